package linux

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/kvmlet/kvmlet/guest/memory"
)

// Where Load puts what the CPU and the kernel's first instructions read. All of it is free again once the kernel has
// taken over its own page tables and copied boot_params and the command line.
const (
	bootInfoAddr = 0x7000 // boot_params, or PVH's start_info with its lists
	stackTop     = 0x9000 // one page, growing down
	gdtAddr      = 0x9000
	pml4Addr     = 0xa000
	pdptAddr     = 0xb000
	pdAddr       = 0xc000 // four, one for each GiB
	cmdlineAddr  = 0x20000

	cmdlineRoom = 0x10000 // for the command line and its NUL

	ebdaAddr   = 0x9fc00 // the extended BIOS data area, up to 640 KiB
	vgaAddr    = 0xa0000
	tablesAddr = 0xe0000  // ACPI and MP tables, up to 1 MiB
	highAddr   = 0x100000 // kernels are loaded from here on
)

// Blob is a piece of an initrd, for example a *bytes.Reader or an *io.SectionReader.
type Blob interface {
	io.ReaderAt
	Size() int64
}

// StableFile is a Blob, or an unpacked kernel, whose bytes stay as they are while any guest lives that was loaded from
// it: a file of a store where files are never written again, not just any file of a user's. Load does not copy its pages
// but maps them (memory.Memory.MapFile), which takes no time, and guests share what they do not change.
type StableFile struct {
	*os.File
	size int64
}

// NewStableFile returns f, which has size bytes, as a StableFile. It may be closed after the last Load.
func NewStableFile(f *os.File, size int64) *StableFile { return &StableFile{f, size} }

// Size implements Blob.
func (f *StableFile) Size() int64 { return f.size }

// Range is a range of guest-physical addresses.
type Range struct {
	Addr, Size uint64
}

// Options say how a kernel is booted.
type Options struct {
	// Cmdline is the kernel command line. Every kernel has a limit, for most 2047 bytes.
	Cmdline string
	// Initrd is what the initial RAM disk consists of: cpio archives, compressed or not, one behind the other. Each
	// begins on a page, with zeroes before it, where the kernel wants a multiple of 4 bytes (buffer-format.rst).
	Initrd []Blob
	// RSDP is the guest-physical address of ACPI's root pointer. With 0 the kernel searches the ROM area for it.
	RSDP uint64
	// Reserved are ranges to be marked so in the memory map: those of devices that the kernel wants to see there, such
	// as the PCI configuration window.
	Reserved []Range
	// PVH enters the kernel through its PVH note even where its 64-bit entry would do. The kernel must be an ELF file
	// or have been given one by SetUnpacked.
	PVH bool
}

// Load puts k, its initrd and its command line into mem and returns how the first CPU enters it. mem must be fresh:
// what Load does not write has to read as zero, and nobody records dirty pages yet. It is no longer so when Load fails.
//
// The kernel goes to the physical address for which it is built, the initrd as high as it allows. Nothing but the first
// MiB and those two ranges is written.
func Load(mem *memory.Memory, k *Kernel, o Options) (Entry, error) {
	l := loader{mem: mem, k: k, o: o, header: k.setupHeader()}
	src, err := l.place()
	if err != nil {
		return Entry{}, err
	}
	if err := l.read(src); err != nil {
		return Entry{}, err
	}
	return l.finish()
}

// Check reports whether Load would find room for everything in mem, and leaves mem as it is.
func Check(mem *memory.Memory, k *Kernel, o Options) error {
	l := loader{mem: mem, k: k, o: o, header: k.setupHeader()}
	_, err := l.place()
	return err
}

// place decides what is loaded and where.
func (l *loader) place() (*source, error) {
	if regions := l.mem.Regions(); len(regions) > 0 && regions[0].Addr == 0 {
		l.lowEnd = uint64(len(regions[0].Bytes))
	}
	if err := l.checkCmdline(); err != nil {
		return nil, err
	}
	if err := l.buildMap(); err != nil {
		return nil, err
	}
	src, err := l.k.open()
	if err != nil {
		return nil, err
	}
	l.program = src.program
	if err := l.chooseMode(); err != nil {
		return nil, err
	}
	if err := l.placeKernel(); err != nil {
		return nil, err
	}
	return src, l.placeInitrd()
}

// setupHeader returns the header to start from. An ELF file has none and gets what the kernel looks at.
func (k *Kernel) setupHeader() setupHeader {
	if k.bz != nil {
		return k.bz.header
	}
	return setupHeader{
		BootFlag: bootFlag, Magic: [4]uint8([]byte(headerMagic)), Version: protocol215, LoadFlags: loadedHigh,
		CmdlineSize: defaultCmdlineSize, InitrdAddrMax: defaultInitrdAddrMax,
	}
}

