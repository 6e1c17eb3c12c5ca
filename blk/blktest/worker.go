package blktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/fault"
	"github.com/kvmlet/kvmlet/iov"
)

// span is a range of bytes.
type span struct{ off, n int64 }

// worker is a goroutine that sends requests.
type worker struct {
	*run
	id      int
	rand    *rand.Rand
	arena   *arena
	spans   []span // what it owns
	resizes bool   // it owns what lies at and behind limit, too
	trace   []string
}

func (r *run) newWorker(id int) *worker {
	return &worker{run: r, id: id, rand: rand.New(rand.NewPCG(r.seed, uint64(id)+1)), arena: getArena()}
}

// traceLength is how many of its last requests a worker shows when it fails.
const traceLength = 12

// log remembers a request.
func (w *worker) log(format string, args ...any) {
	if len(w.trace) == traceLength {
		copy(w.trace, w.trace[1:])
		w.trace = w.trace[:traceLength-1]
	}
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
}

func (w *worker) fatalf(format string, args ...any) {
	w.tb.Errorf("seed %d, worker %d: %s\nits last requests:\n\t%s",
		w.seed, w.id, fmt.Sprintf(format, args...), strings.Join(w.trace, "\n\t"))
	w.failed.Store(true)
	runtime.Goexit()
}

// step does one thing.
func (w *worker) step() {
	w.arena.reset()
	at := w.pick(maxVec)
	if at.n == 0 {
		w.resize()
		return
	}
	switch n := w.rand.IntN(100); {
	case n < 25:
		w.read(at)
	case n < 55:
		w.write(at)
	case n < 64:
		w.zero(at)
	case n < 72:
		w.discard(at)
	case n < 76:
		w.flush()
	case n < 80:
		w.status(at)
	case n < 94:
		w.inBatch(at)
	case n < 96:
		w.drain()
	case n < 98:
		w.control()
	case w.resizes:
		w.resize()
	default:
		w.write(at)
	}
	if !w.arena.intact() {
		w.fatalf("bytes beside a vector were changed")
	}
}

// pick returns a range of at most most bytes that the worker owns; an empty one if it owns none.
func (w *worker) pick(most int64) span {
	var s span
	switch {
	case w.resizes && w.size > w.limit && (len(w.spans) == 0 || w.rand.IntN(4) == 0):
		s = span{w.limit, w.size - w.limit}
	case len(w.spans) > 0:
		s = w.spans[w.rand.IntN(len(w.spans))]
	default:
		return span{}
	}
	at := span{off: s.off + w.rand.Int64N(s.n)}
	at.n = 1 + w.rand.Int64N(min(s.off+s.n-at.off, most, 1<<w.rand.IntN(19)))
	if w.rand.IntN(4) == 0 {
		at = widen(at, s, 512<<w.rand.IntN(8))
		at.n = min(at.n, most)
	}
	return at
}

// widen makes a range begin and end at multiples of unit, a power of two, as far as it stays within s.
func widen(at, s span, unit int64) span {
	unit = max(unit, 1)
	start := max(at.off&^(unit-1), s.off)
	end := min((at.off+at.n+unit-1)&^(unit-1), s.off+s.n)
	return span{start, end - start}
}

// countdown is a context that ends after it was asked a number of times: cancellation that repeats.
type countdown struct {
	context.Context
	left atomic.Int64
	done chan struct{}
	once sync.Once
}

func (c *countdown) ask() bool {
	if c.left.Add(-1) >= 0 {
		return false
	}
	c.once.Do(func() { close(c.done) })
	return true
}

// Done implements context.Context.
func (c *countdown) Done() <-chan struct{} {
	c.ask()
	return c.done
}

// Err implements context.Context.
func (c *countdown) Err() error {
	if c.ask() {
		return context.Canceled
	}
	return nil
}

// context returns what a request is sent with: now and then something that ends soon.
func (w *worker) context() (ctx context.Context, release func()) {
	switch n := w.rand.IntN(20); {
	case n == 0:
		c := &countdown{Context: w.ctx, done: make(chan struct{})}
		c.left.Store(w.rand.Int64N(12))
		return c, func() {}
	case n == 1 && w.o.Workers > 1:
		return context.WithTimeout(w.ctx, time.Duration(w.rand.Int64N(int64(300*time.Microsecond))))
	}
	return w.ctx, func() {}
}

// expected reports whether a request failed, in a way that it may.
func (w *worker) expected(ctx context.Context, flags blk.Flags, err error) (failed bool) {
	switch {
	case err == nil:
		return false
	case ctx != w.ctx && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)):
	case w.faults != nil && (errors.Is(err, errInjected) || w.o.Injected != nil && w.o.Injected(err)):
	case flags&blk.NoFallback != 0 && errors.Is(err, blk.ErrUnsupported):
	default:
		w.fatalf("unexpected error: %v", err)
	}
	return true
}

