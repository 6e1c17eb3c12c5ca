package blk

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/iov"
)

// Options says how a Device uses its Backend. The zero value is a writable disk.
type Options struct {
	ReadOnly     bool           // refuse writes with ErrReadOnly; Flush has nothing to do
	Writethrough bool           // every write is stable when it is done, as with FUA
	NoFlush      bool           // leave flushes out, FUA too: fast, and the disk is lost if the host goes down
	DetectZeroes DetectZeroes   // what becomes of writes whose bytes are all zero
	CopyOnRead   bool           // store what reads get from the backing file, if there is one and the disk is writable
	Throttle     *ThrottleGroup // how fast requests are let through; nil means as they come
	RequestAlign int            // a coarser alignment than the backend's, a power of two up to 64 KiB that the size is a
	// multiple of; 0 means the backend's
}

// Device is one disk as its users see it. All methods may be called from any goroutine at any time.
type Device struct {
	backend    Backend
	can        abilities
	readOnly   bool
	detect     DetectZeroes
	copyOnRead bool
	through    bool
	noFlush    bool
	align      int

	size   atomic.Int64
	own    atomic.Int64           // the request alignment that the backend asks for itself
	told   atomic.Pointer[Limits] // what the backend said last, coarser where that was asked for
	limits atomic.Pointer[Limits] // the same, with numbers for what is not limited

	gate        gate
	tracker     tracker
	beforeWrite listeners[BeforeWrite]
	onResize    listeners[func(size int64)]
	bitmaps     bitmapList
	stats       stats

	throttleMu sync.Mutex // held by those who change throttle, or let its waiters through
	throttle   atomic.Pointer[throttleMember]
	hurried    int // drains that wait for throttled requests

	written  atomic.Uint64 // changes that have ended, well or not, and one for those of before
	flushing chan struct{} // full while a flush is under way
	flushed  uint64        // what written was when the last flush that went well began
	forcing  atomic.Bool   // a write with FUA is with the backend
	slots    chan struct{} // one for each submitted request that is with the backend

	submitter
}

// abilities are what else a Backend can do; nil is what it can't.
type abilities struct {
	discard    Discarder
	zero       ZeroWriter
	status     StatusReporter
	fua        FUAWriter
	compressed CompressedWriter
	truncate   Truncater
	backed     Backed
	state      StateStore
	removable  Removable
	starter    Starter
	threadless bool // of the starter
	observer   Observer
	resetter   Resetter
}

func abilitiesOf(b Backend) (a abilities) {
	a.discard, _ = b.(Discarder)
	a.zero, _ = b.(ZeroWriter)
	a.status, _ = b.(StatusReporter)
	a.fua, _ = b.(FUAWriter)
	a.compressed, _ = b.(CompressedWriter)
	a.truncate, _ = b.(Truncater)
	a.backed, _ = b.(Backed)
	a.state, _ = b.(StateStore)
	a.removable, _ = b.(Removable)
	a.starter, _ = b.(Starter)
	a.resetter, _ = b.(Resetter)
	if t, ok := b.(Threadless); ok && a.starter != nil {
		a.threadless = t.Threadless()
	}
	if o, ok := b.(Observer); ok && o.Observing() {
		a.observer = o
	}
	return a
}

// New returns a Device over b and takes ownership of it: Close closes b. On an error b stays the caller's. ErrLimits
// reports a Backend whose Limits are malformed.
func New(b Backend, o Options) (*Device, error) {
	d := &Device{
		backend: b, can: abilitiesOf(b),
		readOnly: o.ReadOnly, through: o.Writethrough, noFlush: o.NoFlush,
		detect: o.DetectZeroes, copyOnRead: o.CopyOnRead, align: o.RequestAlign,
	}
	d.submitter.init()
	d.flushing = make(chan struct{}, 1)
	d.slots = make(chan struct{}, maxSlots)
	d.written.Store(1) // of what was written before, some may have to be flushed
	if err := d.measure(); err != nil {
		return nil, err
	}
	d.SetThrottle(o.Throttle)
	return d, nil
}

