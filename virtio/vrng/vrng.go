// Package vrng is the virtio entropy device (virtio 1.2, 5.4): it fills the buffers of a guest driver with random bytes
// from the host's kernel.
//
// A guest can ask as often and for as much as it likes; what it can use up is one goroutine's time. One worker answers
// one request at a time, straight into the guest's memory, with MaxBytes at most; the rest of a larger buffer stays
// untouched, as the specification allows (5.4.6.2).
package vrng

import (
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// MaxBytes is the most that one request gets, in bytes. Drivers ask for far less at a time.
const MaxBytes = 64 << 10

// queueSize is the number of descriptors that requestq offers. A driver has one or a few buffers in the queue.
const queueSize = 64

// Device is a virtio entropy device. It implements virtio.Device.
type Device struct {
	requests, bytes, malformed, lost atomic.Uint64

	mu       sync.Mutex // makes Activate and Reset exclude each other
	active   bool
	requestq *queue.Queue // nil where the driver left it disabled
	worker   sync.WaitGroup
}

var _ virtio.Device = (*Device)(nil)

// New returns an entropy device.
func New() *Device { return &Device{} }

// ID returns virtio.RNG.
func (d *Device) ID() virtio.ID { return virtio.RNG }

// Features returns the features offered; the device has none of its own.
func (d *Device) Features() virtio.Features { return virtio.RingIndirectDesc | virtio.RingEventIdx }

// QueueSizes returns the size of requestq, the only queue (virtio 1.2, 5.4.2).
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// ReadConfig reads as zeroes: the device has no configuration space (virtio 1.2, 5.4.4).
func (d *Device) ReadConfig(p []byte, _ int) { clear(p) }

// WriteConfig ignores the write.
func (d *Device) WriteConfig([]byte, int) {}

// Activate starts the worker.
func (d *Device) Activate(_ virtio.Features, queues []*queue.Queue, t virtio.Transport) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.active {
		return errors.New("vrng: activated twice without a reset")
	}
	if len(queues) != 1 {
		return fmt.Errorf("vrng: activated with %d queues instead of 1", len(queues))
	}
	d.active = true
	if d.requestq = queues[0]; d.requestq != nil {
		d.worker.Go(func() { d.work(queues[0], t) })
	}
	return nil
}

// Reset stops the worker. When it returns, the device touches no guest memory until the next Activate.
func (d *Device) Reset() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.requestq != nil {
		d.requestq.Stop()
		d.worker.Wait()
	}
	d.active, d.requestq = false, nil
	return nil
}

// Counters are the numbers of a Device since it was made.
type Counters struct {
	Requests          uint64 // requests answered
	Bytes             uint64 // random bytes given
	Malformed         uint64 // requests without a writable byte, returned with length 0
	LostNotifications uint64 // notifications that the transport failed to deliver
}

// Counters returns the numbers so far. It may be called at any time.
func (d *Device) Counters() Counters {
	return Counters{
		Requests:          d.requests.Load(),
		Bytes:             d.bytes.Load(),
		Malformed:         d.malformed.Load(),
		LostNotifications: d.lost.Load(),
	}
}

// work answers requests until Reset stops the queue, or until the queue breaks, which it tells the driver.
func (d *Device) work(q *queue.Queue, t virtio.Transport) {
	var c queue.Chain
	for q.Wait() == nil {
		ok, err := q.Pop(&c)
		if err != nil {
			t.NeedsReset()
			return
		}
		if !ok {
			continue
		}
		q.Push(&c, uint32(d.fill(c.Writable)))
		if q.ShouldNotify() && t.NotifyQueue(0) != nil {
			d.lost.Add(1)
		}
	}
}

// fill writes up to MaxBytes random bytes to the front of v and returns how many.
func (d *Device) fill(v iov.Vec) int {
	n := 0
	for i := 0; i < len(v) && n < MaxBytes; i++ {
		b := v[i].Bytes()
		b = b[:min(len(b), MaxBytes-n)]
		_, _ = rand.Read(b) // never fails (crypto/rand)
		n += len(b)
	}
	d.requests.Add(1)
	d.bytes.Add(uint64(n))
	if n == 0 {
		d.malformed.Add(1)
	}
	return n
}
