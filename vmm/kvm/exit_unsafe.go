package kvm

import (
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// iorun is KVM_RUN's request number, computed once for the hot path.
var iorun = gokvm.IIO(nrRun)

// runPage is the head of struct kvm_run up to the end of its exit union (linux/kvm.h).
type runPage struct {
	Request     uint32     // 0: request_interrupt_window, immediate_exit, padding
	_           uint32     // 4
	ExitReason  uint32     // 8
	ReadyInject uint8      // 12
	IfFlag      uint8      // 13
	Flags       uint16     // 14
	CR8         uint64     // 16
	APICBase    uint64     // 24
	U           [256]uint8 // 32: the exit union
}

// ioExit is the union's io member.
type ioExit struct {
	Direction  uint8  // 0
	Size       uint8  // 1
	Port       uint16 // 2
	Count      uint32 // 4
	DataOffset uint64 // 8
}

// mmioExit is the union's mmio member.
type mmioExit struct {
	PhysAddr uint64   // 0
	Data     [8]uint8 // 8
	Len      uint32   // 16
	IsWrite  uint8    // 20
}

// failEntryExit is the union's fail_entry member.
type failEntryExit struct {
	Reason uint64 // 0
	CPU    uint32 // 8
}

// internalExit is the union's internal member and, for emulation failures, its emulation_failure member.
type internalExit struct {
	SubError  uint32    // 0
	NData     uint32    // 4
	Flags     uint64    // 8: data[0]
	InsnSize  uint8     // 16: data[1]
	InsnBytes [15]uint8 // 17
}

// internalData is the union's internal member with all its data.
type internalData struct {
	SubError uint32     // 0
	NData    uint32     // 4
	Data     [16]uint64 // 8
}

// systemEventExit is the union's system_event member.
type systemEventExit struct {
	Type  uint32 // 0
	NData uint32 // 4
}

func runPageOf(page []byte) *runPage {
	return (*runPage)(unsafe.Pointer(unsafe.SliceData(page))) // System.init checked the size; an mmap'ed page is aligned
}

func member[T any](r *runPage) *T {
	return (*T)(unsafe.Pointer(&r.U)) // every T above is smaller than the union
}
