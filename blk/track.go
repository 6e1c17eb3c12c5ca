package blk

import (
	"context"
	"sync"
)

// tracker keeps requests apart that must not overlap in time. A request that serialises, because it reads bytes and
// writes them back (a padded write, a copy on read), has its range for itself: it waits for earlier requests that
// overlap, and later ones that overlap wait for it. All others pass freely.
//
// Every request waits only for requests that began before it did. So however they overlap, the oldest one always goes
// on, and there is no deadlock.
type tracker struct {
	mu          sync.Mutex
	first, last *tracked // in the order in which they began
	serialising int      // those among them that serialise
}

// tracked is one request in a tracker. It is embedded in whatever lives as long as the request does.
type tracked struct {
	start, end  int64 // the range that it touches
	serialising bool
	prev, next  *tracked
	ended       chan struct{} // made by the first that waits for it, closed by end
}

// begin adds t and waits for those that it has to wait for. After an error, which is that of ctx, it is not added.
func (tr *tracker) begin(ctx context.Context, t *tracked, start, end int64, serialising bool) error {
	tr.mu.Lock()
	tr.add(t, start, end, serialising)
	for {
		other := tr.conflict(t)
		if other == nil {
			tr.mu.Unlock()
			return nil
		}
		if other.ended == nil {
			other.ended = make(chan struct{})
		}
		ended := other.ended
		tr.mu.Unlock()
		select {
		case <-ended:
		case <-ctx.Done():
			tr.end(t)
			return ctx.Err()
		}
		tr.mu.Lock()
	}
}

// tryBegin adds t if it need not wait.
func (tr *tracker) tryBegin(t *tracked, start, end int64, serialising bool) bool {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.add(t, start, end, serialising)
	if tr.conflict(t) == nil {
		return true
	}
	tr.remove(t)
	return false
}

// end removes t and wakes those that wait for it.
func (tr *tracker) end(t *tracked) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.remove(t)
	if t.ended != nil {
		close(t.ended)
		t.ended = nil
	}
}

func (tr *tracker) add(t *tracked, start, end int64, serialising bool) {
	*t = tracked{start: start, end: end, serialising: serialising, prev: tr.last}
	if tr.last == nil {
		tr.first = t
	} else {
		tr.last.next = t
	}
	tr.last = t
	if serialising {
		tr.serialising++
	}
}

func (tr *tracker) remove(t *tracked) {
	if t.prev == nil {
		tr.first = t.next
	} else {
		t.prev.next = t.next
	}
	if t.next == nil {
		tr.last = t.prev
	} else {
		t.next.prev = t.prev
	}
	t.prev, t.next = nil, nil
	if t.serialising {
		tr.serialising--
	}
}

// conflict returns a request before t that t has to wait for, or nil.
func (tr *tracker) conflict(t *tracked) *tracked {
	if tr.serialising == 0 {
		return nil
	}
	for o := t.prev; o != nil; o = o.prev {
		if (o.serialising || t.serialising) && o.start < t.end && t.start < o.end {
			return o
		}
	}
	return nil
}
