package vmm

import (
	"errors"
	"fmt"

	"github.com/kvmlet/kvmlet/guest/linux"
	"github.com/kvmlet/kvmlet/guest/memory"
	"github.com/kvmlet/kvmlet/vmm/acpi"
	"github.com/kvmlet/kvmlet/vmm/legacy"
	"github.com/kvmlet/kvmlet/vmm/pci"
)

// load fills guest memory: the kernel, its initrd and command line, and the tables that firmware would leave.
func (vm *VM) load(cfg *Config) (linux.Entry, error) {
	rsdp, err := vm.addTables(cfg.CPUs)
	if err != nil {
		return linux.Entry{}, err
	}
	o := cfg.bootOptions()
	o.RSDP = rsdp
	return linux.Load(vm.mem, cfg.Kernel, o)
}

func (c *Config) bootOptions() linux.Options {
	return linux.Options{
		Cmdline:  c.Cmdline,
		Initrd:   c.Initrd,
		Reserved: []linux.Range{{Addr: ecamBase, Size: pci.ECAMSize}},
	}
}

// CheckBoot reports whether the kernel, its initrd and its command line fit the memory. New finds out by itself; this is
// for those who call it late.
func (c *Config) CheckBoot() (err error) {
	if c.Kernel == nil {
		return ErrNoKernel
	}
	mem, err := memory.New(c.Memory)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, mem.Close()) }()
	return linux.Check(mem, c.Kernel, c.bootOptions())
}

// addTables writes the ACPI tables and the MP table, and returns the address of ACPI's root pointer.
func (vm *VM) addTables(cpus int) (rsdp uint64, err error) {
	c := acpi.Config{
		LocalAPIC: localAPIC,
		IOAPIC:    ioAPIC,
		PCI:       acpi.PCI{ECAM: ecamBase, Low: acpi.Window{Base: pciWindow, Size: pciWindowSize}},
		PM: acpi.PM{
			Event: legacy.PMPort + legacy.PMEvent, Control: legacy.PMPort + legacy.PMControl,
			Timer: legacy.PMPort + legacy.PMTimer, SCI: legacy.PMIRQ, SleepOff: legacy.SleepOff,
		},
		ResetPort:  legacy.ResetPort,
		ResetValue: legacy.ResetValue,
		Serial:     []acpi.Legacy{{Port: legacy.COM1Port, IRQ: legacy.COM1IRQ}, {Port: legacy.COM2Port, IRQ: legacy.COM2IRQ}},
		RTC:        acpi.Legacy{Port: legacy.RTCPort, IRQ: legacy.RTCIRQ},
		Century:    legacy.RTCCentury,
		Pvpanic:    legacy.PvpanicPort,
	}
	for id := range cpus {
		c.APICIDs = append(c.APICIDs, uint32(id))
	}
	c.IOAPICID = uint8(cpus) // any id that no CPU has
	tables, rsdp, err := acpi.Build(acpiBase, c)
	if err != nil {
		return 0, err
	}
	mp, err := acpi.BuildMPTable(mpBase, c)
	if err != nil {
		return 0, err
	}
	if len(tables) > mpBase-acpiBase || len(mp) > tablesEnd-mpBase {
		return 0, fmt.Errorf("the firmware tables are too large: %d and %d bytes", len(tables), len(mp))
	}
	if _, err := vm.mem.WriteAt(tables, acpiBase); err != nil {
		return 0, err
	}
	_, err = vm.mem.WriteAt(mp, mpBase)
	return rsdp, err
}
