// Package fault puts faults between a blk.Device and its driver: errors, short transfers and delays by rules, limits that
// the driver does not have, and breakpoints at the events that blk.Observer names. It is for tests, after QEMU's blkdebug.
package fault

import (
	"fmt"
	"math/rand/v2"
	"sync"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/internal/strict"
	"github.com/kvmlet/kvmlet/iov"
)

// ErrLimits reports a request that breaks the forced limits.
var ErrLimits = strict.Err

// Options says what a Disk does from the beginning.
type Options struct {
	// Limits are forced on top of the inner driver's: a field that is not zero replaces the driver's, so it must be at
	// least as strict. All are enforced.
	Limits blk.Limits

	Seed    uint64      // of everything random
	Observe bool        // have the Device report events, for breakpoints. It then passes by blk.Starter.
	Log     func(*Call) // called when a call is done, from its goroutine; the Call is not to be kept
}

// Call is one call of the driver.
type Call struct {
	Op     Op
	Off, N int64
	Unmap  bool // of OpZero
	Err    error
}

// Disk is a driver in front of another. It implements all optional interfaces but blk.Starter, which Async adds, and
// answers blk.ErrUnsupported where the inner driver lacks one.
type Disk struct {
	inner blk.Backend
	o     Options

	mu     sync.Mutex
	rules  []*rule
	rand   *rand.Rand
	calls  [numOps]uint64
	failed uint64

	points points
}

// New returns a Disk in front of inner. It owns inner from then on: Close closes it.
func New(inner blk.Backend, o Options) *Disk {
	d := &Disk{inner: inner, o: o, rand: rand.New(rand.NewPCG(o.Seed, 0))}
	d.points.init()
	return d
}

// Inner returns the driver behind.
func (d *Disk) Inner() blk.Backend { return d.inner }

// Size implements blk.Backend.
func (d *Disk) Size() int64 { return d.inner.Size() }

// Limits implements blk.Backend.
func (d *Disk) Limits() blk.Limits {
	l, f := d.inner.Limits(), d.o.Limits
	force(&l.RequestAlign, f.RequestAlign)
	force(&l.MemoryAlign, f.MemoryAlign)
	force(&l.MaxTransfer, f.MaxTransfer)
	force(&l.MaxVec, f.MaxVec)
	force(&l.DiscardAlign, f.DiscardAlign)
	force(&l.MaxDiscard, f.MaxDiscard)
	force(&l.ZeroAlign, f.ZeroAlign)
	force(&l.MaxZero, f.MaxZero)
	force(&l.Cluster, f.Cluster)
	force(&l.PhysicalBlock, f.PhysicalBlock)
	force(&l.OptimalTransfer, f.OptimalTransfer)
	return l
}

func force[T int | int64](field *T, forced T) {
	if forced != 0 {
		*field = forced
	}
}

// Calls returns how often op was called; OpAny counts all.
func (d *Disk) Calls(op Op) uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	if op != OpAny {
		return d.calls[op]
	}
	sum := uint64(0)
	for _, n := range d.calls {
		sum += n
	}
	return sum
}

// Failed returns how many calls a rule made fail.
func (d *Disk) Failed() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failed
}

// Close removes all breakpoints, lets go on what they hold, and closes the inner driver. It is never made to fail.
func (d *Disk) Close() error {
	d.points.removeAll()
	return d.inner.Close()
}

// call does what the rules say around do, which moves the first n bytes of a request. It returns what do returned, or the
// injected error. check is the rule of blk.Limits that the request has to keep.
func (d *Disk) call(c Call, check error, do func(n int64) (int, error)) (int, error) {
	n, err := 0, check
	if err == nil {
		v := d.judge(c.Op, c.Off, c.N)
		v.wait()
		n, err = d.carryOut(c, v, do)
	}
	if d.o.Log != nil {
		c.Err = err
		d.o.Log(&c)
	}
	return n, err
}

func (d *Disk) carryOut(c Call, v verdict, do func(n int64) (int, error)) (int, error) {
	if !v.fault {
		return do(c.N)
	}
	keep := int64(0)
	if v.short {
		keep = d.round(c, min(v.keep, c.N))
	}
	n := 0
	if keep > 0 {
		var err error
		if n, err = do(keep); err != nil {
			return n, err
		}
	}
	return n, v.err
}

