// Package acpi builds the tables through which a guest's kernel learns what machine it runs on: ACPI (specification 6.4)
// and, for kernels without it, the MP table (Intel MultiProcessor Specification 1.4). Both describe the same Config.
package acpi

import (
	"errors"
	"fmt"
)

// ErrConfig reports a machine that the tables cannot describe.
var ErrConfig = errors.New("acpi: machine cannot be described")

// Config is the machine. A port of 0 means that the device is not there.
type Config struct {
	// APICIDs holds the local APIC id of each CPU, first the one that boots. A CPU's place in the list is its ACPI
	// processor UID. 1 to MaxCPUs, without duplicates.
	APICIDs []uint32
	// LocalAPIC and IOAPIC are the addresses of the interrupt controllers. The second has 24 pins for the global system
	// interrupts (GSI) 0 to 23. ISA interrupts are wired to the pin of their number, but for the timer's, 0, on pin 2:
	// KVM's own routing does not do that, so the VMM sets it.
	LocalAPIC, IOAPIC uint32
	IOAPICID          uint8

	PCI PCI
	PM  PM

	// ResetPort takes ResetValue to reset the machine.
	ResetPort  uint16
	ResetValue uint8

	Serial  []Legacy
	RTC     Legacy
	Century uint8  // the RTC's register of the century
	Pvpanic uint16 // port
}

// MaxCPUs is the most CPUs that the tables describe.
const MaxCPUs = 4096

// PCI is the host bridge of segment 0.
type PCI struct {
	// LastBus is the highest bus number. The configuration space of buses 0 to LastBus, 1 MiB for each, is mapped from
	// ECAM up, below 4 GiB and aligned to its size.
	LastBus uint8
	ECAM    uint32
	// Low is the window for memory BARs below 4 GiB, High one above; a High of size 0 is not there.
	Low, High Window
}

// Window is a range of guest-physical addresses.
type Window struct{ Base, Size uint64 }

// PM is ACPI's fixed hardware.
type PM struct {
	// Event (PM1a_EVT_BLK), Control (PM1a_CNT_BLK) and Timer (PM_TMR_BLK, 32 bits) are the first ports of 4, 2 and 4.
	Event, Control, Timer uint16
	// SCI is the GSI of its interrupt, below 16: level-triggered, active high.
	SCI uint8
	// SleepOff is the sleep type that powers off.
	SleepOff uint8
}

// Legacy is a device with ports and an ISA interrupt.
type Legacy struct {
	Port uint16
	IRQ  uint8
}

// Slots is the number of devices that a PCI bus has.
const Slots = 32

// INTx returns the GSI of a PCI device's interrupt pin: slot 0 to 31, pin 0 (INTA) to 3 (INTD). The pins of the devices
// on bus 0 are wired to GSI 16 to 23 in turn, level-triggered.
//
// PCI's interrupts are active low, and kernels take that for granted in static routes. KVM's I/O APIC disregards the
// polarity: raising the GSI asserts it.
func INTx(slot, pin uint8) uint32 { return 16 + (uint32(slot)+uint32(pin))%8 }

func (c *Config) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrConfig, fmt.Sprintf(format, args...))
	}
	if n := len(c.APICIDs); n < 1 || n > MaxCPUs {
		return bad("%d CPUs, not 1 to %d", n, MaxCPUs)
	}
	seen := make(map[uint32]bool, len(c.APICIDs))
	for _, id := range c.APICIDs {
		if seen[id] || id == broadcastID {
			return bad("APIC id %#x used twice or reserved", id)
		}
		seen[id] = true
	}
	buses := (uint64(c.PCI.LastBus) + 1) << 20
	if uint64(c.PCI.ECAM)+buses > 1<<32 || uint64(c.PCI.ECAM)&(1<<20-1) != 0 {
		return bad("PCI configuration space of %d buses at %#x", c.PCI.LastBus+1, c.PCI.ECAM)
	}
	if w := c.PCI.Low; w.Size == 0 || w.Size > 1<<32 || w.Base > 1<<32-w.Size {
		return bad("PCI memory window of %#x bytes at %#x is not below 4 GiB", w.Size, w.Base)
	}
	if w := c.PCI.High; w.Size != 0 && (w.Base < 1<<32 || w.Base+w.Size < w.Base) {
		return bad("PCI memory window of %#x bytes at %#x is not above 4 GiB", w.Size, w.Base)
	}
	if c.PM.SCI > 15 || c.PM.SCI == 0 || c.PM.SCI == 2 {
		return bad("SCI %d", c.PM.SCI)
	}
	if c.PM.SleepOff > 7 {
		return bad("sleep type %d", c.PM.SleepOff)
	}
	for _, d := range append([]Legacy{c.RTC}, c.Serial...) {
		if d.IRQ > 15 {
			return bad("ISA interrupt %d", d.IRQ)
		}
	}
	if len(c.Serial) > 9 {
		return bad("%d serial ports", len(c.Serial))
	}
	return nil
}
