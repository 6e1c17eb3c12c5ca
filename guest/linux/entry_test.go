package linux

import (
	"encoding/binary"
	"testing"

	"github.com/kvmlet/kvmlet/guest/memory"
)

// TestLongModeState checks what the 64-bit entry demands of the CPU, reading tables as the CPU does.
func TestLongModeState(t *testing.T) {
	t.Parallel()
	mem := newMemory(t, 64<<20)
	e, err := Load(mem, parse(t, testELF{}.build(t)), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if e.CR0 != 0x80000011 || e.CR4 != 0x20 || e.EFER != 0x500 || e.RFLAGS != 2 || e.RBX != 0 {
		t.Errorf("CR0 %#x CR4 %#x EFER %#x RFLAGS %#x", e.CR0, e.CR4, e.EFER, e.RFLAGS)
	}
	for _, addr := range []uint64{
		0, bootInfoAddr, cmdlineAddr, e.RIP, e.RSP - 8, 1<<30 - 1, 1 << 30, 3<<30 + 12345, 1<<32 - 1,
	} {
		if got, ok := translate(t, mem, e.CR3, addr); !ok || got != addr {
			t.Errorf("%#x is mapped to %#x, %v", addr, got, ok)
		}
	}
	if _, ok := translate(t, mem, e.CR3, 1<<32); ok {
		t.Error("4 GiB is mapped")
	}
	for _, tt := range []struct {
		s    Segment
		want uint64
	}{
		{e.Code, 0x00af9b000000ffff},
		{e.Data, 0x00cf93000000ffff},
		{e.Task, 0x00008b0000000067},
	} {
		if got := gdtEntry(t, mem, &e, tt.s.Selector); got != tt.want {
			t.Errorf("selector %#x: descriptor %#016x, want %#016x", tt.s.Selector, got, tt.want)
		}
	}
	if e.Code.Selector != 0x10 || e.Data.Selector != 0x18 {
		t.Errorf("selectors %#x and %#x instead of __BOOT_CS and __BOOT_DS", e.Code.Selector, e.Data.Selector)
	}
	if e.Mode.String() != "64-bit entry" {
		t.Error(e.Mode)
	}
}

func TestPVHState(t *testing.T) {
	t.Parallel()
	mem := newMemory(t, 64<<20)
	e, err := Load(mem, parse(t, testELF{}.build(t)), Options{PVH: true})
	if err != nil {
		t.Fatal(err)
	}
	if e.CR0 != 0x11 || e.CR3 != 0 || e.CR4 != 0 || e.EFER != 0 || e.RFLAGS != 2 || e.RSI != 0 {
		t.Errorf("CR0 %#x CR3 %#x CR4 %#x EFER %#x RFLAGS %#x", e.CR0, e.CR3, e.CR4, e.EFER, e.RFLAGS)
	}
	if got := gdtEntry(t, mem, &e, e.Code.Selector); got != 0x00cf9b000000ffff {
		t.Errorf("code descriptor %#016x", got)
	}
	if e.Mode.String() != "PVH entry" {
		t.Error(e.Mode)
	}
}

func TestDescriptorFields(t *testing.T) {
	t.Parallel()
	s := Segment{Base: 0x12345678, Limit: 0xabcde, Type: 0x2}
	if got := s.descriptor(); got != 0x120a923456_78bcde {
		t.Errorf("%#x", got)
	}
}

func gdtEntry(tb testing.TB, mem *memory.Memory, e *Entry, selector uint16) uint64 {
	tb.Helper()
	if selector+7 > e.GDTLimit {
		tb.Fatalf("selector %#x lies beyond the limit %#x", selector, e.GDTLimit)
	}
	return binary.LittleEndian.Uint64(bytesAt(tb, mem, e.GDTBase+uint64(selector), 8))
}

// translate walks four levels of page tables (Intel SDM 3A, 4.5).
func translate(tb testing.TB, mem *memory.Memory, cr3, addr uint64) (uint64, bool) {
	tb.Helper()
	table := cr3
	for shift := 39; shift >= 12; shift -= 9 {
		entry := binary.LittleEndian.Uint64(bytesAt(tb, mem, table+addr>>shift&511*8, 8))
		if entry&3 != 3 {
			return 0, false
		}
		table = entry &^ 0xfff
		if entry&0x80 != 0 {
			return table | addr&(1<<shift-1), true
		}
	}
	return table | addr&0xfff, true
}
