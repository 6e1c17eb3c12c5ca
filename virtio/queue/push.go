package queue

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/virtio/queue/internal/ring"
)

// Used names a chain that the device is done with: what Push takes, for PushAll.
type Used struct {
	Head    uint16 // Chain.Head
	Written uint32 // bytes that the device wrote into its writable part, from the start of it
}

// Push returns a popped chain to the driver: head is its Chain.Head, written the number of bytes that the device wrote
// into its writable part, from the start of it. Chains may be returned in any order, each once.
func (q *Queue) Push(head uint16, written uint32) {
	q.mu.Lock()
	n := q.pushed.Load()
	q.putUsed(n, head, written)
	q.publish(n + 1)
	q.mu.Unlock()
}

// PushAll is Push for several chains, which the driver sees all at once. The buffers of one frame that virtio-net
// merges must come so (virtio 1.2, 5.1.6.4).
func (q *Queue) PushAll(chains []Used) {
	q.mu.Lock()
	n := q.pushed.Load()
	for i, c := range chains {
		q.putUsed(n+uint64(i), c.Head, c.Written)
	}
	q.publish(n + uint64(len(chains)))
	q.mu.Unlock()
}

// putUsed writes the entry of the used ring for chain n. The caller holds mu.
func (q *Queue) putUsed(n uint64, head uint16, written uint32) {
	i := int(uint16(n) & (q.size - 1))
	binary.LittleEndian.PutUint64(q.used[ring.UsedElemSize*i:], uint64(head)|uint64(written)<<32)
}

// ShouldNotify reports whether the driver wants to be notified of what was pushed since the last call: in the range of
// indexes that it asked for with event-idx, else unless it asked for silence (virtio 1.2, 2.7.7). It says no if nothing
// was pushed.
func (q *Queue) ShouldNotify() bool {
	q.mu.Lock()
	from, to, resumed := q.notified, uint16(q.pushed.Load()), q.resumed
	q.notified, q.resumed = to, false
	q.mu.Unlock()
	if from == to && !resumed {
		return false
	}
	// The publication of the index was a full barrier: either the driver's wish is seen here or the driver sees the
	// entry when it looks again after making its wish.
	var want bool
	if q.eventIdx {
		want = resumed || to-q.usedEvent.Load()-1 < to-from
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
}

// publish makes n the count of chains pushed, and stores flags and idx of the used ring as the one aligned word that they
// share, after the entries and before anything that follows. The caller holds mu.
func (q *Queue) publish(n uint64) {
	// Counted before the driver can see it: it may make the same descriptors available again at once.
	q.pushed.Store(n)
	atomic.StoreUint32(q.usedWord, uint32(q.usedFlags)|uint32(n)<<16)
}
