// Package vconsole is the virtio console device (virtio 1.2, section 5.3): named byte channels between host and guest,
// and on request a terminal (hvc0 in Linux). Each channel is a Port on the host and a /dev/vportNpM in the guest, where
// /sys/class/virtio-ports/*/name tells which is which.
//
// A Port's data travels without buffering towards the guest: Write lends its bytes to a worker, which copies them into
// the guest's own buffers. Towards the host there is one ring of fixed size per port, so that what the guest sent before
// a reset or a power-off can still be read. Nothing that the guest does makes the host allocate.
package vconsole

import (
	"encoding/binary"
	"fmt"
	"sync"
	"unicode"

	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// Feature bits (virtio 1.2, 5.3.3).
const (
	FeatureSize      virtio.Features = 1 << 0 // cols and rows in the configuration space are valid
	FeatureMultiport virtio.Features = 1 << 1 // several ports, told apart by control queues
)

// Limits of a device. Linux puts the name of a port into a sysfs file of one page; 128 bytes are ample.
const (
	MaxPorts = 30  // named ports of one device
	MaxName  = 128 // bytes in a port's name
)

// Queue sizes. Linux fills every receive queue of a port with buffers of one page: 64 of them are 256 KiB.
const (
	dataQueueSize    = 64
	controlQueueSize = 32
)

// Queue numbers (virtio 1.2, 5.3.2): port 0 has 0 and 1, the control queues are 2 and 3, port n > 0 has 2n+2 and 2n+3.
const (
	controlRx = 2
	controlTx = 3
)

// configSize is the length of struct virtio_console_config (virtio 1.2, 5.3.4).
const configSize = 12

// Options say which ports a device has.
type Options struct {
	// Console makes port 0 a terminal, which Linux drives as /dev/hvc0. Without it port 0 does not exist, and a driver
	// that knows no other port writes into the void.
	Console bool
	// Ports are the names of the byte channels, 1 to MaxName printable bytes each, at most MaxPorts and all different.
	Ports []string
}

// Device is a virtio console. It implements virtio.ConfigGenerator. All methods may be called from any goroutine.
type Device struct {
	ports []*Port // by port number; ports[0] is nil without a console

	lifecycle sync.Mutex // held by Activate, Reset and Close from end to end

	mu      sync.Mutex  // guards what follows and the state of all ports
	active  *activation // nil unless the driver runs the device
	control *sync.Cond  // a pending bit was set, or the activation ends
	cols    uint16
	rows    uint16
	changes uint8 // of the configuration: its generation
	stats   Stats
}

var _ virtio.ConfigGenerator = (*Device)(nil)

// Stats are a device's counters since New.
type Stats struct {
	ToGuest    uint64 // bytes that Write handed to the guest
	FromGuest  uint64 // bytes that the guest sent and Read can see
	Discarded  uint64 // bytes that the guest sent to a port that the host closed, or to a console nobody reads
	BadControl uint64 // control messages that made no sense and were ignored
}

// activation is one life of the device between DRIVER_OK and reset.
type activation struct {
	transport virtio.Transport
	queues    []*queue.Queue
	multiport bool
	workers   sync.WaitGroup
	stopping  bool // guarded by Device.mu
}

// New returns a device with the ports that o names. They exist at once: a Write waits until the guest opens its port.
func New(o Options) (*Device, error) {
	if len(o.Ports) > MaxPorts {
		return nil, fmt.Errorf("vconsole: %d ports asked for, at most %d are possible", len(o.Ports), MaxPorts)
	}
	d := &Device{ports: make([]*Port, 1, 1+len(o.Ports))}
	d.control = sync.NewCond(&d.mu)
	if o.Console {
		d.ports[0] = newPort(d, 0, "")
	}
	for i, name := range o.Ports {
		if err := checkName(name); err != nil {
			return nil, err
		}
		if d.Port(name) != nil {
			return nil, fmt.Errorf("vconsole: two ports have the name %q", name)
		}
		d.ports = append(d.ports, newPort(d, uint32(i+1), name))
	}
	return d, nil
}

func checkName(name string) error {
	if name == "" || len(name) > MaxName {
		return fmt.Errorf("vconsole: port name %q: must have 1 to %d bytes", name, MaxName)
	}
	for _, r := range name {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return fmt.Errorf("vconsole: port name %q: must be printable", name)
		}
	}
	return nil
}

// Port returns the port with that name, or nil.
func (d *Device) Port(name string) *Port {
	for _, p := range d.ports[1:] {
		if p.name == name {
			return p
		}
	}
	return nil
}

// Console returns the console port, or nil when the device has none.
func (d *Device) Console() *Port { return d.ports[0] }

// Stats returns the counters.
func (d *Device) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

// Resize tells the guest the size of the console's terminal in characters. It may be called at any time, before the
// guest runs too, and does nothing without a console.
func (d *Device) Resize(cols, rows uint16) {
	if a := d.resize(cols, rows); a != nil {
		// A driver that misses this interrupt still finds the size in the configuration space.
		_ = a.transport.NotifyConfig()
		a.workers.Done()
	}
}

