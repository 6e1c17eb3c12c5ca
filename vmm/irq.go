package vmm

import (
	"errors"
	"fmt"
	"sync"

	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/vmm/acpi"
	"github.com/kvmlet/kvmlet/vmm/kvm"
)

// interrupts owns the machine's routing table: the pins of the in-kernel chips, and a GSI for every message-signalled
// interrupt in use. KVM replaces the table as a whole, so all changes go through here.
type interrupts struct {
	vm interruptController

	mu     sync.Mutex
	routes []kvm.Route            // the pins', then the messages'
	pins   int                    // how many are the pins'
	free   []uint32               // GSIs of removed messages
	levels [kvm.IOAPICPins]uint32 // per GSI, the set of sharers that hold the line up
}

// interruptController is the part of a kvm.VM that interrupts and doorbells go through.
type interruptController interface {
	SetRoutes(routes []kvm.Route) error
	SetIRQ(gsi uint32, high bool) error
	AssignIRQFD(eventfd int, gsi uint32) error
	DeassignIRQFD(eventfd int, gsi uint32) error
	AssignIOEvent(addr uint64, n, eventfd int) error
	DeassignIOEvent(addr uint64, n, eventfd int) error
}

func newInterrupts(vm interruptController) (*interrupts, error) {
	r := &interrupts{vm: vm}
	for gsi := range uint32(kvm.IOAPICPins) {
		switch {
		case gsi == 2: // the cascade of the PICs; the I/O APIC's pin 2 is the timer's
			r.routes = append(r.routes, kvm.ChipRoute(gsi, kvm.ChipPICMaster, gsi))
			continue
		case gsi < 8:
			r.routes = append(r.routes, kvm.ChipRoute(gsi, kvm.ChipPICMaster, gsi))
		case gsi < 16:
			r.routes = append(r.routes, kvm.ChipRoute(gsi, kvm.ChipPICSlave, gsi-8))
		}
		pin := gsi
		if gsi == gsiTimer {
			pin = 2 // as the MADT's override says
		}
		r.routes = append(r.routes, kvm.ChipRoute(gsi, kvm.ChipIOAPIC, pin))
	}
	r.pins = len(r.routes)
	return r, vm.SetRoutes(r.routes)
}

// set raises or lowers the line of a GSI for one of up to 32 sharers; the line is high while any of them holds it. An
// error changes nothing.
func (r *interrupts) set(gsi uint32, sharer int, high bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.levels[gsi]
	after := before &^ (1 << sharer)
	if high {
		after |= 1 << sharer
	}
	if (before != 0) != (after != 0) {
		if err := r.vm.SetIRQ(gsi, after != 0); err != nil {
			return err // and the next call tries again
		}
	}
	r.levels[gsi] = after
	return nil
}

// line returns a function that drives a GSI as its only user. An error leaves the line as it was: KVM refuses a valid
// GSI only when the machine is going away.
func (r *interrupts) line(gsi uint32) func(bool) {
	return func(high bool) { _ = r.set(gsi, 0, high) }
}

// addMSI connects an eventfd to a message.
func (r *interrupts) addMSI(ev *queue.Event, addr uint64, data uint32) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	gsi := uint32(gsiMSIBase + len(r.routes) - r.pins + len(r.free))
	if n := len(r.free); n > 0 {
		gsi, r.free = r.free[n-1], r.free[:n-1]
	}
	r.routes = append(r.routes, kvm.MSIRoute(gsi, addr, data))
	if err := r.vm.SetRoutes(r.routes); err != nil {
		r.drop(gsi)
		return 0, err
	}
	if err := r.vm.AssignIRQFD(ev.FD(), gsi); err != nil {
		r.drop(gsi)
		return 0, errors.Join(err, r.vm.SetRoutes(r.routes))
	}
	return int(gsi), nil
}

// updateMSI changes the message of a GSI that addMSI returned. An error leaves it as it was: KVM takes or refuses the table
// as a whole, so a route that it refuses must not stay in the next one.
func (r *interrupts) updateMSI(id int, addr uint64, data uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := r.find(uint32(id))
	if i < 0 {
		return fmt.Errorf("GSI %d carries no message", id)
	}
	before := r.routes[i]
	r.routes[i] = kvm.MSIRoute(uint32(id), addr, data)
	if err := r.vm.SetRoutes(r.routes); err != nil {
		r.routes[i] = before
		return err
	}
	return nil
}

// removeMSI disconnects the eventfd and frees the GSI.
func (r *interrupts) removeMSI(id int, ev *queue.Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.vm.DeassignIRQFD(ev.FD(), uint32(id))
	r.drop(uint32(id))
	return errors.Join(err, r.vm.SetRoutes(r.routes))
}

func (r *interrupts) find(gsi uint32) int {
	for i := r.pins; i < len(r.routes); i++ {
		if r.routes[i].GSI == gsi {
			return i
		}
	}
	return -1
}

func (r *interrupts) drop(gsi uint32) {
	if i := r.find(gsi); i >= 0 {
		last := len(r.routes) - 1
		r.routes[i] = r.routes[last]
		r.routes = r.routes[:last]
		r.free = append(r.free, gsi)
	}
}

// slot is the interrupt and doorbell side of one PCI function: it implements the Host interface of virtio/pci.
type slot struct {
	irq    *interrupts
	number int
	anyLen bool // KVM_CAP_IOEVENTFD_ANY_LENGTH
}

func (s *slot) AddMSI(ev *queue.Event, addr uint64, data uint32) (int, error) {
	return s.irq.addMSI(ev, addr, data)
}
func (s *slot) UpdateMSI(id int, addr uint64, data uint32) error {
	return s.irq.updateMSI(id, addr, data)
}
func (s *slot) RemoveMSI(id int, ev *queue.Event) error { return s.irq.removeMSI(id, ev) }
func (s *slot) SetINTx(asserted bool) error {
	return s.irq.set(s.intx(), s.number, asserted)
}

// intx is the GSI of the slot's INTA.
func (s *slot) intx() uint32 { return acpi.INTx(uint8(s.number), 0) }

func (s *slot) AddIOEvent(addr uint64, ev *queue.Event) error {
	return s.irq.vm.AssignIOEvent(addr, s.doorbell(), ev.FD())
}

func (s *slot) RemoveIOEvent(addr uint64, ev *queue.Event) error {
	return s.irq.vm.DeassignIOEvent(addr, s.doorbell(), ev.FD())
}

// doorbell returns the width of a notification that KVM is to match: any where it can, which spares it decoding the
// instruction, or else the 2 bytes that a driver writes (virtio 1.2, 4.1.5.2).
func (s *slot) doorbell() int {
	if s.anyLen {
		return 0
	}
	return 2
}
