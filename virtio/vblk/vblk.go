// Package vblk is the virtio block device (virtio 1.2, 5.2): it makes requests to a blk.Device of those of a guest driver.
//
// A request travels in this order: server.pass takes a chain off the queue, Device.begin parses it, server.sendOff gives
// the blk.Device what there is for the disk to do, server.partDone is told when that is done, server.finish hands the chain
// back and server.notify notifies the driver. Where the disk is fast, server.carryOut does all of the latter at once.
//
// While the blk.Device is drained, requests of the driver wait there: the device is at rest. One that the disk was done with
// just before may still be on its way back.
//
// What a driver gets for requests that the specification does not allow:
//
//   - no header, or a header cut short; data of a length that is not a multiple of 512 bytes, or of 16 bytes for discards
//     and zeroes; data in the wrong direction; a range beyond the disk; more sectors or ranges than the configuration
//     allows; a change of a read-only disk: status IOERR, nothing is read or written.
//   - an unknown type; an unknown flag of a range, or unmap for a discard: status UNSUPP, nothing is done.
//   - no byte for the status: the chain comes back with length 0, since there is no other way to answer.
//
// None of these stops the queue. A chain that the queue itself cannot follow does: the device then sets
// DEVICE_NEEDS_RESET and waits for the driver to reset it.
package vblk

import (
	"context"
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
	FeatureSizeMax     virtio.Features = 1 << 1  // config.SizeMax is valid
	FeatureSegMax      virtio.Features = 1 << 2  // config.SegMax is valid
	FeatureReadOnly    virtio.Features = 1 << 5  // the disk refuses writes
	FeatureBlockSize   virtio.Features = 1 << 6  // config.BlockSize is valid
	FeatureFlush       virtio.Features = 1 << 9  // writes may be cached until a flush request
	FeatureTopology    virtio.Features = 1 << 10 // the topology fields of config are valid
	FeatureConfigWCE   virtio.Features = 1 << 11 // config.Writeback is valid, and the driver may change it
	FeatureMQ          virtio.Features = 1 << 12 // config.NumQueues is valid
	FeatureDiscard     virtio.Features = 1 << 13 // the discard fields of config are valid
	FeatureWriteZeroes virtio.Features = 1 << 14 // the fields of config about zeroes are valid
)

const (
	defaultQueueSize = 256
	maxQueues        = 1024 // more queues than any guest has CPUs are a mistake
)

// Options says how a disk is presented. The zero value gives one queue of 256 descriptors and no ID.
type Options struct {
	ID           string // serial number that the guest sees, up to 20 bytes of printable ASCII
	QueueSize    int    // descriptors per queue, a power of two from 4 to 32768; 0 means 256
	NumQueues    int    // request queues; 0 means 1
	LogicalBlock int    // unit that the guest should read and write in, a power of two from 512 to 4096; 0 means 512
}

// Device is a virtio block device. It implements virtio.Device. The disk stays its caller's: it must outlive the
// Device, and nobody closes it here.
type Device struct {
	disk     *blk.Device
	id       [idSize]byte
	features virtio.Features
	sizes    []uint16
	block    int
	fixed    [configSize]byte // the configuration, without what changes

	writeback atomic.Bool // completed writes need a flush to be stable; written under mu

	malformed, unsupported, lost atomic.Uint64

	lifecycle sync.Mutex // held by Activate and Reset from end to end

	mu         sync.Mutex // guards what follows
	active     *activation
	negotiated virtio.Features // 0 before that
	capacity   uint64          // in sectors
	generation uint8           // of the configuration
}

var (
	_ virtio.ConfigGenerator = (*Device)(nil)
	_ virtio.Negotiator      = (*Device)(nil)
)

// activation is one life of the device between DRIVER_OK and reset.
type activation struct {
	transport virtio.Transport
	ctx       context.Context // ends, under Device.mu, when a reset begins
	cancel    context.CancelFunc
	servers   []*server
	notifying sync.WaitGroup // notifications of changes of the configuration
}

