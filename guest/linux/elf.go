package linux

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"strings"
)

// program is what is put into guest memory, and where it may be entered.
type program struct {
	segments []segment // by file offset; none of them overlap in memory
	entry    uint64    // physical
	pvh      uint64    // entry of the PVH note, 0 where there is none
	notes    []segment // note segments, for findPVH
}

// segment is a part of a file and its place in guest memory. Memory beyond the file's part is zero.
type segment struct {
	off    int64
	addr   uint64
	filesz uint64
	memsz  uint64
}

func (s segment) end() uint64 { return s.addr + s.memsz }

// Bounds on an ELF's headers. Kernels have 3 to 6 program headers and some hundred bytes of notes.
const (
	maxProgramHeaders = 64
	maxNotes          = 64 << 10
	elfHeadSize       = 64 << 10 // where a packed kernel's program headers must end
)

// parseELF reads and checks the headers and notes of an ELF file.
func parseELF(r io.ReaderAt, size int64) (*program, error) {
	p, err := parseProgram(r, size)
	if err != nil {
		return nil, err
	}
	return p, p.findPVH(r)
}

// parseProgram reads and checks the program headers only.
func parseProgram(r io.ReaderAt, size int64) (*program, error) {
	h, err := parseFileHeader(r, size)
	if err != nil {
		return nil, err
	}
	const entSize = 56 // sizeof(Elf64_Phdr)
	raw := make([]byte, entSize*int(h.Phnum))
	if h.Phoff > uint64(size) || uint64(len(raw)) > uint64(size)-h.Phoff {
		return nil, fmt.Errorf("%w: the program headers lie beyond its end", ErrTruncated)
	}
	if err := readFull(r, raw, int64(h.Phoff)); err != nil {
		return nil, err
	}
	p := &program{entry: h.Entry}
	for ; len(raw) > 0; raw = raw[entSize:] {
		var ph elf.Prog64
		if _, err := binary.Decode(raw, binary.LittleEndian, &ph); err != nil {
			return nil, err
		}
		if err := p.add(&ph, size); err != nil {
			return nil, err
		}
	}
	return p, p.checkOverlap()
}

func parseFileHeader(r io.ReaderAt, size int64) (*elf.Header64, error) {
	raw := make([]byte, 64) // sizeof(Elf64_Ehdr); Elf32_Ehdr has e_machine at the same place
	if err := readFull(r, raw[:min(size, 64)], 0); err != nil {
		return nil, err
	}
	if size < 64 {
		return nil, fmt.Errorf("%w: %d bytes are too few for an ELF header", ErrTruncated, size)
	}
	if !hasMagic(raw, 0, elfMagic) {
		return nil, fmt.Errorf("%w: no ELF header", ErrNotKernel)
	}
	var order binary.ByteOrder = binary.LittleEndian
	if elf.Data(raw[elf.EI_DATA]) == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	if m := elf.Machine(order.Uint16(raw[18:])); m != elf.EM_X86_64 {
		return nil, fmt.Errorf("%w: an ELF file for %s", ErrArch, machineName(m))
	}
	if elf.Class(raw[elf.EI_CLASS]) != elf.ELFCLASS64 || order != binary.LittleEndian {
		return nil, fmt.Errorf("%w: not a 64-bit, little-endian ELF file", ErrArch)
	}
	var h elf.Header64
	if _, err := binary.Decode(raw, order, &h); err != nil {
		return nil, err
	}
	switch {
	case elf.Type(h.Type) != elf.ET_EXEC && elf.Type(h.Type) != elf.ET_DYN:
		return nil, fmt.Errorf("%w: an ELF file of type %v", ErrNotKernel, elf.Type(h.Type))
	case h.Phentsize != 56 || h.Phnum == 0 || h.Phnum > maxProgramHeaders:
		return nil, fmt.Errorf("%w: an ELF file with %d program headers of %d bytes", ErrNotKernel, h.Phnum, h.Phentsize)
	}
	return &h, nil
}

// machineName turns EM_AARCH64 into aarch64.
func machineName(m elf.Machine) string {
	name, known := strings.CutPrefix(m.String(), "EM_")
	if !known || strings.Contains(name, "+") { // the nearest known one and a distance
		return fmt.Sprintf("machine %d", uint16(m))
	}
	return strings.ToLower(name)
}

