package disk

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

const (
	// copyChunk is how many bytes are read at once.
	copyChunk = 1 << 20

	// defaultWorkers is how many chunks are under way at once unless it is said, as in `qemu-img convert`.
	defaultWorkers = 8

	// defaultSparse is the unit in which zeroes are found among data.
	defaultSparse = 4096
)

// CopyOptions says how Copy works. The zero value is right for any target.
type CopyOptions struct {
	// Own leaves out what does not belong to the source itself but to a layer below.
	Own bool

	// Base is the layer of the source that the target has as its backing file: what belongs to it, or to layers below, is
	// left out.
	Base *blk.Device

	TargetZero bool // the target reads as zeroes where nothing is written, as a new disk without a backing file does
	Compress   bool // write whole clusters compressed, as many at a time as there are workers

	Workers int // 0 means 8

	// Sparse is the unit in bytes, a multiple of 512, in which zeroes among data are looked for; they are not written as
	// data. 0 means 4096; a negative number writes everything as data, known zeroes too.
	Sparse int

	// Progress is told how many bytes of how many are done, from any goroutine; may be nil.
	Progress func(done, total int64)
}

// Copy makes the first src.Size() bytes of dst the same as src, and flushes dst. What src knows to read as zeroes is not
// read. Nobody else may write to either meanwhile. The work of a Copy that fails, or whose ctx ends, is in part done.
func Copy(ctx context.Context, dst, src *blk.Device, o CopyOptions) error {
	if dst.Size() < src.Size() {
		return fmt.Errorf("%w: the target has %d bytes and the source %d", blk.ErrRange, dst.Size(), src.Size())
	}
	c := &copier{dst: dst, src: src, o: o, unit: 1}
	if c.o.Sparse == 0 {
		c.o.Sparse = defaultSparse
	}
	if o.Compress {
		if c.unit = dst.Limits().Cluster; c.unit == 0 {
			return fmt.Errorf("the target can't be compressed: %w (compression needs the format qcow2)", blk.ErrUnsupported)
		}
	}
	w := workers[job]{n: o.Workers, total: src.Size(), progress: o.Progress}
	if err := w.run(ctx, c.jobs, c.worker); err != nil {
		return err
	}
	return dst.FlushContext(ctx)
}

// copier is one Copy.
type copier struct {
	dst, src *blk.Device
	o        CopyOptions
	unit     int64 // jobs begin and end at multiples of it, or with the disk
}

// job is a run of the source that is treated alike.
type job struct {
	off, n int64
	zero   bool // reads as zeroes
}

// jobs finds out what is to be done.
func (c *copier) jobs(ctx context.Context, give func(j job, n int64) error) error {
	for off, size := int64(0), c.src.Size(); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		s, depth, run, err := c.src.StatusAbove(ctx, c.o.Base, off, size-off)
		if err != nil {
			return err
		}
		zero := s.Flags&blk.StatusZero != 0 && c.o.Sparse > 0
		skip := depth < 0 && (c.o.Base != nil || c.o.Own) || depth > 0 && c.o.Own || zero && c.o.TargetZero
		if off+run < size {
			if whole := run - run%c.unit; whole > 0 && (zero || skip) {
				run = whole
			} else { // data, or a cluster of which a part is
				run = min((run+c.unit-1)/c.unit*c.unit, size-off)
				zero, skip = zero && whole > 0, skip && whole > 0
			}
		}
		switch {
		case skip:
			err = give(job{}, run)
		case zero:
			err = give(job{off, run, true}, run)
		default:
			run = min(run, max(copyChunk, c.unit))
			err = give(job{off, run, false}, run)
		}
		if err != nil {
			return err
		}
		off += run
	}
	return nil
}

// worker returns a function that carries jobs out, for one goroutine.
func (c *copier) worker() func(ctx context.Context, j job) error {
	buf := make([]byte, min(max(copyChunk, c.unit), c.src.Size()))
	return func(ctx context.Context, j job) error {
		switch {
		case j.n == 0:
			return nil
		case j.zero:
			return c.dst.WriteZeroes(ctx, j.off, j.n, blk.MayUnmap)
		}
		b := buf[:j.n]
		if err := c.src.Do(ctx, &blk.Request{Op: blk.OpRead, Off: j.off, Vec: iov.Of(b)}); err != nil {
			return fmt.Errorf("read the source at byte %d: %w", j.off, err)
		}
		return c.write(ctx, b, j.off)
	}
}

