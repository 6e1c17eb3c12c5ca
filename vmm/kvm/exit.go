package kvm

import "fmt"

// ExitReason is a KVM_EXIT_* number.
type ExitReason uint32

// The exits that x86 knows and a VM of ours can meet (linux/kvm.h).
const (
	ExitUnknown       ExitReason = 0
	ExitIO            ExitReason = 2
	ExitHLT           ExitReason = 5
	ExitMMIO          ExitReason = 6
	ExitIRQWindow     ExitReason = 7
	ExitShutdown      ExitReason = 8
	ExitFailEntry     ExitReason = 9
	ExitIntr          ExitReason = 10
	ExitInternalError ExitReason = 17
	ExitSystemEvent   ExitReason = 24
)

// String returns the name as linux/kvm.h has it.
func (r ExitReason) String() string {
	switch r {
	case ExitUnknown:
		return "KVM_EXIT_UNKNOWN"
	case ExitIO:
		return "KVM_EXIT_IO"
	case ExitHLT:
		return "KVM_EXIT_HLT"
	case ExitMMIO:
		return "KVM_EXIT_MMIO"
	case ExitIRQWindow:
		return "KVM_EXIT_IRQ_WINDOW_OPEN"
	case ExitShutdown:
		return "KVM_EXIT_SHUTDOWN"
	case ExitFailEntry:
		return "KVM_EXIT_FAIL_ENTRY"
	case ExitIntr:
		return "KVM_EXIT_INTR"
	case ExitInternalError:
		return "KVM_EXIT_INTERNAL_ERROR"
	case ExitSystemEvent:
		return "KVM_EXIT_SYSTEM_EVENT"
	default:
		return fmt.Sprintf("KVM_EXIT %d", uint32(r))
	}
}

// Exit returns why the last Run came back.
func (v *VCPU) Exit() ExitReason { return ExitReason(v.run.ExitReason) }

// PortIO describes the port access of an ExitIO. Data holds Count units of Size bytes, in guest order: what the guest
// wrote, or room for what it reads.
type PortIO struct {
	Port  uint16
	Size  int
	Write bool
	Data  []byte
}

// PortIO returns the access of an ExitIO. Data stays valid until the next Run. A malformed exit gives empty Data.
func (v *VCPU) PortIO() PortIO {
	e := member[ioExit](v.run)
	io := PortIO{Port: e.Port, Size: int(e.Size), Write: e.Direction == 1}
	n := uint64(e.Size) * uint64(e.Count)
	if e.Size != 0 && e.DataOffset <= uint64(len(v.page)) && n <= uint64(len(v.page))-e.DataOffset {
		io.Data = v.page[e.DataOffset : e.DataOffset+n]
	}
	return io
}

// MMIO describes the memory access of an ExitMMIO: Data is what the guest wrote, or room for what it reads.
type MMIO struct {
	Addr  uint64
	Write bool
	Data  []byte
}

// MMIO returns the access of an ExitMMIO. Data stays valid until the next Run.
func (v *VCPU) MMIO() MMIO {
	e := member[mmioExit](v.run)
	return MMIO{Addr: e.PhysAddr, Write: e.IsWrite != 0, Data: e.Data[:min(e.Len, uint32(len(e.Data)))]}
}

// The kinds of SystemEvent (linux/kvm.h).
const (
	SystemEventShutdown = 1
	SystemEventReset    = 2
	SystemEventCrash    = 3
)

// SystemEvent returns the kind of an ExitSystemEvent.
func (v *VCPU) SystemEvent() uint32 { return member[systemEventExit](v.run).Type }

// FailEntry returns the hardware's reason for an ExitFailEntry.
func (v *VCPU) FailEntry() uint64 { return member[failEntryExit](v.run).Reason }

// The kinds of internal error (linux/kvm.h).
const (
	InternalErrorEmulation = 1
	InternalErrorDelivery  = 3 // an event's delivery needs an access that KVM would have to emulate
)

// InternalError describes an ExitInternalError. Insn holds the bytes of the instruction that KVM's emulator does not
// know, where the kernel tells them; Data is what it tells of other errors. A guest's program gets an invalid opcode
// exception for such an instruction, and only its kernel's ends here. KVM_CAP_EXIT_ON_EMULATION_FAILURE would change
// that: any program could end the VM. The bytes come without it.
type InternalError struct {
	SubError uint32
	Insn     []byte
	Data     []uint64
}

// InternalError returns the details of an ExitInternalError.
func (v *VCPU) InternalError() InternalError {
	e := member[internalExit](v.run)
	ie := InternalError{SubError: e.SubError}
	const flagInsnBytes = 1 << 0 // KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
	if e.SubError == InternalErrorEmulation && e.NData >= 3 && e.Flags&flagInsnBytes != 0 {
		ie.Insn = append(ie.Insn, e.InsnBytes[:min(int(e.InsnSize), len(e.InsnBytes))]...)
	}
	if e.SubError != InternalErrorEmulation {
		d := member[internalData](v.run)
		ie.Data = append(ie.Data, d.Data[:min(d.NData, uint32(len(d.Data)))]...)
	}
	return ie
}
