package vconsole

import (
	"sync"

	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// worker is the one goroutine that touches a queue during an activation. The transport is never called with Device.mu
// held: it may be reading the configuration space, which takes that lock, on behalf of a vCPU.
type worker struct {
	*activation
	queue *queue.Queue
	index int
	chain queue.Chain
}

// done gives the popped chain back with n bytes written into it, and interrupts the driver if it wants to know.
func (w *worker) done(n int) {
	w.queue.Push(&w.chain, uint32(n))
	if w.queue.ShouldNotify() {
		// The driver is told again with the next chain; nothing better can be done here about a failed interrupt.
		_ = w.transport.NotifyQueue(w.index)
	}
}

// stopped reports whether the activation ends. Workers ask before each Pop, as a driver that never pauses would
// otherwise hold up the reset.
func (d *Device) stopped(w *worker) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return w.stopping
}

// supply fills the driver's receive buffers: whenever ready says so, fill writes into the next buffer and returns how
// much. Both are called with d.mu held, and a change in what ready depends on broadcasts cond.
func (d *Device) supply(w *worker, cond *sync.Cond, ready func() bool, fill func(dst iov.Vec) (int, error)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		for !ready() && !w.stopping {
			cond.Wait()
		}
		if w.stopping {
			return nil
		}
		ok, err := w.queue.Pop(&w.chain)
		if err != nil {
			return err
		}
		n := 0
		if ok {
			if n, err = fill(w.chain.Writable); err != nil {
				return err
			}
		}
		d.mu.Unlock()
		if ok {
			w.done(n)
		} else {
			err = w.queue.Wait()
		}
		d.mu.Lock()
		if err != nil {
			return nil // the transport has closed the kick
		}
	}
}

// discard consumes what a driver sends to the port 0 that does not exist, so that it never waits for it.
func (d *Device) discard(w *worker) error {
	for !d.stopped(w) {
		ok, err := w.queue.Pop(&w.chain)
		if err != nil {
			return err
		}
		if ok {
			w.done(0)
		} else if w.queue.Wait() != nil {
			return nil
		}
	}
	return nil
}
