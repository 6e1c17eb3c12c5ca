// Package queuetest is a driver for tests: it plays the guest's side of a split virtqueue (virtio 1.2, 2.7) on mapped
// memory, as a well-behaved driver does with Add, Kick and Wait, or as a hostile one with the raw access of raw.go.
package queuetest

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/memory"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/internal/ring"
)

// Timeout is how long Wait waits for the device before it fails the test.
const Timeout = 30 * time.Second

// DefaultLen is the guest memory in bytes that a Driver uses for its rings and buffers, if Options do not say.
const DefaultLen = 16 << 20

// Options say how the driver sets up its queue.
type Options struct {
	EventIdx bool // negotiate virtio.RingEventIdx
	Indirect bool // negotiate virtio.RingIndirectDesc; Add then puts longer chains into an indirect table
	MaxChain int  // queue.Config.MaxChain
	Skew     bool // put the available ring at an address that is even but not a multiple of four

	// Memory is the guest's; nil: the driver makes its own and closes it when the test ends. The driver uses
	// [Base, Base+Len); a Len of zero means DefaultLen.
	Memory *memory.Memory
	Base   uint64
	Len    uint64
}

// Driver is the guest's side of one queue. Its methods belong to one goroutine at a time, except Interrupt; a mistake
// of the device that the driver notices fails the test, so that goroutine should be the test's own.
type Driver struct {
	Mem    *memory.Memory
	Config queue.Config // the addresses and options of the rings, as the driver tells the device
	Event  *queue.Event // the kick
	Queue  *queue.Queue // the device's side, on Event; nil if the test gives Config to a transport

	// Notify is what Kick does when the device wants to know; by default it signals Event.
	Notify func()

	// Kicks counts the calls of Notify.
	Kicks int

	tb testing.TB

	desc                                     []byte
	availFlags, availIdx, usedEvent          ring.Uint16
	avail                                    []byte
	usedFlags, usedIdxField, availEventField ring.Uint16
	used                                     []byte

	free   []uint16         // descriptors of no chain
	chains map[uint16]chain // in flight, by head
	next   uint16           // avail.idx
	kicked uint16           // next at the last Kick
	last   uint16           // used.idx up to which chains were taken
	irq    chan struct{}    // one pending interrupt at most

	bottom, low, high uint64 // buffers of chains grow from bottom at low, those of Alloc down from the end at high
}

// chain is what the driver remembers of a chain in flight.
type chain struct {
	descs    []uint16
	writable []buffer
}

type buffer struct {
	addr uint64
	host []byte
}

// New lays a queue of size entries out in guest memory and makes the device's side for it. Everything is released when
// the test ends; stop the device before that.
func New(tb testing.TB, size uint16, opts Options) *Driver {
	tb.Helper()
	d := NewRings(tb, size, opts)
	ev, err := queue.NewEvent()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { ev.Close() })
	q, err := queue.New(d.Mem, d.Config, ev)
	if err != nil {
		tb.Fatal(err)
	}
	d.Event, d.Queue = ev, q
	d.Notify = func() {
		if err := ev.Signal(); err != nil {
			tb.Error(err)
		}
	}
	return d
}

// NewRings is New without the device's side: the caller tells a transport about Config and sets Notify.
func NewRings(tb testing.TB, size uint16, opts Options) *Driver {
	tb.Helper()
	if opts.Len == 0 {
		opts.Len = DefaultLen
	}
	if opts.Memory == nil {
		opts.Memory = newMemory(tb, opts.Base+opts.Len)
	}
	d := &Driver{
		Mem:    opts.Memory,
		Notify: func() {},
		tb:     tb,
		chains: make(map[uint16]chain),
		irq:    make(chan struct{}, 1),
		low:    opts.Base,
		high:   opts.Base + opts.Len,
	}
	desc := d.carve(ring.DescSize*int(size), 16)
	skew := 0
	if opts.Skew {
		skew = ring.AvailAlign
	}
	avail := d.carve(skew+ring.AvailEvents(size)+ring.EventSize, 4) + uint64(skew)
	used := d.carve(ring.UsedEvents(size)+ring.EventSize, 4)
	d.bottom = d.low
	d.Config = queue.Config{
		Size: size, Desc: desc, Driver: avail, Device: used,
		EventIdx: opts.EventIdx, Indirect: opts.Indirect, MaxChain: opts.MaxChain,
	}
	d.desc = d.Bytes(desc, ring.DescSize*int(size))
	ab := d.Bytes(avail, ring.AvailEvents(size)+ring.EventSize)
	d.availFlags, d.availIdx = ring.Uint16At(ab[ring.FlagsOffset:]), ring.Uint16At(ab[ring.IndexOffset:])
	d.avail, d.usedEvent = ab[ring.RingOffset:], ring.Uint16At(ab[ring.AvailEvents(size):])
	ub := d.Bytes(used, ring.UsedEvents(size)+ring.EventSize)
	d.usedFlags, d.usedIdxField = ring.Uint16At(ub[ring.FlagsOffset:]), ring.Uint16At(ub[ring.IndexOffset:])
	d.used, d.availEventField = ub[ring.RingOffset:], ring.Uint16At(ub[ring.UsedEvents(size):])
	d.Reset()
	return d
}

