package vmm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/memory"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/virtio"
	virtiopci "github.com/kvmlet/kvmlet/virtio/pci"
	"github.com/kvmlet/kvmlet/virtio/vblk"
	"github.com/kvmlet/kvmlet/virtio/vconsole"
	"github.com/kvmlet/kvmlet/virtio/vnet"
	"github.com/kvmlet/kvmlet/virtio/vrng"
	"github.com/kvmlet/kvmlet/vmm/bus"
	"github.com/kvmlet/kvmlet/vmm/kvm"
	"github.com/kvmlet/kvmlet/vmm/legacy"
	"github.com/kvmlet/kvmlet/vmm/pci"
)

// Resources are the files that a VM holds beside KVM's: its disks, locked, and its networks. They are opened before
// anything of KVM is made, so that a bad disk or tap is reported while nothing runs.
type Resources struct {
	disks []*blk.Device
	nets  []net.Backend
}

// OpenResources opens the disks and networks of cfg, which may still lack what the guest boots from. On an error nothing
// is left open.
func OpenResources(cfg *Config) (_ *Resources, err error) {
	r := &Resources{}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if r.disks, err = openDisks(cfg.Disks); err != nil {
		r.disks = nil
		return nil, err
	}
	for _, n := range cfg.Nets {
		b, err := Backends().Open(n.Spec)
		if err != nil {
			return nil, err
		}
		r.nets = append(r.nets, b)
	}
	return r, nil
}

// Close closes what is open. To close twice, or what is nil, does nothing.
func (r *Resources) Close() error {
	if r == nil {
		return nil
	}
	var errs []error
	for _, d := range r.disks {
		errs = append(errs, d.Close())
	}
	for _, b := range r.nets {
		errs = append(errs, b.Close())
	}
	r.disks, r.nets = nil, nil
	return errors.Join(errs...)
}

// platform is the PC around the CPUs: the devices on ports.
type platform struct {
	serial [2]*legacy.Serial
	rtc    *legacy.RTC
	pm     *legacy.PM
}

// addPlatform puts the PC's devices on the port bus.
func (vm *VM) addPlatform(console io.Writer) error {
	var above4G uint64
	if r := vm.mem.Regions(); len(r) > 1 {
		above4G = uint64(len(r[1].Bytes))
	}
	p := &vm.platform
	p.serial[0] = legacy.NewSerial(legacy.COM1Port, console, vm.irq.line(legacy.COM1IRQ))
	p.serial[1] = legacy.NewSerial(legacy.COM2Port, nil, vm.irq.line(legacy.COM2IRQ))
	p.rtc = legacy.NewRTC(vm.mem.Size()-above4G, above4G, nil, vm.irq.line(legacy.RTCIRQ))
	p.pm = legacy.NewPM(legacy.PMPort, nil, vm.irq.line(legacy.PMIRQ), func() { vm.leave(PowerOff) })
	reset := legacy.NewReset(vm.reset)
	keyboard := legacy.NewI8042(vm.irq.line(legacy.I8042IRQ), vm.reset)
	panicked := legacy.NewPvpanic(legacy.PvpanicPort, vm.panicked)

	for _, d := range []struct {
		first uint16
		n     int
		dev   bus.PortDevice
	}{
		{legacy.COM1Port, legacy.SerialPorts, p.serial[0]},
		{legacy.COM2Port, legacy.SerialPorts, p.serial[1]},
		{legacy.RTCPort, legacy.RTCPorts, p.rtc},
		{legacy.I8042DataPort, 1, keyboard},
		{legacy.I8042CommandPort, 1, keyboard},
		{legacy.DebugPort, 1, &legacy.Debug{}},
		{legacy.FastPort, 1, reset},
		{legacy.PvpanicPort, 1, panicked},
		{legacy.PMPort, legacy.PMPorts, p.pm},
		// The reset register is a byte in the middle of the PCI host's double word, as on a PC.
		{pci.AddressPort, 1, vm.pci},
		{legacy.ResetPort, 1, reset},
		{pci.DataPort, 4, vm.pci},
	} {
		if err := vm.ports.Add(d.first, d.n, d.dev); err != nil {
			return err
		}
	}
	return errors.Join(
		vm.mmio.Add(pciWindow, pciWindowSize, vm.pci),
		vm.mmio.Add(ecamBase, pci.ECAMSize, vm.pci),
	)
}

// panicked takes the report of a guest's kernel that fails. One with a crash kernel loaded goes on to run that, to save
// what it can, and the VM with it; its end is a Panic then however it comes.
func (vm *VM) panicked(e legacy.PanicEvent) {
	if e&legacy.GuestPanicked == 0 {
		vm.crashing.Store(true)
		return
	}
	vm.finish(End{Outcome: Panic})
}

// Linux's warm-reboot flag: with reboot=panic_warm on its command line, a kernel that resets because of a panic leaves
// warmFlag at warmAddr, and one that resets because it was asked to leaves zero (the BIOS data area's word 0040:0072).
const (
	warmAddr = 0x472
	warmFlag = 0x1234
)

// reset ends the VM at a reset of whatever kind.
func (vm *VM) reset() {
	var word [2]byte
	_, err := vm.mem.ReadAt(word[:], warmAddr)
	if err == nil && int(word[0])|int(word[1])<<8 == warmFlag && !vm.alwaysWarm {
		vm.leave(Panic)
		return
	}
	vm.leave(Reboot)
}

