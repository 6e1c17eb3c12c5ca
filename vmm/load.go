package vmm

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/kvmlet/kvmlet/guest/image"
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
	if err := cfg.checkRoom(); err != nil {
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
	if err := c.checkRoom(); err != nil {
		return err
	}
	mem, err := memory.New(c.Memory)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, mem.Close()) }()
	return linux.Check(mem, c.Kernel, c.bootOptions())
}

// checkRoom reports whether Linux could unpack an initrd of the image store, such as Image's: a kernel that cannot panics,
// if nothing worse comes of half an initrd. Of an initrd of other files it knows nothing.
//
// Linux unpacks it into a tmpfs that may take half of the memory which is free early in its start (init_mount_tree and
// shmem_default_max_blocks). The kernel is not free then, nor is the initrd itself, nor what describes the memory: 64
// bytes for each page. The unpacked kernel's file stands for the kernel's memory: it is a little larger, by relocations,
// as is what Linux takes for itself by then. With Linux 7.1 on one CPU the sum is 0.5 to 0.7 MiB short, hence early; each
// CPU takes 56 pages more.
func (c *Config) checkRoom() error {
	for word := range strings.FieldsSeq(c.Cmdline) {
		if strings.HasPrefix(word, "root") || strings.HasPrefix(word, "initramfs") {
			return nil // root=, rootfstype=, initramfs_options=: another file system, or one of another size
		}
	}
	if len(c.Initrd) == 0 {
		return nil
	}
	const early, perCPU = 1 << 20, 56 * memory.PageSize
	var archives []io.ReaderAt
	used := early + uint64(c.CPUs)*perCPU + uint64(c.Kernel.UnpackedSize())
	for _, b := range c.Initrd {
		f, ok := b.(*linux.StableFile)
		if !ok {
			return nil
		}
		archives = append(archives, f)
		used += uint64(f.Size())
	}
	need := func(unpacked uint64) uint64 {
		const pages = memory.PageSize / 64
		n := (used + 2*unpacked) / (pages - 1) * pages
		return (n + memoryStep - 1) / memoryStep * memoryStep
	}
	if c.Memory >= need(2*used) {
		return nil // without a look into the archives
	}
	if unpacked, ok := image.UnpackedSize(archives...); ok && c.Memory < need(unpacked) {
		return fmt.Errorf("%w: %d MiB: this kernel and initrd need at least %d MiB: the initrd is unpacked into half of what "+
			"they leave", ErrMemory, c.Memory>>20, need(unpacked)>>20)
	}
	return nil
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
