package vcpu

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"

	"github.com/bobuhiro11/gokvm/cpuid"

	"github.com/kvmlet/kvmlet/vmm/kvm"
)

// Template names a choice of CPU features that a guest sees.
type Template string

const (
	// Host passes on all that the host's CPU and KVM can give.
	Host Template = "host"
	// Baseline passes on only what every x86-64-v2 CPU and every KVM since Linux 5.10 has, so that a guest can move between
	// hosts of one vendor. The vendor, family and model and the sizes of caches are the host's.
	Baseline Template = "baseline"
)

// ParseTemplate returns the template with the given name.
func ParseTemplate(name string) (Template, error) {
	switch t := Template(name); t {
	case Host, Baseline:
		return t, nil
	default:
		return "", fmt.Errorf("unknown CPU template %q (have %s, %s)", name, Host, Baseline)
	}
}

// Leaves and bits of CPUID (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E).
const (
	leafFeatures    = 0x1
	leafCache       = 0x4
	leafMonitor     = 0x5
	leafPower       = 0x6
	leafExtFeatures = 0x7
	leafPerfMon     = 0xA
	leafTopology    = 0xB
	leafXSAVE       = 0xD
	leafTopologyV2  = 0x1F
	leafKVM         = 0x40000000 // KVM's signature (Documentation/virt/kvm/x86/cpuid.rst)
	leafKVMFeatures = 0x40000001
	leafExtended    = 0x80000000
	leafAMDFeatures = 0x80000001
	leafBrand       = 0x80000002 // the first of brandLeaves
	leafAMDCacheL1  = 0x80000005
	leafAMDCacheL2  = 0x80000006
	leafAMDSize     = 0x80000008
	leafAMDCache    = 0x8000001D
	leafAMDTopology = 0x8000001E

	ecx1TSCDeadline = 1 << 24
	ecx1OSXSAVE     = 1 << 27
	ecx1Hypervisor  = 1 << 31
	edx1HTT         = 1 << 28

	brandLeaves = 3

	topologySMT  = 1 // level types of leaf 0xB, ECX[15:8]
	topologyCore = 2
)

// The features of the baseline: x86-64-v2 as the psABI defines it, plus what a guest needs to live under KVM.
const (
	baselineECX1  = 1<<0 | 1<<9 | 1<<13 | 1<<19 | 1<<20 | 1<<21 | 1<<23 // SSE3 SSSE3 CX16 SSE4.1 SSE4.2 x2APIC POPCNT
	baselineEDX1  = 0x078BFBFF                                          // FPU to SSE2: bits 0-9, 11-17, 19, 23-26
	baselineECX81 = 1 << 0                                              // LAHF
	baselineEDX81 = 0x0183F3FF | 1<<11 | 1<<20 | 1<<27 | 1<<29          // AMD's copies of leaf 1, SYSCALL NX RDTSCP LM
	baselineEAX6  = 1 << 2                                              // the APIC's timer never stops

	// KVM's paravirtual features: the clocks (0, 3, 24), no I/O delay (1), asynchronous page faults (4, 10, 14), end of
	// interrupt (6), unhalt (7), TLB flush (9), IPIs (11), polling (12), yield (13). Steal time (5) needs scheduler
	// statistics in the host's kernel.
	baselineKVM = 1<<0 | 1<<1 | 1<<3 | 1<<4 | 1<<6 | 1<<7 | 1<<9 | 1<<10 | 1<<11 | 1<<12 | 1<<13 | 1<<14 | 1<<24

	baselineLast    = leafTopology // the last leaf of each range
	baselineLastKVM = leafKVMFeatures
	baselineLastExt = leafAMDSize

	// The widths of addresses: no larger than those of CPUs without 5-level page tables, and ample for MaxMemory.
	baselinePhysical = 40
	baselineLinear   = 48
)

const all = ^uint32(0)