// source is a program and where its bytes come from: a file, or a decoder.
type source struct {
	program *program
	file    io.ReaderAt // nil where there is a stream
	stream  io.Reader   // the program's file from its start
}

// open chooses what is loaded: the ELF file, or the unpacked payload, or where that is impossible the bzImage as it is.
func (k *Kernel) open() (*source, error) {
	if k.program != nil {
		return &source{program: k.program, file: k.vmlinux}, nil
	}
	if k.bz.method != nil {
		src, err := k.openPayload()
		if err == nil || !errors.Is(err, ErrUnsupported) || k.bz.checkStub() != nil {
			return src, err
		}
	}
	p, err := k.bz.stub()
	if err != nil {
		return nil, err
	}
	return &source{program: p, file: k.file}, nil
}

func (k *Kernel) openPayload() (*source, error) {
	u, err := k.unpacker()
	if err != nil {
		return nil, err
	}
	head := make([]byte, min(k.bz.unpacked, elfHeadSize))
	if _, err := io.ReadFull(u, head); err != nil {
		return nil, err
	}
	p, err := parseProgram(bytes.NewReader(head), k.bz.unpacked)
	if err != nil {
		// Nonsense may come from damage, which the checksum at the end shows.
		if _, damage := io.Copy(io.Discard, u); damage != nil {
			return nil, damage
		}
		return nil, fmt.Errorf("unpacked kernel: %w", err)
	}
	if !p.sequential() {
		return nil, fmt.Errorf("unpacked kernel: %w: its segments share bytes of the file", ErrUnsupported)
	}
	return &source{program: p, stream: io.MultiReader(bytes.NewReader(head), u)}, nil
}

type loader struct {
	mem     *memory.Memory
	k       *Kernel
	o       Options
	header  setupHeader
	program *program
	mode    Mode
	lowEnd  uint64 // end of the RAM below the hole
	initrd  Range
	memMap  []e820Entry
}

func (l *loader) checkCmdline() error {
	limit := min(int(l.header.CmdlineSize), cmdlineRoom-1)
	if n := len(l.o.Cmdline); n > limit {
		return fmt.Errorf("%w: it has %d bytes, this kernel takes %d", ErrCmdlineTooLong, n, limit)
	}
	if i := strings.IndexByte(l.o.Cmdline, 0); i >= 0 {
		return fmt.Errorf("%w: the kernel command line has a NUL byte at %d", ErrOptions, i)
	}
	return nil
}

// buildMap makes the memory map ("e820"): a PC's first MiB, the other RAM, and what the caller reserves.
func (l *loader) buildMap() error {
	if l.lowEnd <= highAddr {
		return fmt.Errorf("%w: it needs more than the %d KiB there are", ErrKernelTooLarge, l.lowEnd>>10)
	}
	l.memMap = append(l.memMap,
		e820Entry{0, ebdaAddr, memoryRAM},
		e820Entry{ebdaAddr, vgaAddr - ebdaAddr, memoryReserved},
		e820Entry{tablesAddr, highAddr - tablesAddr, memoryReserved},
		e820Entry{highAddr, l.lowEnd - highAddr, memoryRAM})
	for _, r := range l.mem.Regions()[1:] {
		l.memMap = append(l.memMap, e820Entry{r.Addr, uint64(len(r.Bytes)), memoryRAM})
	}
	for _, r := range l.o.Reserved {
		l.memMap = append(l.memMap, e820Entry{r.Addr, r.Size, memoryReserved})
	}
	if len(l.memMap) > e820Max {
		return fmt.Errorf("%w: %d ranges of memory, the map has room for %d", ErrOptions, len(l.memMap), e820Max)
	}
	return nil
}

func (l *loader) chooseMode() error {
	p := l.program
	switch {
	case p.has64BitEntry() && !l.o.PVH:
		l.mode = Long64
	case p.pvh != 0:
		l.mode = PVH32
	case l.o.PVH:
		return fmt.Errorf("%w: it has no PVH note (a packed kernel has to be unpacked to show it)", ErrUnsupported)
	default:
		return fmt.Errorf("%w: the entry %#x is no physical address of the kernel, and it has no PVH note",
			ErrUnsupported, p.entry)
	}
	return nil
}

func (l *loader) placeKernel() error {
	if end := l.program.end(); end > l.lowEnd {
		return fmt.Errorf("%w: it reaches up to %d MiB, the guest has %d MiB below the device hole; give it more memory",
			ErrKernelTooLarge, (end-1)>>20+1, l.lowEnd>>20)
	}
	return nil
}