// measure asks the backend for its limits and its size. No request is under way.
func (d *Device) measure() error {
	told := d.backend.Limits()
	if err := told.check(); err != nil {
		return err
	}
	// Memory can be aligned no better than what goes into it: a request of one byte has no length of 512.
	d.own.Store(int64(max(told.RequestAlign, 1)))
	told = told.coarser(max(d.align, told.MemoryAlign))
	if err := told.check(); err != nil {
		return err
	}
	size := d.backend.Size()
	if size < 0 || size%SectorSize != 0 || size > math.MaxInt64-maxAlign {
		return fmt.Errorf("blk: disk of %d bytes: its size must be a multiple of %d below 2^63-%d",
			size, SectorSize, maxAlign)
	}
	if err := fitsCoarser(told, d.own.Load(), size); err != nil {
		return err
	}
	normal := told.normal()
	d.told.Store(&told)
	d.limits.Store(&normal)
	d.size.Store(size)
	return nil
}

// fitsCoarser refuses an alignment, other than the backend's own, that would make the last block end behind the backend's.
func fitsCoarser(l Limits, own, size int64) error {
	if int64(l.RequestAlign) > own && size%int64(l.RequestAlign) != 0 {
		return fmt.Errorf("%w: a disk of %d bytes does not consist of blocks of %d", ErrLimits, size, l.RequestAlign)
	}
	return nil
}

// Size returns the size of the disk in bytes, a multiple of SectorSize.
func (d *Device) Size() int64 { return d.size.Load() }

// ReadOnly reports whether writes are refused.
func (d *Device) ReadOnly() bool { return d.readOnly }

// Writethrough reports whether every write is stable when it is done, whatever the request says.
func (d *Device) Writethrough() bool { return d.through }

// Limits returns what the backend asks for and knows about its medium. A Device itself takes requests of any alignment,
// length and number of elements; these are the ones that it serves best.
func (d *Device) Limits() Limits { return *d.told.Load() }

// Backend returns the driver, for what only it can do. Requests that go there pass by everything that a Device does.
func (d *Device) Backend() Backend { return d.backend }

// Observing reports whether the backend wants to be told of events.
func (d *Device) Observing() bool { return d.can.observer != nil }

// Event tells the backend about e, if it wants to know. Drivers call it on the Device that holds their file.
func (d *Device) Event(e Event) {
	if d.can.observer != nil {
		d.can.observer.Event(e)
	}
}

// SetThrottle makes the disk a member of g, or of no group where g is nil. Requests that wait for the old limit go on.
func (d *Device) SetThrottle(g *ThrottleGroup) {
	d.throttleMu.Lock()
	defer d.throttleMu.Unlock()
	var m *throttleMember
	if g != nil {
		m = g.join()
		for range d.hurried {
			m.bypass(true)
		}
	}
	if old := d.throttle.Swap(m); old != nil {
		old.leave()
	}
}

// hurry lets throttled requests through at once until the function that it returns is called.
func (d *Device) hurry() (done func()) {
	d.throttleMu.Lock()
	defer d.throttleMu.Unlock()
	bypass := func(on bool) {
		if m := d.throttle.Load(); m != nil {
			m.bypass(on)
		}
	}
	d.hurried++
	bypass(true)
	return func() {
		d.throttleMu.Lock()
		defer d.throttleMu.Unlock()
		d.hurried--
		bypass(false)
	}
}

// Drain waits until no request is under way, whose Done has returned if it has one, and keeps new ones waiting until
// Undrain. Throttled requests are let through. Sections may be nested and may overlap; each Drain that returned nil needs
// its Undrain. Errors: ErrClosed, and those of ctx.
//
// Requests that wait for the end of the section are not lost. Whoever holds one open must not send any and wait.
func (d *Device) Drain(ctx context.Context) error {
	defer d.hurry()()
	return d.gate.shut(ctx)
}

// Undrain ends a section that Drain began.
func (d *Device) Undrain() { d.gate.open() }

// DrainAll drains several disks and returns the function that ends all sections. On an error none is left open. Disks
// that are above others in a chain of backing files are drained before these, whose requests they wait for; what else is
// built of Devices, such as the file of a format, must not be among them.
func DrainAll(ctx context.Context, devices ...*Device) (undrain func(), err error) {
	drained := make([]*Device, 0, len(devices))
	undrain = func() {
		for _, d := range drained {
			d.Undrain()
		}
	}
	above := map[*Device]int{} // how many of them it lies below
	for _, d := range devices {
		for b := d.Backing(); b != nil; b = b.Backing() {
			above[b]++
		}
	}
	inOrder := slices.Clone(devices)
	slices.SortStableFunc(inOrder, func(a, b *Device) int { return above[a] - above[b] })
	for _, d := range inOrder {
		if err := d.Drain(ctx); err != nil {
			undrain()
			return nil, err
		}
		drained = append(drained, d)
	}
	return undrain, nil
}

