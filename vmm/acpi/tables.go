package acpi

import (
	"encoding/binary"
	"fmt"
)

var le = binary.LittleEndian

// Sizes (ACPI 6.4, 5.2).
const (
	headerSize = 36
	rsdpSize   = 36
	facsSize   = 64
	fadtSize   = 276
	mcfgSize   = headerSize + 8 + 16
)

// broadcastID is the x2APIC id that means all CPUs, and in tables all processors.
const broadcastID = 0xffffffff

// Build returns the ACPI tables for the guest-physical address base, which is a multiple of 64 below 4 GiB, and the
// address of the RSDP. Kernels that are not told that address look for it from 0xe0000 to 0xfffff.
func Build(base uint64, c Config) (tables []byte, rsdp uint64, err error) {
	if base%64 != 0 {
		return nil, 0, fmt.Errorf("%w: tables at %#x, not at a multiple of 64", ErrConfig, base)
	}
	if err := c.check(); err != nil {
		return nil, 0, err
	}
	// The RSDP comes first, though what it leads to is only known last.
	tables = append(tables, buildRSDP(0)...)
	place := func(table []byte) uint64 {
		// The FACS has to be at a multiple of 64, the others need less.
		tables = append(tables, make([]byte, -len(tables)&63)...)
		at := base + uint64(len(tables))
		tables = append(tables, table...)
		return at
	}
	facs := place(buildFACS())
	dsdt := place(c.dsdt())
	list := []uint64{
		place(c.fadt(facs, dsdt)),
		place(c.madt()),
		place(c.mcfg()),
	}
	copy(tables, buildRSDP(place(buildXSDT(list))))
	if end := base + uint64(len(tables)); end > 1<<32 {
		return nil, 0, fmt.Errorf("%w: tables end at %#x, beyond 4 GiB", ErrConfig, end)
	}
	return tables, base, nil
}

// table puts the header before a body and fills in length and checksum (ACPI 6.4, table 5.4).
func table(signature string, revision byte, body []byte) []byte {
	t := make([]byte, headerSize, headerSize+len(body))
	copy(t[0:], signature)
	le.PutUint32(t[4:], uint32(headerSize+len(body)))
	t[8] = revision
	copy(t[10:], "KVMLET")   // OEM
	copy(t[16:], "KVMLETVM") // OEM's name of the table
	le.PutUint32(t[24:], 1)  // and its revision
	copy(t[28:], "KVML")     // creator
	le.PutUint32(t[32:], 1)  // and its revision
	t = append(t, body...)
	t[9] = checksum(t)
	return t
}

// checksum returns the byte that makes the sum of all bytes 0.
func checksum(b []byte) byte {
	var sum byte
	for _, v := range b {
		sum += v
	}
	return -sum
}

// buildRSDP makes the root pointer (ACPI 6.4, table 5.3). There is no RSDT.
func buildRSDP(xsdt uint64) []byte {
	t := make([]byte, rsdpSize)
	copy(t[0:], "RSD PTR ")
	copy(t[9:], "KVMLET")
	t[15] = 2 // revision
	le.PutUint32(t[20:], rsdpSize)
	le.PutUint64(t[24:], xsdt)
	t[8] = checksum(t[:20]) // of ACPI 1.0's part
	t[32] = checksum(t)
	return t
}

// buildXSDT makes the list of the other tables (ACPI 6.4, table 5.8).
func buildXSDT(list []uint64) []byte {
	var body []byte
	for _, at := range list {
		body = le.AppendUint64(body, at)
	}
	return table("XSDT", 1, body)
}

// buildFACS makes the structure that firmware and kernel share (ACPI 6.4, table 5.11). No sleep state uses it.
func buildFACS() []byte {
	t := make([]byte, facsSize)
	copy(t[0:], "FACS")
	le.PutUint32(t[4:], facsSize)
	t[32] = 2 // version
	return t
}

// mcfg makes the table that says where PCI's configuration space is (PCI Firmware Specification 3.2, table 4-2).
func (c *Config) mcfg() []byte {
	body := make([]byte, mcfgSize-headerSize)
	e := body[8:]
	le.PutUint64(e[0:], uint64(c.PCI.ECAM))
	e[11] = c.PCI.LastBus // segment 0 at 8, first bus 0 at 10
	return table("MCFG", 1, body)
}

// Flags of the FADT (ACPI 6.4, tables 5.10 and 5.11).
const (
	fadtWBINVD     = 1 << 0
	fadtC1         = 1 << 2
	fadtNoSleepKey = 1 << 5
	fadtNoRTCWake  = 1 << 6
	fadtTimer32    = 1 << 8
	fadtReset      = 1 << 10

	bootLegacy = 1 << 0 // devices on the ISA bus
	bootNoVGA  = 1 << 2
	bootNoRTC  = 1 << 5
	// Bit 1, a keyboard controller, stays clear. One answers for the sake of its reset (package legacy), but has no
	// keyboard: kernels need not spend time on a probe.
)

