// Package vblk is the virtio block device (virtio 1.2, 5.2): it turns the requests of a guest driver into reads, writes
// and flushes of a blk.Device.
//
// A request travels in this order: server.next takes a chain off the queue, Device.serve finds its status byte and has
// execute parse and carry out what the header asks for, server.finish hands the chain back and notifies the driver.
//
// What a driver gets for requests that the specification does not allow:
//
//   - no header, or a header cut short; data of a length that is not a multiple of 512 bytes; data in the wrong
//     direction; a range beyond the disk; a write to a read-only disk: status IOERR, nothing is read or written.
//   - an unknown type: status UNSUPP.
//   - no byte for the status: the chain comes back with length 0, since there is no other way to answer.
//
// None of these stops the queue. A chain that the queue itself cannot follow does: the device then sets
// DEVICE_NEEDS_RESET and waits for the driver to reset it.
package vblk

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// Feature bits (virtio 1.2, 5.2.3).
const (
	FeatureSegMax    virtio.Features = 1 << 2  // config.SegMax is valid
	FeatureReadOnly  virtio.Features = 1 << 5  // the disk refuses writes
	FeatureBlockSize virtio.Features = 1 << 6  // config.BlockSize is valid
	FeatureFlush     virtio.Features = 1 << 9  // writes are cached until a flush request
	FeatureTopology  virtio.Features = 1 << 10 // the topology fields of config are valid
	FeatureMQ        virtio.Features = 1 << 12 // config.NumQueues is valid
)

const (
	defaultQueueSize = 256
	defaultWorkers   = 16
	maxQueues        = 1024 // more queues than any guest has CPUs are a mistake
	maxWorkers       = 1024
)

// Options says how a disk is presented. The zero value gives one queue of 256 descriptors and no ID.
type Options struct {
	ID        string // serial number that the guest sees, up to 20 bytes of printable ASCII
	QueueSize int    // descriptors per queue, a power of two from 4 to 32768; 0 means 256
	NumQueues int    // request queues; 0 means 1
	Workers   int    // requests of one queue that are under way at once; 0 means 16
}

// Device is a virtio block device. It implements virtio.Device. The disk stays its caller's: it must outlive the
// Device, and nobody closes it here.
type Device struct {
	disk     *blk.Device
	id       [idSize]byte
	features virtio.Features
	sizes    []uint16
	workers  int
	config   []byte

	writethrough bool // set by Activate before any worker starts

	malformed, unsupported, lost atomic.Uint64

	stopping atomic.Bool // Reset is waiting for the workers

	mu      sync.Mutex // makes Activate and Reset exclude each other
	servers []*server
}

var _ virtio.Device = (*Device)(nil)

// New returns a device that presents disk, read-only where disk is.
func New(disk *blk.Device, o Options) (*Device, error) {
	o.QueueSize = orDefault(o.QueueSize, defaultQueueSize)
	o.NumQueues = orDefault(o.NumQueues, 1)
	o.Workers = orDefault(o.Workers, defaultWorkers)
	id, err := makeID(o.ID)
	switch {
	case err != nil:
		return nil, err
	case o.QueueSize < 4 || o.QueueSize > queue.MaxSize || o.QueueSize&(o.QueueSize-1) != 0:
		return nil, fmt.Errorf("vblk: queue size %d: want a power of two from 4 to %d", o.QueueSize, queue.MaxSize)
	case o.NumQueues < 1 || o.NumQueues > maxQueues:
		return nil, fmt.Errorf("vblk: %d queues: want 1 to %d", o.NumQueues, maxQueues)
	case o.Workers < 1 || o.Workers > maxWorkers:
		return nil, fmt.Errorf("vblk: %d workers: want 1 to %d", o.Workers, maxWorkers)
	}

	d := &Device{disk: disk, id: id, sizes: make([]uint16, o.NumQueues), workers: o.Workers}
	for i := range d.sizes {
		d.sizes[i] = uint16(o.QueueSize)
	}
	d.features = FeatureSegMax | FeatureBlockSize | FeatureFlush | FeatureTopology |
		virtio.RingIndirectDesc | virtio.RingEventIdx
	if disk.ReadOnly() {
		d.features |= FeatureReadOnly
	}
	if o.NumQueues > 1 {
		d.features |= FeatureMQ
	}
	d.config = newConfig(disk, o).encode()
	return d, nil
}

// ID returns virtio.Block.
func (d *Device) ID() virtio.ID { return virtio.Block }

// Features returns the features offered.
func (d *Device) Features() virtio.Features { return d.features }

// QueueSizes returns the maximum size of each request queue.
func (d *Device) QueueSizes() []uint16 { return slices.Clone(d.sizes) }

// ReadConfig copies the configuration space (virtio 1.2, 5.2.4) from off on to p; beyond its end it reads as zeroes.
func (d *Device) ReadConfig(p []byte, off int) {
	clear(p)
	if off >= 0 && off < len(d.config) {
		copy(p, d.config[off:])
	}
}

// WriteConfig ignores the write: no field is writable with the features offered.
func (d *Device) WriteConfig([]byte, int) {}

// Activate starts the workers of every queue that the driver enabled.
func (d *Device) Activate(f virtio.Features, queues []*queue.Queue, t virtio.Transport) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.servers != nil {
		return errors.New("vblk: activated twice without a reset")
	}
	if len(queues) != len(d.sizes) {
		return fmt.Errorf("vblk: activated with %d queues instead of %d", len(queues), len(d.sizes))
	}
	// A driver that does not know flushes takes a completed write for a stable one (virtio 1.2, 5.2.6.2).
	d.writethrough = !f.Has(FeatureFlush)
	d.stopping.Store(false)
	d.servers = make([]*server, 0, len(queues))
	for i, q := range queues {
		if q != nil {
			d.servers = append(d.servers, startServer(d, q, i, t))
		}
	}
	return nil
}

// Reset stops the workers after the requests they have in hand; of a long one, after the 4 MiB that are under way: the
// rest is not carried out, and its status is IOERR. When Reset returns, no worker runs and the device touches no guest
// memory until the next Activate.
func (d *Device) Reset() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopping.Store(true)
	for _, s := range d.servers {
		s.queue.Stop()
	}
	for _, s := range d.servers {
		s.workers.Wait()
	}
	d.servers = nil
	return nil
}

// Counters are numbers that blk.Device and queue.Queue do not have, since the device was made.
type Counters struct {
	Malformed         uint64 // requests without a header, a status byte, or data of the right length and direction
	Unsupported       uint64 // requests of an unknown type
	LostNotifications uint64 // notifications that the transport failed to deliver
}

// Counters returns the numbers so far. It may be called at any time.
func (d *Device) Counters() Counters {
	return Counters{
		Malformed:         d.malformed.Load(),
		Unsupported:       d.unsupported.Load(),
		LostNotifications: d.lost.Load(),
	}
}

func orDefault(n, def int) int {
	if n == 0 {
		return def
	}
	return n
}
