package vcpu

import (
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/vmm/kvm"
)

// supported is a small host: an AMD CPU with caches, topology leaves and more features than the baseline.
func supported() []kvm.CPUIDEntry {
	return []kvm.CPUIDEntry{
		{Function: 0, Eax: 0x1F, Ebx: 0x68747541, Ecx: 0x444d4163, Edx: 0x69746e65},
		{Function: 1, Eax: 0x800F12, Ebx: 0x07_02_08_00, Ecx: 0xFFFF_FFFF &^ (1 << 24), Edx: 0xFFFF_FFFF},
		{Function: 4, Index: 0, Flags: kvm.CPUIDSignificantIndex, Eax: 0x21 | 5<<14 | 9<<26},
		{Function: 4, Index: 1, Flags: kvm.CPUIDSignificantIndex, Eax: 0x63 | 5<<14 | 9<<26},
		{Function: 4, Index: 2, Flags: kvm.CPUIDSignificantIndex},
		{Function: 5, Ecx: 3},
		{Function: 6, Eax: 0xFF, Ecx: 9},
		{Function: 7, Index: 0, Flags: kvm.CPUIDSignificantIndex, Eax: 1, Ebx: 0xFFFF_FFFF},
		{Function: 7, Index: 1, Flags: kvm.CPUIDSignificantIndex, Eax: 0xFF},
		{Function: 0xA, Eax: 0x0730_0402},
		{Function: 0xB, Index: 0, Flags: kvm.CPUIDSignificantIndex, Edx: 77},
		{Function: 0xD, Index: 0, Flags: kvm.CPUIDSignificantIndex, Eax: 7},
		{Function: 0x4000_0000, Eax: 0x4000_0001, Ebx: 0x4b4d564b},
		{Function: 0x8000_0000, Eax: 0x8000_0001, Ebx: 0x68747541, Ecx: 0x444d4163, Edx: 0x69746e65},
		{Function: 0x8000_0001, Ecx: 0xFFFF_FFFF, Edx: 0xFFFF_FFFF},
		{Function: 0x8000_0002},
		{Function: 0x8000_0003, Eax: 0xFFFF_FFFF},
		{Function: 0x8000_0008, Ecx: 0x7007},
		{Function: 0x8000_001D, Index: 3, Flags: kvm.CPUIDSignificantIndex, Eax: 0x63 | 3<<14},
		{Function: 0x8000_001E, Eax: 99, Ebx: 0x101, Ecx: 5},
	}
}

func find(t *testing.T, entries []kvm.CPUIDEntry, function, index uint32) kvm.CPUIDEntry {
	t.Helper()
	for _, e := range entries {
		if e.Function == function && e.Index == index {
			return e
		}
	}
	t.Fatalf("no leaf %#x index %d", function, index)
	return kvm.CPUIDEntry{}
}

func has(entries []kvm.CPUIDEntry, function uint32) bool {
	for _, e := range entries {
		if e.Function == function {
			return true
		}
	}
	return false
}

func TestTopology(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 2, 3, 8, 64} {
		shift := 0
		for 1<<shift < n {
			shift++
		}
		for id := range n {
			l := Host.CPUID(supported(), id, n, true)
			one := find(t, l, 1, 0)
			if got := int(one.Ebx >> 24); got != id {
				t.Errorf("CPU %d of %d: initial APIC id %d", id, n, got)
			}
			if got := one.Ebx >> 16 & 0xFF; int(got) != 1<<shift {
				t.Errorf("CPU %d of %d: %d logical processors", id, n, got)
			}
			if got := one.Edx>>28&1 == 1; got != (n > 1) {
				t.Errorf("CPU %d of %d: HTT is %v", id, n, got)
			}
			for _, leaf := range []uint32{0xB, 0x1F} {
				smt, core := find(t, l, leaf, 0), find(t, l, leaf, 1)
				if smt.Eax != 0 || smt.Ebx != 1 || smt.Ecx != 0x100 || int(smt.Edx) != id {
					t.Errorf("CPU %d of %d: leaf %#x level 0 is %+v", id, n, leaf, smt)
				}
				if int(core.Eax) != shift || int(core.Ebx) != n || core.Ecx != 0x201 || int(core.Edx) != id {
					t.Errorf("CPU %d of %d: leaf %#x level 1 is %+v", id, n, leaf, core)
				}
			}
			if e := find(t, l, 0x8000_001E, 0); int(e.Eax) != id || int(e.Ebx) != id {
				t.Errorf("CPU %d of %d: leaf 0x8000001E is %+v", id, n, e)
			}
			if e := find(t, l, 0x8000_0008, 0); int(e.Ecx&0xFF) != n-1 || int(e.Ecx>>12&15) != shift {
				t.Errorf("CPU %d of %d: leaf 0x80000008 ECX %#x", id, n, e.Ecx)
			}
			if e := find(t, l, 4, 0); e.Eax>>14&0xFFF != 0 || int(e.Eax>>26) != n-1 {
				t.Errorf("CPU %d of %d: the first-level cache is shared: EAX %#x", id, n, e.Eax)
			}
			if e := find(t, l, 4, 1); int(e.Eax>>14&0xFFF) != n-1 {
				t.Errorf("CPU %d of %d: the third-level cache is not shared by all: EAX %#x", id, n, e.Eax)
			}
			if e := find(t, l, 4, 2); e.Eax != 0 {
				t.Errorf("CPU %d of %d: the end of the cache list became %#x", id, n, e.Eax)
			}
		}
	}
}

