package pci

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/virtio/queue"
)

// noVector is VIRTIO_MSI_NO_VECTOR (virtio 1.2, 4.1.5.1.2).
const noVector = 0xFFFF

// Sizes and offsets of an entry of the MSI-X table (PCI 3.0, 6.8.2.6 to 6.8.2.9).
const (
	entrySize    = 16
	entryAddr    = 0
	entryData    = 8
	entryControl = 12

	controlMasked = 1 << 0
)

// vector is an entry of the MSI-X table and the way of its message to the guest.
type vector struct {
	// Guarded by Function.mu.
	message
	masked bool
	users  int // queues, and the configuration, that are mapped to it

	// The host's route, made when the vector is first used unmasked and kept until it is used no more. Guarded by
	// Function.mu.
	event  *queue.Event
	routed bool
	id     int
	route  message // as the host has it

	mu      sync.Mutex // guards what follows; held while the message is sent, so that none follows a mask
	live    bool       // event reaches the guest
	pending bool
}

// message is what an MSI writes, and where.
type message struct {
	addr uint64
	data uint32
}

// send sends the message, or notes it as pending while it must not be sent.
func (v *vector) send() (sent bool, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.live {
		v.pending = true
		return false, nil
	}
	return true, v.event.Signal()
}

// open lets messages through, the pending one first.
func (v *vector) open() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.live = true
	if !v.pending {
		return nil
	}
	v.pending = false
	return v.event.Signal()
}

// shut holds messages back.
func (v *vector) shut() {
	v.mu.Lock()
	v.live = false
	v.mu.Unlock()
}

// NotifyQueue implements virtio.Transport: it sends queue i's interrupt, by its vector if MSI-X is enabled, else by the
// line (virtio 1.2, 4.1.5.3). It allocates nothing.
func (f *Function) NotifyQueue(i int) error {
	if i < 0 || i >= len(f.queues) {
		return fmt.Errorf("virtio device %d has no queue %d", f.dev.ID(), i)
	}
	return f.interrupt(&f.queues[i].vector, isrQueue)
}

// NotifyConfig implements virtio.Transport: the driver's view of the device configuration has changed
// (virtio 1.2, 4.1.5.4).
func (f *Function) NotifyConfig() error {
	return f.configInterrupt()
}

func (f *Function) configInterrupt() error { return f.interrupt(&f.configVector, isrConfig) }

// interrupt sends an interrupt that is mapped to the vector in mapped or sets bit in the ISR status.
func (f *Function) interrupt(mapped *atomic.Uint32, bit uint8) error {
	if !f.msixOn.Load() {
		err := f.intx.raise(bit)
		if err == nil {
			f.interrupts.Add(1)
		}
		return err
	}
	if bit == isrConfig {
		// Set in either case (virtio 1.2, 4.1.4.5.1); with MSI-X the line stays down.
		if err := f.intx.raise(bit); err != nil {
			return err
		}
	}
	n := mapped.Load()
	if n == noVector {
		return nil
	}
	sent, err := f.vectors[n].send()
	if f.check(err) {
		if sent {
			f.interrupts.Add(1)
		} else {
			f.held.Add(1)
		}
	}
	return err
}

// mapVector maps the interrupts that go by mapped to vector n. One that does not exist, or for which the host has no
// route, becomes noVector, which the driver sees when it reads back (virtio 1.2, 4.1.5.1.2).
func (f *Function) mapVector(mapped *atomic.Uint32, n uint16) {
	old := mapped.Load()
	if old == uint32(n) {
		return
	}
	if int(n) >= len(f.vectors) {
		n = noVector
	}
	if n != noVector {
		v := &f.vectors[n]
		v.users++
		if !f.check(f.syncVector(v)) {
			v.users--
			n = noVector
		}
	}
	mapped.Store(uint32(n))
	if old != noVector {
		v := &f.vectors[old]
		v.users--
		f.check(f.syncVector(v))
	}
}