// baselineLeaves are the leaves that the baseline lets through and, of each, the bits in EAX, EBX, ECX and EDX. Whatever
// is not here, and is not made by this package, the guest does not see.
var baselineLeaves = map[uint32][4]uint32{
	0:               {all, all, all, all}, // the last leaf, clamped; the vendor
	leafFeatures:    {all, 0xFF00, baselineECX1, baselineEDX1},
	leafCache:       {all, all, all, all},
	leafPower:       {baselineEAX6, 0, 0, 0},
	leafExtFeatures: {},                   // none
	leafKVM:         {all, all, all, all}, // the last leaf, clamped; the signature
	leafKVMFeatures: {baselineKVM, 0, 0, 0},
	leafExtended:    {all, all, all, all}, // the last leaf, clamped; the vendor again
	leafAMDFeatures: {all, 0, baselineECX81, baselineEDX81},
	leafAMDCacheL1:  {all, all, all, all},
	leafAMDCacheL2:  {all, all, all, all},
	leafAMDSize:     {0xFFFF, 0, 0xF0FF, 0}, // the widths of addresses, clamped; the number of threads
}

// baselineBrand is the baseline's processor name. It names no host, since the guest may move to another.
const baselineBrand = "kvmlet baseline x86-64-v2"

// brand returns the processor name that the guest sees, 48 bytes in EAX, EBX, ECX and EDX of three leaves, as they are
// there. KVM has none to offer: the host template asks the host's CPU, which has one unless it is older than long mode.
func (t Template) brand() (b [brandLeaves * 16]byte) {
	if t == Baseline {
		copy(b[:], baselineBrand)
		return b
	}
	if last, _, _, _ := cpuid.CPUID(leafExtended); last < leafBrand+brandLeaves-1 {
		return b
	}
	for i := range brandLeaves {
		eax, ebx, ecx, edx := cpuid.CPUID(leafBrand + uint32(i))
		for j, v := range [...]uint32{eax, ebx, ecx, edx} {
			binary.LittleEndian.PutUint32(b[i*16+j*4:], v)
		}
	}
	return b
}

// nameLeaves spells brand.
func nameLeaves(brand [brandLeaves * 16]byte) []kvm.CPUIDEntry {
	entries := make([]kvm.CPUIDEntry, brandLeaves)
	for i := range entries {
		word := func(j int) uint32 { return binary.LittleEndian.Uint32(brand[i*16+j*4:]) }
		entries[i] = kvm.CPUIDEntry{Function: leafBrand + uint32(i), Eax: word(0), Ebx: word(1), Ecx: word(2), Edx: word(3)}
	}
	return entries
}

// CPUID returns the leaves of vCPU id of a machine with n vCPUs: one socket, one core each, one thread per core, with
// APIC ids 0 to n-1. supported is what kvm.System.SupportedCPUID returned; it is not changed. tscDeadline says that the
// in-kernel APIC has a TSC deadline timer, which KVM does not put into its list.
func (t Template) CPUID(supported []kvm.CPUIDEntry, id, n int, tscDeadline bool) []kvm.CPUIDEntry {
	entries := make([]kvm.CPUIDEntry, 0, len(supported)+4+brandLeaves)
	for _, e := range supported {
		switch e.Function {
		case leafTopology, leafTopologyV2, leafPerfMon, leafMonitor:
			continue // the topology is ours; there is no virtual PMU and no MWAIT
		case leafBrand, leafBrand + 1, leafBrand + 2:
			continue // zero, where KVM lists them
		}
		if t == Baseline && !mask(&e) {
			continue
		}
		adjust(&e, id, n, tscDeadline)
		entries = append(entries, e)
	}
	entries = append(entries, topology(leafTopology, id, n)...)
	if maxLeaf(supported) >= leafTopologyV2 && t != Baseline {
		entries = append(entries, topology(leafTopologyV2, id, n)...)
	}
	entries = append(entries, nameLeaves(t.brand())...)
	slices.SortStableFunc(entries, func(a, b kvm.CPUIDEntry) int {
		return int(int64(a.Function)<<8+int64(a.Index)) - int(int64(b.Function)<<8+int64(b.Index))
	})
	return entries
}