// round shortens the first n bytes of c to what the inner driver takes in one call.
func (d *Disk) round(c Call, n int64) int64 {
	l := d.Limits()
	unit := max(int64(l.RequestAlign), 1)
	switch c.Op {
	case OpDiscard:
		unit = max(unit, l.DiscardAlign)
	case OpZero:
		unit = max(unit, l.ZeroAlign)
	default:
		return n / unit * unit
	}
	return max((c.Off+n)/unit*unit-c.Off, 0)
}

// ReadVecAt implements blk.Backend. A read that is made to fail leaves garbage in dst.
func (d *Disk) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	size := dst.Size()
	n, err := d.call(Call{Op: OpRead, Off: off, N: int64(size)}, d.checkTransfer(dst, off), func(n int64) (int, error) {
		return part(dst, n, func(v iov.Vec) (int, error) { return d.inner.ReadVecAt(v, off) })
	})
	if err != nil {
		const garbage = 0xa5
		_ = dst.Fill(0, size, garbage) // the whole of dst is there
	}
	return n, err
}

// WriteVecAt implements blk.Backend.
func (d *Disk) WriteVecAt(src iov.Vec, off int64) (int, error) {
	return d.write(src, off, d.inner.WriteVecAt)
}

// WriteVecFUA implements blk.FUAWriter.
func (d *Disk) WriteVecFUA(src iov.Vec, off int64) (int, error) {
	w, ok := d.inner.(blk.FUAWriter)
	if !ok {
		return 0, blk.ErrUnsupported
	}
	return d.write(src, off, w.WriteVecFUA)
}

func (d *Disk) write(src iov.Vec, off int64, write func(src iov.Vec, off int64) (int, error)) (int, error) {
	return d.call(Call{Op: OpWrite, Off: off, N: int64(src.Size())}, d.checkTransfer(src, off), func(n int64) (int, error) {
		return part(src, n, func(v iov.Vec) (int, error) { return write(v, off) })
	})
}

func (d *Disk) checkTransfer(v iov.Vec, off int64) error {
	return strict.Transfer(d.Limits(), d.inner.Size(), off, v)
}

// part calls f with the first n bytes of v.
func part(v iov.Vec, n int64, f func(v iov.Vec) (int, error)) (int, error) {
	if n == int64(v.Size()) {
		return f(v)
	}
	v, err := v.Slice(0, int(n))
	if err != nil {
		return 0, err
	}
	return f(v)
}

// Flush implements blk.Backend.
func (d *Disk) Flush() error {
	return d.plain(Call{Op: OpFlush}, nil, func(int64) error { return d.inner.Flush() })
}

func (d *Disk) plain(c Call, check error, do func(n int64) error) error {
	_, err := d.call(c, check, func(n int64) (int, error) { return int(n), do(n) })
	return err
}

// Discard implements blk.Discarder.
func (d *Disk) Discard(off, n int64) error {
	i, ok := d.inner.(blk.Discarder)
	if !ok {
		return blk.ErrUnsupported
	}
	check := strict.Discard(d.Limits(), d.inner.Size(), off, n)
	return d.plain(Call{Op: OpDiscard, Off: off, N: n}, check, func(n int64) error { return i.Discard(off, n) })
}

// WriteZeroes implements blk.ZeroWriter.
func (d *Disk) WriteZeroes(off, n int64, unmap bool) error {
	i, ok := d.inner.(blk.ZeroWriter)
	if !ok {
		return blk.ErrUnsupported
	}
	check := strict.Zero(d.Limits(), d.inner.Size(), off, n)
	c := Call{Op: OpZero, Off: off, N: n, Unmap: unmap}
	return d.plain(c, check, func(n int64) error { return i.WriteZeroes(off, n, unmap) })
}

// BlockStatus implements blk.StatusReporter.
func (d *Disk) BlockStatus(off, n int64) (s blk.Status, run int64, err error) {
	i, ok := d.inner.(blk.StatusReporter)
	if !ok {
		return s, 0, blk.ErrUnsupported
	}
	check := strict.Range(d.Limits(), d.inner.Size(), off, n)
	err = d.plain(Call{Op: OpStatus, Off: off, N: n}, check, func(int64) (err error) {
		s, run, err = i.BlockStatus(off, n)
		return err
	})
	return s, run, err
}

