// Package kvm gives the KVM API of Linux one Go type for each of its objects: System for /dev/kvm, VM, and VCPU.
//
// It builds on github.com/bobuhiro11/gokvm/kvm, whose register structures and pointerless requests it uses, and adds
// what that package lacks or gets wrong: requests with pointers, MSI routing, ioeventfd, irqfd, the whole exit union of
// struct kvm_run. Every structure's size and offsets are tested against the C compiler's view of linux/kvm.h.
//
// References are to Documentation/virt/kvm/api.rst of the Linux kernel, by section number.
package kvm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// Path is the device node of KVM.
const Path = "/dev/kvm"

// apiVersion is the only version of the API that Linux has had since 2.6.22 (api.rst, 4.1).
const apiVersion = 12

// ErrUnavailable reports that this host offers no KVM to this user.
var ErrUnavailable = errors.New("KVM is not available")

// System is an open /dev/kvm. It is safe for concurrent use.
type System struct {
	fd       int
	mmapSize int
}

// Open opens /dev/kvm and checks its API version. The error wraps ErrUnavailable and says what to do.
func Open() (*System, error) {
	fd, err := unix.Open(Path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("%w: open %s: %w (enable virtualization in the firmware and load kvm_intel or kvm_amd,"+
			" or use --accel lab)", ErrUnavailable, Path, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w: open %s: %w (run as root, or add this user to the group that owns it,"+
			" or use --accel lab)", ErrUnavailable, Path, err)
	case err != nil:
		return nil, fmt.Errorf("%w: open %s: %w", ErrUnavailable, Path, err)
	}
	s := &System{fd: fd}
	if err := s.init(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *System) init() error {
	v, err := gokvm.GetAPIVersion(uintptr(s.fd))
	if err != nil {
		return fmt.Errorf("%w: KVM_GET_API_VERSION: %w", ErrUnavailable, err)
	}
	if v != apiVersion {
		return fmt.Errorf("%w: %s speaks API version %d, need %d", ErrUnavailable, Path, v, apiVersion)
	}
	n, err := gokvm.GetVCPUMMmapSize(uintptr(s.fd))
	if err != nil {
		return fmt.Errorf("KVM_GET_VCPU_MMAP_SIZE: %w", err)
	}
	if int(n) < int(size[runPage]()) {
		return fmt.Errorf("KVM_GET_VCPU_MMAP_SIZE: %d bytes are too few for struct kvm_run", n)
	}
	s.mmapSize = int(n)
	return nil
}

// APIVersion returns the version that Open checked.
func (s *System) APIVersion() int { return apiVersion }

// Capability is a KVM_CAP_* number.
type Capability = gokvm.Capability

// Capabilities that gokvm has no name for, or that read better here (linux/kvm.h).
const (
	CapIRQFD            = gokvm.Capability(32)
	CapIOEventFD        = gokvm.Capability(36)
	CapTSCDeadlineTimer = gokvm.Capability(72)
	CapTSCControl       = gokvm.Capability(60)
	CapMaxVCPUs         = gokvm.Capability(66)
	CapSignalMSI        = gokvm.Capability(77)
	CapIOEventFDAnyLen  = gokvm.Capability(122)
	CapImmediateExit    = gokvm.Capability(136)
	CapDirtyLogProtect2 = gokvm.Capability(168)
	CapDirtyLogRing     = gokvm.Capability(192)
)

// Check returns the value of a capability: 0 where the host lacks it, 1 or a quantity where it has it (api.rst, 4.4).
func (s *System) Check(c Capability) int {
	n, err := gokvm.CheckExtension(uintptr(s.fd), c)
	if err != nil {
		return 0
	}
	return int(n)
}

// required lists what every VM of ours needs, with the name a reader can look up.
var required = []struct {
	cap  Capability
	name string
}{
	{gokvm.CapIRQChip, "KVM_CAP_IRQCHIP"},
	{gokvm.CapUserMemory, "KVM_CAP_USER_MEMORY"},
	{gokvm.CapSetTSSAddr, "KVM_CAP_SET_TSS_ADDR"},
	{gokvm.CapEXTCPUID, "KVM_CAP_EXT_CPUID"},
	{gokvm.CapIRQRouting, "KVM_CAP_IRQ_ROUTING"},
	{gokvm.CapPIT2, "KVM_CAP_PIT2"},
	{CapIRQFD, "KVM_CAP_IRQFD"},
	{CapIOEventFD, "KVM_CAP_IOEVENTFD"},
	{CapImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"},
}

// Missing returns the names of the capabilities that a VM needs and this host lacks.
func (s *System) Missing() []string {
	var names []string
	for _, r := range required {
		if s.Check(r.cap) == 0 {
			names = append(names, r.name)
		}
	}
	return names
}

// CreateVM makes an empty machine: no memory, no vCPU, no interrupt controller (api.rst, 4.2).
func (s *System) CreateVM() (*VM, error) {
	for {
		fd, err := gokvm.CreateVM(uintptr(s.fd))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("KVM_CREATE_VM: %w", os.NewSyscallError("ioctl", err))
		}
		return &VM{fd: int(fd), mmapSize: s.mmapSize}, nil
	}
}

// Close closes /dev/kvm. VMs made from it live on.
func (s *System) Close() error { return closeOnce(&s.fd) }

// closeOnce closes a file. Its number may be another file's by the time of a second call, which returns os.ErrClosed.
func closeOnce(fd *int) error {
	n := *fd
	if n < 0 {
		return os.ErrClosed
	}
	*fd = -1
	return unix.Close(n)
}
