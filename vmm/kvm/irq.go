package kvm

import "fmt"

const (
	nrIRQLine       = 0x61
	nrSetGSIRouting = 0x6A
	nrIRQFD         = 0x76
	nrIOEventFD     = 0x79
)

// irqLevel is struct kvm_irq_level.
type irqLevel struct {
	IRQ   uint32 // 0
	Level uint32 // 4
}

// SetIRQ drives a GSI's line high or low (KVM_IRQ_LINE; api.rst, 4.25).
func (m *VM) SetIRQ(gsi uint32, high bool) error {
	l := irqLevel{IRQ: gsi}
	if high {
		l.Level = 1
	}
	if err := ioctlPtr(m.fd, iow[irqLevel](nrIRQLine), &l); err != nil {
		return fmt.Errorf("KVM_IRQ_LINE: GSI %d: %w", gsi, err)
	}
	return nil
}

// The kinds of routing entry (linux/kvm.h).
const (
	routeIRQChip = 1 // KVM_IRQ_ROUTING_IRQCHIP
	routeMSI     = 2 // KVM_IRQ_ROUTING_MSI
)

// The chips of the in-kernel irqchip (asm/kvm.h).
const (
	ChipPICMaster = 0
	ChipPICSlave  = 1
	ChipIOAPIC    = 2
)

// IOAPICPins is the number of pins of KVM's I/O APIC (KVM_IOAPIC_NUM_PINS).
const IOAPICPins = 24

// Route is struct kvm_irq_routing_entry: where an interrupt raised on a GSI goes.
type Route struct {
	GSI   uint32    // 0
	Type  uint32    // 4
	Flags uint32    // 8
	_     uint32    // 12
	U     [8]uint32 // 16: irqchip: chip, pin; msi: address_lo, address_hi, data, devid
}

// ChipRoute sends a GSI to a pin of one of the Chip constants.
func ChipRoute(gsi, chip, pin uint32) Route {
	return Route{GSI: gsi, Type: routeIRQChip, U: [8]uint32{chip, pin}}
}

// MSIRoute turns a GSI into the message-signalled interrupt (addr, data).
func MSIRoute(gsi uint32, addr uint64, data uint32) Route {
	return Route{GSI: gsi, Type: routeMSI, U: [8]uint32{uint32(addr), uint32(addr >> 32), data}}
}

// MaxRoutes is the number of entries that SetRoutes takes: enough for 64 functions with 48 vectors each and well
// under KVM_MAX_IRQ_ROUTES (4096).
const MaxRoutes = 1024

// routingHeader is struct kvm_irq_routing without its flexible array: what the ioctl number encodes.
type routingHeader struct {
	Nr    uint32 // 0
	Flags uint32 // 4
}

// routingTable returns struct kvm_irq_routing with these entries, no larger than they are: a guest that masks and unmasks
// its vectors has the table set each time.
func routingTable(routes []Route) []byte {
	h := routingHeader{Nr: uint32(len(routes))}
	t := make([]byte, 0, size[routingHeader]()+uintptr(len(routes))*size[Route]())
	return append(append(t, bytesOf([]routingHeader{h})...), bytesOf(routes)...)
}

// SetRoutes replaces the machine's whole routing table (api.rst, 4.52).
func (m *VM) SetRoutes(routes []Route) error {
	if len(routes) > MaxRoutes {
		return fmt.Errorf("KVM_SET_GSI_ROUTING: %d routes, at most %d", len(routes), MaxRoutes)
	}
	if err := ioctlPtr(m.fd, iow[routingHeader](nrSetGSIRouting), &routingTable(routes)[0]); err != nil {
		return fmt.Errorf("KVM_SET_GSI_ROUTING: %d routes: %w", len(routes), err)
	}
	return nil
}

// irqfd is struct kvm_irqfd.
type irqfd struct {
	FD         uint32    // 0
	GSI        uint32    // 4
	Flags      uint32    // 8
	ResampleFD uint32    // 12
	_          [16]uint8 // 16
}

const irqfdDeassign = 1 << 0 // KVM_IRQFD_FLAG_DEASSIGN

// AssignIRQFD makes every signal of the eventfd raise the GSI (api.rst, 4.75).
func (m *VM) AssignIRQFD(eventfd int, gsi uint32) error { return m.irqfd(eventfd, gsi, 0) }

// DeassignIRQFD undoes AssignIRQFD.
func (m *VM) DeassignIRQFD(eventfd int, gsi uint32) error {
	return m.irqfd(eventfd, gsi, irqfdDeassign)
}

func (m *VM) irqfd(eventfd int, gsi, flags uint32) error {
	f := irqfd{FD: uint32(eventfd), GSI: gsi, Flags: flags}
	if err := ioctlPtr(m.fd, iow[irqfd](nrIRQFD), &f); err != nil {
		return fmt.Errorf("KVM_IRQFD: GSI %d, flags %#x: %w", gsi, flags, err)
	}
	return nil
}

// ioEventFD is struct kvm_ioeventfd.
type ioEventFD struct {
	DataMatch uint64    // 0
	Addr      uint64    // 8
	Len       uint32    // 16
	FD        int32     // 20
	Flags     uint32    // 24
	_         [36]uint8 // 28
}

const ioEventDeassign = 1 << 2 // KVM_IOEVENTFD_FLAG_DEASSIGN

// AssignIOEvent makes a guest's write of n bytes (1, 2, 4 or 8; 0: any number) to the guest-physical address signal the
// eventfd, whatever the value, without leaving the kernel (api.rst, 4.59).
func (m *VM) AssignIOEvent(addr uint64, n, eventfd int) error { return m.ioEvent(addr, n, eventfd, 0) }

// DeassignIOEvent undoes AssignIOEvent with the same arguments.
func (m *VM) DeassignIOEvent(addr uint64, n, eventfd int) error {
	return m.ioEvent(addr, n, eventfd, ioEventDeassign)
}

func (m *VM) ioEvent(addr uint64, n, eventfd int, flags uint32) error {
	e := ioEventFD{Addr: addr, Len: uint32(n), FD: int32(eventfd), Flags: flags}
	if err := ioctlPtr(m.fd, iow[ioEventFD](nrIOEventFD), &e); err != nil {
		return fmt.Errorf("KVM_IOEVENTFD: %#x, %d bytes, flags %#x: %w", addr, n, flags, err)
	}
	return nil
}