// Truncate changes the size of the disk to size bytes, a multiple of SectorSize. New bytes read as zeroes. Requests under
// way and drained sections end first, new ones wait; so whoever holds a section open must not resize. Errors:
// ErrReadOnly, ErrRange, ErrUnsupported, ErrClosed, ErrBitmap where a bitmap can't follow, ErrLimits where
// Options.RequestAlign can't, those of ctx, and the Backend's.
func (d *Device) Truncate(ctx context.Context, size int64) error {
	switch {
	case d.readOnly:
		return ErrReadOnly
	case d.can.truncate == nil:
		return fmt.Errorf("resize disk: %w", ErrUnsupported)
	case size < 0 || size%SectorSize != 0 || size > math.MaxInt64-maxAlign:
		return fmt.Errorf("%w: resize to %d bytes: want a multiple of %d below 2^63-%d", ErrRange, size, SectorSize, maxAlign)
	}
	if err := errors.Join(d.bitmaps.fits(size), fitsCoarser(d.Limits(), d.own.Load(), size)); err != nil {
		return err
	}
	return d.remeasure(ctx, func() error {
		if cut := d.Size() - size; cut > 0 {
			if err := d.notifyBeforeWrite(ctx, size, cut); err != nil {
				return err
			}
		}
		d.written.Add(1)
		if err := d.can.truncate.Truncate(size); err != nil {
			return d.stats.failed(err)
		}
		return nil
	})
}

// Refresh has the backend look again at what it stores its bytes in, and takes over limits and size as they are now.
// Requests under way and drained sections end first, as for Truncate. Errors: as for New, ErrClosed, those of ctx, and the
// Backend's.
func (d *Device) Refresh(ctx context.Context) error {
	return d.remeasure(ctx, func() error {
		if d.can.resetter == nil {
			return nil
		}
		return d.can.resetter.Refresh()
	})
}

// remeasure does change in a drained section of its own, and tells of a new size when that is over.
func (d *Device) remeasure(ctx context.Context, change func() error) error {
	done := d.hurry()
	err := d.gate.shutAlone(ctx)
	done()
	if err != nil {
		return err
	}
	before := d.Size()
	err = change()
	if again := d.measure(); err == nil {
		err = again
	}
	after := d.Size()
	if after != before {
		err = errors.Join(err, d.bitmaps.resize(before, after))
	}
	d.Undrain()
	if after != before {
		for _, f := range d.onResize.all() {
			(*f)(after)
		}
	}
	return err
}

// Close waits for the requests under way and closes the Backend. Requests that come later or wait, those held back by
// Plug among them, and a second Close, get ErrClosed.
func (d *Device) Close() error {
	defer d.hurry()()
	if !d.gate.close() {
		return ErrClosed
	}
	d.dispatch(d.submitter.close()) // to be refused
	d.SetThrottle(nil)
	return d.backend.Close()
}

// ReadStateAt reads the state of a VM that is kept beside the disk. It returns fewer bytes than dst holds where the state
// ends. Errors: ErrUnsupported, ErrRange, ErrClosed, and the Backend's.
func (d *Device) ReadStateAt(dst iov.Vec, off int64) (int, error) {
	return d.moveState(dst, off, false)
}

// WriteStateAt writes state of a VM, as ReadStateAt reads it.
func (d *Device) WriteStateAt(src iov.Vec, off int64) (int, error) {
	if d.readOnly {
		return 0, ErrReadOnly
	}
	return d.moveState(src, off, true)
}

func (d *Device) moveState(v iov.Vec, off int64, write bool) (int, error) {
	if d.can.state == nil {
		return 0, fmt.Errorf("VM state: %w", ErrUnsupported)
	}
	if err := d.gate.enter(context.Background()); err != nil {
		return 0, err
	}
	defer d.gate.leave()
	if off < 0 || int64(v.Size()) > math.MaxInt64-off {
		return 0, ErrRange
	}
	if !write {
		return d.can.state.ReadStateAt(v, off)
	}
	defer d.written.Add(1)
	return d.can.state.WriteStateAt(v, off)
}

// FlushAll flushes several disks, all of them whatever happens to one.
func FlushAll(ctx context.Context, devices ...*Device) error {
	var err error
	for _, d := range devices {
		err = errors.Join(err, d.FlushContext(ctx))
	}
	return err
}
