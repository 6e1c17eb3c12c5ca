package nbd

import "sync"

// budget bounds the buffers of all connections of a Server together, in bytes.
//
// A connection asks for one buffer at a time and waits in a queue, so whatever it has to do, each of the others gets one
// before it gets the next. What it may hold beyond a single buffer is its share: the same for each connection. One whose
// client is slow thus leaves room for the rest, and one that holds something gets on without having to wait for more:
// its requests are answered, or its client is given up (Server.StallTimeout), and it gives back what they held.
type budget struct {
	mu    sync.Mutex
	limit int64
	used  int64
	conns int64
	queue []*holder // those that wait
}

// holder is what one connection has of a budget.
type holder struct {
	b     *budget
	held  int64
	wants int64
	got   chan struct{} // gets a value when it has what it waits for
}

func (b *budget) join() *holder {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns++
	return &holder{b: b, got: make(chan struct{}, 1)}
}

// leave gives back everything. Nobody uses h any more.
func (h *holder) leave() {
	b := h.b
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns--
	b.used -= h.held
	b.serve()
}

// take waits for n bytes, which must not be more than the limit. Calls for the same holder follow each other.
func (h *holder) take(n int64) {
	b := h.b
	b.mu.Lock()
	h.wants = n
	if len(b.queue) == 0 && !h.hasShare() && b.used+n <= b.limit {
		h.give()
		b.mu.Unlock()
		return
	}
	b.queue = append(b.queue, h)
	b.serve()
	b.mu.Unlock()
	<-h.got
}

// hasShare reports whether h holds too much to get what it wants. The caller of it, and of give, holds b.mu.
func (h *holder) hasShare() bool { return h.held > 0 && h.held+h.wants > h.b.limit/h.b.conns }

func (h *holder) give() {
	h.b.used += h.wants
	h.held += h.wants
}

func (h *holder) release(n int64) {
	b := h.b
	b.mu.Lock()
	defer b.mu.Unlock()
	h.held -= n
	b.used -= n
	if len(b.queue) > 0 {
		b.serve()
	}
}

// serve gives to those that wait what there is. One that has its share is passed over, as it waits for itself; one for
// which not enough is left is not, or smaller ones could keep it waiting for ever. The caller holds b.mu.
func (b *budget) serve() {
	waiting := b.queue[:0]
	for i, h := range b.queue {
		if h.hasShare() {
			waiting = append(waiting, h)
			continue
		}
		if b.used+h.wants > b.limit {
			waiting = append(waiting, b.queue[i:]...)
			break
		}
		h.give()
		h.got <- struct{}{}
	}
	clear(b.queue[len(waiting):])
	b.queue = waiting
}
