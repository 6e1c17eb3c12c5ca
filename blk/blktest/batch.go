package blktest

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// change is what one request may have done.
type change struct {
	span
	data []byte // nil for zeroes
	sure bool   // it was done: the old bytes are gone
}

// view is what one request has read.
type view struct {
	span
	got []byte
}

// inBatch sends requests that may overlap each other, all at once.
func (w *worker) inBatch(at span) {
	changes, views := w.batch(at, 1+w.rand.IntN(maxVecs))
	w.checkViews(views, at, w.model[at.off:][:at.n], changes)
	w.resolve(at, changes)
}

// batch sends n requests within at and returns what they did when all are done.
func (w *worker) batch(at span, n int) (changes []change, views []view) {
	w.arena.reset()
	ctx, release := w.context()
	defer release()
	requests := make([]*blk.Request, n)
	data := make([][]byte, n)
	side, rest := w.rand.IntN(2) == 0, at // one beside the other, to be merged
	for i := range requests {
		part := span{rest.off, 1 + w.rand.Int64N(rest.n)}
		switch {
		case side:
			part.n = max(min(part.n, rest.n/int64(n-i)), 1)
			if rest = (span{part.off + part.n, rest.n - part.n}); rest.n == 0 {
				rest = at
			}
		default:
			part.off += w.rand.Int64N(at.n - part.n + 1)
			if w.rand.IntN(2) == 0 {
				part = widen(part, at, int64(w.dev.Limits().RequestAlign))
			}
		}
		requests[i], data[i] = w.request(part)
	}
	w.submit(ctx, requests)
	for i, r := range requests {
		w.log("batch of %d: %s: %v", n, describe(r), r.Err)
		failed := w.expected(ctx, r.Flags, r.Err)
		part := span{r.Off, r.Len}
		switch r.Op {
		case blk.OpRead:
			if part.n = int64(r.Vec.Size()); !failed {
				views = append(views, view{part, gather(r.Vec)})
			}
		case blk.OpWrite:
			part.n = int64(len(data[i]))
			if !bytes.Equal(gather(r.Vec), data[i]) {
				w.fatalf("a write changed the bytes that it wrote from")
			}
			changes = append(changes, change{part, data[i], !failed})
		case blk.OpWriteZeroes:
			changes = append(changes, change{part, nil, !failed})
		case blk.OpDiscard:
			changes = append(changes, change{part, nil, false})
		}
	}
	return changes, views
}

// request makes a random one. data is what a write writes.
func (w *worker) request(at span) (r *blk.Request, data []byte) {
	r = &blk.Request{Off: at.off}
	switch n := w.rand.IntN(16); {
	case n < 5:
		r.Op, r.Vec = blk.OpRead, w.arena.vec(w.rand, int(at.n))
	case n < 13:
		data = make([]byte, at.n) // not what is there: others may change that
		if n > 5 {
			copy(data, w.random[w.rand.IntN(len(w.random)-len(data)+1):])
		}
		r.Op, r.Vec = blk.OpWrite, w.arena.vec(w.rand, len(data))
		if w.rand.IntN(4) == 0 {
			r.Flags = w.flags(blk.FUA)
		}
		_, _ = r.Vec.CopyFrom(0, data) // is as long
	case n == 13:
		r.Op, r.Len = blk.OpDiscard, at.n
	case n == 14:
		r.Op, r.Len, r.Flags = blk.OpWriteZeroes, at.n, w.flags(blk.FUA, blk.MayUnmap, blk.NoFallback)
	case n == 15:
		r.Op = blk.OpFlush
	}
	return r, data
}

