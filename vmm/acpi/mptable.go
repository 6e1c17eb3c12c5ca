package acpi

import "fmt"

// Entry types of the MP table (MultiProcessor Specification 1.4, table 4-3).
const (
	mpProcessor = 0
	mpBus       = 1
	mpIOAPIC    = 2
	mpInterrupt = 3
	mpLocal     = 4

	mpEnabled = 1 // processor and I/O APIC flag
	mpBoot    = 2 // processor flag

	mpINT    = 0 // interrupt types
	mpNMI    = 1
	mpExtINT = 3

	mpBusPCI = 0 // our bus ids; PCI's are its bus numbers
	mpBusISA = 1
	mpAll    = 0xff // all local APICs

	mpPointerSize = 16
	mpHeaderSize  = 44
)

// BuildMPTable returns the floating pointer and, behind it, the MP table for the guest-physical address base, a multiple
// of 16 below 4 GiB. Kernels look for the pointer in 0xf0000 to 0xfffff, and in the last KiB of base memory. CPUs with
// an APIC id above 254 are left out: the table has no room for the id.
func BuildMPTable(base uint64, c Config) ([]byte, error) {
	if base%16 != 0 || base > 1<<32-1<<16 {
		return nil, fmt.Errorf("%w: MP table at %#x, not at a multiple of 16 below 4 GiB", ErrConfig, base)
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	var b []byte
	entries := uint16(0)
	entry := func(fields ...byte) {
		b = append(b, fields...)
		entries++
	}
	// The sections are in the order of their types, as the specification wants it (4.3).
	for i, id := range c.APICIDs {
		if id >= 255 {
			continue
		}
		flags := byte(mpEnabled)
		if i == 0 {
			flags |= mpBoot
		}
		entry(mpProcessor, byte(id), localAPICVersion, flags,
			0x00, 0x06, 0, 0, // signature: family 6
			0x01, 0x02, 0, 0, // features: FPU, APIC
			0, 0, 0, 0, 0, 0, 0, 0)
	}
	entry(append([]byte{mpBus, mpBusPCI}, "PCI   "...)...)
	entry(append([]byte{mpBus, mpBusISA}, "ISA   "...)...)
	entry(le.AppendUint32([]byte{mpIOAPIC, c.IOAPICID, ioAPICVersion, mpEnabled}, c.IOAPIC)...)
	// Flags of 0 mean as usual on the bus: edge-triggered and active high on ISA, level and low on PCI.
	for irq := range byte(16) {
		pin := irq
		switch irq {
		case 0:
			pin = 2
		case 2: // the cascade
			continue
		}
		flags := byte(0)
		if irq == c.PM.SCI {
			flags = levelHigh
		}
		entry(mpInterrupt, mpINT, flags, 0, mpBusISA, irq, c.IOAPICID, pin)
	}
	for slot := byte(1); slot < Slots; slot++ {
		for pin := range byte(4) {
			entry(mpInterrupt, mpINT, 0, 0, mpBusPCI, slot<<2|pin, c.IOAPICID, byte(INTx(slot, pin)))
		}
	}
	// The 8259 controllers' output goes to the local APICs' LINT0, and to no pin of the I/O APIC.
	entry(mpLocal, mpExtINT, 0, 0, mpBusISA, 0, mpAll, 0)
	entry(mpLocal, mpNMI, 0, 0, mpBusISA, 0, mpAll, lint1)

	// The header (table 4-2).
	h := make([]byte, mpHeaderSize, mpHeaderSize+len(b))
	copy(h[0:], "PCMP")
	le.PutUint16(h[4:], uint16(mpHeaderSize+len(b)))
	h[6] = 4 // specification 1.4
	copy(h[8:], "KVMLET  ")
	copy(h[16:], "KVMLETVM    ")
	le.PutUint16(h[34:], entries)
	le.PutUint32(h[36:], c.LocalAPIC)
	h = append(h, b...)
	h[7] = checksum(h)

	// The floating pointer (table 4-1). Its feature bytes are 0: there is a table, and no IMCR.
	p := make([]byte, mpPointerSize, mpPointerSize+len(h))
	copy(p[0:], "_MP_")
	le.PutUint32(p[4:], uint32(base+mpPointerSize))
	p[8] = 1 // length in units of 16 bytes
	p[9] = 4 // specification 1.4
	p[10] = checksum(p)
	return append(p, h...), nil
}

// Versions that the controllers' own registers show.
const (
	localAPICVersion = 0x14
	ioAPICVersion    = 0x11
)
