package vmm

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/vmm/kvm"
)

// KVMKind says what the KVM of a host is.
type KVMKind string

// The kinds of KVM that there are.
const (
	HardwareKVM KVMKind = "hardware" // runs everything
	SoftwareKVM KVMKind = "software" // emulates a guest's kernel code; stock kernels do not run
	NoKVM       KVMKind = "none"
)

// Feature is one thing that a host can or cannot do, and what to do if it cannot.
type Feature struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"` // a version, a number, or what went wrong
	Remedy string `json:"remedy,omitempty"` // only where something is to be done
}

// Probe is what Inspect found.
type Probe struct {
	KVM          KVMKind        `json:"kvm"`
	APIVersion   int            `json:"kvm_api_version,omitempty"`
	GuestSpeed   float64        `json:"guest_instructions_per_second,omitempty"`
	Capabilities map[string]int `json:"kvm_capabilities,omitempty"`
	Kernel       string         `json:"kernel"`
	CPUs         int            `json:"cpus"`
	Memory       uint64         `json:"memory_bytes"`
	Features     []Feature      `json:"features"`
}

// capabilities are those that `kvmlet probe` reports.
var capabilities = []struct {
	name string
	cap  kvm.Capability
}{
	{"KVM_CAP_IRQFD", kvm.CapIRQFD},
	{"KVM_CAP_IOEVENTFD", kvm.CapIOEventFD},
	{"KVM_CAP_IOEVENTFD_ANY_LENGTH", kvm.CapIOEventFDAnyLen},
	{"KVM_CAP_SIGNAL_MSI", kvm.CapSignalMSI},
	{"KVM_CAP_IMMEDIATE_EXIT", kvm.CapImmediateExit},
	{"KVM_CAP_MAX_VCPUS", kvm.CapMaxVCPUs},
	{"KVM_CAP_TSC_CONTROL", kvm.CapTSCControl},
	{"KVM_CAP_TSC_DEADLINE_TIMER", kvm.CapTSCDeadlineTimer},
	{"KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", kvm.CapDirtyLogProtect2},
	{"KVM_CAP_DIRTY_LOG_RING", kvm.CapDirtyLogRing},
}

// Inspect finds out, by trying, what this host can do for VMs. It changes nothing and takes about 20 ms, or 150
// where KVM is software.
func Inspect() *Probe {
	p := &Probe{KVM: NoKVM, CPUs: runtime.NumCPU()}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		p.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err == nil {
		p.Memory = si.Totalram * uint64(si.Unit)
	}
	p.Features = append(p.Features, p.inspectKVM(), inspectTap(), inspectIOUring())
	return p
}

const needLab = "use --accel lab: commands and tests run the same there, only slower"

func (p *Probe) inspectKVM() Feature {
	f := Feature{Name: "kvm"}
	sys, err := kvm.Open()
	if err != nil {
		f.Detail = err.Error()
		f.Remedy = needLab
		return f
	}
	defer sys.Close()
	p.APIVersion = sys.APIVersion()
	p.Capabilities = make(map[string]int)
	for _, c := range capabilities {
		p.Capabilities[c.name] = sys.Check(c.cap)
	}
	if missing := sys.Missing(); len(missing) > 0 {
		f.Detail, f.Remedy = "lacks "+strings.Join(missing, ", "), needLab
		return f
	}
	if p.GuestSpeed, err = sys.GuestSpeed(); err != nil {
		f.Detail, f.Remedy = err.Error(), needLab
		return f
	}
	million := p.GuestSpeed / 1e6
	if p.GuestSpeed < kvm.SoftwareLimit {
		p.KVM = SoftwareKVM
		f.Detail = fmt.Sprintf("software: guest kernel code runs at %.1f million instructions a second", million)
		f.Remedy = needLab
		return f
	}
	p.KVM = HardwareKVM
	f.OK = true
	f.Detail = fmt.Sprintf("hardware: guest kernel code runs at %.0f million instructions a second", million)
	return f
}

func inspectTap() Feature {
	f := Feature{Name: "tap"}
	const path = "/dev/net/tun"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		f.Detail = fmt.Sprintf("open %s: %v", path, err)
		f.Remedy = "load the tun module, or run as root"
		return f
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("")
	if err != nil {
		f.Detail = err.Error()
		return f
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		f.Detail = fmt.Sprintf("create a tap: %v", err)
		f.Remedy = "run as root, or give the binary CAP_NET_ADMIN, or have an administrator make the tap for this user"
		return f
	}
	f.OK = true // the tap goes away with the descriptor
	f.Detail = "taps can be created"
	return f
}

func inspectIOUring() Feature {
	f := Feature{Name: "io_uring"}
	fd, err := setupIOUring()
	if err != nil {
		f.Detail = fmt.Sprintf("io_uring_setup: %v", err)
		f.Remedy = "nothing needs it; disks use preadv and pwritev"
		if errors.Is(err, os.ErrPermission) {
			f.Remedy += " (see sysctl kernel.io_uring_disabled)"
		}
		return f
	}
	defer unix.Close(fd)
	f.OK = true
	f.Detail = "rings can be created"
	return f
}
