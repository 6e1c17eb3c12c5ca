package raw

import (
	"sync"

	"github.com/kvmlet/kvmlet/blk"
)

// maxWorkers is how many transfers of one disk block in system calls at a time, each on a thread of its own. QEMU's
// pool has as many.
const maxWorkers = 64

// pool carries out transfers with blocking system calls. Its goroutines end as soon as nothing is queued: a new one
// costs no more than waking one up.
type pool struct {
	file *File
	work func() // the method value, made once

	mu      sync.Mutex
	queue   fifo
	workers int
	ended   sync.WaitGroup
}

func newPool(f *File) *pool {
	p := &pool{file: f}
	p.work = p.run
	return p
}

// start queues batch and sees to it that someone works on it.
func (p *pool) start(batch []*blk.IO) {
	p.mu.Lock()
	p.queue.push(batch)
	spawn := min(len(batch), maxWorkers-p.workers) // a worker that is about to end looks at the queue first
	p.workers += spawn
	p.ended.Add(spawn) // in time: what is queued is under way, so nobody closes the disk
	p.mu.Unlock()
	for range spawn {
		go p.work()
	}
}

// push is start of one transfer.
func (p *pool) push(io *blk.IO) {
	one := [1]*blk.IO{io}
	p.start(one[:])
}

// close waits for the workers. No transfer is under way.
func (p *pool) close() { p.ended.Wait() }

func (p *pool) run() {
	defer p.ended.Done()
	for {
		p.mu.Lock()
		io := p.queue.pop()
		if io == nil {
			p.workers--
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		p.file.carryOut(io)
	}
}