func newMemory(tb testing.TB, size uint64) *memory.Memory {
	tb.Helper()
	mem, err := memory.New((size + 4095) &^ 4095)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := mem.Close(); err != nil {
			tb.Error(err)
		}
	})
	return mem
}

// Reset zeroes the rings and forgets every chain, as a driver does after it has reset the device. Queue is not renewed.
func (d *Driver) Reset() {
	clear(d.Bytes(d.Config.Desc, int(d.bottom-d.Config.Desc)))
	d.free = d.free[:0]
	for i := int(d.Config.Size) - 1; i >= 0; i-- {
		d.free = append(d.free, uint16(i))
	}
	clear(d.chains)
	d.next, d.kicked, d.last, d.low = 0, 0, 0, d.bottom
}

// Free returns the number of unused descriptors.
func (d *Driver) Free() int { return len(d.free) }

// InFlight returns the number of chains that the device has not returned.
func (d *Driver) InFlight() int { return len(d.chains) }

// Add copies the readable buffers into guest memory and makes a chain of them, followed by one writable buffer for each
// of writable, which starts out with the slice's bytes. The device sees the chain at once; Kick tells it. When the chain
// comes back, the writable slices are filled with what the guest's buffers then hold. Add fails the test if descriptors
// or memory run out, or if the chain is empty.
func (d *Driver) Add(readable, writable [][]byte) (head uint16) {
	d.tb.Helper()
	var c chain
	var descs []Desc
	for i, b := range append(append([][]byte(nil), readable...), writable...) {
		if len(b) == 0 {
			d.tb.Fatal("queuetest: a buffer of length zero")
		}
		addr := d.carve(len(b), 1)
		copy(d.Bytes(addr, len(b)), b)
		flags := uint16(0)
		if i >= len(readable) {
			flags = FlagWrite
			c.writable = append(c.writable, buffer{addr, b})
		}
		descs = append(descs, Desc{Addr: addr, Len: uint32(len(b)), Flags: flags})
	}
	if len(descs) == 0 {
		d.tb.Fatal("queuetest: a chain without buffers")
	}
	if d.Config.Indirect && len(descs) > 1 {
		addr := d.carve(ring.DescSize*len(descs), 16)
		storeChain(d.Bytes(addr, ring.DescSize*len(descs)), descs)
		descs = []Desc{{Addr: addr, Len: uint32(ring.DescSize * len(descs)), Flags: FlagIndirect}}
	}
	if len(descs) > len(d.free) {
		d.tb.Fatalf("queuetest: a chain of %d descriptors, %d are free", len(descs), len(d.free))
	}
	for i := range descs {
		at := d.free[len(d.free)-1]
		d.free = d.free[:len(d.free)-1]
		c.descs = append(c.descs, at)
		if i+1 < len(descs) {
			descs[i].Flags |= FlagNext
			descs[i].Next = d.free[len(d.free)-1]
		}
		d.SetDesc(at, descs[i])
	}
	head = c.descs[0]
	d.chains[head] = c
	d.MakeAvailable(head)
	return head
}

// storeChain writes descs one after the other, each linked to the next.
func storeChain(table []byte, descs []Desc) {
	for i, desc := range descs {
		if i+1 < len(descs) {
			desc.Flags |= FlagNext
			desc.Next = uint16(i + 1)
		}
		desc.Store(table, uint16(i))
	}
}