func maxLeaf(entries []kvm.CPUIDEntry) uint32 {
	for _, e := range entries {
		if e.Function == 0 {
			return e.Eax
		}
	}
	return 0
}

// mask reduces e to the baseline. It returns false where the baseline has no such leaf.
func mask(e *kvm.CPUIDEntry) bool {
	m, ok := baselineLeaves[e.Function]
	if !ok || e.Function == leafExtFeatures && e.Index != 0 {
		return false
	}
	e.Eax, e.Ebx, e.Ecx, e.Edx = e.Eax&m[0], e.Ebx&m[1], e.Ecx&m[2], e.Edx&m[3]
	switch e.Function {
	case 0:
		e.Eax = baselineLast // whatever the host's last leaf is: this one is ours
	case leafKVM:
		e.Eax = baselineLastKVM
	case leafExtended:
		e.Eax = min(e.Eax, baselineLastExt)
	case leafAMDSize:
		e.Eax = min(e.Eax&0xFF, baselinePhysical) | min(e.Eax>>8, baselineLinear)<<8
	}
	return true
}

// adjust sets the fields that depend on the vCPU and the machine.
func adjust(e *kvm.CPUIDEntry, id, n int, tscDeadline bool) {
	cores := uint32(n - 1)
	switch e.Function {
	case leafFeatures:
		// EBX: initial APIC id 31:24, logical processors 23:16, CLFLUSH size 15:8.
		logical := uint32(1) << bits.Len32(cores)
		e.Ebx = uint32(id)<<24 | min(logical, 255)<<16 | e.Ebx&0xFFFF
		e.Ecx |= ecx1Hypervisor
		e.Ecx &^= ecx1OSXSAVE // follows the guest's CR4
		if tscDeadline {
			e.Ecx |= ecx1TSCDeadline
		}
		if n > 1 {
			e.Edx |= edx1HTT
		} else {
			e.Edx &^= edx1HTT
		}
	case leafCache, leafAMDCache:
		// EAX: core ids in the package 31:26 (Intel only), logical processors that share the cache 25:14, level 7:5.
		if e.Eax&0x1F == 0 {
			return // no more caches
		}
		shared := uint32(0)
		if e.Eax>>5&7 >= 3 {
			shared = cores
		}
		e.Eax = e.Eax&0x3FFF | min(shared, 0xFFF)<<14
		if e.Function == leafCache {
			e.Eax |= min(cores, 63) << 26
		}
	case leafExtended:
		e.Eax = max(e.Eax, leafBrand+brandLeaves-1) // EAX: the last extended leaf
	case leafAMDSize:
		// ECX: threads in the package 7:0, bits of the APIC id that number them 15:12.
		if e.Ecx != 0 || n > 1 {
			e.Ecx = e.Ecx&^0xF0FF | cores&0xFF | uint32(bits.Len32(cores))<<12
		}
	case leafAMDTopology:
		// EAX: extended APIC id; EBX: core id 7:0, threads per core 15:8; ECX: node 7:0, nodes 10:8.
		e.Eax, e.Ebx, e.Ecx, e.Edx = uint32(id), uint32(id)&0xFF, 0, 0
	}
}

// topology returns the two levels of an extended topology leaf: one thread per core, n cores in the package.
func topology(leaf uint32, id, n int) []kvm.CPUIDEntry {
	level := func(index, shift, count, kind uint32) kvm.CPUIDEntry {
		return kvm.CPUIDEntry{
			Function: leaf, Index: index, Flags: kvm.CPUIDSignificantIndex,
			Eax: shift, Ebx: count, Ecx: kind<<8 | index, Edx: uint32(id),
		}
	}
	return []kvm.CPUIDEntry{
		level(0, 0, 1, topologySMT),
		level(1, uint32(bits.Len32(uint32(n-1))), uint32(n), topologyCore),
		level(2, 0, 0, 0),
	}
}