// do sends a request and reports whether it failed.
func (w *worker) do(r *blk.Request) (failed bool) {
	ctx, release := w.context()
	defer release()
	err := w.dev.Do(ctx, r)
	w.log("%s: %v", describe(r), err)
	return w.expected(ctx, r.Flags, err)
}

func describe(r *blk.Request) string {
	n := r.Len
	if r.Op <= blk.OpWrite {
		n = int64(r.Vec.Size())
	}
	return fmt.Sprintf("%s %d+%d (%d elements, flags %#x)",
		[...]string{"read", "write", "flush", "discard", "zero"}[r.Op], r.Off, n, len(r.Vec), r.Flags)
}

// flags returns some of the flags, each now and then.
func (w *worker) flags(all ...blk.Flags) (f blk.Flags) {
	for _, one := range all {
		if w.rand.IntN(5) == 0 {
			f |= one
		}
	}
	return f
}

func (w *worker) read(at span) {
	r := &blk.Request{Op: blk.OpRead, Off: at.off, Vec: w.arena.vec(w.rand, int(at.n)), Flags: w.flags(blk.CopyOnRead)}
	if !w.do(r) {
		w.equal(gather(r.Vec), at)
	}
}

func gather(v iov.Vec) []byte {
	b := make([]byte, v.Size())
	_, _ = v.CopyTo(b, 0) // fills b, which is as long
	return b
}

func (w *worker) equal(got []byte, at span) {
	if want := w.model[at.off:][:at.n]; !bytes.Equal(got, want) {
		w.fatalf("%s", difference(got, want, at.off))
	}
}

// data returns n bytes to write: random ones, zeroes, or what is there.
func (w *worker) data(at span) []byte {
	b := make([]byte, at.n)
	switch w.rand.IntN(8) {
	case 0:
	case 1:
		copy(b, w.model[at.off:])
	default:
		copy(b, w.random[w.rand.IntN(len(w.random)-len(b)+1):])
	}
	return b
}

func (w *worker) write(at span) {
	data := w.data(at)
	r := &blk.Request{Op: blk.OpWrite, Off: at.off, Vec: w.arena.vec(w.rand, len(data)), Flags: w.flags(blk.FUA)}
	_, _ = r.Vec.CopyFrom(0, data) // is as long
	failed := w.do(r)
	if !bytes.Equal(gather(r.Vec), data) {
		w.fatalf("a write changed the bytes that it wrote from")
	}
	if failed {
		w.resolve(at, []change{{span: at, data: data}})
	} else {
		copy(w.model[at.off:], data)
	}
}

func (w *worker) zero(at span) {
	flags := w.flags(blk.FUA, blk.MayUnmap, blk.MayUnmap, blk.NoFallback)
	r := &blk.Request{Op: blk.OpWriteZeroes, Off: at.off, Len: at.n, Flags: flags}
	if w.do(r) {
		w.resolve(at, []change{{span: at}})
	} else {
		clear(w.model[at.off:][:at.n])
	}
}

func (w *worker) discard(at span) {
	w.do(&blk.Request{Op: blk.OpDiscard, Off: at.off, Len: at.n})
	w.resolve(at, []change{{span: at}})
}

func (w *worker) flush() { w.do(&blk.Request{Op: blk.OpFlush}) }

// status checks what is claimed to be zeroes.
func (w *worker) status(at span) {
	ctx, release := w.context()
	defer release()
	var s blk.Status
	var run int64
	var err error
	own := w.rand.IntN(2) == 0 // of this layer alone
	if own {
		s, run, err = w.dev.BlockStatus(ctx, at.off, at.n)
	} else {
		s, _, run, err = w.dev.StatusAbove(ctx, nil, at.off, at.n)
	}
	w.log("status %d+%d: %x, %d, %v", at.off, at.n, s.Flags, run, err)
	switch {
	case w.expected(ctx, 0, err):
	case run < 1 || run > at.n:
		w.fatalf("status of a run of %d bytes where %d were asked for", run, at.n)
	case own && run < at.n && (at.off+run)&int64(max(w.dev.Limits().RequestAlign, 1)-1) != 0:
		w.fatalf("status of a run of %d bytes at %d, which ends within a block", run, at.off)
	case s.Flags&blk.StatusZero != 0 && !iov.Of(w.model[at.off:][:run]).IsZero():
		w.fatalf("%d bytes at %d are said to be zeroes, which they are not", run, at.off)
	}
}