// submit sends requests in one of several ways and waits for all. A worker that is alone sends one at a time, so that the
// run repeats.
func (w *worker) submit(ctx context.Context, requests []*blk.Request) {
	if w.o.Workers == 1 && len(requests) > 1 {
		for i := range requests {
			w.submit(ctx, requests[i:i+1])
		}
		return
	}
	var done sync.WaitGroup
	ended := make([]atomic.Int32, len(requests))
	for i, r := range requests {
		done.Add(1)
		want := int32(1)
		if r.Op == blk.OpRead && w.rand.IntN(4) == 0 {
			want = 2 // submitted again by Done
		}
		r.Done = func(again *blk.Request) {
			switch n := ended[i].Add(1); {
			case again != r || n > want:
				w.tb.Errorf("seed %d: Done of a request was called too often, or with another", w.seed)
				w.failed.Store(true)
			case n < want && r.Err == nil:
				w.dev.Submit(ctx, []*blk.Request{r})
			default:
				done.Done()
			}
		}
	}
	switch w.rand.IntN(4) {
	case 0: // one by one, each on a goroutine of its own
		for _, r := range requests {
			go func() {
				r.Err = w.dev.Do(ctx, r)
				done.Done()
			}()
		}
	case 1:
		w.dev.Plug()
		for _, r := range requests {
			w.dev.Submit(ctx, []*blk.Request{r})
		}
		w.dev.Unplug()
	default:
		w.dev.Submit(ctx, requests)
	}
	done.Wait()
}

// checkViews checks what was read while changes were under way: old bytes or those of a change.
func (w *worker) checkViews(views []view, at span, old []byte, changes []change) {
	for _, v := range views {
		unsure := make([]change, len(changes))
		for i, c := range changes {
			unsure[i] = c
			unsure[i].sure = false
		}
		if bad := mismatch(v.got, v.span, old[v.off-at.off:], unsure); bad != "" {
			w.fatalf("read of %d bytes at %d beside writes: %s", v.n, v.off, bad)
		}
	}
}

// resolve reads what changes made of the bytes at at, checks it, and takes it for known.
func (w *worker) resolve(at span, changes []change) {
	got := w.readBack(at)
	model := w.model[at.off:][:at.n]
	if bad := mismatch(got, at, model, changes); bad != "" {
		w.fatalf("%d bytes at %d: %s", at.n, at.off, bad)
	}
	copy(model, got)
}

// mismatch describes a byte of got, which lies at at, that is neither what old has nor what one of changes made of it,
// or old in spite of a change that is sure. It returns "" if there is none.
func mismatch(got []byte, at span, old []byte, changes []change) string {
	good, gone := make([]bool, len(got)), make([]bool, len(got))
	for _, c := range changes {
		from, to := max(c.off, at.off), min(c.off+c.n, at.off+at.n)
		for off := from; off < to; off++ {
			b := byte(0)
			if c.data != nil {
				b = c.data[off-c.off]
			}
			i := off - at.off
			good[i] = good[i] || got[i] == b
			gone[i] = gone[i] || c.sure
		}
	}
	for i := range got {
		if !good[i] && (gone[i] || got[i] != old[i]) {
			return fmt.Sprintf("byte %d (%#x) is %#x, which nobody wrote; it was %#x (overwritten for sure: %v)",
				at.off+int64(i), at.off+int64(i), got[i], old[i], gone[i])
		}
	}
	return ""
}

// readBack reads until it goes well: in parts where faults are so many that a long read never does.
func (w *worker) readBack(at span) []byte {
	b := make([]byte, at.n)
	w.readInto(b, at.off)
	return b
}

func (w *worker) readInto(b []byte, off int64) {
	const patience = 1000
	for i := 0; ; i++ {
		err := w.dev.Do(w.ctx, &blk.Request{Op: blk.OpRead, Off: off, Vec: iov.Of(b)})
		switch {
		case !w.expected(w.ctx, 0, err):
			return
		case i >= 3 && len(b) > 1:
			w.readInto(b[:len(b)/2], off)
			w.readInto(b[len(b)/2:], off+int64(len(b)/2))
			return
		case i == patience:
			w.fatalf("read of %d bytes at %d failed %d times: %v", len(b), off, i, err)
		}
	}
}
