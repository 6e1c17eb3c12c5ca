package linux

import (
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
)

// transfer is a part of a file on its way into guest memory.
type transfer struct {
	what string // for errors
	src  io.ReaderAt
	off  int64
	dst  []byte
}

const (
	transferChunk = 4 << 20
	maxReaders    = 4 // the memory bus is busy with fewer
)

// readAll carries out ts. Much of the time goes into the first touch of guest pages, which several CPUs do faster.
func readAll(ts []transfer) error {
	var chunks []transfer
	for _, t := range ts {
		for len(t.dst) > 0 {
			c := t
			c.dst = t.dst[:min(len(t.dst), transferChunk)]
			chunks = append(chunks, c)
			t.dst, t.off = t.dst[len(c.dst):], t.off+int64(len(c.dst))
		}
	}
	var (
		next  atomic.Int64
		wg    sync.WaitGroup
		once  sync.Once
		first error
	)
	for range min(runtime.GOMAXPROCS(0), maxReaders, len(chunks)) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(chunks)); i = next.Add(1) - 1 {
				c := chunks[i]
				if err := readFull(c.src, c.dst, c.off); err != nil {
					once.Do(func() { first = fmt.Errorf("%s: %w", c.what, err) })
					return
				}
			}
		})
	}
	wg.Wait()
	return first
}

// sequential reports whether the segments can be read in one pass over the file.
func (p *program) sequential() bool {
	var end int64
	for _, s := range p.segments {
		if s.off < end {
			return false
		}
		end = s.off + int64(s.filesz)
	}
	return true
}

// readSequentially carries out ts, which are sorted by offset and do not overlap, from the stream r of the whole file,
// and reads r to its end, where it checks itself.
func readSequentially(r io.Reader, ts []transfer) error {
	var pos int64
	for _, t := range ts {
		if _, err := io.CopyN(io.Discard, r, t.off-pos); err != nil {
			return err
		}
		if _, err := io.ReadFull(r, t.dst); err != nil {
			return err
		}
		pos = t.off + int64(len(t.dst))
	}
	_, err := io.Copy(io.Discard, r)
	return err
}