// leave ends the VM as its guest has asked.
func (vm *VM) leave(o Outcome) {
	if vm.crashing.Load() {
		o = Panic
	}
	vm.finish(End{Outcome: o})
}

// rebootsWarm reports whether a Linux kernel with this command line leaves warmFlag at every reset, as reboot=w makes it
// do (admin-guide/kernel-parameters.txt, reboot=). The last word that names a mode counts; those behind -- are init's.
func rebootsWarm(cmdline string) bool {
	warm := false
	for _, word := range strings.Fields(cmdline) {
		if word == "--" {
			break
		}
		list, ok := strings.CutPrefix(word, "reboot=")
		if !ok {
			continue
		}
		for _, item := range strings.Split(list, ",") {
			cpu := strings.TrimPrefix(strings.TrimPrefix(item, "s"), "mp")
			switch {
			case item == "", strings.HasPrefix(item, "panic_"):
			case item[0] == 's' && cpu != "" && cpu[0] >= '0' && cpu[0] <= '9': // the CPU that resets
			case item[0] == 'w':
				warm = true
			case strings.ContainsRune("chsg", rune(item[0])): // cold, hard, soft, gpio
				warm = false
			}
		}
	}
	return warm
}

// maxDiskQueues is the most queues that a disk has: one for each CPU, as long as there are not more CPUs than a host's disk
// has use for.
const maxDiskQueues = 16

// addVirtio puts the virtio devices into PCI slots: the agent's console and the entropy source, then disks and cards in
// the order of the configuration.
func (vm *VM) addVirtio(cfg *Config) error {
	if cfg.AgentPort {
		d, err := vconsole.New(vconsole.Options{Ports: []string{agent.PortName}})
		if err != nil {
			return err
		}
		vm.agentPort = d.Port(agent.PortName)
		if err := vm.addFunction(d); err != nil {
			return err
		}
	}
	if err := vm.addFunction(vrng.New()); err != nil {
		return err
	}
	for i, disk := range vm.resources.disks {
		queues := cmp.Or(cfg.Disks[i].Queues, min(cfg.CPUs, maxDiskQueues))
		d, err := vblk.New(disk, vblk.Options{ID: cfg.Disks[i].id(i), NumQueues: queues})
		if err != nil {
			return err
		}
		if err := vm.addFunction(d); err != nil {
			return err
		}
	}
	for i, b := range vm.resources.nets {
		d, err := vnet.New(b, vnet.Options{MAC: cfg.Nets[i].MAC, MTU: guestMTU(b)})
		if err != nil {
			return err
		}
		if err := vm.addFunction(d); err != nil {
			return err
		}
	}
	return nil
}

// guestMTU returns the MTU that the guest's driver is told of, or 0 to leave the choice to it. A driver that is told one
// takes it and refuses a larger one later. So the usual MTU goes without saying, as in QEMU, where host_mtu is unset unless
// somebody asks: the host's may then still be raised while the guest runs. Another one somebody has chosen for the device.
func guestMTU(b net.Backend) int {
	if d, ok := b.(interface{ MTU() int }); ok && d.MTU() != vnet.DefaultMTU && d.MTU() >= vnet.MinMTU {
		return d.MTU()
	}
	return 0
}

// addFunction wraps a virtio device in a PCI function, gives it a slot, an interrupt line and its place in the window.
func (vm *VM) addFunction(dev virtio.Device) error {
	host := &slot{irq: vm.irq, anyLen: vm.anyLen}
	f, err := virtiopci.New(dev, vm.mem, host)
	if err != nil {
		return err
	}
	vm.functions = append(vm.functions, f)
	if host.number, err = vm.pci.Add(f); err != nil {
		return fmt.Errorf("%w: at most %d devices", err, pci.Slots-1)
	}
	f.SetInterruptLine(uint8(host.intx()))
	for bar := range 6 {
		n := f.BARSize(bar)
		if n == 0 {
			continue
		}
		vm.nextBAR = (vm.nextBAR + n - 1) &^ (n - 1) // a BAR is aligned to its size
		if err := f.SetBAR(bar, vm.nextBAR); err != nil {
			return err
		}
		vm.nextBAR += n
	}
	return nil
}

// flushTime bounds the wait for a console writer that does not take the guest's last words.
const flushTime = 2 * time.Second

// release stops devices and gives everything back, in the reverse order of assembly. The vCPUs have ended.
func (vm *VM) release() error {
	var errs []error
	for _, f := range vm.functions { // no worker touches guest memory once its function is closed
		errs = append(errs, f.Close())
	}
	if vm.platform.pm != nil {
		ctx, cancel := context.WithTimeout(context.Background(), flushTime)
		errs = append(errs, ignoreDeadline(vm.platform.serial[0].Close(ctx)), vm.platform.serial[1].Close(ctx),
			vm.platform.rtc.Close(), vm.platform.pm.Close())
		cancel()
	}
	for _, c := range vm.cpus {
		errs = append(errs, c.Close())
	}
	if vm.kvm != nil {
		errs = append(errs, vm.kvm.Close())
	}
	if vm.mem != nil {
		errs = append(errs, vm.mem.Close())
	}
	errs = append(errs, vm.resources.Close())
	return errors.Join(errs...)
}

func ignoreDeadline(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}

// addMemory maps guest memory into the machine, a slot for each region.
func addMemory(m *kvm.VM, mem *memory.Memory) error {
	for i, r := range mem.Regions() {
		if err := m.SetMemory(uint32(i), 0, r.Addr, r.Bytes); err != nil {
			return err
		}
	}
	return nil
}