// Kick tells the device about the chains added since the last Kick if it wants to know (virtio 1.2, 2.7.13.4), and
// reports whether it did.
func (d *Driver) Kick() bool {
	from, to := d.kicked, d.next
	d.kicked = to
	d.availIdx.Store(to) // as it was: a full barrier between the index and what the device asked for
	if d.Config.EventIdx {
		if to-d.AvailEvent()-1 >= to-from {
			return false
		}
	} else if d.UsedFlags()&ring.UsedNoNotify != 0 {
		return false
	}
	d.Kicks++
	d.Notify()
	return true
}

// Interrupt is the device's notification. It may be called from any goroutine.
func (d *Driver) Interrupt() {
	select {
	case d.irq <- struct{}{}:
	default:
	}
}

// Used takes the next chain that the device returned, without waiting for one.
func (d *Driver) Used() (head uint16, written uint32, ok bool) {
	d.tb.Helper()
	if d.UsedIdx() == d.last {
		return 0, 0, false
	}
	id, written := d.UsedElem(d.last)
	d.last++
	c, ok := d.chains[uint16(id)]
	if id > 0xFFFF || !ok {
		d.tb.Fatalf("queuetest: the device returned chain %d, which is not in flight", id)
	}
	delete(d.chains, uint16(id))
	space := 0
	for _, b := range c.writable {
		copy(b.host, d.Bytes(b.addr, len(b.host)))
		space += len(b.host)
	}
	if uint64(written) > uint64(space) {
		d.tb.Errorf("queuetest: chain %d: device says it wrote %d bytes, writable are %d", id, written, space)
	}
	for i := len(c.descs) - 1; i >= 0; i-- {
		d.free = append(d.free, c.descs[i])
	}
	if len(d.chains) == 0 {
		d.low = d.bottom
	}
	return uint16(id), written, true
}

// Wait takes the next chain that the device returned. If there is none it asks for an interrupt and waits for it; it
// does not look at the ring on its own, so a notification that the device forgot fails the test after Timeout.
func (d *Driver) Wait() (head uint16, written uint32) {
	d.tb.Helper()
	timeout := time.NewTimer(Timeout)
	defer timeout.Stop()
	for {
		if head, written, ok := d.Used(); ok {
			return head, written
		}
		d.EnableInterrupts()
		if d.UsedIdx() == d.last {
			select {
			case <-d.irq:
			case <-timeout.C:
				d.tb.Fatalf("queuetest: no interrupt in %v; used index %d, taken up to %d, %d chains in flight",
					Timeout, d.UsedIdx(), d.last, len(d.chains))
			}
		}
		d.DisableInterrupts()
	}
}

// Do adds a chain, kicks and waits for it. There must be no other chain in flight.
func (d *Driver) Do(readable, writable [][]byte) (written uint32) {
	d.tb.Helper()
	head := d.Add(readable, writable)
	d.Kick()
	got, written := d.Wait()
	if got != head {
		d.tb.Fatalf("queuetest: waited for chain %d, the device returned %d", head, got)
	}
	return written
}

// EnableInterrupts asks the device to notify the next chain that it returns.
func (d *Driver) EnableInterrupts() {
	if d.Config.EventIdx {
		d.usedEvent.Store(d.last)
	} else {
		d.availFlags.Store(0)
	}
}

// DisableInterrupts asks the device for silence. With event-idx the index that it compares with will have been passed.
func (d *Driver) DisableInterrupts() {
	if !d.Config.EventIdx {
		d.availFlags.Store(ring.AvailNoInterrupt)
	}
}

// carve takes n bytes from the bottom of the driver's memory.
func (d *Driver) carve(n int, align uint64) uint64 {
	d.tb.Helper()
	addr := (d.low + align - 1) &^ (align - 1)
	if addr+uint64(n) > d.high {
		d.tb.Fatalf("queuetest: out of guest memory: %d bytes wanted, %d left", n, d.high-min(addr, d.high))
	}
	d.low = addr + uint64(n)
	return addr
}

// putElem writes entry i of the available ring.
func (d *Driver) putElem(i, head uint16) {
	binary.LittleEndian.PutUint16(d.avail[ring.AvailElemSize*int(i&(d.Config.Size-1)):], head)
}