// resize stores the size. It returns the activation whose driver is to be told, if any, with a place among its workers,
// so that a reset waits until that is done.
func (d *Device) resize(cols, rows uint16) *activation {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.ports[0]
	if p == nil || (d.cols == cols && d.rows == rows) {
		return nil
	}
	d.cols, d.rows = cols, rows
	d.changes++
	if p.ready {
		d.send(p, pendingResize)
	}
	if d.active == nil || d.active.stopping {
		return nil
	}
	d.active.workers.Add(1)
	return d.active
}

// ID returns virtio.Console.
func (d *Device) ID() virtio.ID { return virtio.Console }

// Features returns what the device offers.
func (d *Device) Features() virtio.Features {
	f := FeatureMultiport | virtio.RingIndirectDesc | virtio.RingEventIdx
	if d.ports[0] != nil {
		f |= FeatureSize
	}
	return f
}

// QueueSizes returns two sizes per port, and those of the two control queues after port 0's.
func (d *Device) QueueSizes() []uint16 {
	sizes := make([]uint16, 2*len(d.ports)+2)
	for i := range sizes {
		sizes[i] = dataQueueSize
	}
	sizes[controlRx], sizes[controlTx] = controlQueueSize, controlQueueSize
	return sizes
}

// ReadConfig reads struct virtio_console_config (virtio 1.2, 5.3.4).
func (d *Device) ReadConfig(p []byte, off int) {
	var c [configSize]byte
	d.mu.Lock()
	binary.LittleEndian.PutUint16(c[0:], d.cols)               // 0: cols
	binary.LittleEndian.PutUint16(c[2:], d.rows)               // 2: rows
	binary.LittleEndian.PutUint32(c[4:], uint32(len(d.ports))) // 4: max_nr_ports
	d.mu.Unlock()
	// 8: emerg_wr stays 0, as VIRTIO_CONSOLE_F_EMERG_WRITE is not offered.
	clear(p)
	if off >= 0 && off < configSize {
		copy(p, c[off:])
	}
}

// ConfigGeneration implements virtio.ConfigGenerator.
func (d *Device) ConfigGeneration() uint8 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changes
}

// WriteConfig ignores the write: the driver may change nothing here.
func (d *Device) WriteConfig([]byte, int) {}

// Activate starts the workers. The transport calls it at DRIVER_OK with one queue, or nil, per element of QueueSizes.
func (d *Device) Activate(f virtio.Features, queues []*queue.Queue, t virtio.Transport) error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	if want := 2*len(d.ports) + 2; len(queues) != want {
		return fmt.Errorf("vconsole: activated with %d queues, has %d", len(queues), want)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.active != nil {
		return fmt.Errorf("vconsole: activated twice without a reset between")
	}
	a := &activation{transport: t, queues: queues, multiport: f&FeatureMultiport != 0}
	d.active = a
	if a.multiport {
		d.start(a, controlRx, d.announce)
		d.start(a, controlTx, d.obey)
	}
	for id, p := range d.ports {
		if id > 0 && !a.multiport {
			break
		}
		if p == nil {
			d.start(a, txQueue(id), d.discard)
			continue
		}
		p.tx = queues[txQueue(id)]
		if !a.multiport {
			p.setOpen(true) // virtio 1.2, 5.3.5: without control queues there is one port, and it is simply there
		}
		d.start(a, rxQueue(id), p.feed)
		d.start(a, txQueue(id), p.drain)
	}
	return nil
}

// Reset stops the workers and waits for them; no guest memory is touched after it returns. What the guest had sent is
// taken into the ports' rings first, as far as there is room. Open ports see the end of their session: Read returns
// io.EOF behind the last byte, a Write in progress os.ErrClosed. On a device that is not active it does nothing.
func (d *Device) Reset() error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	d.reset()
	return nil
}

// Close resets the device and closes all its ports.
func (d *Device) Close() error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	d.reset()
	for _, p := range d.ports {
		if p != nil {
			p.Close()
		}
	}
	return nil
}

func (d *Device) reset() {
	d.mu.Lock()
	a := d.active
	if a == nil {
		d.mu.Unlock()
		return
	}
	a.stopping = true
	d.control.Broadcast()
	for _, p := range d.ports {
		if p != nil {
			p.resets++
			p.changed.Broadcast()
		}
	}
	d.mu.Unlock()
	// Woken and not stopped: drain pops what is there before it goes.
	for _, q := range a.queues {
		if q != nil {
			q.Wake()
		}
	}
	a.workers.Wait()
	for _, q := range a.queues {
		if q != nil {
			q.Stop()
		}
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	d.active = nil
	for _, p := range d.ports {
		if p != nil {
			p.endActivation()
		}
	}
}

// start runs work on queue number i, unless the driver left that queue disabled. Work that ends with an error met
// something that only a reset by the driver can mend. d.mu is held.
func (d *Device) start(a *activation, i int, work func(*worker) error) {
	if a.queues[i] == nil {
		return
	}
	w := &worker{activation: a, queue: a.queues[i], index: i}
	a.workers.Go(func() {
		if work(w) != nil {
			a.transport.NeedsReset()
		}
	})
}
