package kvm

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// The register structures are gokvm's, which has them right.
type (
	// Regs is struct kvm_regs: the general-purpose registers, RIP and RFLAGS.
	Regs = gokvm.Regs
	// SRegs is struct kvm_sregs: segment, control and descriptor-table registers.
	SRegs = gokvm.Sregs
	// Segment is struct kvm_segment: a segment register with its hidden part.
	Segment = gokvm.Segment
	// Descriptor is struct kvm_dtable: GDTR or IDTR.
	Descriptor = gokvm.Descriptor
)

// VCPU is one virtual CPU. Its methods are called by the one thread that runs it, except Interrupt.
type VCPU struct {
	fd   int
	page []byte // the mmap'ed struct kvm_run and the data page of port I/O behind it
	run  *runPage
}

const (
	nrRun      = 0x80
	nrGetRegs  = 0x81
	nrSetRegs  = 0x82
	nrGetSRegs = 0x83
	nrSetSRegs = 0x84
	nrSetFPU   = 0x8d
	nrGetLAPIC = 0x8e
	nrSetLAPIC = 0x8f
	nrMPState  = 0x98
)

func newVCPU(fd, mmapSize int) (*VCPU, error) {
	page, err := unix.Mmap(fd, 0, mmapSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mmap of struct kvm_run: %w", err), unix.Close(fd))
	}
	return &VCPU{fd: fd, page: page, run: runPageOf(page)}, nil
}

// Close unmaps and closes the vCPU. It must not be running.
func (v *VCPU) Close() error {
	if v.fd < 0 {
		return os.ErrClosed
	}
	return errors.Join(unix.Munmap(v.page), closeOnce(&v.fd))
}

// ErrInterrupted reports that Run came back because of Interrupt or a signal and not because of the guest. What the
// guest had asked for before is complete then.
var ErrInterrupted = errors.New("KVM_RUN: interrupted")

// Run enters the guest until it needs the VMM; Exit then tells why (api.rst, 4.10).
func (v *VCPU) Run() error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(v.fd), iorun, 0)
	switch errno {
	case 0:
		return nil
	case unix.EINTR, unix.EAGAIN: // EAGAIN: an application processor got its INIT while it waited for SIPI
		return ErrInterrupted
	default:
		return fmt.Errorf("KVM_RUN: %w", errno)
	}
}

// Interrupt says whether Run is to return at once instead of entering the guest. It may be called from any goroutine;
// KVM looks at it on entry only, so a caller that wants a running vCPU back signals its thread as well.
func (v *VCPU) Interrupt(on bool) {
	// The byte shares its word only with request_interrupt_window, which stays zero, and padding.
	var w uint32
	if on {
		w = 1 << 8
	}
	atomic.StoreUint32(&v.run.Request, w)
}

// Regs returns the general-purpose registers (api.rst, 4.11).
func (v *VCPU) Regs() (r Regs, err error) {
	if err = ioctlPtr(v.fd, ior[Regs](nrGetRegs), &r); err != nil {
		err = fmt.Errorf("KVM_GET_REGS: %w", err)
	}
	return r, err
}

// SetRegs sets the general-purpose registers (api.rst, 4.12).
func (v *VCPU) SetRegs(r *Regs) error {
	if err := ioctlPtr(v.fd, iow[Regs](nrSetRegs), r); err != nil {
		return fmt.Errorf("KVM_SET_REGS: %w", err)
	}
	return nil
}

// SRegs returns the segment, control and descriptor-table registers (api.rst, 4.13).
func (v *VCPU) SRegs() (r SRegs, err error) {
	if err = ioctlPtr(v.fd, ior[SRegs](nrGetSRegs), &r); err != nil {
		err = fmt.Errorf("KVM_GET_SREGS: %w", err)
	}
	return r, err
}

// SetSRegs sets the segment, control and descriptor-table registers (api.rst, 4.14).
func (v *VCPU) SetSRegs(r *SRegs) error {
	if err := ioctlPtr(v.fd, iow[SRegs](nrSetSRegs), r); err != nil {
		return fmt.Errorf("KVM_SET_SREGS: %w", err)
	}
	return nil
}

// FPU is struct kvm_fpu: the x87 and SSE state.
type FPU struct {
	FPR        [8][16]uint8  // 0
	FCW        uint16        // 128
	FSW        uint16        // 130
	FTWX       uint8         // 132
	_          uint8         // 133
	LastOpcode uint16        // 134
	LastIP     uint64        // 136
	LastDP     uint64        // 144
	XMM        [16][16]uint8 // 152
	MXCSR      uint32        // 408
	_          uint32        // 412
}

// SetFPU sets the x87 and SSE state (api.rst, 4.23).
func (v *VCPU) SetFPU(f *FPU) error {
	if err := ioctlPtr(v.fd, iow[FPU](nrSetFPU), f); err != nil {
		return fmt.Errorf("KVM_SET_FPU: %w", err)
	}
	return nil
}

// LAPIC is struct kvm_lapic_state: the local APIC's register page.
type LAPIC struct {
	Regs [1024]uint8 // 0
}

// LAPIC returns the local APIC's registers (api.rst, 4.57).
func (v *VCPU) LAPIC() (l LAPIC, err error) {
	if err = ioctlPtr(v.fd, ior[LAPIC](nrGetLAPIC), &l); err != nil {
		err = fmt.Errorf("KVM_GET_LAPIC: %w", err)
	}
	return l, err
}

// SetLAPIC sets the local APIC's registers (api.rst, 4.58).
func (v *VCPU) SetLAPIC(l *LAPIC) error {
	if err := ioctlPtr(v.fd, iow[LAPIC](nrSetLAPIC), l); err != nil {
		return fmt.Errorf("KVM_SET_LAPIC: %w", err)
	}
	return nil
}

// MPState is struct kvm_mp_state: what a vCPU waits for.
type MPState uint32

// The states that x86 knows and a VM of ours can meet (linux/kvm.h).
const (
	MPRunnable      MPState = 0 // nothing
	MPUninitialized MPState = 1 // INIT: an application processor that was never started
	MPInitReceived  MPState = 2 // SIPI
	MPHalted        MPState = 3 // an interrupt
)

// MPState returns what the vCPU waits for (api.rst, 4.38).
func (v *VCPU) MPState() (s MPState, err error) {
	if err = ioctlPtr(v.fd, ior[MPState](nrMPState), &s); err != nil {
		err = fmt.Errorf("KVM_GET_MP_STATE: %w", err)
	}
	return s, err
}
