// Package vnet is the virtio network device (virtio 1.2, section 5.1): one receive and one transmit queue in front of a
// net.Backend. Frames travel between the backend and the guest's own buffers without being copied here.
package vnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// Feature bits beside the offloads, which net.Features holds with the same numbers (virtio 1.2, 5.1.3).
const (
	FeatureMTU      virtio.Features = 1 << 3  // mtu in the configuration space is valid
	FeatureMAC      virtio.Features = 1 << 5  // mac is valid
	FeatureMrgRxBuf virtio.Features = 1 << 15 // a received frame may be spread over several buffers
	FeatureStatus   virtio.Features = 1 << 16 // status is valid
)

// Queue numbers (virtio 1.2, 5.1.2).
const (
	rxQueue = 0
	txQueue = 1
)

// statusLinkUp is VIRTIO_NET_S_LINK_UP (virtio 1.2, 5.1.4).
const statusLinkUp = 1

// configSize is the length of the part of struct virtio_net_config up to mtu (virtio 1.2, 5.1.4).
const configSize = 12

// DefaultMTU is what a driver takes for a card that tells it nothing.
const DefaultMTU = 1500

// Limits of Options.
const (
	MinMTU           = 68 // virtio 1.2, 5.1.4.1
	DefaultQueueSize = 256
	MaxQueueSize     = 1024
)

// Options describe a card. The zero value is a card with a random address.
type Options struct {
	MAC       net.MAC // the card's address; zero: random
	MTU       int     // told to the driver, MinMTU to 65535; 0: nothing is told
	QueueSize int     // of each queue, a power of two up to MaxQueueSize; 0: DefaultQueueSize
}

// Device is a virtio network card. It implements virtio.ConfigGenerator. All methods may be called from any goroutine.
type Device struct {
	backend   net.Backend
	mac       net.MAC
	mtu       uint16
	queueSize uint16
	offloads  net.Features // that backend can do
	stats     counters

	lifecycle sync.Mutex // held by Activate, Reset and Close from end to end

	mu         sync.Mutex // guards what follows
	active     *activation
	unplugged  bool  // by SetLink
	failure    error // of the backend, since Activate
	generation uint8 // of the configuration
}

var _ virtio.ConfigGenerator = (*Device)(nil)

// activation is one life of the device between DRIVER_OK and reset.
type activation struct {
	transport virtio.Transport
	queues    []*queue.Queue
	features  virtio.Features
	offloads  net.Features
	stopping  atomic.Bool // set under Device.mu
	workers   sync.WaitGroup
}

// New returns a card on b, which belongs to it from then on.
func New(b net.Backend, o Options) (*Device, error) {
	d := &Device{backend: b, mac: o.MAC, mtu: uint16(o.MTU), queueSize: uint16(o.QueueSize)}
	if o.MAC == (net.MAC{}) {
		d.mac = net.RandomMAC()
	}
	if err := d.mac.Check(); err != nil {
		return nil, err
	}
	if o.MTU != 0 && (o.MTU < MinMTU || o.MTU > 65535) {
		return nil, fmt.Errorf("vnet: MTU %d: must be %d to 65535", o.MTU, MinMTU)
	}
	if o.QueueSize == 0 {
		d.queueSize = DefaultQueueSize
	} else if o.QueueSize < 0 || o.QueueSize > MaxQueueSize || o.QueueSize&(o.QueueSize-1) != 0 {
		return nil, fmt.Errorf("vnet: queue size %d: must be a power of two up to %d", o.QueueSize, MaxQueueSize)
	}
	d.offloads = b.Features() & net.Offloads
	return d, nil
}

// MAC returns the card's address.
func (d *Device) MAC() net.MAC { return d.mac }

// SetLink plugs the cable in or out, as the driver sees it. A new card is plugged in.
func (d *Device) SetLink(up bool) {
	if a := d.plug(up); a != nil {
		_ = a.transport.NotifyConfig() // a driver that misses it still reads the right status
		a.workers.Done()
	}
}

// plug stores the state of the cable. It returns the activation whose driver is to be told, if any, with a place among
// its workers, so that a reset waits until that is done.
func (d *Device) plug(up bool) *activation {
	d.mu.Lock()
	defer d.mu.Unlock()
	changed := d.unplugged == up
	d.unplugged = !up
	if changed {
		d.generation++
	}
	if !changed || d.active == nil || d.active.stopping.Load() {
		return nil
	}
	d.active.workers.Add(1)
	return d.active
}

