package linux

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"slices"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/guest/memory"
)

func crc32IEEE(b []byte) uint32 { return crc32.ChecksumIEEE(b) }

func bytesAt(tb testing.TB, mem *memory.Memory, addr uint64, n int) []byte {
	tb.Helper()
	b, err := mem.Bytes(addr, uint64(n))
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// checkProgram checks that the segments of testELF{} lie in memory, with zeroes behind them.
func checkProgram(tb testing.TB, mem *memory.Memory) {
	tb.Helper()
	if !bytes.Equal(bytesAt(tb, mem, textAddr, len(textBytes())), textBytes()) {
		tb.Error("the text segment is not there")
	}
	data := dataBytes()
	if !bytes.Equal(bytesAt(tb, mem, dataAddr, len(data)), data) {
		tb.Error("the data segment is not there")
	}
	bss := bytesAt(tb, mem, dataAddr+uint64(len(data)), dataBSS)
	if i := slices.IndexFunc(bss, func(b byte) bool { return b != 0 }); i >= 0 {
		tb.Errorf("byte %d behind the data segment is not zero", i)
	}
}

func zeroPage(tb testing.TB, mem *memory.Memory, e Entry) *bootParams {
	tb.Helper()
	p := new(bootParams)
	if _, err := binary.Decode(bytesAt(tb, mem, e.RSI, 4096), binary.LittleEndian, p); err != nil {
		tb.Fatal(err)
	}
	return p
}

// cString returns the NUL-terminated string at addr.
func cString(tb testing.TB, mem *memory.Memory, addr uint64) string {
	tb.Helper()
	s, _, _ := bytes.Cut(bytesAt(tb, mem, addr, cmdlineRoom), []byte{0})
	return string(s)
}

// blobs makes an initrd of several parts.
func blobs(parts ...string) (b []Blob) {
	for _, p := range parts {
		b = append(b, strings.NewReader(p))
	}
	return b
}

func TestLoadBootParams(t *testing.T) {
	t.Parallel()
	k := parse(t, testBz{payload: pack(t, "zstd", testELF{}.build(t))}.build(t))
	mem := newMemory(t, 512<<20)
	ecam := Range{0xe0000000, 1 << 20}
	e, err := Load(mem, k, Options{
		Cmdline: "console=ttyS0 quiet", RSDP: 0xe0010, Reserved: []Range{ecam},
		Initrd: blobs("070701 one", "070701 twoo", "x"),
	})
	if err != nil {
		t.Fatal(err)
	}
	p := zeroPage(t, mem, e)
	h := &p.Header
	if h.BootFlag != bootFlag || string(h.Magic[:]) != "HdrS" || h.Version != protocol215 || h.TypeOfLoader != 0xff ||
		h.LoadFlags&loadedHigh == 0 || h.KernelAlignment != 2<<20 || h.XLoadFlags == 0 {
		t.Errorf("setup header: %+v", h)
	}
	if s := cString(t, mem, uint64(h.CmdLinePtr)); s != "console=ttyS0 quiet" || p.ExtCmdLinePtr != 0 {
		t.Errorf("command line %q", s)
	}
	if p.ACPIRSDPAddr != 0xe0010 {
		t.Errorf("RSDP at %#x", p.ACPIRSDPAddr)
	}
	// Parts begin on pages, and the whole ends within a page of the top.
	initrd := "070701 one" + strings.Repeat("\x00", 4096-10) + "070701 twoo" + strings.Repeat("\x00", 4096-11) + "x"
	if h.RamdiskSize != uint32(len(initrd)) || h.RamdiskImage != 512<<20-3*4096 || p.ExtRamdiskImage|p.ExtRamdiskSize != 0 {
		t.Errorf("initrd of %d bytes at %#x", h.RamdiskSize, h.RamdiskImage)
	}
	if got := bytesAt(t, mem, uint64(h.RamdiskImage), len(initrd)); string(got) != initrd {
		t.Errorf("initrd %q", got)
	}
	want := []e820Entry{
		{0, 0x9fc00, 1},
		{0x9fc00, 0x400, 2},
		{0xe0000, 0x20000, 2},
		{0x100000, 511 << 20, 1},
		{ecam.Addr, ecam.Size, 2},
	}
	if got := p.E820Table[:p.E820Entries]; !slices.Equal(got, want) {
		t.Errorf("memory map %#x", got)
	}
	checkProgram(t, mem)
}

// TestLoadELF boots a vmlinux, which brings no setup header.
func TestLoadELF(t *testing.T) {
	t.Parallel()
	mem := newMemory(t, 64<<20)
	e, err := Load(mem, parse(t, testELF{noNote: true}.build(t)), Options{Cmdline: "panic=-1"})
	if err != nil {
		t.Fatal(err)
	}
	h := &zeroPage(t, mem, e).Header
	if h.BootFlag != bootFlag || string(h.Magic[:]) != "HdrS" || h.Version < protocol212 || h.TypeOfLoader != 0xff {
		t.Errorf("setup header: %+v", h)
	}
	if h.RamdiskImage != 0 || h.RamdiskSize != 0 {
		t.Errorf("initrd of %d bytes at %#x", h.RamdiskSize, h.RamdiskImage)
	}
	if e.RIP != textAddr+0x10 {
		t.Errorf("entry %#x", e.RIP)
	}
	checkProgram(t, mem)
}

func TestLoadHighMemory(t *testing.T) {
	t.Parallel()
	mem := newMemory(t, 5<<30)
	e, err := Load(mem, parse(t, testELF{}.build(t)), Options{Initrd: blobs("initrd")})
	if err != nil {
		t.Fatal(err)
	}
	p := zeroPage(t, mem, e)
	if got := p.E820Table[3:p.E820Entries]; !slices.Equal(got, []e820Entry{
		{1 << 20, 3<<30 - 1<<20, 1}, {4 << 30, 2 << 30, 1},
	}) {
		t.Errorf("memory map %#x", got)
	}
	// initrd_addr_max keeps it in the first 2 GiB.
	if p.Header.RamdiskImage != 2<<30-4096 {
		t.Errorf("initrd at %#x", p.Header.RamdiskImage)
	}
}

// sizeOnly is a large initrd of zeroes.
type sizeOnly int64

func (s sizeOnly) Size() int64 { return int64(s) }

func (s sizeOnly) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	return min(len(p), int(int64(s)-off)), nil
}

