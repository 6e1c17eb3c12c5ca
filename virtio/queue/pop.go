package queue

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/kvmlet/kvmlet/virtio/queue/internal/ring"
)

// Wait blocks until the driver has made a chain available, or Wake was called. It returns ErrStopped after Stop and after
// the kick event was closed, and the error of Pop once that has failed. While the caller is awake the driver is asked not to kick.
func (q *Queue) Wait() error {
	for {
		if q.stopped.Load() {
			return ErrStopped
		}
		if q.failure != nil {
			return q.failure
		}
		// Look first, then ask for kicks and look again: a chain that was added before the driver saw the request
		// came without a kick. Asking is a full barrier, so one of the two sees the other (virtio 1.2, 2.7.10).
		if q.woken.Swap(false) || !q.empty() {
			break
		}
		q.enableKicks()
		if !q.empty() {
			break
		}
		if err := q.kick.Wait(); err != nil {
			return ErrStopped
		}
		q.kicks.Add(1)
	}
	q.disableKicks()
	return nil
}

// empty reports whether the driver's index is where the device has got to.
func (q *Queue) empty() bool { return q.availIdx.Load() == uint16(q.popped.Load()) }

// enableKicks asks the driver to kick when it adds a chain (virtio 1.2, 2.7.10).
func (q *Queue) enableKicks() {
	if q.eventIdx {
		q.availEvent.Store(uint16(q.popped.Load()))
		q.mem.MarkDirty(q.usedAddr+uint64(ring.UsedEvents(q.size)), ring.EventSize)
		return
	}
	q.silent = false
	q.setUsedFlags(0)
}

// disableKicks asks the driver not to kick. With event-idx the index that it compares with has been passed, which says
// the same.
func (q *Queue) disableKicks() {
	if !q.eventIdx && !q.silent {
		q.silent = true
		q.setUsedFlags(ring.UsedNoNotify)
	}
}

// Pop takes the next chain that the driver made available and reports whether there was one. The chain's bytes are guest
// memory, in RAM, and stay valid while the device is active; it stays in flight until Push. An error wraps ErrBadChain:
// the queue is broken for good and the device calls NeedsReset. The cost of a call is bounded by Config.MaxChain, and
// no more than Size chains are ever in flight, whatever the driver does.
func (q *Queue) Pop(c *Chain) (bool, error) {
	if q.failure != nil {
		return false, q.failure
	}
	if q.stopped.Load() {
		return false, nil
	}
	popped := q.popped.Load()
	next := uint16(popped)
	if q.seen == next {
		q.seen = q.availIdx.Load()
		ahead := q.seen - next
		if ahead == 0 {
			return false, nil
		}
		if ahead > q.size {
			return false, q.fail("available index %d is %d ahead of the device's, queue size %d", q.seen, ahead, q.size)
		}
	}
	if popped-q.pushed.Load() >= uint64(q.size) {
		return false, q.fail("a chain more than the queue's %d entries", q.size)
	}
	c.Head = binary.LittleEndian.Uint16(q.avail[ring.AvailElemSize*int(next&(q.size-1)):])
	c.clear()
	if err := q.walk(c); err != nil {
		c.clear()
		return false, err
	}
	q.popped.Store(popped + 1)
	return true, nil
}

// clear empties the lists.
func (c *Chain) clear() {
	c.Readable, c.Writable, c.spans, c.touched = c.Readable[:0], c.Writable[:0], c.spans[:0], false
}

// Undo gives back the chain that was popped last, as if Pop had not been called; it must not have been pushed. Called
// n times it gives back the last n chains.
func (q *Queue) Undo() { q.popped.Store(q.popped.Load() - 1) }

// walk follows the chain that starts at c.Head (virtio 1.2, 2.7.5). The chain may end in a descriptor that refers to an
// indirect table, which holds the rest of it.
func (q *Queue) walk(c *Chain) error {
	var (
		table = q.desc
		size  = uint32(q.size)        // entries of table
		left  = min(size, q.maxChain) // descriptors that may still follow; fewer entries than that are a loop
		room  = q.maxChain            // the same for the whole chain
		total uint64                  // bytes so far
		i     = c.Head
	)
	inTable := false
	for {
		if uint32(i) >= size {
			return q.bad(c, i, "outside its table of %d", size)
		}
		if left == 0 {
			return q.bad(c, i, "looped, or longer than %d descriptors", min(size, q.maxChain))
		}
		d := ring.LoadDesc(table, i)

		if d.Flags&ring.FlagIndirect != 0 {
			// FlagWrite means nothing here (virtio 1.2, 2.7.5.3.2).
			switch {
			case !q.indirect:
				return q.bad(c, i, "indirect, which was not negotiated")
			case inTable:
				return q.bad(c, i, "indirect within an indirect table")
			case d.Flags&ring.FlagNext != 0:
				return q.bad(c, i, "both indirect and followed by another")
			case d.Len == 0 || d.Len%ring.DescSize != 0:
				return q.bad(c, i, "indirect table of %d bytes", d.Len)
			case d.Len/ring.DescSize > q.maxChain:
				return q.bad(c, i, "indirect table of %d descriptors, at most %d", d.Len/ring.DescSize, q.maxChain)
			}
			b, err := q.mem.Bytes(d.Addr, uint64(d.Len))
			if err != nil {
				return q.bad(c, i, "indirect table: %v", err)
			}
			table, size, i, inTable = b, d.Len/ring.DescSize, 0, true
			left = min(size, room)
			continue
		}

		if d.Len == 0 {
			return q.bad(c, i, "of length zero")
		}
		if total += uint64(d.Len); total > math.MaxUint32 {
			return q.bad(c, i, "takes the chain beyond 4 GiB")
		}
		var err error
		switch {
		case d.Flags&ring.FlagWrite != 0:
			c.Writable, err = q.mem.AppendVec(c.Writable, d.Addr, uint64(d.Len))
			c.spans = append(c.spans, span{d.Addr, uint64(d.Len)})
		case len(c.Writable) > 0:
			return q.bad(c, i, "readable after a writable one")
		default:
			c.Readable, err = q.mem.AppendVec(c.Readable, d.Addr, uint64(d.Len))
		}
		if err != nil {
			return q.bad(c, i, "%v", err)
		}
		if d.Flags&ring.FlagNext == 0 {
			return nil
		}
		left--
		room--
		i = d.Next
	}
}

// bad breaks the queue over descriptor i of the chain c.
func (q *Queue) bad(c *Chain, i uint16, format string, args ...any) error {
	return q.fail("chain %d: descriptor %d %s", c.Head, i, fmt.Sprintf(format, args...))
}

// fail breaks the queue.
func (q *Queue) fail(format string, args ...any) error {
	q.failure = fmt.Errorf("%w: %s", ErrBadChain, fmt.Sprintf(format, args...))
	return q.failure
}