// Err returns the error that ended reception since the device was last activated, or nil. The link is down then.
func (d *Device) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failure
}

// ID returns virtio.Net.
func (d *Device) ID() virtio.ID { return virtio.Net }

// Features returns what the card offers: the offloads are those of the backend.
func (d *Device) Features() virtio.Features {
	f := FeatureMAC | FeatureStatus | FeatureMrgRxBuf | virtio.RingIndirectDesc | virtio.RingEventIdx
	if d.mtu != 0 {
		f |= FeatureMTU
	}
	return f | virtio.Features(d.offloads)
}

// QueueSizes returns the sizes of the receive and the transmit queue.
func (d *Device) QueueSizes() []uint16 { return []uint16{d.queueSize, d.queueSize} }

// ReadConfig reads struct virtio_net_config (virtio 1.2, 5.1.4).
func (d *Device) ReadConfig(p []byte, off int) {
	var c [configSize]byte
	copy(c[0:6], d.mac[:]) // 0: mac
	d.mu.Lock()
	if !d.unplugged && d.failure == nil {
		binary.LittleEndian.PutUint16(c[6:], statusLinkUp) // 6: status
	}
	d.mu.Unlock()
	// 8: max_virtqueue_pairs stays 0, as VIRTIO_NET_F_MQ is not offered.
	binary.LittleEndian.PutUint16(c[10:], d.mtu) // 10: mtu
	clear(p)
	if off >= 0 && off < configSize {
		copy(p, c[off:])
	}
}

// ConfigGeneration implements virtio.ConfigGenerator.
func (d *Device) ConfigGeneration() uint8 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.generation
}

// WriteConfig ignores the write: since virtio 1 the driver may change nothing here.
func (d *Device) WriteConfig([]byte, int) {}

// Activate tells the backend what was negotiated and starts the workers.
func (d *Device) Activate(f virtio.Features, queues []*queue.Queue, t virtio.Transport) error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	if len(queues) != 2 {
		return fmt.Errorf("vnet: activated with %d queues, has 2", len(queues))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.active != nil {
		return errors.New("vnet: activated twice without a reset between")
	}
	a := &activation{transport: t, queues: queues, features: f}
	a.offloads = (net.Features(f) & d.offloads).Complete()
	if err := d.backend.SetFeatures(a.offloads, net.HeaderLen); err != nil {
		return fmt.Errorf("vnet: negotiate with the backend: %w", err)
	}
	if err := d.backend.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("vnet: start the backend: %w", err)
	}
	d.active = a
	d.setFailure(nil)
	if q := queues[rxQueue]; q != nil {
		a.workers.Go(newReceiver(d, a, q).run)
	}
	if q := queues[txQueue]; q != nil {
		a.workers.Go((&transmitter{activation: a, dev: d, queue: q}).run)
	}
	return nil
}

// Reset stops the workers, also where they wait for the backend, and waits for them. A frame that was received in part
// is dropped; frames that wait in the backend stay there. On a device that is not active it does nothing.
func (d *Device) Reset() error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	return d.reset()
}

// Close resets the device and closes the backend.
func (d *Device) Close() error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	return errors.Join(d.reset(), d.backend.Close())
}

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

func (d *Device) reset() error {
	d.mu.Lock()
	a := d.active
	if a != nil {
		a.stopping.Store(true)
	}
	d.mu.Unlock()
	if a == nil {
		return nil
	}
	for _, q := range a.queues {
		if q != nil {
			q.Stop()
		}
	}
	err := d.backend.SetDeadline(longAgo)
	if err != nil {
		// A backend that cannot be interrupted must go, as its worker holds guest memory.
		err = errors.Join(err, d.backend.Close())
	}
	a.workers.Wait()
	d.mu.Lock()
	d.active = nil
	d.mu.Unlock()
	return err
}

// fail records that no more frames will come, and takes the link down.
func (d *Device) fail(a *activation, err error) {
	d.mu.Lock()
	d.setFailure(err)
	d.mu.Unlock()
	_ = a.transport.NotifyConfig()
}

// setFailure sets the failure, which is part of the configuration's status. d.mu is held.
func (d *Device) setFailure(err error) {
	if (d.failure == nil) != (err == nil) {
		d.generation++
	}
	d.failure = err
}
