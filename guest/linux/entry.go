package linux

import (
	"encoding/binary"
	"fmt"

	"github.com/kvmlet/kvmlet/guest/memory"
)

// Mode is a state of the CPU that a boot protocol asks for.
type Mode uint8

// The modes in which Load's kernels are entered.
const (
	// Long64 is long mode with the first 4 GiB mapped one to one and boot_params at RSI (boot.rst, "64-bit BOOT
	// PROTOCOL").
	Long64 Mode = iota + 1
	// PVH32 is protected mode without paging, with start_info at RBX (Xen, docs/misc/pvh.pandoc).
	PVH32
)

func (m Mode) String() string {
	switch m {
	case Long64:
		return "64-bit entry"
	case PVH32:
		return "PVH entry"
	default:
		return fmt.Sprintf("Mode(%d)", uint8(m))
	}
}

// Entry is the state in which the first CPU enters the kernel. Registers that it does not name are 0. Interrupts are
// off and no interrupt table is loaded.
type Entry struct {
	Mode Mode

	RIP, RSP, RBX, RSI  uint64
	RFLAGS              uint64
	CR0, CR3, CR4, EFER uint64
	Code                Segment // CS
	Data                Segment // DS, ES, FS, GS and SS
	Task                Segment // TR
	GDTBase             uint64  // where Load has written the descriptors of these segments
	GDTLimit            uint16
}

// Segment is a segment register with its hidden part (Intel SDM 3A, 3.4.5). Those that are not Long have Default set:
// they are 32 bits wide.
type Segment struct {
	Selector    uint16
	Base        uint64
	Limit       uint32 // of the last byte
	Type        uint8  // 4 bits
	System      bool   // a task state segment, not code or data: descriptor bit S is clear
	Long        bool   // descriptor bit L: 64-bit code
	Default     bool   // descriptor bit D/B: 32-bit code or stack
	Granularity bool   // descriptor bit G: the descriptor counts the limit in pages
}

// Bits of the control registers (Intel SDM 3A, 2.2.1 and 2.5) and of RFLAGS.
const (
	cr0PE     = 1 << 0
	cr0ET     = 1 << 4
	cr0PG     = 1 << 31
	cr4PAE    = 1 << 5
	eferLME   = 1 << 8
	eferLMA   = 1 << 10
	rflagsOne = 1 << 1 // reads as 1 always
)

// Selectors __BOOT_CS and __BOOT_DS, which boot.rst fixes, and one for the task register, which no CPU runs without.
const (
	bootCS = 0x10
	bootDS = 0x18
	bootTR = 0x20

	gdtEntries = 6 // the task's descriptor takes two in long mode
)

// Types of segments (Intel SDM 3A, 3.4.5.1 and 3.5).
const (
	typeData = 0x3 // read, write, accessed
	typeCode = 0xb // execute, read, accessed
	typeTask = 0xb // busy 32- or 64-bit TSS
)

func baseEntry() Entry {
	return Entry{
		RFLAGS:  rflagsOne,
		RSP:     stackTop,
		CR0:     cr0PE | cr0ET,
		Code:    Segment{Selector: bootCS, Limit: 0xffffffff, Type: typeCode, Granularity: true},
		Data:    Segment{Selector: bootDS, Limit: 0xffffffff, Type: typeData, Default: true, Granularity: true},
		Task:    Segment{Selector: bootTR, Limit: 0x67, Type: typeTask, System: true},
		GDTBase: gdtAddr, GDTLimit: gdtEntries*8 - 1,
	}
}

// longModeEntry enters at a physical address in long mode.
func longModeEntry(rip uint64) Entry {
	e := baseEntry()
	e.Mode, e.RIP, e.RSI = Long64, rip, bootInfoAddr
	e.CR0 |= cr0PG
	e.CR3, e.CR4, e.EFER = pml4Addr, cr4PAE, eferLME|eferLMA
	e.Code.Long = true
	return e
}

// pvhEntry enters at a physical address in protected mode.
func pvhEntry(rip uint64) Entry {
	e := baseEntry()
	e.Mode, e.RIP, e.RBX = PVH32, rip, bootInfoAddr
	e.Code.Default = true
	return e
}

// write puts the descriptor table and, for long mode, the page tables into memory.
func (e *Entry) write(mem *memory.Memory) error {
	gdt := make([]byte, 0, gdtEntries*8)
	for _, d := range [gdtEntries]uint64{
		bootCS / 8: e.Code.descriptor(), bootDS / 8: e.Data.descriptor(), bootTR / 8: e.Task.descriptor(),
	} {
		gdt = binary.LittleEndian.AppendUint64(gdt, d)
	}
	if _, err := mem.WriteAt(gdt, gdtAddr); err != nil {
		return err
	}
	if e.Mode != Long64 {
		return nil
	}
	_, err := mem.WriteAt(identityMap(), pml4Addr)
	return err
}

// descriptor returns the segment as it stands in a descriptor table (Intel SDM 3A, figure 3-8). All have DPL 0 and are
// present.
func (s Segment) descriptor() uint64 {
	limit := uint64(s.Limit)
	if s.Granularity {
		limit >>= 12
	}
	return limit&0xffff | limit>>16&0xf<<48 |
		s.Base&0xffffff<<16 | s.Base>>24&0xff<<56 |
		uint64(s.Type)<<40 | bit(44, !s.System) | bit(47, true) |
		bit(53, s.Long) | bit(54, s.Default) | bit(55, s.Granularity)
}

func bit(n int, on bool) uint64 {
	if on {
		return 1 << n
	}
	return 0
}

// Bits of a page table entry (Intel SDM 3A, 4.5.4).
const (
	pagePresent = 1 << 0
	pageWrite   = 1 << 1
	pageLarge   = 1 << 7 // in a page directory: 2 MiB
)

// identityMap returns page tables, to be put at pml4Addr, that map the first 4 GiB one to one in pages of 2 MiB, which
// every x86-64 CPU has. The tables stand one behind the other: PML4, PDPT, four page directories.
func identityMap() []byte {
	const entries = 512
	b := make([]byte, 0, 6*memory.PageSize)
	add := func(n int, entry func(i int) uint64) {
		for i := range n {
			b = binary.LittleEndian.AppendUint64(b, entry(i))
		}
		b = b[:alignPage(uint64(len(b)))]
	}
	add(1, func(int) uint64 { return pdptAddr | pagePresent | pageWrite })
	add(4, func(i int) uint64 { return pdAddr + uint64(i)*memory.PageSize | pagePresent | pageWrite })
	add(4*entries, func(i int) uint64 { return uint64(i)<<21 | pagePresent | pageWrite | pageLarge })
	return b
}