// fadt makes the description of the fixed hardware (ACPI 6.4, table 5.9). There is no command to enter ACPI mode: the
// machine is in it.
func (c *Config) fadt(facs, dsdt uint64) []byte {
	t := make([]byte, fadtSize)
	le.PutUint32(t[36:], uint32(facs))
	le.PutUint32(t[40:], uint32(dsdt))
	le.PutUint16(t[46:], uint16(c.PM.SCI))
	le.PutUint32(t[56:], uint32(c.PM.Event))
	le.PutUint32(t[64:], uint32(c.PM.Control))
	le.PutUint32(t[76:], uint32(c.PM.Timer))
	t[88] = 4                    // bytes of the event block,
	t[89] = 2                    // the control block
	t[91] = 4                    // and the timer
	le.PutUint16(t[96:], 0xffff) // a latency that says there is no C2,
	le.PutUint16(t[98:], 0xffff) // nor C3
	t[108] = c.Century           // register of the RTC
	boot := uint16(bootLegacy | bootNoVGA)
	if c.RTC.Port == 0 {
		boot |= bootNoRTC
	}
	le.PutUint16(t[109:], boot)
	flags := uint32(fadtWBINVD | fadtC1 | fadtNoSleepKey | fadtNoRTCWake | fadtTimer32)
	if c.ResetPort != 0 {
		flags |= fadtReset
		ioAddress(t[116:], c.ResetPort, 1)
		t[128] = c.ResetValue
	}
	le.PutUint32(t[112:], flags)
	t[131] = 4 // minor revision; the header has the major
	le.PutUint64(t[140:], dsdt)
	ioAddress(t[148:], c.PM.Event, 4)
	ioAddress(t[172:], c.PM.Control, 2)
	ioAddress(t[208:], c.PM.Timer, 4)
	copy(t[268:], "KVMLET") // hypervisor's vendor
	return table("FACP", 6, t[headerSize:])
}

// ioAddress fills in a generic address structure for a register of n bytes (ACPI 6.4, table 5.1). The access size is
// left to the kernel, which knows how wide the parts of each block are.
func ioAddress(t []byte, port uint16, n uint8) {
	t[0] = 1 // I/O space
	t[1] = n * 8
	le.PutUint64(t[4:], uint64(port))
}

// Types of the entries of the MADT (ACPI 6.4, table 5.21).
const (
	madtLocalAPIC   = 0
	madtIOAPIC      = 1
	madtOverride    = 2
	madtLocalNMI    = 4
	madtLocalX2APIC = 9
	madtX2APICNMI   = 10

	madtPCAT    = 1 // table flag: there are 8259 controllers too
	madtEnabled = 1 // CPU flag

	// Flags of an interrupt, here and in the MP table: level-triggered, active high.
	levelHigh = 3<<2 | 1
	lint1     = 1 // the local APIC's pin of the NMI
)

// madt makes the description of the interrupt controllers (ACPI 6.4, 5.2.12).
func (c *Config) madt() []byte {
	b := le.AppendUint32(nil, c.LocalAPIC)
	b = le.AppendUint32(b, madtPCAT)
	x2 := false
	for i, id := range c.APICIDs {
		uid := uint32(i)
		if id < 255 && uid < 255 {
			b = append(b, madtLocalAPIC, 8, byte(uid), byte(id))
			b = le.AppendUint32(b, madtEnabled)
			continue
		}
		x2 = true
		b = append(b, madtLocalX2APIC, 16, 0, 0)
		b = le.AppendUint32(b, id)
		b = le.AppendUint32(b, madtEnabled)
		b = le.AppendUint32(b, uid)
	}
	b = append(b, madtIOAPIC, 12, c.IOAPICID, 0)
	b = le.AppendUint32(b, c.IOAPIC)
	b = le.AppendUint32(b, 0) // its first GSI
	override := func(irq uint8, gsi uint32, flags uint16) {
		b = append(b, madtOverride, 10, 0, irq)
		b = le.AppendUint32(b, gsi)
		b = le.AppendUint16(b, flags)
	}
	override(0, 2, 0) // the timer is wired to pin 2; edge and polarity as on ISA
	override(c.PM.SCI, uint32(c.PM.SCI), levelHigh)
	b = append(b, madtLocalNMI, 6, 0xff, 0, 0, lint1) // all processors
	if x2 {
		b = append(b, madtX2APICNMI, 12, 0, 0)
		b = le.AppendUint32(b, broadcastID)
		b = append(b, lint1, 0, 0, 0)
	}
	return table("APIC", 5, b)
}