// placeInitrd finds room: below initrd_addr_max, or above 4 GiB where the kernel takes that.
func (l *loader) placeInitrd() error {
	var size uint64
	for _, b := range l.o.Initrd {
		n := b.Size()
		if n < 0 || n > memory.MaxSize {
			return fmt.Errorf("%w: a part of %d bytes", ErrInitrdTooLarge, n)
		}
		size = pageUp(size) + uint64(n)
		if size > memory.MaxSize {
			return fmt.Errorf("%w: %d bytes", ErrInitrdTooLarge, size)
		}
	}
	if size == 0 {
		return nil
	}
	bottom := pageUp(l.program.end())
	top := min(l.lowEnd, uint64(l.header.InitrdAddrMax)+1)
	if at, ok := placeBelow(bottom, top, size); ok {
		l.initrd = Range{at, size}
		return nil
	}
	if l.mode == Long64 && l.header.XLoadFlags&xlfAbove4GiB != 0 {
		for _, r := range l.mem.Regions()[1:] {
			if at, ok := placeBelow(r.Addr, r.Addr+uint64(len(r.Bytes)), size); ok {
				l.initrd = Range{at, size}
				return nil
			}
		}
	}
	return fmt.Errorf("%w: %d KiB, between the kernel and %#x are %d KiB; give the guest more memory", ErrInitrdTooLarge,
		(size+1023)>>10, top, (max(top, bottom)-bottom)>>10)
}

// placeBelow returns the highest page at which size bytes fit between bottom and top.
func placeBelow(bottom, top, size uint64) (uint64, bool) {
	if top < bottom || size > top-bottom {
		return 0, false
	}
	at := (top - size) &^ (memory.PageSize - 1)
	return at, at >= bottom
}

// pageUp rounds up to a multiple of the page size.
func pageUp(n uint64) uint64 { return (n + memory.PageSize - 1) &^ (memory.PageSize - 1) }

// read brings the kernel and the initrd into memory: it maps the pages of stable files and copies the rest, by several
// goroutines at once.
func (l *loader) read(src *source) error {
	var (
		files []transfer
		err   error
	)
	for _, s := range src.program.segments {
		if files, err = l.add(files, "kernel", src.file, s.off, s.addr, s.filesz); err != nil {
			return err
		}
	}
	if src.stream != nil {
		if err := readSequentially(src.stream, files); err != nil {
			return err
		}
		files = files[:0]
	}
	at := l.initrd.Addr
	for _, b := range l.o.Initrd {
		at = pageUp(at)
		n := uint64(b.Size())
		if files, err = l.add(files, "initrd", b, 0, at, n); err != nil {
			return err
		}
		at += n
	}
	return readAll(files)
}

// add maps what it can of src's n bytes from off on to addr, and appends to files what is left to be copied.
func (l *loader) add(files []transfer, what string, src io.ReaderAt, off int64, addr, n uint64) ([]transfer, error) {
	if f, ok := src.(*StableFile); ok && (uint64(off)|addr)%memory.PageSize == 0 {
		if whole := n &^ (memory.PageSize - 1); whole > 0 {
			if err := l.mem.MapFile(addr, whole, f.File, off); err != nil {
				return files, fmt.Errorf("%s: %w", what, err)
			}
			off, addr, n = off+int64(whole), addr+whole, n-whole
		}
	}
	if n == 0 {
		return files, nil
	}
	dst, err := l.mem.Bytes(addr, n)
	if err != nil { // there was room: the file has grown
		return files, fmt.Errorf("%s: %w", what, err)
	}
	return append(files, transfer{what, src, off, dst}), nil
}

// finish writes what the first instructions read.
func (l *loader) finish() (Entry, error) {
	cmdline := append([]byte(l.o.Cmdline), 0)
	if _, err := l.mem.WriteAt(cmdline, cmdlineAddr); err != nil {
		return Entry{}, err
	}
	info := l.zeroPage
	e := longModeEntry(l.program.entry)
	if l.mode == PVH32 {
		info = l.startInfo
		e = pvhEntry(l.program.pvh)
	}
	b, err := info()
	if err != nil {
		return Entry{}, err
	}
	if _, err := l.mem.WriteAt(b, bootInfoAddr); err != nil {
		return Entry{}, err
	}
	return e, e.write(l.mem)
}

// zeroPage returns boot_params ("64-bit BOOT PROTOCOL").
func (l *loader) zeroPage() ([]byte, error) {
	p := bootParams{
		ACPIRSDPAddr:    l.o.RSDP,
		ExtRamdiskImage: uint32(l.initrd.Addr >> 32),
		ExtRamdiskSize:  uint32(l.initrd.Size >> 32),
		E820Entries:     uint8(len(l.memMap)),
		Header:          l.header,
	}
	p.Header.TypeOfLoader = loaderUndefined
	p.Header.CmdLinePtr = cmdlineAddr
	p.Header.RamdiskImage = uint32(l.initrd.Addr)
	p.Header.RamdiskSize = uint32(l.initrd.Size)
	p.Header.SetupData = 0
	copy(p.E820Table[:], l.memMap)
	return binary.Append(nil, binary.LittleEndian, &p)
}
