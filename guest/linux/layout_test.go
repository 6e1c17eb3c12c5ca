package linux

import (
	"encoding/binary"
	"reflect"
	"testing"
)

// TestLayout checks the offsets that the structures have on the wire, where they are packed.
func TestLayout(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		v       any
		base    int
		size    int
		offsets map[string]int
	}{
		{setupHeader{}, offSetupHeader, offHeaderEnd - offSetupHeader, map[string]int{ // boot.rst
			"SetupSects": 0x1f1, "RootFlags": 0x1f2, "SysSize": 0x1f4, "RAMSize": 0x1f8, "VidMode": 0x1fa, "RootDev": 0x1fc,
			"BootFlag": 0x1fe, "Jump": 0x200, "Magic": 0x202, "Version": 0x206, "RealModeSwitch": 0x208,
			"StartSysSeg": 0x20c, "KernelVersion": 0x20e, "TypeOfLoader": 0x210, "LoadFlags": 0x211,
			"SetupMoveSize": 0x212, "Code32Start": 0x214, "RamdiskImage": 0x218, "RamdiskSize": 0x21c,
			"BootsectKludge": 0x220, "HeapEndPtr": 0x224, "ExtLoaderVer": 0x226, "ExtLoaderType": 0x227,
			"CmdLinePtr": 0x228, "InitrdAddrMax": 0x22c, "KernelAlignment": 0x230, "RelocatableKernel": 0x234,
			"MinAlignment": 0x235, "XLoadFlags": 0x236, "CmdlineSize": 0x238, "HardwareSubarch": 0x23c,
			"HardwareSubarchData": 0x240, "PayloadOffset": 0x248, "PayloadLength": 0x24c, "SetupData": 0x250,
			"PrefAddress": 0x258, "InitSize": 0x260, "HandoverOffset": 0x264, "KernelInfoOffset": 0x268, "Later": 0x26c,
		}},
		{bootParams{}, 0, 4096, map[string]int{ // zero-page.rst
			"ACPIRSDPAddr": 0x70, "ExtRamdiskImage": 0xc0, "ExtRamdiskSize": 0xc4, "ExtCmdLinePtr": 0xc8,
			"E820Entries": 0x1e8, "Header": 0x1f1, "E820Table": 0x2d0,
		}},
		{e820Entry{}, 0, 20, map[string]int{"Addr": 0, "Size": 8, "Type": 16}},
		{startInfo{}, 0, startInfoSize, map[string]int{
			"Magic": 0, "Version": 4, "Flags": 8, "NrModules": 12, "ModlistAddr": 16, "CmdlineAddr": 24, "RSDPAddr": 32,
			"MemmapAddr": 40, "MemmapEntries": 48,
		}},
		{modlistEntry{}, 0, modlistSize, map[string]int{"Addr": 0, "Size": 8, "CmdlineAddr": 16}},
		{memmapEntry{}, 0, 24, map[string]int{"Addr": 0, "Size": 8, "Type": 16}},
	} {
		typ := reflect.TypeOf(tt.v)
		if got := binary.Size(tt.v); got != tt.size {
			t.Errorf("%v: size %#x, want %#x", typ, got, tt.size)
		}
		off, named := tt.base, 0
		for i := range typ.NumField() {
			f := typ.Field(i)
			if f.Name != "_" {
				named++
				if want, ok := tt.offsets[f.Name]; !ok || off != want {
					t.Errorf("%v.%s: offset %#x, want %#x", typ, f.Name, off, want)
				}
			}
			off += binary.Size(reflect.Zero(f.Type).Interface())
		}
		if named != len(tt.offsets) {
			t.Errorf("%v: %d fields, %d offsets", typ, named, len(tt.offsets))
		}
	}
}

// TestLowMemory checks that what Load writes below 1 MiB neither overlaps nor leaves conventional memory.
func TestLowMemory(t *testing.T) {
	t.Parallel()
	end := uint64(0)
	for _, r := range []struct {
		name       string
		addr, size uint64
	}{
		{"boot information", bootInfoAddr, 4096},
		{"stack", stackTop - 4096, 4096},
		{"GDT", gdtAddr, gdtEntries * 8},
		{"page tables", pml4Addr, uint64(len(identityMap()))},
		{"command line", cmdlineAddr, cmdlineRoom},
	} {
		if r.addr < end {
			t.Errorf("%s at %#x overlaps what ends at %#x", r.name, r.addr, end)
		}
		end = r.addr + r.size
	}
	if end > ebdaAddr {
		t.Errorf("it ends at %#x, inside the EBDA", end)
	}
	if n := startInfoSize + modlistSize + e820Max*24; n > 4096 {
		t.Errorf("PVH's boot information can have %d bytes", n)
	}
}
