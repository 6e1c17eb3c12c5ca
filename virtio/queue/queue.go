// Package queue is the device's side of a split virtqueue (virtio 1.2, 2.7): it takes descriptor chains out of guest
// memory as pairs of scatter-gather lists and returns them.
//
// A worker waits, pops until nothing is left, pushes what it has handled and notifies once:
//
//	for q.Wait() == nil {
//		for {
//			ok, err := q.Pop(&c)
//			if err != nil {
//				t.NeedsReset()
//				return
//			}
//			if !ok {
//				break
//			}
//			q.Push(&c, handle(&c))
//		}
//		if q.ShouldNotify() {
//			t.NotifyQueue(i)
//		}
//	}
//
// Everything in the rings comes from the guest. A chain or an index that breaks the rules breaks the queue: the error
// stays until the driver resets the device.
package queue

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/guest/memory"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/virtio/queue/internal/ring"
)

var (
	// ErrStopped is returned by Wait after Stop, and after the kick event was closed.
	ErrStopped = errors.New("virtqueue stopped")

	// ErrBadChain reports a descriptor chain or a ring index that breaks the rules; the queue is of no more use.
	ErrBadChain = errors.New("malformed virtqueue")

	// ErrConfig reports a queue size, an address or a state that no queue can have.
	ErrConfig = errors.New("bad virtqueue configuration")
)

// MaxSize is the largest size of a split queue (virtio 1.2, 2.7).
const MaxSize = ring.MaxSize

// minMaxChain is the least that a Config.MaxChain of zero stands for. Drivers may put more into an indirect table than
// the queue has entries, though the spec forbids it.
const minMaxChain = 1024

// Config describes a queue as the driver set it up.
type Config struct {
	Size     uint16 // entries: a power of two, 1 to MaxSize
	Desc     uint64 // guest-physical address of the descriptor table, aligned to 16
	Driver   uint64 // of the available ring, aligned to 2
	Device   uint64 // of the used ring, aligned to 4
	EventIdx bool   // virtio.RingEventIdx was negotiated
	Indirect bool   // virtio.RingIndirectDesc was negotiated
	MaxChain int    // most descriptors in one chain; 0: the size, and at least 1024
}

// Chain is one request of the driver: the bytes that the device reads, then those that it may write. Pop fills it in
// and reuses its lists, so a Chain that is popped into again allocates nothing. The zero Chain is ready to use. A device
// may change the lists, or not keep them, but it keeps the Chain until Push.
type Chain struct {
	Head     uint16 // names the chain to the driver
	Readable iov.Vec
	Writable iov.Vec

	// For dirty logs.
	spans   []span // what Writable was when popped, as the guest names it
	touched bool   // all of it counts as written
}

// Touched tells dirty logs, at Push, that the device may have written any bytes of the writable part: not only as many,
// from its start on, as it tells the driver.
func (c *Chain) Touched() { c.touched = true }

// span is a range of guest-physical addresses.
type span struct{ addr, n uint64 }

// State is what a queue must remember beside guest memory.
type State struct {
	Avail uint16 // index of the next entry of the available ring to pop
	Used  uint16 // index of the next entry of the used ring to write
}

// Counters counts events since New.
type Counters struct {
	Pops          uint64 // chains taken
	Kicks         uint64 // wake-ups of Wait
	Notifications uint64 // times that ShouldNotify said yes
}

// Queue is the device's side of a split virtqueue.
//
// Wait, Pop, Undo and SetState belong to one goroutine at a time. Push, PushAll, ShouldNotify, Wake, Stop, State, Size
// and Counters may be called from any.
type Queue struct {
	mem  *memory.Memory
	kick *Event

	size     uint16
	maxChain uint32
	eventIdx bool
	indirect bool

	desc       []byte      // descriptor table
	availIdx   ring.Uint16 // written by the driver
	availFlags ring.Uint16 // written by the driver; unused with event-idx
	avail      []byte      // entries of the available ring
	usedEvent  ring.Uint16 // written by the driver: notify me when you use this index
	usedAddr   uint64      // guest-physical address of the used ring
	used       []byte      // its entries
	usedWord   *uint32     // its flags and idx
	availEvent ring.Uint16 // written here: kick me when you add this index

	// Chains popped and pushed, counted without wrapping: the low 16 bits are the ring indexes, the difference is what
	// is in flight, at most size. Each has one writer, the popping goroutine and the holder of mu.
	popped, pushed atomic.Uint64

	seen    uint16 // the driver's avail.idx when last read
	silent  bool   // the driver is asked not to kick; unused with event-idx
	failure error  // why the queue is broken
	stopped atomic.Bool
	woken   atomic.Bool // by Wake, and no Wait has returned for it

	mu        sync.Mutex // guards what follows, and the writes to pushed and usedWord
	usedFlags uint16
	notified  uint64 // pushed at the last ShouldNotify
	resumed   bool   // the driver may wait for a notification that was due before SetState

	firstPop             uint64 // popped as SetState left it
	kicks, notifications atomic.Uint64
}