// New returns a device that presents disk, read-only where disk is. For as long as disk lives, it tells the device when it
// is resized.
func New(disk *blk.Device, o Options) (*Device, error) {
	o.QueueSize = orDefault(o.QueueSize, defaultQueueSize)
	o.NumQueues = orDefault(o.NumQueues, 1)
	o.LogicalBlock = orDefault(o.LogicalBlock, defaultBlock)
	id, err := makeID(o.ID)
	switch {
	case err != nil:
		return nil, err
	case o.QueueSize < 4 || o.QueueSize > queue.MaxSize || o.QueueSize&(o.QueueSize-1) != 0:
		return nil, fmt.Errorf("vblk: queue size %d: want a power of two from 4 to %d", o.QueueSize, queue.MaxSize)
	case o.NumQueues < 1 || o.NumQueues > maxQueues:
		return nil, fmt.Errorf("vblk: %d queues: want 1 to %d", o.NumQueues, maxQueues)
	case o.LogicalBlock < blk.SectorSize || o.LogicalBlock > maxBlock || o.LogicalBlock&(o.LogicalBlock-1) != 0:
		return nil, fmt.Errorf("vblk: logical blocks of %d bytes: want a power of two from %d to %d",
			o.LogicalBlock, blk.SectorSize, maxBlock)
	}

	d := &Device{disk: disk, id: id, sizes: make([]uint16, o.NumQueues), block: o.LogicalBlock}
	for i := range d.sizes {
		d.sizes[i] = uint16(o.QueueSize)
	}
	d.features = FeatureSizeMax | FeatureSegMax | FeatureBlockSize | FeatureFlush | FeatureConfigWCE | FeatureTopology |
		virtio.RingIndirectDesc | virtio.RingEventIdx
	if disk.ReadOnly() {
		d.features |= FeatureReadOnly
	} else {
		d.features |= FeatureWriteZeroes
	}
	if discards(disk) {
		d.features |= FeatureDiscard
	}
	if o.NumQueues > 1 {
		d.features |= FeatureMQ
	}
	d.fixed = newConfig(disk, o).encode()
	d.writeback.Store(true)
	d.capacity = sectors(disk, d.block)
	disk.OnResize(d.resized)
	d.remeasure() // in case that it came between
	return d, nil
}

// ID returns virtio.Block.
func (d *Device) ID() virtio.ID { return virtio.Block }

// Features returns the features offered.
func (d *Device) Features() virtio.Features { return d.features }

// QueueSizes returns the maximum size of each request queue.
func (d *Device) QueueSizes() []uint16 { return slices.Clone(d.sizes) }

// Negotiated implements virtio.Negotiator. A driver that does not know flushes takes a completed write for a stable one
// (virtio 1.2, 5.2.5.2 and 5.2.6.2); so the cache begins as writeback for one that does only.
func (d *Device) Negotiated(f virtio.Features) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.negotiate(f)
}

// negotiate is Negotiated, with mu held.
func (d *Device) negotiate(f virtio.Features) {
	d.negotiated = f
	d.writeback.Store(f.Has(FeatureFlush))
}

// Activate starts serving every queue that the driver enabled.
func (d *Device) Activate(f virtio.Features, queues []*queue.Queue, t virtio.Transport) error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.active != nil {
		return errors.New("vblk: activated twice without a reset")
	}
	if len(queues) != len(d.sizes) {
		return fmt.Errorf("vblk: activated with %d queues instead of %d", len(queues), len(d.sizes))
	}
	if d.negotiated != f {
		d.negotiate(f)
	}
	a := &activation{transport: t}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	d.active = a
	for i, q := range queues {
		if q != nil {
			a.servers = append(a.servers, startServer(a.ctx, d, q, i, t))
		}
	}
	return nil
}

// Reset stops serving and waits for the requests under way. What of them the disk has begun it completes, at most 4 MiB or
// one range of each; the rest is not carried out, and its status is IOERR. When Reset returns, nothing is under way and
// the device touches no guest memory until the next Activate.
func (d *Device) Reset() error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	d.mu.Lock()
	a := d.active
	if a != nil {
		a.cancel()
	}
	d.mu.Unlock()
	if a != nil {
		for _, s := range a.servers {
			s.queue.Stop()
		}
		for _, s := range a.servers {
			s.stop()
		}
		a.notifying.Wait()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.active = nil
	d.negotiated = 0
	d.writeback.Store(true)
	return nil
}

// Counters are numbers that blk.Device and queue.Queue do not have, since the device was made.
type Counters struct {
	Malformed         uint64 // requests without a header or a status byte, with data of the wrong form, or with bad ranges
	Unsupported       uint64 // requests of an unknown type, or with unknown flags
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
