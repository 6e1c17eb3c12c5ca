package acpi

import (
	"fmt"

	"github.com/kvmlet/kvmlet/vmm/acpi/aml"
)

// dsdt makes the table of the devices that cannot be found by looking (ACPI 6.4, 5.2.11.1).
func (c *Config) dsdt() []byte {
	devices := []aml.Term{c.hostBridge(), c.motherboard()}
	for i, s := range c.Serial {
		if s.Port != 0 {
			devices = append(devices, device(fmt.Sprintf("COM%d", i+1), "PNP0501", uint64(i),
				aml.IO(s.Port, 8), aml.IRQ(s.IRQ)))
		}
	}
	if c.RTC.Port != 0 {
		devices = append(devices, device("RTC", "PNP0B00", 0, aml.IO(c.RTC.Port, 2), aml.IRQ(c.RTC.IRQ)))
	}
	if c.Pvpanic != 0 {
		devices = append(devices, aml.Device("PEVT",
			aml.Name("_HID", aml.String("QEMU0001")),
			aml.Name("_CRS", aml.Resources(aml.IO(c.Pvpanic, 1)))))
	}
	for uid := range c.APICIDs {
		devices = append(devices, aml.Device(fmt.Sprintf("C%03X", uid),
			aml.Name("_HID", aml.String("ACPI0007")),
			aml.Name("_UID", aml.Int(uint64(uid)))))
	}
	off := aml.Int(uint64(c.PM.SleepOff))
	var body []byte
	body = append(body, aml.Scope(`\_SB`, devices...)...)
	body = append(body, aml.Name(`\_S5`, aml.Package(off, off, aml.Int(0), aml.Int(0)))...)
	return table("DSDT", 2, body) // from revision 2 on integers have 64 bits
}

// device makes a device with an EISA identifier and fixed resources.
func device(name, id string, uid uint64, resources ...aml.Resource) aml.Term {
	return aml.Device(name,
		aml.Name("_HID", aml.EISAID(id)),
		aml.Name("_UID", aml.Int(uid)),
		aml.Name("_CRS", aml.Resources(resources...)))
}

// hostBridge makes PCI's root: PCI Express, or plain PCI for kernels that do not know it.
func (c *Config) hostBridge() aml.Term {
	windows := []aml.Resource{
		aml.BusRange(0, c.PCI.LastBus),
		aml.IO(0xcf8, 8), // the configuration ports, between the two ranges that are handed on
		aml.IORange(0, 0xcf7),
		aml.IORange(0xd00, 0xffff),
		aml.MemoryRange(c.PCI.Low.Base, c.PCI.Low.Base+c.PCI.Low.Size-1),
	}
	if w := c.PCI.High; w.Size != 0 {
		windows = append(windows, aml.MemoryRange(w.Base, w.Base+w.Size-1))
	}
	var routes []aml.Term
	for slot := uint8(1); slot < Slots; slot++ { // slot 0 is the bridge itself
		for pin := range uint8(4) {
			routes = append(routes, aml.Package(
				aml.Int(uint64(slot)<<16|0xffff), // any function
				aml.Int(uint64(pin)),
				aml.Int(0), // no link device: what follows is a GSI
				aml.Int(uint64(INTx(slot, pin)))))
		}
	}
	return aml.Device("PCI0",
		aml.Name("_HID", aml.EISAID("PNP0A08")),
		aml.Name("_CID", aml.EISAID("PNP0A03")),
		aml.Name("_UID", aml.Int(0)),
		aml.Name("_SEG", aml.Int(0)),
		aml.Name("_BBN", aml.Int(0)),
		aml.Name("_CRS", aml.Resources(windows...)),
		aml.Name("_PRT", aml.Package(routes...)),
		// The kernel gets every PCI Express feature it asks for: no firmware here uses one (PCI Firmware Specification
		// 3.2, 4.5.1). The first word of the answer names errors: an unknown UUID, an unknown revision.
		aml.Method("_OSC", 4, true,
			aml.CreateDWordField(aml.Arg(3), 0, "CDW1"),
			aml.If(aml.Not(aml.Equal(aml.Arg(0), aml.UUID("33db4d5b-1ff7-401c-9657-7441c03dd766"))),
				aml.Or(aml.Path("CDW1"), aml.Int(1<<2), aml.Path("CDW1"))),
			aml.If(aml.Not(aml.Equal(aml.Arg(1), aml.Int(1))),
				aml.Or(aml.Path("CDW1"), aml.Int(1<<3), aml.Path("CDW1"))),
			aml.Return(aml.Arg(3))),
	)
}

// motherboard reserves what belongs to no other device. Kernels use PCI's memory-mapped configuration space only where
// it is reserved.
func (c *Config) motherboard() aml.Term {
	reserved := []aml.Resource{
		aml.Memory(c.PCI.ECAM, (uint32(c.PCI.LastBus)+1)<<20),
		aml.IO(c.PM.Event, 4),
		aml.IO(c.PM.Control, 2),
		aml.IO(c.PM.Timer, 4),
	}
	return device("MBRD", "PNP0C02", 0, reserved...)
}
