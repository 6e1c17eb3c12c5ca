package pci

import (
	"fmt"
	"time"

	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

func (f *Function) readStatus() virtio.Status {
	s := f.status
	if f.needed.Load() != f.answered.Load() || s == 0 && f.halting != nil {
		s |= virtio.StatusNeedsReset // the second: whatever it was, it is not zero before the device has stopped
	}
	return s
}

// writeStatus moves the device through its life (virtio 1.2, 2.1 and 3.1). The driver sets bits, in the order below, and
// clears them only all together, which is a reset. FEATURES_OK is refused, by not being set, for features that were not
// offered and without VERSION_1; DRIVER_OK without FEATURES_OK.
func (f *Function) writeStatus(s virtio.Status) {
	if s == 0 {
		f.reset()
		return
	}
	f.status |= s & (virtio.StatusAcknowledge | virtio.StatusDriver | virtio.StatusFailed)
	if s&virtio.StatusFeaturesOK != 0 && f.acceptable() {
		f.negotiated()
	}
	if s&virtio.StatusDriverOK != 0 && f.status&virtio.StatusFeaturesOK != 0 {
		f.status |= virtio.StatusDriverOK
		f.start()
	}
	if f.status&virtio.StatusFailed != 0 && f.active {
		f.halt(false) // the driver has given up; its memory may serve something else by now
	}
}

// acceptable reports whether the device can work with the features that the driver accepted.
func (f *Function) acceptable() bool {
	return f.offered.Has(f.driver.features) && f.driver.features.Has(virtio.VersionOne)
}

// negotiated sets FEATURES_OK, which makes the features final.
func (f *Function) negotiated() {
	if f.status&virtio.StatusFeaturesOK != 0 {
		return
	}
	f.status |= virtio.StatusFeaturesOK
	if d, ok := f.dev.(virtio.Negotiator); ok {
		d.Negotiated(f.driver.features)
	}
}

// start activates the device if the driver wants that and lets it access memory. If its queues are not what they should
// be, or the device refuses or is broken, it needs a reset.
func (f *Function) start() {
	const ok = virtio.StatusDriverOK
	if f.active || f.halting != nil || !f.master || f.closed ||
		f.readStatus()&(ok|virtio.StatusNeedsReset|virtio.StatusFailed) != ok {
		return
	}
	if err := f.activate(); err != nil {
		f.needReset()
		return
	}
	f.active = true
	f.syncDoorbells()
}

func (f *Function) activate() error {
	if f.broken.Load() {
		return fmt.Errorf("virtio device %d was not stopped at the last reset", f.dev.ID())
	}
	features := f.driver.features
	queues := make([]*queue.Queue, len(f.queues))
	for i := range f.queues {
		r := &f.queues[i]
		if !r.enable {
			continue
		}
		if r.size > r.max {
			return fmt.Errorf("%w: queue %d of size %d, at most %d", queue.ErrConfig, i, r.size, r.max)
		}
		q, err := queue.New(f.mem, queue.Config{
			Size:     r.size,
			Desc:     r.desc,
			Driver:   r.driver,
			Device:   r.device,
			EventIdx: features.Has(virtio.RingEventIdx),
			Indirect: features.Has(virtio.RingIndirectDesc),
		}, r.kick)
		if err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
		queues[i] = q
	}
	return f.dev.Activate(features, queues, f)
}

// halt is a reset of the device that is under way.
type halt struct {
	clear bool          // the driver asked for it: the registers follow; guarded by Function.mu
	done  chan struct{} // closed when the device has stopped, or cannot be
	err   error         // of the device's Reset; set before done is closed
}

// grace is how long the access that makes a device stop waits for that. It is ample for every device that is not held up
// by its backend, so that a driver finds the status zero when it looks first; and short enough for a vCPU to be away.
const grace = 100 * time.Millisecond

// halt begins to reset the device, if that is not under way, and takes its doorbells away at once. It does not wait, as
// the device's I/O may take for ever. With thenClear the registers are cleared at the end. The caller holds mu.
func (f *Function) halt(thenClear bool) *halt {
	if h := f.halting; h != nil {
		h.clear = h.clear || thenClear
		return h
	}
	h := &halt{clear: thenClear, done: make(chan struct{})}
	f.halting, f.begun, f.active = h, h, false
	f.syncDoorbells()
	go func() {
		defer close(h.done)
		err := f.dev.Reset()
		f.mu.Lock()
		defer f.mu.Unlock()
		f.halted(err)
	}()
	return h
}

// halted ends a halt. A driver that has reset a device waits until the status is zero, so it becomes zero even if the
// device cannot be stopped: it is of no more use then, until a later reset succeeds. The caller holds mu.
func (f *Function) halted(err error) {
	h := f.halting
	f.halting = nil
	f.broken.Store(!f.check(err))
	if err != nil {
		h.err = fmt.Errorf("reset virtio device %d: %w", f.dev.ID(), err)
	}
	if h.clear {
		f.clear()
	}
}

// unlock releases mu. If the access that held it made the device stop, it gives that a moment.
func (f *Function) unlock() {
	h := f.begun
	f.begun = nil
	f.mu.Unlock()
	if h == nil {
		return
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-h.done:
	case <-timer.C:
	}
}

// reset is the driver's reset (virtio 1.2, 2.4). Until it is done the status stays what it was, for which the driver
// waits (virtio 1.2, 4.1.4.3.1 and 4.1.4.3.2).
func (f *Function) reset() {
	f.resets.Add(1)
	f.halt(true)
}

// clear puts the registers of virtio into their state after a reset. The configuration space and the MSI-X table stay
// as they are.
func (f *Function) clear() {
	f.status = 0
	f.answered.Store(f.needed.Load())
	f.driver = driverRegs{}
	f.mapVector(&f.configVector, noVector)
	for i := range f.queues {
		q := &f.queues[i]
		f.mapVector(&q.vector, noVector)
		q.size, q.enable = q.max, false
		q.desc, q.driver, q.device = 0, 0, 0
	}
	f.intx.clear()
}

// NeedsReset implements virtio.Transport: the status shows DEVICE_NEEDS_RESET until the driver resets the device, and a
// configuration change tells it to look (virtio 1.2, 2.1.2). A device that outlived its reset is not heard any more.
func (f *Function) NeedsReset() {
	if !f.broken.Load() {
		f.needReset()
	}
}

func (f *Function) needReset() {
	// One word is both the count and what the status shows, so nobody sees the bit before it is counted.
	if n := f.answered.Load(); !f.needed.CompareAndSwap(n, n+1) {
		return // it is asked for already
	}
	_ = f.configInterrupt() // counted; the status still says it
}
