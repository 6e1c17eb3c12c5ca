package image

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
)

// thin returns the bytes of the program p changed so that it starts without the libraries named in without. Debian
// builds fio, for one, with the clients of several storage clusters, which are fifty times its own size and take most of
// its start.
//
// Three things are changed: the DT_NEEDED entries go, so does what the program asks of the libraries' versions, and the
// symbols that no remaining library defines become weak, which the loader leaves at address zero. Code is untouched. The
// program then crashes on the first call into a library that was left out, and works like the original otherwise.
func (l *linker) thin(p *program, without []string) ([]byte, error) {
	raw, err := os.ReadFile(p.path)
	if err != nil {
		return nil, err
	}
	f, err := elf.Open(p.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := func(name string, t elf.SectionType) ([]byte, error) {
		s := f.Section(name)
		if s == nil || s.Type != t || s.Offset > uint64(len(raw)) || s.Size > uint64(len(raw))-s.Offset {
			return nil, fmt.Errorf("no usable section %s", name)
		}
		return raw[s.Offset : s.Offset+s.Size], nil
	}
	dynamic, err := section(".dynamic", elf.SHT_DYNAMIC)
	if err != nil {
		return nil, err
	}
	dynsym, err := section(".dynsym", elf.SHT_DYNSYM)
	if err != nil {
		return nil, err
	}
	versym, err := section(".gnu.version", elf.SHT_GNU_VERSYM)
	if err != nil {
		return nil, err
	}
	verneed, err := section(".gnu.version_r", elf.SHT_GNU_VERNEED)
	if err != nil {
		return nil, err
	}
	dynstr, err := section(".dynstr", elf.SHT_STRTAB)
	if err != nil {
		return nil, err
	}
	str := func(off uint64) string {
		if off >= uint64(len(dynstr)) {
			return ""
		}
		b := dynstr[off:]
		if i := slices.Index(b, 0); i >= 0 {
			b = b[:i]
		}
		return string(b)
	}
	first, kept, err := dropVersions(verneed, func(off uint32) bool { return slices.Contains(without, str(uint64(off))) })
	if err != nil {
		return nil, err
	}
	if err := dropNeeded(dynamic, uint64(first), uint64(kept), func(off uint64) bool {
		return slices.Contains(without, str(off))
	}); err != nil {
		return nil, err
	}
	return raw, l.weaken(p, dynsym, versym, str)
}

var errDamagedELF = errors.New("the ELF file is damaged")

// dropVersions unlinks the records of .gnu.version_r about files that drop picks. It returns the first remaining
// record's offset and their number. Record: Elf64_Verneed, 16 bytes: vn_version u16, vn_cnt u16, vn_file u32, vn_aux u32,
// vn_next u32 (System V ABI, Linux extensions: LSB 5.0, 10.7).
func dropVersions(verneed []byte, drop func(file uint32) bool) (first, kept int, err error) {
	const recordSize, fileAt, nextAt = 16, 4, 12
	var keep []int
	for off := 0; ; {
		if off < 0 || off+recordSize > len(verneed) {
			return 0, 0, errDamagedELF
		}
		if !drop(binary.LittleEndian.Uint32(verneed[off+fileAt:])) {
			keep = append(keep, off)
		}
		next := int(binary.LittleEndian.Uint32(verneed[off+nextAt:]))
		if next == 0 {
			break
		}
		off += next
	}
	if len(keep) == 0 {
		return 0, 0, errors.New("no version of a remaining library is asked for")
	}
	for i, off := range keep {
		next := 0
		if i+1 < len(keep) {
			next = keep[i+1] - off
		}
		binary.LittleEndian.PutUint32(verneed[off+nextAt:], uint32(next))
	}
	return keep[0], len(keep), nil
}

// dropNeeded removes the DT_NEEDED entries that drop picks and sets the place and the number of the version records.
// Entry: Elf64_Dyn, 16 bytes: d_tag i64, d_val u64 (System V ABI, chapter 5).
func dropNeeded(dynamic []byte, verneedAt, verneedNum uint64, drop func(name uint64) bool) error {
	const entrySize = 16
	to := 0
	for from := 0; from+entrySize <= len(dynamic); from += entrySize {
		e := dynamic[from : from+entrySize]
		tag := elf.DynTag(binary.LittleEndian.Uint64(e))
		val := binary.LittleEndian.Uint64(e[8:])
		switch tag {
		case elf.DT_NEEDED:
			if drop(val) {
				continue
			}
		case elf.DT_VERNEED:
			binary.LittleEndian.PutUint64(e[8:], val+verneedAt)
		case elf.DT_VERNEEDNUM:
			binary.LittleEndian.PutUint64(e[8:], verneedNum)
		}
		to += copy(dynamic[to:], e)
	}
	if to == len(dynamic) {
		return errDamagedELF // nothing was dropped
	}
	clear(dynamic[to:]) // DT_NULL
	return nil
}

// weaken makes the undefined symbols weak that no library of p defines. Symbol: Elf64_Sym, 24 bytes: st_name u32,
// st_info u8 (binding in the upper half), st_other u8, st_shndx u16, st_value u64, st_size u64; each has a u16 in
// .gnu.version.
func (l *linker) weaken(p *program, dynsym, versym []byte, str func(uint64) string) error {
	const symSize, infoAt, shndxAt = 24, 4, 6
	const verGlobal = 1 // VER_NDX_GLOBAL: of no particular version
	for i := 1; (i+1)*symSize <= len(dynsym); i++ {
		s := dynsym[i*symSize : (i+1)*symSize]
		info := s[infoAt]
		if elf.SectionIndex(binary.LittleEndian.Uint16(s[shndxAt:])) != elf.SHN_UNDEF || elf.ST_BIND(info) != elf.STB_GLOBAL {
			continue
		}
		name := str(uint64(binary.LittleEndian.Uint32(s)))
		defined := false
		for _, lib := range p.libs {
			names, err := l.exports(lib.path)
			if err != nil {
				return err
			}
			if names[name] {
				defined = true
				break
			}
		}
		if defined {
			continue
		}
		if (i+1)*2 > len(versym) {
			return errDamagedELF
		}
		s[infoAt] = elf.ST_INFO(elf.STB_WEAK, elf.ST_TYPE(info))
		binary.LittleEndian.PutUint16(versym[i*2:], verGlobal)
	}
	return nil
}
