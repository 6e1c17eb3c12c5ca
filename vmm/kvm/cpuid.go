package kvm

import (
	"errors"
	"fmt"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// CPUIDEntry is struct kvm_cpuid_entry2: one leaf, or one index of a leaf, and the registers that CPUID answers.
type CPUIDEntry = gokvm.CPUIDEntry2

// CPUIDSignificantIndex in an entry's Flags says that Index selects the entry (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
const CPUIDSignificantIndex = 1 << 0

// maxCPUID is KVM's own limit on entries (KVM_MAX_CPUID_ENTRIES).
const maxCPUID = 256

// cpuid is struct kvm_cpuid2 with room for every entry that KVM accepts.
type cpuid struct {
	Nent    uint32               // 0
	_       uint32               // 4
	Entries [maxCPUID]CPUIDEntry // 8
}

// cpuidHeader is struct kvm_cpuid2 without its flexible array: what the ioctl numbers encode.
type cpuidHeader struct{ Nent, Padding uint32 }

const (
	nrGetSupportedCPUID = 0x05
	nrSetCPUID2         = 0x90
)

// SupportedCPUID returns the leaves that the host's CPU and KVM can give a guest (api.rst, 4.46).
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	c := cpuid{Nent: maxCPUID}
	if err := ioctlPtr(s.fd, iowr[cpuidHeader](nrGetSupportedCPUID), &c); err != nil {
		return nil, fmt.Errorf("KVM_GET_SUPPORTED_CPUID: %w", err)
	}
	return append([]CPUIDEntry(nil), c.Entries[:min(c.Nent, maxCPUID)]...), nil
}

// SetCPUID sets what CPUID answers on this vCPU. It must come before SetMSRs and before the first Run (api.rst, 4.20).
func (v *VCPU) SetCPUID(entries []CPUIDEntry) error {
	if len(entries) > maxCPUID {
		return fmt.Errorf("KVM_SET_CPUID2: %d entries, at most %d: %w", len(entries), maxCPUID, unix.E2BIG)
	}
	c := cpuid{Nent: uint32(len(entries))}
	copy(c.Entries[:], entries)
	if err := ioctlPtr(v.fd, iow[cpuidHeader](nrSetCPUID2), &c); err != nil {
		return fmt.Errorf("KVM_SET_CPUID2: %w", err)
	}
	return nil
}

// msrs is struct kvm_msrs with room for the few MSRs that a boot sets.
type msrs struct {
	N       uint32       // 0
	_       uint32       // 4
	Entries [16]MSREntry // 8
}

type msrsHeader struct{ N, Pad uint32 }

// MSREntry is struct kvm_msr_entry: the number of a model-specific register and its value.
type MSREntry struct {
	Index uint32 // 0
	_     uint32 // 4
	Data  uint64 // 8
}

const (
	nrSetMSRs = 0x89
	nrGetMSRs = 0x88
)

// ErrMSR reports that KVM refused a model-specific register.
var ErrMSR = errors.New("model-specific register refused")

// SetMSRs writes up to 16 model-specific registers (api.rst, 4.19). The error names the first one refused.
func (v *VCPU) SetMSRs(entries ...MSREntry) error {
	var m msrs
	if len(entries) > len(m.Entries) {
		return fmt.Errorf("KVM_SET_MSRS: %d entries, at most %d: %w", len(entries), len(m.Entries), unix.E2BIG)
	}
	m.N = uint32(copy(m.Entries[:], entries))
	n, err := ioctlCount(v.fd, iow[msrsHeader](nrSetMSRs), &m)
	if err != nil {
		return fmt.Errorf("KVM_SET_MSRS: %w", err)
	}
	if n < len(entries) {
		return fmt.Errorf("KVM_SET_MSRS: %w: %#x", ErrMSR, entries[n].Index)
	}
	return nil
}

// MSR reads one model-specific register (api.rst, 4.18).
func (v *VCPU) MSR(index uint32) (uint64, error) {
	m := msrs{N: 1}
	m.Entries[0].Index = index
	n, err := ioctlCount(v.fd, iowr[msrsHeader](nrGetMSRs), &m)
	if err != nil {
		return 0, fmt.Errorf("KVM_GET_MSRS: %w", err)
	}
	if n != 1 {
		return 0, fmt.Errorf("KVM_GET_MSRS: %w: %#x", ErrMSR, index)
	}
	return m.Entries[0].Data, nil
}
