package pci

import (
	"fmt"

	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

func (f *Function) readStatus() virtio.Status {
	if f.needed.Load() != f.answered.Load() {
		return f.status | virtio.StatusNeedsReset
	}
	return f.status
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
		f.status |= virtio.StatusFeaturesOK
	}
	if s&virtio.StatusDriverOK != 0 && f.status&virtio.StatusFeaturesOK != 0 {
		f.status |= virtio.StatusDriverOK
		f.start()
	}
	if f.status&virtio.StatusFailed != 0 && f.active {
		f.check(f.stop()) // the driver has given up; its memory may serve something else by now
	}
}

// acceptable reports whether the device can work with the features that the driver accepted.
func (f *Function) acceptable() bool {
	return f.offered.Has(f.driver.features) && f.driver.features.Has(virtio.VersionOne)
}

// start activates the device if the driver wants that and lets it access memory. If its queues are not what they should
// be, or the device refuses, it needs a reset.
func (f *Function) start() {
	const ok = virtio.StatusDriverOK
	if f.active || !f.master || f.readStatus()&(ok|virtio.StatusNeedsReset|virtio.StatusFailed) != ok {
		return
	}
	if err := f.activate(); err != nil {
		f.NeedsReset()
		return
	}
	f.active = true
	f.syncDoorbells()
}

func (f *Function) activate() error {
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

// stop resets the device and takes its doorbells away. After an error it may still be at work.
func (f *Function) stop() error {
	if err := f.dev.Reset(); err != nil {
		return fmt.Errorf("reset virtio device %d: %w", f.dev.ID(), err)
	}
	f.active = false
	f.syncDoorbells()
	return nil
}

// reset is the driver's reset (virtio 1.2, 2.4). A device that cannot be stopped keeps asking for another.
func (f *Function) reset() {
	f.resets.Add(1)
	if !f.check(f.stop()) {
		f.NeedsReset()
		return
	}
	f.clear()
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
// configuration change tells it to look (virtio 1.2, 2.1.2).
func (f *Function) NeedsReset() {
	// One word is both the count and what the status shows, so nobody sees the bit before it is counted.
	if n := f.answered.Load(); !f.needed.CompareAndSwap(n, n+1) {
		return // it is asked for already
	}
	_ = f.configInterrupt() // counted; the status still says it
}
