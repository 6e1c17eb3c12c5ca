package raw

import "github.com/kvmlet/kvmlet/blk"

// fifo is a queue of transfers. It keeps its memory, so that a disk in steady use does not allocate.
type fifo struct {
	ring  []*blk.IO // a power of two long, or nil
	first int       // where in ring the oldest is
	n     int
}

// push adds batch at the end.
func (q *fifo) push(batch []*blk.IO) {
	for q.n+len(batch) > len(q.ring) {
		q.grow()
	}
	for _, io := range batch {
		q.ring[(q.first+q.n)&(len(q.ring)-1)] = io
		q.n++
	}
}

// pop removes the oldest transfer; nil means that there is none.
func (q *fifo) pop() *blk.IO {
	if q.n == 0 {
		return nil
	}
	io := q.ring[q.first]
	q.ring[q.first] = nil // it is its owner's soon
	q.first = (q.first + 1) & (len(q.ring) - 1)
	q.n--
	return io
}

func (q *fifo) grow() {
	bigger := make([]*blk.IO, max(2*len(q.ring), 64))
	for i := range q.n {
		bigger[i] = q.ring[(q.first+i)&(len(q.ring)-1)]
	}
	q.ring, q.first = bigger, 0
}
