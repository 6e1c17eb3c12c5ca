// Package pci puts a virtio device on a PCI bus: the modern transport of virtio 1.2, 4.1, without the legacy interface.
//
// A Function is a PCI function with one 32-bit memory BAR:
//
//	0x0000 common configuration    0x3000 notification, 4 bytes for each queue
//	0x1000 ISR status              0x4000 MSI-X table
//	0x2000 device configuration    0x5000 MSI-X pending bits
//
// Files follow the parts: config.go the configuration space, bar.go the memory, common.go the common configuration,
// status.go the life of the device, doorbell.go notifications from the driver, msix.go and intx.go those to it.
//
// Locks: Function.mu serialises what the guest does through registers, and is held while the device is activated, but
// not while it is reset, which waits for the device's I/O. What a device's worker calls (the virtio.Transport methods)
// takes only the locks of one vector and of the interrupt line, which are never held while waiting for the device. An
// access to another function's memory takes no lock here.
package pci

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/guest/memory"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// Host is what the machine gives one function. Its methods may be called from any goroutine. They must not call the
// Function and must not wait for a vCPU: they are called from vCPUs' threads, SetINTx also from devices' workers.
type Host interface {
	// AddMSI makes every signal of ev send the message (addr, data), until RemoveMSI. id names it.
	AddMSI(ev *queue.Event, addr uint64, data uint32) (id int, err error)
	// UpdateMSI changes the message of id.
	UpdateMSI(id int, addr uint64, data uint32) error
	// RemoveMSI undoes AddMSI.
	RemoveMSI(id int, ev *queue.Event) error

	// SetINTx drives the function's level-triggered interrupt line.
	SetINTx(asserted bool) error

	// AddIOEvent makes a guest's write of 2 bytes, or of any width, to the guest-physical address addr signal ev instead
	// of reaching WriteMMIO. On an error the function does without.
	AddIOEvent(addr uint64, ev *queue.Event) error
	// RemoveIOEvent undoes AddIOEvent.
	RemoveIOEvent(addr uint64, ev *queue.Event) error
}

// MaxQueues is the number of queues that a function has room for.
const MaxQueues = 255

// ErrDevice reports a device that a function cannot carry.
var ErrDevice = errors.New("virtio device does not fit PCI")

// unsupported are the features that need something of the transport or the queue that is not there.
const unsupported = virtio.RingPacked | virtio.SRIOV | virtio.NotificationData | virtio.NotifConfigData |
	virtio.RingReset

// Counters counts events since New.
type Counters struct {
	Interrupts uint64 // notifications sent, by message or line
	Held       uint64 // notifications that a mask or the lack of bus mastering made pending
	Doorbells  uint64 // notifications of the driver that came through WriteMMIO
	Resets     uint64 // resets by the driver
	NeedsReset uint64 // times that DEVICE_NEEDS_RESET was set
	HostErrors uint64 // failed calls of Host, and of the device's Reset
}

// Function is a virtio device on a PCI bus. ReadConfig, WriteConfig, ReadMMIO and WriteMMIO may be called from several
// vCPUs at once, the methods of virtio.Transport from any goroutine.
type Function struct {
	dev     virtio.Device
	mem     *memory.Memory
	host    Host
	offered virtio.Features

	mu       sync.Mutex // guards what follows up to the blank line
	closed   bool
	config   configSpace
	master   bool // the driver lets the function access memory and send messages
	active   bool // the device is between Activate and the beginning of its reset
	halting  *halt
	begun    *halt // halting, until the access that began it lets go of mu
	status   virtio.Status
	driver   driverRegs
	funcMask bool        // MSI-X: all vectors are masked
	queues   []queueRegs // the slices themselves never change, and their atomic fields need no lock
	vectors  []vector

	base         atomic.Uint64 // guest-physical address of the BAR, 0 while it is not decoded; written under mu
	broken       atomic.Bool   // the device's last Reset failed: it may still be at work; written under mu
	configVector atomic.Uint32 // vector of configuration changes, or noVector
	msixOn       atomic.Bool   // MSI-X is enabled; written under mu
	intx         line
	answered     atomic.Uint64 // needed at the last reset: while they differ, the device needs another

	interrupts, held, doorbells, resets, needed, hostErrors atomic.Uint64
}