func TestHostTemplate(t *testing.T) {
	t.Parallel()
	in := supported()
	l := Host.CPUID(in, 0, 2, true)
	one := find(t, l, 1, 0)
	if one.Ecx>>24&1 != 1 || one.Ecx>>31 != 1 || one.Ecx>>27&1 != 0 {
		t.Errorf("leaf 1 ECX %#x: want TSC deadline, hypervisor, no OSXSAVE", one.Ecx)
	}
	if one.Ebx&0xFFFF != 0x0800 {
		t.Errorf("leaf 1 EBX %#x: the CLFLUSH size is lost", one.Ebx)
	}
	if Host.CPUID(in, 0, 2, false)[1].Ecx>>24&1 != 0 {
		t.Error("a TSC deadline timer without one in the APIC")
	}
	if has(l, 0xA) || has(l, 5) {
		t.Error("the guest is shown a PMU or MWAIT")
	}
	if !has(l, 0x4000_0000) || find(t, l, 7, 0).Ebx != 0xFFFF_FFFF {
		t.Error("the host template withholds features")
	}
	if in[1] != supported()[1] {
		t.Error("the caller's list was changed")
	}
	for i := 1; i < len(l); i++ {
		if a, b := l[i-1], l[i]; a.Function > b.Function || a.Function == b.Function && a.Index >= b.Index {
			t.Errorf("leaves out of order or twice: %#x.%d, %#x.%d", a.Function, a.Index, b.Function, b.Index)
		}
	}
}

func TestBaselineTemplate(t *testing.T) {
	t.Parallel()
	l := Baseline.CPUID(supported(), 1, 2, true)
	one := find(t, l, 1, 0)
	const avx, xsave, fma, popcnt, sse42 = 1 << 28, 1 << 26, 1 << 12, 1 << 23, 1 << 20
	if one.Ecx&(avx|xsave|fma) != 0 || one.Ecx&popcnt == 0 || one.Ecx&sse42 == 0 || one.Ecx>>31 != 1 {
		t.Errorf("leaf 1 ECX %#x is not x86-64-v2", one.Ecx)
	}
	if e := find(t, l, 7, 0); e.Eax|e.Ebx|e.Ecx|e.Edx != 0 {
		t.Errorf("leaf 7 is %+v", e)
	}
	if has(l, 0xD) {
		t.Error("XSAVE state without XSAVE")
	}
	const lm, nx, syscall = 1 << 29, 1 << 20, 1 << 11
	if e := find(t, l, 0x8000_0001, 0); e.Edx&(lm|nx|syscall) != lm|nx|syscall || e.Ecx != 1 {
		t.Errorf("leaf 0x80000001 is %+v", e)
	}
}

