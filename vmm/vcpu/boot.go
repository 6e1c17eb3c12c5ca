package vcpu

import (
	"encoding/binary"

	"github.com/kvmlet/kvmlet/guest/linux"
	"github.com/kvmlet/kvmlet/vmm/kvm"
)

// SetCPUID sets what CPUID answers; it comes first of all setters.
func (v *VCPU) SetCPUID(entries []kvm.CPUIDEntry) error { return v.kvm.SetCPUID(entries) }

// Model-specific registers (Intel SDM volume 4, 2.1).
const (
	msrMiscEnable  = 0x1A0
	msrMTRRDefType = 0x2FF

	miscFastStrings = 1 << 0
	mtrrEnable      = 1 << 11
	mtrrWriteBack   = 6
)

// Offsets of local APIC registers and the delivery modes of its pins (Intel SDM volume 3A, 11.4.1 and 11.5.1).
const (
	lapicLVT0   = 0x350
	lapicLVT1   = 0x360
	modeNMI     = 4 << 8
	modeExtINT  = 7 << 8
	modeMask    = 7 << 8
	initialFCW  = 0x37F
	initialMXCR = 0x1F80
)

// Reset puts the vCPU into the state that firmware leaves to a boot loader: memory cached, fast string operations on,
// the local APIC's pins wired to the PIC and to NMI, the FPU initialised.
func (v *VCPU) Reset() error {
	err := v.kvm.SetMSRs(
		kvm.MSREntry{Index: msrMiscEnable, Data: miscFastStrings},
		kvm.MSREntry{Index: msrMTRRDefType, Data: mtrrEnable | mtrrWriteBack},
	)
	if err != nil {
		return err
	}
	if err := v.kvm.SetFPU(&kvm.FPU{FCW: initialFCW, MXCSR: initialMXCR}); err != nil {
		return err
	}
	apic, err := v.kvm.LAPIC()
	if err != nil {
		return err
	}
	setMode(apic.Regs[lapicLVT0:], modeExtINT)
	setMode(apic.Regs[lapicLVT1:], modeNMI)
	return v.kvm.SetLAPIC(&apic)
}

func setMode(reg []byte, mode uint32) {
	binary.LittleEndian.PutUint32(reg, binary.LittleEndian.Uint32(reg)&^modeMask|mode)
}

// SetEntry makes the vCPU enter a kernel as its boot protocol asks.
func (v *VCPU) SetEntry(e linux.Entry) error {
	sregs, err := v.kvm.SRegs()
	if err != nil {
		return err
	}
	sregs.CS = segment(e.Code)
	data := segment(e.Data)
	sregs.DS, sregs.ES, sregs.FS, sregs.GS, sregs.SS = data, data, data, data, data
	sregs.TR = segment(e.Task)
	sregs.GDT.Base, sregs.GDT.Limit = e.GDTBase, e.GDTLimit
	sregs.IDT.Base, sregs.IDT.Limit = 0, 0
	sregs.CR0, sregs.CR3, sregs.CR4, sregs.EFER = e.CR0, e.CR3, e.CR4, e.EFER
	if err := v.kvm.SetSRegs(&sregs); err != nil {
		return err
	}
	return v.kvm.SetRegs(&kvm.Regs{RIP: e.RIP, RSP: e.RSP, RBX: e.RBX, RSI: e.RSI, RFLAGS: e.RFLAGS})
}

func segment(s linux.Segment) kvm.Segment {
	return kvm.Segment{
		Selector: s.Selector, Base: s.Base, Limit: s.Limit, Typ: s.Type, Present: 1,
		S: bit(!s.System), L: bit(s.Long), DB: bit(s.Default), G: bit(s.Granularity),
	}
}

func bit(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}