// WriteCompressed implements blk.CompressedWriter.
func (d *Disk) WriteCompressed(src iov.Vec, off int64) error {
	i, ok := d.inner.(blk.CompressedWriter)
	if !ok {
		return blk.ErrUnsupported
	}
	return d.plain(Call{Op: OpCompressed, Off: off, N: int64(src.Size())}, nil, func(int64) error {
		return i.WriteCompressed(src, off)
	})
}

// Truncate implements blk.Truncater.
func (d *Disk) Truncate(size int64) error {
	i, ok := d.inner.(blk.Truncater)
	if !ok {
		return blk.ErrUnsupported
	}
	return d.plain(Call{Op: OpTruncate, N: size}, nil, func(int64) error { return i.Truncate(size) })
}

// ReadStateAt implements blk.StateStore.
func (d *Disk) ReadStateAt(dst iov.Vec, off int64) (int, error) {
	i, ok := d.inner.(blk.StateStore)
	if !ok {
		return 0, blk.ErrUnsupported
	}
	return d.call(Call{Op: OpState, Off: off, N: int64(dst.Size())}, nil, func(n int64) (int, error) {
		return part(dst, n, func(v iov.Vec) (int, error) { return i.ReadStateAt(v, off) })
	})
}

// WriteStateAt implements blk.StateStore.
func (d *Disk) WriteStateAt(src iov.Vec, off int64) (int, error) {
	i, ok := d.inner.(blk.StateStore)
	if !ok {
		return 0, blk.ErrUnsupported
	}
	return d.call(Call{Op: OpState, Off: off, N: int64(src.Size())}, nil, func(n int64) (int, error) {
		return part(src, n, func(v iov.Vec) (int, error) { return i.WriteStateAt(v, off) })
	})
}

// Backing implements blk.Backed.
func (d *Disk) Backing() *blk.Device {
	if i, ok := d.inner.(blk.Backed); ok {
		return i.Backing()
	}
	return nil
}

// Inserted implements blk.Removable.
func (d *Disk) Inserted() bool {
	i, ok := d.inner.(blk.Removable)
	return !ok || i.Inserted()
}

// Refresh implements blk.Resetter.
func (d *Disk) Refresh() error {
	return d.plain(Call{Op: OpRefresh}, nil, func(int64) error {
		if i, ok := d.inner.(blk.Resetter); ok {
			return i.Refresh()
		}
		return nil
	})
}

// Async is a Disk that implements blk.Starter.
type Async struct{ *Disk }

// Async returns a driver that is d and implements blk.Starter as well: by that of the inner driver, or with a goroutine
// for each transfer where it has none or a rule matches.
func (d *Disk) Async() *Async { return &Async{d} }

// Start implements blk.Starter.
func (a *Async) Start(batch []*blk.IO) {
	inner, ok := a.inner.(blk.Starter)
	var pass []*blk.IO
	for _, io := range batch {
		if ok && !a.ruled() && a.checkTransfer(io.Vec, io.Off) == nil {
			pass = append(pass, a.watch(io))
		} else {
			go a.do(io)
		}
	}
	if len(pass) > 0 {
		inner.Start(pass)
	}
}

func (d *Disk) ruled() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.rules) > 0
}

// watch returns an IO for the inner driver that stands for io.
func (a *Async) watch(io *blk.IO) *blk.IO {
	c := &Call{Op: OpRead, Off: io.Off, N: int64(io.Vec.Size())}
	if io.Op == blk.OpWrite {
		c.Op = OpWrite
	}
	a.mu.Lock()
	a.calls[c.Op]++
	a.mu.Unlock()
	return &blk.IO{Op: io.Op, Vec: io.Vec, Off: io.Off, Done: func(done *blk.IO) {
		io.N, io.Err = done.N, done.Err
		if a.o.Log != nil {
			c.Err = io.Err
			a.o.Log(c)
		}
		io.Done(io)
	}}
}

func (a *Async) do(io *blk.IO) {
	io.Transfer(a)
	io.Done(io)
}

// String names the call for logs.
func (c *Call) String() string {
	return fmt.Sprintf("%v %d+%d: %v", c.Op, c.Off, c.N, c.Err)
}