func TestInitrdPlacement(t *testing.T) {
	t.Parallel()
	const kernelEnd = textAddr + 8<<20 // by init_size, as the stub is entered
	for _, tt := range []struct {
		name   string
		memory uint64
		size   sizeOnly
		header func(*setupHeader)
		want   uint64 // 0: ErrInitrdTooLarge
	}{
		{"one page", 64 << 20, 4096, nil, 64<<20 - 4096},
		{"one byte more", 64 << 20, 4097, nil, 64<<20 - 8192},
		{"fills the rest", 64 << 20, 64<<20 - kernelEnd, nil, kernelEnd},
		{"one byte too many", 64 << 20, 64<<20 - kernelEnd + 1, nil, 0},
		{"larger than memory", 64 << 20, 1 << 40, nil, 0},
		{"negative", 64 << 20, -1, nil, 0},
		{"limited by the kernel", 64 << 20, 4096, func(h *setupHeader) { h.InitrdAddrMax = 0x2ffffff }, 48<<20 - 4096},
		{"limit inside a page", 64 << 20, 4096, func(h *setupHeader) { h.InitrdAddrMax = 0x2ffff00 }, 48<<20 - 8192},
		{"limit below the kernel", 64 << 20, 4096, func(h *setupHeader) { h.InitrdAddrMax = 0x37fffff &^ 0x3000000 }, 0},
		{"highest limit", 64 << 20, 4096, func(h *setupHeader) { h.InitrdAddrMax = 1<<32 - 1 }, 64<<20 - 4096},
		{"above 4 GiB", 5 << 30, 4 << 10, func(h *setupHeader) { h.InitrdAddrMax = 0 }, 6<<30 - 4096},
		{"not above 4 GiB", 5 << 30, 4 << 10, func(h *setupHeader) {
			h.InitrdAddrMax, h.XLoadFlags = 0, xlfKernel64
		}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			mem := newMemory(t, tt.memory)
			k := parse(t, testBz{payload: pack(t, "lzo", nil), header: tt.header}.build(t))
			e, err := Load(mem, k, Options{Initrd: []Blob{tt.size}})
			if tt.want == 0 {
				if !errors.Is(err, ErrInitrdTooLarge) {
					t.Fatalf("got %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			p := zeroPage(t, mem, e)
			at := uint64(p.ExtRamdiskImage)<<32 | uint64(p.Header.RamdiskImage)
			if at != tt.want || p.Header.RamdiskSize != uint32(tt.size) || p.ExtRamdiskSize != 0 {
				t.Errorf("%d bytes at %#x, want %#x", p.Header.RamdiskSize, at, tt.want)
			}
		})
	}
}

func TestInitrdSumOverflow(t *testing.T) {
	t.Parallel()
	parts := slices.Repeat([]Blob{sizeOnly(memory.MaxSize)}, 8)
	_, err := Load(newMemory(t, 64<<20), parse(t, testELF{}.build(t)), Options{Initrd: parts})
	if !errors.Is(err, ErrInitrdTooLarge) {
		t.Errorf("got %v", err)
	}
}

// shrinking is an initrd that has become shorter than its size says.
type shrinking struct{ *bytes.Reader }

func (shrinking) Size() int64 { return 1 << 20 }

func TestInitrdTruncated(t *testing.T) {
	t.Parallel()
	o := Options{Initrd: []Blob{shrinking{bytes.NewReader(make([]byte, 1000))}}}
	_, err := Load(newMemory(t, 64<<20), parse(t, testELF{}.build(t)), o)
	if !errors.Is(err, ErrTruncated) || !strings.Contains(err.Error(), "initrd") {
		t.Errorf("got %v", err)
	}
}

func TestKernelTooLarge(t *testing.T) {
	t.Parallel()
	vmlinux := testELF{}.build(t)
	for _, tt := range []struct {
		name string
		file []byte
	}{
		{"ELF", vmlinux},
		{"packed", testBz{payload: pack(t, "zstd", vmlinux)}.build(t)},
		{"stub", testBz{payload: pack(t, "lzo", vmlinux)}.build(t)},
		{"huge", testELF{phys: func(i int, p *elf.Prog64) {
			if i == 0 {
				p.Memsz = 1 << 62
			}
		}}.build(t)},
	} {
		_, err := Load(newMemory(t, 20<<20), parse(t, tt.file), Options{})
		if !errors.Is(err, ErrKernelTooLarge) || !strings.Contains(err.Error(), "20 MiB") {
			t.Errorf("%s: %v", tt.name, err)
		}
		if _, err := Load(newMemory(t, 4096), parse(t, tt.file), Options{}); !errors.Is(err, ErrKernelTooLarge) {
			t.Errorf("%s, one page: %v", tt.name, err)
		}
	}
}

// Sizes and addresses at the end of the address space don't wrap.
func TestKernelAtTheEnd(t *testing.T) {
	t.Parallel()
	stub := func(addr uint64) []byte {
		return testBz{payload: pack(t, "lzo", nil), header: func(h *setupHeader) { h.PrefAddress = addr }}.build(t)
	}
	for _, tt := range []struct {
		name, want string
		file       []byte
	}{
		{"ELF", "up to 17592186044416 MiB", testELF{phys: func(i int, p *elf.Prog64) {
			if i == 0 {
				p.Memsz = 1<<64 - 1 - p.Paddr
			}
		}}.build(t)},
		{"stub", "0xffffffffffffffff", stub(1<<64 - 1)},
		{"stub that ends behind the last address", "0xffffffffff800000", stub(1<<64 - 8<<20)},
		{"stub that ends at the last page", "up to 17592186044416 MiB", stub(1<<64 - 8<<20 - 4096)},
	} {
		_, err := Load(newMemory(t, 64<<20), parse(t, tt.file), Options{})
		if !errors.Is(err, ErrKernelTooLarge) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestCmdlineLimit(t *testing.T) {
	t.Parallel()
	bz := func(size uint32) []byte {
		return testBz{payload: pack(t, "lzo", nil), header: func(h *setupHeader) { h.CmdlineSize = size }}.build(t)
	}
	for _, tt := range []struct {
		name  string
		file  []byte
		limit int
	}{
		{"vmlinux", testELF{}.build(t), 2047},
		{"bzImage", bz(300), 300},
		{"bzImage without limit", bz(1<<32 - 1), 65535},
	} {
		k, mem := parse(t, tt.file), newMemory(t, 64<<20)
		line := strings.Repeat("x", tt.limit)
		e, err := Load(mem, k, Options{Cmdline: line})
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		} else if got := cString(t, mem, uint64(zeroPage(t, mem, e).Header.CmdLinePtr)); got != line {
			t.Errorf("%s: %d bytes arrived", tt.name, len(got))
		}
		_, err = Load(mem, k, Options{Cmdline: line + "x"})
		if !errors.Is(err, ErrCmdlineTooLong) {
			t.Errorf("%s, one byte more: %v", tt.name, err)
		}
	}
	_, err := Load(newMemory(t, 64<<20), parse(t, bz(300)), Options{Cmdline: strings.Repeat("x", 301)})
	if err == nil || !strings.Contains(err.Error(), "301") || !strings.Contains(err.Error(), "300") {
		t.Errorf("the error does not tell length and limit: %v", err)
	}
	_, err = Load(newMemory(t, 64<<20), parse(t, bz(300)), Options{Cmdline: "a\x00b"})
	if !errors.Is(err, ErrOptions) {
		t.Errorf("NUL byte: %v", err)
	}
}

func TestTooManyReserved(t *testing.T) {
	t.Parallel()
	k := parse(t, testELF{}.build(t))
	if _, err := Load(newMemory(t, 64<<20), k, Options{Reserved: make([]Range, e820Max-4)}); err != nil {
		t.Error(err)
	}
	if _, err := Load(newMemory(t, 64<<20), k, Options{Reserved: make([]Range, e820Max)}); !errors.Is(err, ErrOptions) {
		t.Errorf("got %v", err)
	}
}

// TestStubAddress loads at 1 MiB what does not know of a preferred address.
func TestStubAddress(t *testing.T) {
	t.Parallel()
	b := testBz{payload: pack(t, "lzo", nil), header: func(h *setupHeader) {
		h.Version, h.PrefAddress, h.InitSize = protocol212, 0, 0
	}}.build(t)
	mem := newMemory(t, 64<<20)
	e, err := Load(mem, parse(t, b), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if e.RIP != 0x100200 || !bytes.Equal(bytesAt(t, mem, 0x100000, len(b)-bzSetup), b[bzSetup:]) {
		t.Errorf("entry %#x", e.RIP)
	}
}

// TestLongHeader hands fields of a later protocol through and drops code behind the header.
func TestLongHeader(t *testing.T) {
	t.Parallel()
	b := testBz{payload: pack(t, "lzo", nil), header: func(h *setupHeader) {
		h.Jump[1] = 0x6e // four bytes more than 2.15 has
		for i := range h.Later {
			h.Later[i] = byte(i + 1)
		}
	}}.build(t)
	mem := newMemory(t, 64<<20)
	e, err := Load(mem, parse(t, b), Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := append([]byte{1, 2, 3, 4}, make([]byte, 32)...)
	if got := bytesAt(t, mem, e.RSI+0x26c, 36); !bytes.Equal(got, want) {
		t.Errorf("later fields: % x", got)
	}
}

func TestPVH(t *testing.T) {
	t.Parallel()
	vmlinux := testELF{entry: 0xffffffff81000010}.build(t) // a virtual address: the PVH entry is the only one
	mem := newMemory(t, 5<<30)
	e, err := Load(mem, parse(t, vmlinux), Options{
		Cmdline: "pvh", RSDP: 0xe0020, Initrd: blobs("initrd"), Reserved: []Range{{0xe0000000, 4096}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if e.Mode != PVH32 || e.RIP != pvhAddr {
		t.Errorf("%v at %#x", e.Mode, e.RIP)
	}
	var s startInfo
	if _, err := binary.Decode(bytesAt(t, mem, e.RBX, startInfoSize), binary.LittleEndian, &s); err != nil {
		t.Fatal(err)
	}
	if s.Magic != 0x336ec578 || s.Version != 1 || s.Flags != 0 || s.NrModules != 1 || s.RSDPAddr != 0xe0020 {
		t.Errorf("start_info %+v", s)
	}
	if got := cString(t, mem, s.CmdlineAddr); got != "pvh" {
		t.Errorf("command line %q", got)
	}
	var m modlistEntry
	if _, err := binary.Decode(bytesAt(t, mem, s.ModlistAddr, modlistSize), binary.LittleEndian, &m); err != nil {
		t.Fatal(err)
	}
	if string(bytesAt(t, mem, m.Addr, int(m.Size))) != "initrd" {
		t.Errorf("module %+v", m)
	}
	memmap := make([]memmapEntry, s.MemmapEntries)
	if _, err := binary.Decode(bytesAt(t, mem, s.MemmapAddr, 24*len(memmap)), binary.LittleEndian, memmap); err != nil {
		t.Fatal(err)
	}
	if want := []memmapEntry{
		{Addr: 0, Size: 0x9fc00, Type: 1}, {Addr: 0x9fc00, Size: 0x400, Type: 2}, {Addr: 0xe0000, Size: 0x20000, Type: 2},
		{Addr: 1 << 20, Size: 3<<30 - 1<<20, Type: 1}, {Addr: 4 << 30, Size: 2 << 30, Type: 1},
		{Addr: 0xe0000000, Size: 4096, Type: 2},
	}; !slices.Equal(memmap, want) {
		t.Errorf("memory map %#x", memmap)
	}
	checkProgram(t, mem)
}

func TestEntryChoice(t *testing.T) {
	t.Parallel()
	const virtual = 0xffffffff81000010
	plain := testELF{}.build(t)
	unpacked := parse(t, testBz{payload: pack(t, "zstd", plain)}.build(t))
	if err := unpacked.SetUnpacked(bytes.NewReader(plain), int64(len(plain))); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		k    *Kernel
		pvh  bool
		want Mode // 0: ErrUnsupported
	}{
		{"both", parse(t, plain), false, Long64},
		{"both, PVH wanted", parse(t, plain), true, PVH32},
		{"unpacked, PVH wanted", unpacked, true, PVH32},
		{"packed, PVH wanted", parse(t, testBz{payload: pack(t, "zstd", plain)}.build(t)), true, 0},
		{"no note, PVH wanted", parse(t, testELF{noNote: true}.build(t)), true, 0},
		{"only PVH", parse(t, testELF{entry: virtual}.build(t)), false, PVH32},
		{"neither", parse(t, testELF{entry: virtual, noNote: true}.build(t)), false, 0},
	} {
		mem := newMemory(t, 64<<20)
		e, err := Load(mem, tt.k, Options{PVH: tt.pvh})
		if tt.want == 0 && !errors.Is(err, ErrUnsupported) || tt.want != 0 && (err != nil || e.Mode != tt.want) {
			t.Errorf("%s: %v, %v", tt.name, e.Mode, err)
		}
		if err == nil && e.Mode == PVH32 {
			if n := binary.LittleEndian.Uint32(bytesAt(t, mem, e.RBX+12, 4)); n != 0 {
				t.Errorf("%s: %d modules without an initrd", tt.name, n)
			}
		}
	}
}

// TestSharedBytes has two segments made of the same bytes of the file, which a stream cannot serve.
func TestSharedBytes(t *testing.T) {
	t.Parallel()
	shared := testELF{phys: func(i int, p *elf.Prog64) {
		if i == 0 {
			p.Off = 0x1800
		}
	}}.build(t)
	mem := newMemory(t, 64<<20)
	if _, err := Load(mem, parse(t, shared), Options{}); err != nil {
		t.Error(err)
	} else if !bytes.Equal(bytesAt(t, mem, dataAddr, 100), shared[0x1800:0x1800+100]) {
		t.Error("the data segment is not there")
	}
	k := parse(t, testBz{payload: pack(t, "zstd", shared)}.build(t))
	if e, err := Load(newMemory(t, 64<<20), k, Options{}); err != nil || e.RIP != textAddr+0x200 {
		t.Errorf("packed: entry %#x, %v", e.RIP, err)
	}
}

// TestPackedStranger has a payload that is no kernel of ours, which shows only once it is unpacked.
func TestPackedStranger(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		payload []byte
		want    error
	}{
		{"text", bytes.Repeat([]byte("text "), 100), ErrNotKernel},
		{"aarch64", testELF{header: func(h *elf.Header64) { h.Machine = uint16(elf.EM_AARCH64) }}.build(t), ErrArch},
		{"cut", testELF{}.build(t)[:0x1800], ErrTruncated},
		{"far program headers", testELF{header: func(h *elf.Header64) { h.Phoff = 1 << 30 }}.build(t), ErrTruncated},
	} {
		k := parse(t, testBz{payload: pack(t, "gzip", tt.payload)}.build(t))
		if _, err := Load(newMemory(t, 64<<20), k, Options{}); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// TestLoadReadError has the kernel's file fail after its headers were read.
func TestLoadReadError(t *testing.T) {
	t.Parallel()
	broken := errors.New("input/output error")
	b := testELF{}.build(t)
	r := &breaking{Reader: bytes.NewReader(b)}
	k, err := Parse(r, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	r.err = broken
	_, err = Load(newMemory(t, 64<<20), k, Options{})
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "kernel") {
		t.Errorf("got %v", err)
	}
}

type breaking struct {
	*bytes.Reader
	err error
}

func (r *breaking) ReadAt(p []byte, off int64) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	return r.Reader.ReadAt(p, off)
}