// drain checks that nothing reaches the driver in a drained section, though others resize the disk meanwhile.
func (w *worker) drain() {
	ctx, release := w.context()
	defer release()
	if w.rand.IntN(4) == 0 { // given up while requests are under way
		c := &countdown{Context: w.ctx, done: make(chan struct{})}
		c.left.Store(w.rand.Int64N(2))
		ctx = c
	}
	var err error
	undrain := w.dev.Undrain
	if w.rand.IntN(2) == 0 {
		err = w.dev.Drain(ctx)
	} else {
		undrain, err = blk.DrainAll(ctx, w.dev)
	}
	w.log("drain: %v", err)
	if w.expected(ctx, 0, err) {
		return
	}
	defer undrain()
	if w.faults == nil {
		return
	}
	before := w.faults.Calls(fault.OpAny)
	for range 50 {
		runtime.Gosched()
	}
	if w.rand.IntN(2) == 0 {
		if err := w.dev.Drain(w.ctx); err != nil {
			w.fatalf("nested drain: %v", err)
		}
		w.dev.Undrain()
	}
	if n := w.faults.Calls(fault.OpAny) - before; n > 0 {
		w.fatalf("%d calls reached the driver while the disk was drained", n)
	}
}

// control does what changes no bytes.
func (w *worker) control() {
	ctx, release := w.context()
	defer release()
	switch w.rand.IntN(7) {
	case 0:
		w.dev.SetThrottle(w.group)
	case 1:
		w.dev.SetThrottle(nil)
	case 2:
		err := w.dev.Refresh(ctx)
		w.log("refresh: %v", err)
		w.expected(ctx, 0, err)
	case 3:
		w.dev.Stats()
		w.dev.Latency(blk.OpWrite)
		w.dev.Limits()
	case 4:
		if w.id == 0 {
			w.turnBitmap()
		}
	default:
		if w.id == 0 {
			w.outside(ctx)
		}
	}
}

// turnBitmap takes the bitmap through its states.
func (w *worker) turnBitmap() {
	var err error
	switch {
	case !w.bitmap.Frozen():
		err = w.bitmap.Freeze()
	case w.rand.IntN(2) == 0:
		err = w.bitmap.Reclaim()
	default:
		w.saved.Merge(w.bitmap)
		err = w.bitmap.Commit()
	}
	if err != nil {
		w.fatalf("%v", err)
	}
}

// outside sends requests that must be refused.
func (w *worker) outside(ctx context.Context) {
	off := w.size - w.rand.Int64N(min(w.size, 10_000)+1)
	n := w.size - off + 1 + w.rand.Int64N(10_000)
	r := &blk.Request{Op: blk.OpWriteZeroes, Off: off, Len: n}
	switch w.rand.IntN(5) {
	case 0:
		r.Op, r.Vec = blk.OpRead, w.arena.vec(w.rand, int(n))
	case 1:
		r.Op, r.Vec = blk.OpWrite, w.arena.vec(w.rand, int(n))
	case 2:
		r.Op = blk.OpDiscard
	case 3:
		r.Off = -off - 1
	}
	err := w.dev.Do(ctx, r)
	w.log("outside: %s: %v", describe(r), err)
	if !errors.Is(err, blk.ErrRange) && !w.expected(ctx, 0, err) {
		w.fatalf("a request outside of the disk, which has %d bytes, went well", w.size)
	}
}

// resize changes the size, or fails to.
func (w *worker) resize() {
	if !w.resizes {
		return
	}
	size := w.limit + w.rand.Int64N((w.o.MaxSize-w.limit)/w.o.SizeUnit+1)*w.o.SizeUnit
	old := w.size
	ctx, release := w.context()
	defer release()
	err := w.dev.Truncate(ctx, size)
	w.log("resize from %d to %d: %v", old, size, err)
	failed := w.expected(ctx, 0, err)
	w.size = w.dev.Size()
	if w.size != size && (!failed || w.size != old) {
		w.fatalf("resize from %d to %d: the size is %d", old, size, w.size)
	}
	if told := w.told.Load(); told != w.size {
		w.fatalf("resize from %d to %d: OnResize told of %d", old, w.size, told)
	}
	switch {
	case w.size > old:
		clear(w.model[old:w.size])
		w.resolveLong(old, w.size)
	case w.size < old:
		clear(w.model[w.size:old])
	case size < old:
		w.resolveLong(size, old) // it failed after it may have dropped some
	}
}

// resolveLong resolves a range of any length, which holds what it did or zeroes.
func (w *worker) resolveLong(off, end int64) {
	for off < end {
		at := span{off, min(end-off, maxVec)}
		w.resolve(at, []change{{span: at}})
		off += at.n
	}
}