// New maps a queue that the driver has set up in mem. kick is what Wait waits for; it stays the caller's and may serve
// one queue after another. Errors wrap ErrConfig.
func New(mem *memory.Memory, cfg Config, kick *Event) (*Queue, error) {
	size := cfg.Size
	if size == 0 || size > MaxSize || size&(size-1) != 0 {
		return nil, fmt.Errorf("%w: size %d is not a power of two up to %d", ErrConfig, size, MaxSize)
	}
	if cfg.MaxChain < 0 || cfg.MaxChain > MaxSize {
		return nil, fmt.Errorf("%w: chains of %d descriptors, at most %d", ErrConfig, cfg.MaxChain, MaxSize)
	}
	q := &Queue{mem: mem, kick: kick, size: size, eventIdx: cfg.EventIdx, indirect: cfg.Indirect}
	q.maxChain = uint32(cfg.MaxChain)
	if q.maxChain == 0 {
		q.maxChain = max(uint32(size), minMaxChain)
	}

	// A driver that did not negotiate event-idx need not leave room for the two event fields.
	availLen, usedLen := ring.AvailEvents(size), ring.UsedEvents(size)
	if cfg.EventIdx {
		availLen += ring.EventSize
		usedLen += ring.EventSize
	}
	desc, err := part(mem, "descriptor table", cfg.Desc, ring.DescSize*int(size), ring.DescAlign)
	if err != nil {
		return nil, err
	}
	avail, err := part(mem, "available ring", cfg.Driver, availLen, ring.AvailAlign)
	if err != nil {
		return nil, err
	}
	used, err := part(mem, "used ring", cfg.Device, usedLen, ring.UsedAlign)
	if err != nil {
		return nil, err
	}

	q.desc = desc
	q.availFlags = ring.Uint16At(avail[ring.FlagsOffset:])
	q.availIdx = ring.Uint16At(avail[ring.IndexOffset:])
	q.avail = avail[ring.RingOffset:ring.AvailEvents(size)]
	q.usedAddr = cfg.Device
	q.usedWord = ring.Uint32At(used)
	q.used = used[ring.RingOffset:ring.UsedEvents(size)]
	if cfg.EventIdx {
		q.usedEvent = ring.Uint16At(avail[ring.AvailEvents(size):])
		q.availEvent = ring.Uint16At(used[ring.UsedEvents(size):])
	}
	return q, nil
}

// part returns the host bytes of one of a queue's three parts.
func part(mem *memory.Memory, name string, addr uint64, n int, align uint64) ([]byte, error) {
	if addr%align != 0 {
		return nil, fmt.Errorf("%w: %s at %#x is not aligned to %d", ErrConfig, name, addr, align)
	}
	b, err := mem.Bytes(addr, uint64(n))
	if err != nil {
		return nil, fmt.Errorf("%w: %s of %d bytes at %#x: %w", ErrConfig, name, n, addr, err)
	}
	return b, nil
}

// Size returns the number of entries.
func (q *Queue) Size() uint16 { return q.size }

// Counters returns what has been counted so far.
func (q *Queue) Counters() Counters {
	return Counters{Pops: q.popped.Load() - q.firstPop, Kicks: q.kicks.Load(), Notifications: q.notifications.Load()}
}

// State returns the queue's position. It is a consistent one while no chain is in flight and the worker is stopped.
func (q *Queue) State() State {
	q.mu.Lock()
	defer q.mu.Unlock()
	return State{Avail: uint16(q.popped.Load()), Used: uint16(q.pushed.Load())}
}

// SetState continues where another Queue over the same memory stopped. It must come before the first Wait or Pop. The
// chains between s.Used and s.Avail count as in flight; if there are more than the queue holds, the error wraps
// ErrConfig. The next ShouldNotify says yes unless the driver asked for silence, and the next Wait arms the driver's
// kicks anew, so nothing that was due before is lost.
func (q *Queue) SetState(s State) error {
	n := s.Avail - s.Used
	if n > q.size {
		return fmt.Errorf("%w: %d chains in flight (available %d, used %d), queue size %d",
			ErrConfig, n, s.Avail, s.Used, q.size)
	}
	q.firstPop = uint64(s.Used) + uint64(n)
	q.popped.Store(q.firstPop)
	q.seen = s.Avail
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pushed.Store(uint64(s.Used))
	q.notified, q.resumed = uint64(s.Used), true
	return nil
}

// Wake makes a Wait under way, or else the next one, return nil once although the driver may have added nothing: the
// worker has something else to look at.
func (q *Queue) Wake() {
	q.woken.Store(true)
	_ = q.kick.Signal() // a closed event has woken Wait already
}

// Stop makes Wait return ErrStopped and Pop find nothing, now and for ever. Push keeps working for chains in flight.
func (q *Queue) Stop() {
	q.stopped.Store(true)
	_ = q.kick.Signal() // a closed event has woken Wait already
}