var _ virtio.Transport = (*Function)(nil)

// New makes a function of dev, whose queues will lie in mem. It holds an eventfd for each queue and for each vector in
// use; the caller closes it. Errors wrap ErrDevice, or say that the host is out of descriptors.
func New(dev virtio.Device, mem *memory.Memory, host Host) (*Function, error) {
	sizes := dev.QueueSizes()
	if len(sizes) > MaxQueues {
		return nil, fmt.Errorf("%w: %d queues, at most %d", ErrDevice, len(sizes), MaxQueues)
	}
	f := &Function{
		dev:     dev,
		mem:     mem,
		host:    host,
		offered: dev.Features()&^unsupported | virtio.VersionOne,
		queues:  make([]queueRegs, len(sizes)),
		vectors: make([]vector, len(sizes)+1), // one for each queue and one for the configuration
	}
	f.intx.set = func(asserted bool) error {
		err := host.SetINTx(asserted)
		f.check(err)
		return err
	}
	for i := range f.vectors {
		f.vectors[i].masked = true // PCI 3.0, 6.8.2.9: the state after reset
	}
	for i, size := range sizes {
		if size == 0 || size > queue.MaxSize || size&(size-1) != 0 {
			return nil, errors.Join(
				fmt.Errorf("%w: queue %d of size %d, not a power of two up to %d", ErrDevice, i, size, queue.MaxSize),
				f.closeEvents())
		}
		ev, err := queue.NewEvent()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("doorbell of queue %d: %w", i, err), f.closeEvents())
		}
		f.queues[i].max, f.queues[i].kick = size, ev
		f.queues[i].vector.Store(noVector)
	}
	f.configVector.Store(noVector)
	f.config.init(dev.ID(), len(f.vectors))
	f.clear()
	return f, nil
}

// Counters returns what has been counted so far.
func (f *Function) Counters() Counters {
	return Counters{
		Interrupts: f.interrupts.Load(),
		Held:       f.held.Load(),
		Doorbells:  f.doorbells.Load(),
		Resets:     f.resets.Load(),
		NeedsReset: f.needed.Load(),
		HostErrors: f.hostErrors.Load(),
	}
}

// Close resets the device, takes back everything that was given to the host and closes the eventfds. The function does
// not answer accesses any more. A second Close does nothing. The error joins those of the device and the host.
func (f *Function) Close() error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil
	}
	failed := f.hostErrors.Load()
	f.closed = true
	f.base.Store(0)
	h := f.halt(true)
	f.begun = nil // nobody else waits for it
	f.mu.Unlock()
	<-h.done

	f.mu.Lock()
	defer f.mu.Unlock()
	f.intx.mask(true)
	err := h.err
	if n := f.hostErrors.Load() - failed; err == nil && n > 0 {
		err = fmt.Errorf("virtio device %d on PCI: the host refused %d calls while it was taken down", f.dev.ID(), n)
	}
	return errors.Join(err, f.closeEvents())
}

func (f *Function) closeEvents() error {
	var errs []error
	for i := range f.queues {
		if ev := f.queues[i].kick; ev != nil {
			errs = append(errs, ev.Close())
		}
	}
	for i := range f.vectors {
		if ev := f.vectors[i].event; ev != nil {
			errs = append(errs, ev.Close())
		}
	}
	return errors.Join(errs...)
}

// check counts an error of the host and reports whether there was none.
func (f *Function) check(err error) bool {
	if err != nil {
		f.hostErrors.Add(1)
	}
	return err == nil
}
