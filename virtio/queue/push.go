package queue

import (
	"encoding/binary"
	"math"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/virtio/queue/internal/ring"
)

// Used names a chain that the device is done with: what Push takes, for PushAll.
type Used struct {
	Chain   *Chain
	Written uint32 // bytes that the device wrote into its writable part, from the start of it
}

// Push returns a popped chain to the driver; written is the number of bytes that the device wrote into its writable part,
// from the start of it, which is also what dirty logs get to know. Chains may be returned in any order, each once.
func (q *Queue) Push(c *Chain, written uint32) {
	q.mu.Lock()
	n := q.pushed.Load()
	q.putUsed(n, c.Head, written)
	q.publish(n + 1)
	q.mu.Unlock()
	// Looked at after the writes: a log that begins later has everything to read anyway.
	if q.mem.Recording() {
		q.mark(n, c, written)
	}
}

// PushAll is Push for several chains, which the driver sees all at once. The buffers of one frame that virtio-net
// merges must come so (virtio 1.2, 5.1.6.4).
func (q *Queue) PushAll(chains []Used) {
	q.mu.Lock()
	n := q.pushed.Load()
	for i, c := range chains {
		q.putUsed(n+uint64(i), c.Chain.Head, c.Written)
	}
	q.publish(n + uint64(len(chains)))
	q.mu.Unlock()
	if q.mem.Recording() {
		for i, c := range chains {
			q.mark(n+uint64(i), c.Chain, c.Written)
		}
	}
}

// putUsed writes the entry of the used ring for chain n. The caller holds mu.
func (q *Queue) putUsed(n uint64, head uint16, written uint32) {
	binary.LittleEndian.PutUint64(q.used[q.usedElem(n):], uint64(head)|uint64(written)<<32)
}

// usedElem returns where in the used ring's entries that of chain n is.
func (q *Queue) usedElem(n uint64) int { return ring.UsedElemSize * int(uint16(n)&(q.size-1)) }

// mark tells dirty logs what was written for chain n: its bytes, its entry in the used ring and the index.
func (q *Queue) mark(n uint64, c *Chain, written uint32) {
	left := uint64(written)
	for _, s := range c.spans {
		m := s.n
		if !c.touched {
			m = min(m, left)
			left -= m
		}
		q.mem.MarkDirty(s.addr, m)
	}
	q.mem.MarkDirty(q.usedAddr+ring.RingOffset+uint64(q.usedElem(n)), ring.UsedElemSize)
	q.markUsedWord()
}

// markUsedWord tells dirty logs of a change of the used ring's flags or index.
func (q *Queue) markUsedWord() { q.mem.MarkDirty(q.usedAddr, ring.RingOffset) }

// ShouldNotify reports whether the driver wants to be notified of what was pushed since the last call: in the range of
// indexes that it asked for with event-idx, else unless it asked for silence (virtio 1.2, 2.7.7). It says no if nothing
// was pushed.
func (q *Queue) ShouldNotify() bool {
	q.mu.Lock()
	from, to, resumed := q.notified, q.pushed.Load(), q.resumed
	q.notified, q.resumed = to, false
	q.mu.Unlock()
	if from == to && !resumed {
		return false
	}
	// The publication of the index was a full barrier: either the driver's wish is seen here or the driver sees the
	// entry when it looks again after making its wish.
	var want bool
	if q.eventIdx {
		// A device that pushed more than there are indexes has passed every one of them.
		want = resumed || to-from > math.MaxUint16 || uint16(to)-q.usedEvent.Load()-1 < uint16(to-from)
	} else {
		want = q.availFlags.Load()&ring.AvailNoInterrupt == 0
	}
	if want {
		q.notifications.Add(1)
	}
	return want
}

// setUsedFlags publishes the flags of the used ring.
func (q *Queue) setUsedFlags(flags uint16) {
	q.mu.Lock()
	q.usedFlags = flags
	q.publish(q.pushed.Load())
	q.mu.Unlock()
	q.markUsedWord()
}

// publish makes n the count of chains pushed, and stores flags and idx of the used ring as the one aligned word that they
// share, after the entries and before anything that follows. The caller holds mu.
func (q *Queue) publish(n uint64) {
	// Counted before the driver can see it: it may make the same descriptors available again at once.
	q.pushed.Store(n)
	atomic.StoreUint32(q.usedWord, uint32(q.usedFlags)|uint32(n)<<16)
}
