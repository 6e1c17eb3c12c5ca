package kvm

import (
	"errors"
	"fmt"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// VM is one machine's file descriptor. Its methods are safe for concurrent use except where they say otherwise.
type VM struct {
	fd       int
	mmapSize int
}

const (
	nrSetUserMemoryRegion = 0x46
	nrSetIdentityMapAddr  = 0x48
	nrCreatePIT2          = 0x77
)

// Flags of a memory slot (api.rst, 4.35).
const (
	MemLogDirtyPages = 1 << 0
	MemReadOnly      = 1 << 1
)

// SetMemory maps mem, which must be page-aligned and must not be Go heap, at guest-physical address addr in the given
// slot. An empty mem deletes the slot. The mapping must outlive the VM or the slot (api.rst, 4.35).
func (m *VM) SetMemory(slot uint32, flags uint32, addr uint64, mem []byte) error {
	r := gokvm.UserspaceMemoryRegion{
		Slot: slot, Flags: flags, GuestPhysAddr: addr, MemorySize: uint64(len(mem)), UserspaceAddr: address(mem),
	}
	if err := ioctlPtr(m.fd, iow[gokvm.UserspaceMemoryRegion](nrSetUserMemoryRegion), &r); err != nil {
		return fmt.Errorf("KVM_SET_USER_MEMORY_REGION: slot %d at %#x, %d bytes: %w", slot, addr, len(mem), err)
	}
	return nil
}

// SetTSSAddr and SetIdentityMapAddr reserve four pages at tss, below 4 GiB and away from memory and devices, in which
// VMX runs real mode (api.rst, 4.13 and 4.41). They come before the first vCPU. On AMD they cost nothing.
func (m *VM) SetTSSAddr(tss uint32) error {
	if err := gokvm.SetTSSAddr(uintptr(m.fd), tss); err != nil {
		return fmt.Errorf("KVM_SET_TSS_ADDR: %w", err)
	}
	return nil
}

// SetIdentityMapAddr sets the page of VMX's identity-mapped page table; see SetTSSAddr.
func (m *VM) SetIdentityMapAddr(addr uint64) error {
	if err := ioctlPtr(m.fd, iow[uint64](nrSetIdentityMapAddr), &addr); err != nil {
		return fmt.Errorf("KVM_SET_IDENTITY_MAP_ADDR: %w", err)
	}
	return nil
}

// CreateIRQChip gives the machine its in-kernel PICs, I/O APIC and, for vCPUs made later, local APICs (api.rst, 4.24).
func (m *VM) CreateIRQChip() error {
	if err := gokvm.CreateIRQChip(uintptr(m.fd)); err != nil {
		return fmt.Errorf("KVM_CREATE_IRQCHIP: %w", err)
	}
	return nil
}

// pitConfig is struct kvm_pit_config.
type pitConfig struct {
	Flags uint32     // 0
	_     [15]uint32 // 4
}

// pitSpeakerDummy makes KVM answer the speaker port 0x61, which Linux reads to calibrate its clocks (KVM_PIT_SPEAKER_DUMMY).
const pitSpeakerDummy = 1

// CreatePIT gives the machine an in-kernel i8254 and port 0x61. CreateIRQChip comes first (api.rst, 4.71).
func (m *VM) CreatePIT() error {
	c := pitConfig{Flags: pitSpeakerDummy}
	if err := ioctlPtr(m.fd, iow[pitConfig](nrCreatePIT2), &c); err != nil {
		return fmt.Errorf("KVM_CREATE_PIT2: %w", err)
	}
	return nil
}

// CreateVCPU makes vCPU number id, which is also its initial APIC id (api.rst, 4.7).
func (m *VM) CreateVCPU(id int) (*VCPU, error) {
	for {
		fd, err := gokvm.CreateVCPU(uintptr(m.fd), id)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("KVM_CREATE_VCPU %d: %w", id, err)
		}
		return newVCPU(int(fd), m.mmapSize)
	}
}

// Close releases the machine. vCPUs are closed first.
func (m *VM) Close() error { return closeOnce(&m.fd) }
