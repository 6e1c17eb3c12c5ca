package vblk

import (
	"sync"

	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// server serves one queue with a fixed number of workers. Each of them waits for a request, carries it out and returns
// it; they take turns at waiting, so a slow request holds up nobody but itself, and no request is handed from one
// goroutine to another.
type server struct {
	dev       *Device
	queue     *queue.Queue
	index     int
	transport virtio.Transport
	workers   sync.WaitGroup
	turn      sync.Mutex // held by the worker that waits for the next request
}

func startServer(d *Device, q *queue.Queue, index int, t virtio.Transport) *server {
	s := &server{dev: d, queue: q, index: index, transport: t}
	for range d.workers {
		s.workers.Go(s.work)
	}
	return s
}

func (s *server) work() {
	r := new(request)
	for s.next(&r.chain) {
		s.finish(r, s.dev.serve(r))
	}
}

// next waits for a request. It returns false once the queue is stopped: by Reset, or here because it is broken.
func (s *server) next(c *queue.Chain) bool {
	s.turn.Lock()
	defer s.turn.Unlock()
	for s.queue.Wait() == nil {
		ok, err := s.queue.Pop(c)
		if ok {
			return true
		}
		if err != nil {
			s.queue.Stop() // so that the other workers don't find the same
			s.transport.NeedsReset()
		}
	}
	return false
}

// finish returns a request to the driver and tells it so, unless it said that it will look by itself.
func (s *server) finish(r *request, written uint32) {
	if int(written) < r.room {
		// The status byte is the last one, and a read that failed may have changed any before it.
		r.chain.Touched()
	}
	s.queue.Push(&r.chain, written)
	if s.queue.ShouldNotify() && s.transport.NotifyQueue(s.index) != nil {
		s.dev.lost.Add(1)
	}
}
