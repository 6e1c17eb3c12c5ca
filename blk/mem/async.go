package mem

import (
	"math/rand/v2"
	"sync"

	"github.com/kvmlet/kvmlet/blk"
)

// Async is a Disk that implements blk.Starter as well. It carries out transfers in any order, most of them on goroutines
// of its own and some before Start returns.
type Async struct {
	*Disk

	mu     sync.Mutex
	work   sync.Cond // something was queued, or closed
	queue  []*blk.IO
	rand   *rand.Rand
	closed bool
	ended  sync.WaitGroup
}

// NewAsync is New for an Async with that many goroutines. The order depends on seed and on the scheduler.
func NewAsync(size int64, o Options, workers int, seed uint64) (*Async, error) {
	d, err := New(size, o)
	if err != nil {
		return nil, err
	}
	a := &Async{Disk: d, rand: rand.New(rand.NewPCG(seed, 0))}
	a.work.L = &a.mu
	for range max(workers, 1) {
		a.ended.Go(a.run)
	}
	return a, nil
}

// Start implements blk.Starter.
func (a *Async) Start(batch []*blk.IO) {
	var now []*blk.IO
	a.mu.Lock()
	for _, io := range batch {
		if a.closed || a.rand.IntN(8) == 0 {
			now = append(now, io)
		} else {
			a.queue = append(a.queue, io)
		}
	}
	a.mu.Unlock()
	a.work.Broadcast()
	for _, io := range now {
		a.do(io)
	}
}

// Close implements blk.Backend.
func (a *Async) Close() error {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.work.Broadcast()
	a.ended.Wait()
	return a.Disk.Close()
}

// run carries out what is queued until there is nothing and the disk is closed.
func (a *Async) run() {
	for {
		a.mu.Lock()
		for len(a.queue) == 0 && !a.closed {
			a.work.Wait()
		}
		last := len(a.queue) - 1
		if last < 0 {
			a.mu.Unlock()
			return
		}
		i := a.rand.IntN(last + 1)
		io := a.queue[i]
		a.queue[i], a.queue[last] = a.queue[last], nil
		a.queue = a.queue[:last]
		a.mu.Unlock()
		a.do(io)
	}
}

func (a *Async) do(io *blk.IO) {
	io.Transfer(a)
	io.Done(io)
}