// setMSIX follows a change of MSI-X's message control.
func (f *Function) setMSIX() {
	control := f.config.uint16(msixControl)
	f.funcMask = control&msixFuncMask != 0
	f.msixOn.Store(control&msixEnable != 0)
	f.intx.mask(f.msixOn.Load() || f.config.uint16(regCommand)&commandINTxDisable != 0)
	f.syncVectors()
}

// syncVectors is syncVector for all. A mapping that the host turns out not to serve is past refusing.
func (f *Function) syncVectors() {
	for i := range f.vectors {
		if !f.check(f.syncVector(&f.vectors[i])) {
			f.needReset()
		}
	}
}

// syncVector brings the host's route and the flow of messages in line with the table, the masks and the users. On an
// error messages are held back.
func (f *Function) syncVector(v *vector) error {
	inUse := v.users > 0 && f.msixOn.Load()
	open := inUse && f.master && !f.funcMask && !v.masked
	if !open {
		v.shut()
	}
	if !inUse {
		return f.unroute(v)
	}
	if !open {
		return nil
	}
	if err := f.reroute(v); err != nil {
		v.shut()
		return err
	}
	return v.open()
}

// reroute makes the host send the vector's message as the table has it.
func (f *Function) reroute(v *vector) (err error) {
	switch {
	case v.routed && v.route == v.message:
		return nil
	case v.routed:
		err = f.host.UpdateMSI(v.id, v.addr, v.data)
	default:
		if v.event == nil {
			if v.event, err = queue.NewEvent(); err != nil {
				return err
			}
		}
		v.id, err = f.host.AddMSI(v.event, v.addr, v.data)
	}
	if err != nil {
		return err
	}
	v.routed, v.route = true, v.message
	return nil
}

// unroute gives the host's route back. What was pending has no sender any more.
func (f *Function) unroute(v *vector) error {
	v.mu.Lock()
	v.pending = false
	v.mu.Unlock()
	if !v.routed {
		return nil
	}
	v.routed = false
	return f.host.RemoveMSI(v.id, v.event)
}

// entry returns the vector as the guest sees it in the table.
func (v *vector) entry() (b [entrySize]byte) {
	binary.LittleEndian.PutUint64(b[entryAddr:], v.addr)
	binary.LittleEndian.PutUint32(b[entryData:], v.data)
	if v.masked {
		b[entryControl] = controlMasked
	}
	return b
}

// readTable reads bytes of the MSI-X table.
func (f *Function) readTable(p []byte, off int) {
	for len(p) > 0 && off/entrySize < len(f.vectors) {
		b := f.vectors[off/entrySize].entry()
		n := copy(p, b[off%entrySize:])
		p, off = p[n:], off+n
	}
}

// writeTable writes bytes of the MSI-X table. A driver writes whole double words or quad words (PCI 3.0, 6.8.2).
func (f *Function) writeTable(p []byte, off int) {
	for len(p) > 0 && off/entrySize < len(f.vectors) {
		v := &f.vectors[off/entrySize]
		b := v.entry()
		n := copy(b[off%entrySize:], p)
		p, off = p[n:], off+n
		v.addr = binary.LittleEndian.Uint64(b[entryAddr:])
		v.data = binary.LittleEndian.Uint32(b[entryData:])
		v.masked = b[entryControl]&controlMasked != 0
		if !f.check(f.syncVector(v)) {
			f.needReset()
		}
	}
}

// readPending reads bytes of the pending bit array: a bit for each vector, from bit 0 of the first byte on
// (PCI 3.0, 6.8.2.10).
func (f *Function) readPending(p []byte, off int) {
	for i := range p {
		for bit := range 8 {
			n := 8*(off+i) + bit
			if n >= len(f.vectors) {
				return
			}
			v := &f.vectors[n]
			v.mu.Lock()
			if v.pending {
				p[i] |= 1 << bit
			}
			v.mu.Unlock()
		}
	}
}
