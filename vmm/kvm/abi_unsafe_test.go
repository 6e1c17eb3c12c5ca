package kvm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// TestABI compares every structure and request number that this package passes to the kernel with what the C compiler
// makes of linux/kvm.h.
func TestABI(t *testing.T) {
	t.Parallel()
	cc, err := exec.LookPath("cc")
	if err != nil {
		if os.Getenv("KVMLET_REQUIRE") == "all" {
			t.Fatal("no C compiler: run `make setup`")
		}
		t.Skip("no C compiler: run `make setup`")
	}

	// The C expression, and the value that Go has for it.
	checks := map[string]uintptr{}
	offset := func(cType, member string, v uintptr) {
		checks[fmt.Sprintf("offsetof(struct %s, %s)", cType, member)] = v
	}
	sizeOf := func(cType string, v uintptr) { checks[fmt.Sprintf("sizeof(struct %s)", cType)] = v }

	var run runPage
	offset("kvm_run", "immediate_exit", unsafe.Offsetof(run.Request)+1)
	offset("kvm_run", "exit_reason", unsafe.Offsetof(run.ExitReason))
	offset("kvm_run", "ready_for_interrupt_injection", unsafe.Offsetof(run.ReadyInject))
	offset("kvm_run", "if_flag", unsafe.Offsetof(run.IfFlag))
	offset("kvm_run", "flags", unsafe.Offsetof(run.Flags))
	offset("kvm_run", "cr8", unsafe.Offsetof(run.CR8))
	offset("kvm_run", "apic_base", unsafe.Offsetof(run.APICBase))
	offset("kvm_run", "hw", unsafe.Offsetof(run.U))
	union := unsafe.Offsetof(run.U)
	var io ioExit
	offset("kvm_run", "io.direction", union+unsafe.Offsetof(io.Direction))
	offset("kvm_run", "io.size", union+unsafe.Offsetof(io.Size))
	offset("kvm_run", "io.port", union+unsafe.Offsetof(io.Port))
	offset("kvm_run", "io.count", union+unsafe.Offsetof(io.Count))
	offset("kvm_run", "io.data_offset", union+unsafe.Offsetof(io.DataOffset))
	var mmio mmioExit
	offset("kvm_run", "mmio.phys_addr", union+unsafe.Offsetof(mmio.PhysAddr))
	offset("kvm_run", "mmio.data", union+unsafe.Offsetof(mmio.Data))
	offset("kvm_run", "mmio.len", union+unsafe.Offsetof(mmio.Len))
	offset("kvm_run", "mmio.is_write", union+unsafe.Offsetof(mmio.IsWrite))
	var fail failEntryExit
	offset("kvm_run", "fail_entry.hardware_entry_failure_reason", union+unsafe.Offsetof(fail.Reason))
	offset("kvm_run", "fail_entry.cpu", union+unsafe.Offsetof(fail.CPU))
	var internal internalExit
	offset("kvm_run", "internal.suberror", union+unsafe.Offsetof(internal.SubError))
	offset("kvm_run", "internal.ndata", union+unsafe.Offsetof(internal.NData))
	offset("kvm_run", "emulation_failure.flags", union+unsafe.Offsetof(internal.Flags))
	offset("kvm_run", "emulation_failure.insn_size", union+unsafe.Offsetof(internal.InsnSize))
	offset("kvm_run", "emulation_failure.insn_bytes", union+unsafe.Offsetof(internal.InsnBytes))
	var data internalData
	offset("kvm_run", "internal.data", union+unsafe.Offsetof(data.Data))
	var event systemEventExit
	offset("kvm_run", "system_event.type", union+unsafe.Offsetof(event.Type))
	offset("kvm_run", "system_event.ndata", union+unsafe.Offsetof(event.NData))

	sizeOf("kvm_userspace_memory_region", size[gokvm.UserspaceMemoryRegion]())
	sizeOf("kvm_regs", size[Regs]())
	sizeOf("kvm_sregs", size[SRegs]())
	sizeOf("kvm_segment", size[Segment]())
	sizeOf("kvm_dtable", size[Descriptor]())
	var regs Regs
	offset("kvm_regs", "r8", unsafe.Offsetof(regs.R8))
	offset("kvm_regs", "rip", unsafe.Offsetof(regs.RIP))
	var sregs SRegs
	offset("kvm_sregs", "tr", unsafe.Offsetof(sregs.TR))
	offset("kvm_sregs", "gdt", unsafe.Offsetof(sregs.GDT))
	offset("kvm_sregs", "cr0", unsafe.Offsetof(sregs.CR0))
	offset("kvm_sregs", "efer", unsafe.Offsetof(sregs.EFER))
	offset("kvm_sregs", "apic_base", unsafe.Offsetof(sregs.ApicBase))
	var seg Segment
	offset("kvm_segment", "selector", unsafe.Offsetof(seg.Selector))
	offset("kvm_segment", "unusable", unsafe.Offsetof(seg.Unusable))
	sizeOf("kvm_vcpu_events", size[Events]())
	var events Events
	offset("kvm_vcpu_events", "interrupt", unsafe.Offsetof(events.Interrupt))
	offset("kvm_vcpu_events", "nmi", unsafe.Offsetof(events.NMI))
	offset("kvm_vcpu_events", "sipi_vector", unsafe.Offsetof(events.SIPIVector))
	offset("kvm_vcpu_events", "smi", unsafe.Offsetof(events.SMI))
	offset("kvm_vcpu_events", "triple_fault", unsafe.Offsetof(events.TripleFault))
	offset("kvm_vcpu_events", "exception_has_payload", unsafe.Offsetof(events.ExceptionHasPayload))
	offset("kvm_vcpu_events", "exception_payload", unsafe.Offsetof(events.ExceptionPayload))
	var fpu FPU
	sizeOf("kvm_fpu", size[FPU]())
	offset("kvm_fpu", "fcw", unsafe.Offsetof(fpu.FCW))
	offset("kvm_fpu", "last_opcode", unsafe.Offsetof(fpu.LastOpcode))
	offset("kvm_fpu", "xmm", unsafe.Offsetof(fpu.XMM))
	offset("kvm_fpu", "mxcsr", unsafe.Offsetof(fpu.MXCSR))
	sizeOf("kvm_lapic_state", size[LAPIC]())
	sizeOf("kvm_mp_state", size[MPState]())

	sizeOf("kvm_cpuid2", size[cpuidHeader]())
	sizeOf("kvm_cpuid_entry2", size[CPUIDEntry]())
	var entry CPUIDEntry
	offset("kvm_cpuid_entry2", "flags", unsafe.Offsetof(entry.Flags))
	offset("kvm_cpuid_entry2", "edx", unsafe.Offsetof(entry.Edx))
	var c cpuid
	offset("kvm_cpuid2", "entries", unsafe.Offsetof(c.Entries))
	sizeOf("kvm_msrs", size[msrsHeader]())
	sizeOf("kvm_msr_entry", size[MSREntry]())
	var m msrs
	offset("kvm_msrs", "entries", unsafe.Offsetof(m.Entries))
	offset("kvm_msr_entry", "data", unsafe.Offsetof(m.Entries[0].Data))

	sizeOf("kvm_pit_config", size[pitConfig]())
	sizeOf("kvm_irq_level", size[irqLevel]())
	sizeOf("kvm_irq_routing", size[routingHeader]())
	sizeOf("kvm_irq_routing_entry", size[Route]())
	offset("kvm_irq_routing", "entries", size[routingHeader]())
	var rt Route
	offset("kvm_irq_routing_entry", "u", unsafe.Offsetof(rt.U))
	sizeOf("kvm_irqfd", size[irqfd]())
	var fd irqfd
	offset("kvm_irqfd", "gsi", unsafe.Offsetof(fd.GSI))
	offset("kvm_irqfd", "resamplefd", unsafe.Offsetof(fd.ResampleFD))
	sizeOf("kvm_ioeventfd", size[ioEventFD]())
	var ev ioEventFD
	offset("kvm_ioeventfd", "addr", unsafe.Offsetof(ev.Addr))
	offset("kvm_ioeventfd", "fd", unsafe.Offsetof(ev.FD))
	offset("kvm_ioeventfd", "flags", unsafe.Offsetof(ev.Flags))

	checks["KVM_RUN"] = iorun
	checks["KVM_SET_USER_MEMORY_REGION"] = iow[gokvm.UserspaceMemoryRegion](nrSetUserMemoryRegion)
	checks["KVM_SET_IDENTITY_MAP_ADDR"] = iow[uint64](nrSetIdentityMapAddr)
	checks["KVM_CREATE_PIT2"] = iow[pitConfig](nrCreatePIT2)
	checks["KVM_GET_REGS"] = ior[Regs](nrGetRegs)
	checks["KVM_SET_REGS"] = iow[Regs](nrSetRegs)
	checks["KVM_GET_SREGS"] = ior[SRegs](nrGetSRegs)
	checks["KVM_SET_SREGS"] = iow[SRegs](nrSetSRegs)
	checks["KVM_GET_VCPU_EVENTS"] = ior[Events](nrGetEvents)
	checks["KVM_SET_FPU"] = iow[FPU](nrSetFPU)
	checks["KVM_GET_LAPIC"] = ior[LAPIC](nrGetLAPIC)
	checks["KVM_SET_LAPIC"] = iow[LAPIC](nrSetLAPIC)
	checks["KVM_GET_MP_STATE"] = ior[MPState](nrMPState)
	checks["KVM_GET_SUPPORTED_CPUID"] = iowr[cpuidHeader](nrGetSupportedCPUID)
	checks["KVM_SET_CPUID2"] = iow[cpuidHeader](nrSetCPUID2)
	checks["KVM_SET_MSRS"] = iow[msrsHeader](nrSetMSRs)
	checks["KVM_GET_MSRS"] = iowr[msrsHeader](nrGetMSRs)
	checks["KVM_IRQ_LINE"] = iow[irqLevel](nrIRQLine)
	checks["KVM_SET_GSI_ROUTING"] = iow[routingHeader](nrSetGSIRouting)
	checks["KVM_IRQFD"] = iow[irqfd](nrIRQFD)
	checks["KVM_IOEVENTFD"] = iow[ioEventFD](nrIOEventFD)
	for name, c := range map[string]Capability{
		"KVM_CAP_IRQFD": CapIRQFD, "KVM_CAP_IOEVENTFD": CapIOEventFD, "KVM_CAP_TSC_CONTROL": CapTSCControl,
		"KVM_CAP_MAX_VCPUS": CapMaxVCPUs, "KVM_CAP_SIGNAL_MSI": CapSignalMSI,
		"KVM_CAP_IOEVENTFD_ANY_LENGTH": CapIOEventFDAnyLen,
		"KVM_CAP_IMMEDIATE_EXIT":       CapImmediateExit, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2": CapDirtyLogProtect2,
		"KVM_CAP_DIRTY_LOG_RING": CapDirtyLogRing,
		"KVM_CAP_IRQCHIP":        gokvm.CapIRQChip, "KVM_CAP_USER_MEMORY": gokvm.CapUserMemory,
		"KVM_CAP_SET_TSS_ADDR": gokvm.CapSetTSSAddr, "KVM_CAP_EXT_CPUID": gokvm.CapEXTCPUID,
		"KVM_CAP_IRQ_ROUTING": gokvm.CapIRQRouting, "KVM_CAP_PIT2": gokvm.CapPIT2,
		"KVM_CAP_TSC_DEADLINE_TIMER": CapTSCDeadlineTimer,
	} {
		checks[name] = uintptr(c)
	}

	var src strings.Builder
	src.WriteString("#include <stddef.h>\n#include <linux/kvm.h>\n")
	for expr, v := range checks {
		fmt.Fprintf(&src, "_Static_assert((%s) == %d, %q);\n", expr, v, fmt.Sprintf("%s is not %d", expr, v))
	}
	file := filepath.Join(t.TempDir(), "abi.c")
	if err := os.WriteFile(file, []byte(src.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(cc, "-fsyntax-only", file).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
