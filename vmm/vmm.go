// Package vmm is the virtual machine: it assembles memory, CPUs, the PC around them and virtio devices from a Config,
// and starts, pauses and ends the whole.
//
// One file each: the configuration, the guest-physical layout, interrupts, devices, the lifecycle. A VM takes nothing
// from the process but what it opens; many may run in one process, and each gives back all when it is closed.
package vmm

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/guest/linux"
	"github.com/kvmlet/kvmlet/guest/memory"
	virtiopci "github.com/kvmlet/kvmlet/virtio/pci"
	"github.com/kvmlet/kvmlet/virtio/vconsole"
	"github.com/kvmlet/kvmlet/vmm/bus"
	"github.com/kvmlet/kvmlet/vmm/kvm"
	"github.com/kvmlet/kvmlet/vmm/pci"
	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

// VM is one machine. Its methods may be called from any goroutine.
type VM struct {
	lifecycle
	endMu sync.Mutex // guards end and the closing of ended; never held together with a wait

	resources *Resources
	mem       *memory.Memory
	kvm       *kvm.VM
	irq       *interrupts
	cpus      []*vcpu.VCPU
	ports     bus.Ports
	mmio      bus.Memory
	pci       *pci.Host
	platform  platform
	functions []*virtiopci.Function
	agentPort *vconsole.Port
	nextBAR   uint64
	anyLen    bool // KVM matches doorbells of any width

	alwaysWarm bool        // the guest leaves Linux's warm-reboot flag at any reset, so that it tells nothing
	crashing   atomic.Bool // the guest has panicked and runs its crash kernel
}

// machine is the VM as its vCPUs see it.
type machine struct{ vm *VM }

// PortIO implements vcpu.Machine.
func (m machine) PortIO(port uint16, size int, write bool, data []byte) {
	m.vm.ports.Access(port, size, write, data)
}

// MMIO implements vcpu.Machine.
func (m machine) MMIO(addr uint64, write bool, data []byte) { m.vm.mmio.Access(addr, write, data) }

// New assembles a VM that is ready to start. Whatever is wrong with cfg, a file or the host is reported before a
// machine exists where that is possible at all; on an error nothing is left open.
func New(cfg *Config) (_ *VM, err error) {
	vm := &VM{
		lifecycle: lifecycle{ended: make(chan struct{})},
		resources: cfg.Resources,
		pci:       pci.NewHost(ecamBase),
		nextBAR:   pciWindow,

		alwaysWarm: rebootsWarm(cfg.Cmdline),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, vm.release())
		}
	}()
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	if cfg.Kernel == nil {
		return nil, ErrNoKernel
	}
	if vm.resources == nil {
		if vm.resources, err = OpenResources(cfg); err != nil {
			return nil, err
		}
	}
	sys, err := kvm.Open()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, sys.Close()) }()
	if m := sys.Missing(); len(m) > 0 {
		return nil, fmt.Errorf("%w: this kernel lacks %v", kvm.ErrUnavailable, m)
	}
	vm.anyLen = sys.Check(kvm.CapIOEventFDAnyLen) > 0
	if err := vm.assemble(cfg, sys); err != nil {
		return nil, err
	}
	return vm, nil
}

// assemble makes the parts in the order in which they need each other.
func (vm *VM) assemble(cfg *Config, sys *kvm.System) (err error) {
	if vm.mem, err = memory.New(cfg.Memory); err != nil {
		return err
	}
	entry, err := vm.load(cfg) // before KVM: a kernel that does not fit is the user's error, not KVM's
	if err != nil {
		return err
	}
	if vm.kvm, err = sys.CreateVM(); err != nil {
		return err
	}
	if err := errors.Join(vm.kvm.SetIdentityMapAddr(identityPage), vm.kvm.SetTSSAddr(tssPages)); err != nil {
		return err
	}
	if err := vm.kvm.CreateIRQChip(); err != nil {
		return err
	}
	if err := vm.kvm.CreatePIT(); err != nil {
		return err
	}
	if vm.irq, err = newInterrupts(vm.kvm); err != nil {
		return err
	}
	if err := addMemory(vm.kvm, vm.mem); err != nil {
		return err
	}
	if err := vm.addPlatform(cfg.Console); err != nil {
		return err
	}
	if err := vm.addVirtio(cfg); err != nil {
		return err
	}
	return vm.addCPUs(cfg, sys, entry)
}

// addCPUs makes the vCPUs. The first starts at entry; the others wait for it to send INIT and SIPI.
func (vm *VM) addCPUs(cfg *Config, sys *kvm.System, entry linux.Entry) error {
	supported, err := sys.SupportedCPUID()
	if err != nil {
		return err
	}
	tscDeadline := sys.Check(kvm.CapTSCDeadlineTimer) > 0
	for id := range cfg.CPUs {
		k, err := vm.kvm.CreateVCPU(id)
		if err != nil {
			return err
		}
		c := vcpu.New(id, k, machine{vm})
		vm.cpus = append(vm.cpus, c)
		if err := c.SetCPUID(cfg.template().CPUID(supported, id, cfg.CPUs, tscDeadline)); err != nil {
			return err
		}
		if err := c.Reset(); err != nil {
			return err
		}
		if id == 0 {
			if err := c.SetEntry(entry); err != nil {
				return err
			}
		}
	}
	return nil
}

// Serial sends p to the guest's first serial port as if typed there; it waits until the guest has taken it.
func (vm *VM) Serial(p []byte) (int, error) { return vm.platform.serial[0].Write(p) }

// AgentPort is the host's end of the agent's byte stream, or nil when the configuration asked for none. When the VM has
// ended, what the guest sent can still be read, and io.EOF follows; writes fail.
func (vm *VM) AgentPort() io.ReadWriteCloser {
	if vm.agentPort == nil {
		return nil
	}
	return vm.agentPort
}

// PressPowerButton asks the guest to power off, by ACPI. It reports whether the guest listens to the button.
func (vm *VM) PressPowerButton() bool { return vm.platform.pm.PressPowerButton() }

// Memory returns the guest's memory.
func (vm *VM) Memory() *memory.Memory { return vm.mem }
