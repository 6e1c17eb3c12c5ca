package queuetest

import (
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// Transport is a virtio.Transport without a bus: it takes a device's notifications to the drivers of its queues.
type Transport struct {
	Drivers  []*Driver // one for each queue
	Features virtio.Features

	dev     virtio.Device
	changes atomic.Int64
	once    sync.Once
	needs   chan struct{}
}

var _ virtio.Transport = (*Transport)(nil)

// Start activates dev with the features it offers out of want, and VersionOne, over queues of their maximum size in one
// guest memory. The device is reset when the test ends. Options other than the features say where the memory is; each
// queue takes Len bytes of it.
func Start(tb testing.TB, dev virtio.Device, want virtio.Features, opts Options) *Transport {
	tb.Helper()
	t := &Transport{
		Features: dev.Features()&want | virtio.VersionOne,
		dev:      dev,
		needs:    make(chan struct{}),
	}
	sizes := dev.QueueSizes()
	if opts.Len == 0 {
		opts.Len = DefaultLen
	}
	if opts.Memory == nil {
		opts.Memory = newMemory(tb, opts.Base+opts.Len*uint64(len(sizes)))
	}
	opts.EventIdx = t.Features.Has(virtio.RingEventIdx)
	opts.Indirect = t.Features.Has(virtio.RingIndirectDesc)
	var queues []*queue.Queue
	for _, size := range sizes {
		d := New(tb, size, opts)
		t.Drivers = append(t.Drivers, d)
		queues = append(queues, d.Queue)
		opts.Base += opts.Len
	}
	tb.Cleanup(func() {
		if err := dev.Reset(); err != nil {
			tb.Errorf("reset: %v", err)
		}
	})
	if n, ok := dev.(virtio.Negotiator); ok {
		n.Negotiated(t.Features)
	}
	if err := dev.Activate(t.Features, queues, t); err != nil {
		tb.Fatalf("activate: %v", err)
	}
	return t
}

// NotifyQueue implements virtio.Transport.
func (t *Transport) NotifyQueue(i int) error {
	t.Drivers[i].Interrupt()
	return nil
}

// NotifyConfig implements virtio.Transport.
func (t *Transport) NotifyConfig() error {
	t.changes.Add(1)
	return nil
}

// NeedsReset implements virtio.Transport.
func (t *Transport) NeedsReset() { t.once.Do(func() { close(t.needs) }) }

// ConfigChanges returns the number of calls of NotifyConfig.
func (t *Transport) ConfigChanges() int { return int(t.changes.Load()) }

// NeedingReset returns a channel that is closed once the device asked for a reset.
func (t *Transport) NeedingReset() <-chan struct{} { return t.needs }