// TestBaselineWithholds offers every bit of every leaf, as a CPU of the future might, and wants to see only what is old.
func TestBaselineWithholds(t *testing.T) {
	t.Parallel()
	const all = ^uint32(0)
	var in []kvm.CPUIDEntry
	for _, r := range [][2]uint32{{0, 0x30}, {0x4000_0000, 0x4000_0010}, {0x8000_0000, 0x8000_0030}, {0xC000_0000, 0xC000_0004}} {
		for f := r[0]; f <= r[1]; f++ {
			for i := range uint32(3) {
				in = append(in, kvm.CPUIDEntry{Function: f, Index: i, Eax: all, Ebx: all, Ecx: all, Edx: all})
			}
		}
	}
	const id, n = 1, 4
	brand := [4]uint32{all, all, all, all} // TestBrand
	want := map[uint32][4]uint32{
		0: {0xB, all, all, all},
		// the hypervisor's bit and the TSC deadline timer in ECX, HTT in EDX
		1:           {all, id<<24 | n<<16 | 0xFF00, 0x0098_2201 | 1<<24 | 1<<31 | 1<<21, 0x078B_FBFF | 1<<28},
		4:           {all, all, all, all},
		6:           {4, 0, 0, 0},
		7:           {},
		0xB:         {all, all, all, all}, // TestTopology
		0x4000_0000: {0x4000_0001, all, all, all},
		0x4000_0001: {0x0100_7EDB, 0, 0, 0},
		0x8000_0000: {0x8000_0008, all, all, all},
		0x8000_0001: {all, 0, 1, 0x2993_FBFF},
		0x8000_0002: brand, 0x8000_0003: brand, 0x8000_0004: brand,
		0x8000_0005: {all, all, all, all},
		0x8000_0006: {all, all, all, all},
		0x8000_0008: {48<<8 | 40, 0, 0x2003, 0},
	}
	seen := map[uint32]bool{}
	for _, e := range Baseline.CPUID(in, id, n, true) {
		w, ok := want[e.Function]
		if !ok {
			t.Errorf("leaf %#x passes", e.Function)
			continue
		}
		seen[e.Function] = true
		if (e.Eax|w[0])^w[0]|(e.Ebx|w[1])^w[1]|(e.Ecx|w[2])^w[2]|(e.Edx|w[3])^w[3] != 0 {
			t.Errorf("leaf %#x.%d is %#x %#x %#x %#x, more than %#x", e.Function, e.Index, e.Eax, e.Ebx, e.Ecx, e.Edx, w)
		}
		if e.Index == 0 && e.Function != 4 && e.Function != 0xB && w != brand &&
			[4]uint32{e.Eax, e.Ebx, e.Ecx, e.Edx} != w {
			t.Errorf("leaf %#x is %#x %#x %#x %#x, want %#x", e.Function, e.Eax, e.Ebx, e.Ecx, e.Edx, w)
		}
	}
	for f := range want {
		if !seen[f] {
			t.Errorf("leaf %#x is missing", f)
		}
	}
}

// TestBrand reads the processor's name as Linux does: the host's own under the host template, and a fixed one that says
// nothing about the host under the baseline.
func TestBrand(t *testing.T) {
	t.Parallel()
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	_, own, _ := strings.Cut(string(info), "model name\t: ")
	own, _, _ = strings.Cut(own, "\n")
	for template, want := range map[Template]string{Host: own, Baseline: "kvmlet baseline x86-64-v2"} {
		for _, last := range []uint32{0x8000_0001, 0x8000_0021} {
			in := supported()
			for i := range in {
				if in[i].Function == 0x8000_0000 {
					in[i].Eax = last
				}
			}
			l := template.CPUID(in, 0, 1, true)
			wantLast := max(last, 0x8000_0004)
			if template == Baseline {
				wantLast = min(wantLast, 0x8000_0008)
			}
			if e := find(t, l, 0x8000_0000, 0); e.Eax != wantLast || e.Ebx != 0x68747541 {
				t.Errorf("%s: leaf 0x80000000 is %+v after one that ends at %#x", template, e, last)
			}
			var b []byte
			for leaf := uint32(0x8000_0002); leaf <= 0x8000_0004; leaf++ {
				e := find(t, l, leaf, 0)
				for _, v := range []uint32{e.Eax, e.Ebx, e.Ecx, e.Edx} {
					b = binary.LittleEndian.AppendUint32(b, v)
				}
			}
			name, _, _ := strings.Cut(string(b), "\x00")
			if strings.Join(strings.Fields(name), " ") != strings.Join(strings.Fields(want), " ") {
				t.Errorf("%s: the processor is called %q, want %q", template, name, want)
			}
		}
	}
}

func TestParseTemplate(t *testing.T) {
	t.Parallel()
	for _, name := range []Template{Host, Baseline} {
		if got, err := ParseTemplate(string(name)); got != name || err != nil {
			t.Errorf("ParseTemplate(%q) = %q, %v", name, got, err)
		}
	}
	if _, err := ParseTemplate("fast"); err == nil {
		t.Error("an unknown template was accepted")
	}
}