// write stores b, and finds out where it is zero.
func (c *copier) write(ctx context.Context, b []byte, off int64) error {
	unit, flags := c.o.Sparse, blk.Flags(0)
	if c.o.Compress {
		unit, flags = int(c.unit), blk.Compressed
	}
	for len(b) > 0 {
		zero, n := false, len(b)
		if c.o.Sparse > 0 {
			zero, n = zeroRun(b, unit)
		} else if c.o.Compress {
			n = min(n, unit)
		}
		r := blk.Request{Op: blk.OpWrite, Flags: flags, Off: off, Vec: iov.Of(b[:n])}
		switch {
		case zero && c.o.TargetZero:
			r.Vec = nil
		case zero:
			r = blk.Request{Op: blk.OpWriteZeroes, Flags: blk.MayUnmap, Off: off, Len: int64(n)}
		}
		if err := c.dst.Do(ctx, &r); err != nil {
			return fmt.Errorf("write the target at byte %d: %w", off, err)
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// zeroRun reports whether b begins with a unit of zeroes, and for how many bytes, in whole units, that holds.
func zeroRun(b []byte, unit int) (zero bool, n int) {
	unit = min(unit, len(b))
	zero = isZero(b[:unit])
	for n = unit; n < len(b); n += unit {
		unit = min(unit, len(b)-n)
		if isZero(b[n:n+unit]) != zero {
			break
		}
	}
	return zero, n
}

func isZero(b []byte) bool { return iov.Of(b).IsZero() }

// workers does jobs on several goroutines.
type workers[J any] struct {
	n        int // goroutines; 0 means defaultWorkers
	total    int64
	progress func(done, total int64)
}

// run calls jobs, which calls give with each job and the number of bytes that it accounts for, and has the jobs done by
// what worker returns, called once for each goroutine. The first error ends it all.
func (w *workers[J]) run(ctx context.Context, jobs func(ctx context.Context, give func(J, int64) error) error,
	worker func() func(context.Context, J) error,
) error {
	if w.n <= 0 {
		w.n = defaultWorkers
	}
	type work struct {
		job J
		n   int64
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	queue := make(chan work)
	var done atomic.Int64
	var ends sync.WaitGroup
	for range w.n {
		ends.Go(func() {
			do := worker()
			for j := range queue {
				if err := do(ctx, j.job); err != nil {
					cancel(err)
					continue // the queue is emptied
				}
				if n := done.Add(j.n); w.progress != nil {
					w.progress(n, w.total)
				}
			}
		})
	}
	err := jobs(ctx, func(j J, n int64) error {
		select {
		case queue <- work{j, n}:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	close(queue)
	ends.Wait()
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return err
}

// Difference tells how two disks differ.
type Difference uint8

// What Compare may find.
const (
	Same       Difference = iota
	Contents              // another byte
	Sizes                 // only if it is asked for: another size, whatever the bytes beyond the shorter one are
	Allocation            // only if it is asked for: one has stored what the other only knows to be zero, or the like
)

// CompareOptions says how Compare works.
type CompareOptions struct {
	Strict   bool                    // sizes and allocation count too; else the shorter disk goes on with zeroes
	Workers  int                     // 0 means 8
	Progress func(done, total int64) // as for Copy
}

// Compare finds the first byte at which two disks differ, and returns its offset. What both know to be zero is not read.
func Compare(ctx context.Context, a, b *blk.Device, o CompareOptions) (Difference, int64, error) {
	if o.Strict && a.Size() != b.Size() {
		return Sizes, min(a.Size(), b.Size()), nil
	}
	c := &comparer{a: a, b: b, strict: o.Strict, size: max(a.Size(), b.Size())}
	w := workers[job]{n: o.Workers, total: c.size, progress: o.Progress}
	err := w.run(ctx, c.jobs, c.worker)
	if err != nil || c.what == Same {
		return Same, 0, err
	}
	return c.what, c.first, nil
}

// comparer is one Compare.
type comparer struct {
	a, b   *blk.Device
	strict bool
	size   int64 // of the larger one

	mu    sync.Mutex // guards what follows
	what  Difference
	first int64 // where
}

// found notes a difference.
func (c *comparer) found(what Difference, at int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if at < c.first || c.what == Same {
		c.what, c.first = what, at
	}
}

func (c *comparer) over() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.what != Same
}

// statusOf is StatusAbove for a disk that goes on with zeroes.
func statusOf(ctx context.Context, d *blk.Device, off, n int64) (blk.Status, int64, error) {
	if off >= d.Size() {
		return blk.Status{Flags: blk.StatusZero}, n, nil
	}
	s, _, run, err := d.StatusAbove(ctx, nil, off, min(n, d.Size()-off))
	return s, run, err
}

// jobs finds what must be read. Those that were given before a difference was found are done, so the first of all is
// among them.
func (c *comparer) jobs(ctx context.Context, give func(j job, n int64) error) error {
	for off, size := int64(0), c.size; off < size && !c.over(); {
		sa, run, err := statusOf(ctx, c.a, off, size-off)
		if err != nil {
			return err
		}
		sb, run, err := statusOf(ctx, c.b, off, run)
		if err != nil {
			return err
		}
		const shape = blk.StatusData | blk.StatusZero | blk.StatusAllocated
		if c.strict && sa.Flags&shape != sb.Flags&shape {
			c.found(Allocation, off)
			return nil
		}
		j := job{}
		if sa.Flags&sb.Flags&blk.StatusZero == 0 {
			run = min(run, copyChunk)
			j = job{off: off, n: run}
		}
		if err := give(j, run); err != nil {
			return err
		}
		off += run
	}
	return nil
}

func (c *comparer) worker() func(ctx context.Context, j job) error {
	n := min(copyChunk, max(c.a.Size(), c.b.Size()))
	bufs := [2][]byte{make([]byte, n), make([]byte, n)}
	return func(ctx context.Context, j job) error {
		if j.n == 0 {
			return nil
		}
		for i, d := range []*blk.Device{c.a, c.b} {
			have := min(max(d.Size()-j.off, 0), j.n)
			clear(bufs[i][have:j.n])
			if err := d.Do(ctx, &blk.Request{Op: blk.OpRead, Off: min(j.off, d.Size()), Vec: iov.Of(bufs[i][:have])}); err != nil {
				return fmt.Errorf("read disk %d at byte %d: %w", i+1, j.off, err)
			}
		}
		if a, b := bufs[0][:j.n], bufs[1][:j.n]; !bytes.Equal(a, b) {
			i := 0
			for a[i] == b[i] {
				i++
			}
			c.found(Contents, j.off+int64(i))
		}
		return nil
	}
}