// add takes one program header.
func (p *program) add(ph *elf.Prog64, size int64) error {
	switch elf.ProgType(ph.Type) {
	case elf.PT_INTERP:
		return fmt.Errorf("%w: a dynamically linked program", ErrNotKernel)
	case elf.PT_LOAD, elf.PT_NOTE:
	default:
		return nil
	}
	if ph.Off > uint64(size) || ph.Filesz > uint64(size)-ph.Off {
		return fmt.Errorf("%w: %d bytes, a segment of %d bytes begins at %d", ErrTruncated, size, ph.Filesz, ph.Off)
	}
	s := segment{off: int64(ph.Off), addr: ph.Paddr, filesz: ph.Filesz, memsz: ph.Memsz}
	if elf.ProgType(ph.Type) == elf.PT_NOTE {
		p.notes = append(p.notes, s)
		return nil
	}
	switch {
	case s.memsz == 0:
		return nil
	case s.filesz > s.memsz || s.end() < s.addr:
		return fmt.Errorf("%w: the segment at %#x has %#x bytes in the file and %#x in memory", ErrNotKernel, s.addr,
			s.filesz, s.memsz)
	case s.addr < highAddr:
		return fmt.Errorf("%w: a segment at %#x, below 1 MiB: a program for an operating system?", ErrNotKernel, s.addr)
	}
	p.segments = append(p.segments, s)
	return nil
}

func (p *program) checkOverlap() error {
	if len(p.segments) == 0 {
		return fmt.Errorf("%w: an ELF file with nothing to load", ErrNotKernel)
	}
	slices.SortFunc(p.segments, func(a, b segment) int { return cmp.Compare(a.addr, b.addr) })
	for i, s := range p.segments[1:] {
		if s.addr < p.segments[i].end() {
			return fmt.Errorf("%w: two segments overlap at %#x", ErrNotKernel, s.addr)
		}
	}
	slices.SortStableFunc(p.segments, func(a, b segment) int { return cmp.Compare(a.off, b.off) })
	return nil
}

// end returns the first address behind the program.
func (p *program) end() (end uint64) {
	for _, s := range p.segments {
		end = max(end, s.end())
	}
	return end
}

// has64BitEntry reports whether the entry is a physical address inside the program, as Linux's is. Others, BSD's for
// example, are virtual addresses that a loader of their own has to map.
func (p *program) has64BitEntry() bool {
	return slices.ContainsFunc(p.segments, func(s segment) bool { return s.addr <= p.entry && p.entry < s.end() })
}

// xenPhys32Entry is XEN_ELFNOTE_PHYS32_ENTRY (public/elfnote.h): the physical address of the PVH entry.
const xenPhys32Entry = 18

// findPVH looks for the note with the PVH entry. A malformed note hides those behind it.
func (p *program) findPVH(r io.ReaderAt) error {
	for _, s := range p.notes {
		buf := make([]byte, min(s.filesz, maxNotes))
		if err := readFull(r, buf, s.off); err != nil {
			return err
		}
		for len(buf) >= 12 {
			nameSize, descSize := binary.LittleEndian.Uint32(buf), binary.LittleEndian.Uint32(buf[4:])
			typ := binary.LittleEndian.Uint32(buf[8:])
			name, rest, ok := cutNote(buf[12:], nameSize)
			if !ok {
				break
			}
			var desc []byte
			if desc, buf, ok = cutNote(rest, descSize); !ok {
				break
			}
			if typ == xenPhys32Entry && bytes.Equal(name, []byte("Xen\x00")) {
				p.setPVH(desc)
			}
		}
	}
	return nil
}

// cutNote splits n bytes, padded to 4, off b.
func cutNote(b []byte, n uint32) (field, rest []byte, ok bool) {
	padded := (uint64(n) + 3) &^ 3
	if padded > uint64(len(b)) {
		return nil, nil, false
	}
	return b[:n], b[padded:], true
}

// setPVH takes the note's value, 4 or 8 bytes wide. What lies outside the program is no entry.
func (p *program) setPVH(desc []byte) {
	var addr uint64
	switch len(desc) {
	case 4:
		addr = uint64(binary.LittleEndian.Uint32(desc))
	case 8:
		addr = binary.LittleEndian.Uint64(desc)
	}
	inside := func(s segment) bool { return s.addr <= addr && addr < s.end() }
	if addr>>32 == 0 && slices.ContainsFunc(p.segments, inside) {
		p.pvh = addr
	}
}
