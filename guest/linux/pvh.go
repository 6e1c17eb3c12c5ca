package linux

import "encoding/binary"

// startInfo is struct hvm_start_info, version 1 (public/arch-x86/hvm/start_info.h).
type startInfo struct {
	Magic         uint32 // 0
	Version       uint32 // 4
	Flags         uint32 // 8
	NrModules     uint32 // 12
	ModlistAddr   uint64 // 16
	CmdlineAddr   uint64 // 24
	RSDPAddr      uint64 // 32
	MemmapAddr    uint64 // 40
	MemmapEntries uint32 // 48
	_             uint32 // 52
}

// modlistEntry is struct hvm_modlist_entry.
type modlistEntry struct {
	Addr        uint64 // 0
	Size        uint64 // 8
	CmdlineAddr uint64 // 16
	_           uint64 // 24
}

// memmapEntry is struct hvm_memmap_table_entry.
type memmapEntry struct {
	Addr uint64 // 0
	Size uint64 // 8
	Type uint32 // 16
	_    uint32 // 20
}

const (
	startInfoMagic   = 0x336ec578
	startInfoVersion = 1
	startInfoSize    = 56
	modlistSize      = 32
)

// startInfo returns PVH's start_info with the module list and the memory map behind it, to be put at bootInfoAddr. The
// initrd is the only module.
func (l *loader) startInfo() ([]byte, error) {
	s := startInfo{
		Magic: startInfoMagic, Version: startInfoVersion,
		CmdlineAddr: cmdlineAddr, RSDPAddr: l.o.RSDP,
		MemmapAddr: bootInfoAddr + startInfoSize + modlistSize, MemmapEntries: uint32(len(l.memMap)),
	}
	if l.initrd.Size > 0 {
		s.NrModules, s.ModlistAddr = 1, bootInfoAddr+startInfoSize
	}
	mods := modlistEntry{Addr: l.initrd.Addr, Size: l.initrd.Size}
	memmap := make([]memmapEntry, len(l.memMap))
	for i, m := range l.memMap {
		memmap[i] = memmapEntry{Addr: m.Addr, Size: m.Size, Type: m.Type}
	}
	var (
		b   []byte
		err error
	)
	for _, v := range []any{&s, &mods, memmap} {
		if b, err = binary.Append(b, binary.LittleEndian, v); err != nil {
			return nil, err
		}
	}
	return b, nil
}
