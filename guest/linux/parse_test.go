package linux

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	t.Parallel()
	vmlinux := testELF{}.build(t)
	bz := testBz{payload: pack(t, "zstd", vmlinux)}.build(t)

	k := parse(t, vmlinux)
	if k.Format() != ELF || k.Packed() || k.Version() != "" || k.Compression() != "" || k.UnpackedSize() != 0 {
		t.Errorf("vmlinux: %v, packed %v, version %q", k.Format(), k.Packed(), k.Version())
	}
	if err := k.Unpack(io.Discard); !errors.Is(err, ErrUnsupported) {
		t.Errorf("Unpack of a vmlinux: %v", err)
	}

	k = parse(t, bz)
	if k.Format() != BzImage || !k.Packed() || k.Version() != bzVersion || k.Compression() != "zstd" ||
		k.UnpackedSize() != int64(len(vmlinux)) {
		t.Errorf("bzImage: %v, packed %v, version %q, %q, %d bytes", k.Format(), k.Packed(), k.Version(),
			k.Compression(), k.UnpackedSize())
	}
}

func TestOpen(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "vmlinux")
	if err := os.WriteFile(path, testELF{}.build(t), 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
	if err := k.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
	if _, err := Open(filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrNotKernel) || !strings.Contains(err.Error(), dir) {
		t.Errorf("directory: %v", err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(pipe); !errors.Is(err, ErrNotKernel) {
		t.Errorf("pipe: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errors.Is(err, ErrTruncated) || !strings.Contains(err.Error(), path) {
		t.Errorf("empty file: %v", err)
	}
}

// bzWith returns a bzImage whose header is changed.
func bzWith(t *testing.T, change func(*setupHeader)) []byte {
	return testBz{payload: pack(t, "gzip", testELF{}.build(t)), header: change}.build(t)
}

func elfWith(t *testing.T, change func(*elf.Header64)) []byte {
	return testELF{header: change}.build(t)
}

func elfSegment(t *testing.T, change func(*elf.Prog64)) []byte {
	return testELF{phys: func(i int, ph *elf.Prog64) {
		if i == 0 {
			change(ph)
		}
	}}.build(t)
}

// at returns a file of a page with magic at an offset.
func at(off int, magic string) []byte {
	b := make([]byte, 4096)
	copy(b[off:], magic)
	return b
}

func TestParseBad(t *testing.T) {
	t.Parallel()
	vmlinux := testELF{}.build(t)
	bz := testBz{payload: pack(t, "gzip", vmlinux)}.build(t)
	cut := func(b []byte, n int) []byte { return b[:n] }

	for _, tt := range []struct {
		name string
		file []byte
		want error
		text string
	}{
		{"empty", nil, ErrTruncated, "0 bytes"},
		{"short", []byte("hello"), ErrTruncated, "5 bytes"},
		{"zeroes", make([]byte, 8192), ErrNotKernel, "neither"},
		{"script", at(0, "#!/bin/sh\n"), ErrNotKernel, "script"},
		{"initrd", at(0, "070701"), ErrNotKernel, "initrd"},
		{"gzipped", at(0, "\x1f\x8b\x08"), ErrNotKernel, "unpack it first"},
		{"boot sector", at(0x1fe, "\x55\xaa"), ErrNotKernel, "boot sector"},
		{"EFI program", at(0, "MZ"), ErrNotKernel, "EFI"},
		{"arm64 Image", append([]byte("MZ"), at(54, "ARM\x64")...), ErrArch, "arm64"},
		{"riscv Image", at(56, "RSC\x05"), ErrArch, "RISC-V"},
		{"LoongArch Image", at(56, "\xcd\x23\x82\x81"), ErrArch, "LoongArch"},
		{"arm zImage", at(36, "\x18\x28\x6f\x01"), ErrArch, "zImage"},
		{"EFI zboot", at(0, "MZ\x00\x00zimg"), ErrArch, "zboot"},

		{"bzImage cut in the header", cut(bz, 0x230), ErrTruncated, "560 bytes"},
		{"bzImage cut in the setup code", cut(bz, 0x290), ErrTruncated, "announces"},
		{"bzImage cut in the payload", cut(bz, len(bz)-100), ErrTruncated, "announces"},
		{"bzImage without boot flag", bzWith(t, func(h *setupHeader) { h.BootFlag = 0 }), ErrNotKernel, "boot_flag"},
		{"old bzImage", bzWith(t, func(h *setupHeader) { h.Version = 0x0206 }), ErrUnsupported, "2.06"},
		{"zImage", bzWith(t, func(h *setupHeader) { h.LoadFlags = 0 }), ErrUnsupported, "zImage"},
		{"32-bit bzImage", bzWith(t, func(h *setupHeader) { h.XLoadFlags = 0 }), ErrArch, "32-bit x86"},
		{"payload beyond the end", bzWith(t, func(h *setupHeader) { h.PayloadOffset = 1 << 20 }), ErrTruncated, "payload"},
		{"payload length overflow", bzWith(t, func(h *setupHeader) { h.PayloadLength = 1<<32 - 1 }), ErrTruncated, ""},
		{"no payload, no stub", bzWith(t, func(h *setupHeader) {
			h.PayloadLength, h.Version = 0, 0x020a
		}), ErrUnsupported, "no 64-bit entry"},

		{"ELF cut in its header", cut(vmlinux, 60), ErrTruncated, "ELF header"},
		{"ELF cut in the program headers", cut(vmlinux, 100), ErrTruncated, "program headers"},
		{"ELF cut in a segment", cut(vmlinux, 0x4000), ErrTruncated, "a segment"},
		{"aarch64", elfWith(t, func(h *elf.Header64) { h.Machine = uint16(elf.EM_AARCH64) }), ErrArch, "aarch64"},
		{"riscv", elfWith(t, func(h *elf.Header64) { h.Machine = uint16(elf.EM_RISCV) }), ErrArch, "riscv"},
		{"s390", elfWith(t, func(h *elf.Header64) {
			h.Ident[elf.EI_DATA] = byte(elf.ELFDATA2MSB)
			h.Machine = uint16(elf.EM_S390) << 8
		}), ErrArch, "s390"},
		{"i386", elfWith(t, func(h *elf.Header64) {
			h.Ident[elf.EI_CLASS], h.Machine = byte(elf.ELFCLASS32), uint16(elf.EM_386)
		}), ErrArch, "386"},
		{"x32", elfWith(t, func(h *elf.Header64) { h.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS32) }), ErrArch, "64-bit"},
		{"unknown machine", elfWith(t, func(h *elf.Header64) { h.Machine = 0xfffe }), ErrArch, "65534"},
		{"object file", elfWith(t, func(h *elf.Header64) { h.Type = uint16(elf.ET_REL) }), ErrNotKernel, "ET_REL"},
		{"no program headers", elfWith(t, func(h *elf.Header64) { h.Phnum = 0 }), ErrNotKernel, "0 program headers"},
		{"too many", elfWith(t, func(h *elf.Header64) { h.Phnum = 0xffff }), ErrNotKernel, "65535 program headers"},
		{"odd program headers", elfWith(t, func(h *elf.Header64) { h.Phentsize = 32 }), ErrNotKernel, "32 bytes"},
		{"far program headers", elfWith(t, func(h *elf.Header64) { h.Phoff = 1<<64 - 8 }), ErrTruncated, ""},
		{"program", elfSegment(t, func(p *elf.Prog64) { p.Type = uint32(elf.PT_INTERP) }), ErrNotKernel, "dynamically"},
		{"low segment", elfSegment(t, func(p *elf.Prog64) { p.Paddr = 0x1000 }), ErrNotKernel, "below 1 MiB"},
		{"wrapping segment", elfSegment(t, func(p *elf.Prog64) { p.Paddr = 1<<64 - 8 }), ErrNotKernel, ""},
		{"large in the file", elfSegment(t, func(p *elf.Prog64) { p.Memsz = 1 }), ErrNotKernel, "in memory"},
		{"far segment", elfSegment(t, func(p *elf.Prog64) { p.Off = 1<<64 - 8 }), ErrTruncated, ""},
		{"overlap", elfSegment(t, func(p *elf.Prog64) { p.Paddr = textAddr + 4096 }), ErrNotKernel, "overlap"},
		{"nothing to load", testELF{phys: func(_ int, p *elf.Prog64) { p.Memsz, p.Filesz = 0, 0 }}.build(t), ErrNotKernel,
			"nothing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := Parse(bytes.NewReader(tt.file), int64(len(tt.file)))
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %v with %q", err, tt.want, tt.text)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %v", err)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		at   uint16
		text string
		want string
	}{
		{"usual", 0x100, "6.1.0\x00", "6.1.0"},
		{"none", 0, "6.1.0\x00", ""},
		{"outside the setup code", 0x200, "6.1.0\x00", ""},
		{"no end", 0x100, strings.Repeat("6", 256), ""},
		{"control characters", 0x100, "6\x1b[31m\n\x00", "6?[31m?"},
	} {
		b := bzWith(t, func(h *setupHeader) { h.KernelVersion = tt.at })
		copy(b[0x300:], tt.text)
		if got := parse(t, b).Version(); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestPVHNote(t *testing.T) {
	t.Parallel()
	le32 := func(n uint32) []byte { return binary.LittleEndian.AppendUint32(nil, n) }
	le64 := func(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }
	for _, tt := range []struct {
		name string
		note []byte
		want uint64
	}{
		{"32-bit", note("Xen", 18, le32(pvhAddr)), pvhAddr},
		{"64-bit", note("Xen", 18, le64(pvhAddr)), pvhAddr},
		{"behind others", append(note("GNU", 1, []byte("x")), note("Xen", 18, le32(pvhAddr))...), pvhAddr},
		{"other name", note("GNU", 18, le32(pvhAddr)), 0},
		{"outside", note("Xen", 18, le32(0x1000)), 0},
		{"above 4 GiB", note("Xen", 18, le64(1<<32+pvhAddr)), 0},
		{"odd size", note("Xen", 18, []byte{1, 2}), 0},
		{"cut", note("Xen", 18, le32(pvhAddr))[:17], 0},
		{"huge name", append(le32(1<<32-1), le64(0)...), 0},
		{"none", []byte{}, 0},
	} {
		if got := parse(t, testELF{note: tt.note}.build(t)).program.pvh; got != tt.want {
			t.Errorf("%s: %#x, want %#x", tt.name, got, tt.want)
		}
	}
}

// errReader fails in the way of a disk.
type errReader struct{ err error }

func (r errReader) ReadAt([]byte, int64) (int, error) { return 0, r.err }

func TestParseIOError(t *testing.T) {
	t.Parallel()
	if _, err := Parse(errReader{fs.ErrPermission}, 1<<20); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("got %v", err)
	}
	if _, err := Parse(bytes.NewReader(nil), -1); !errors.Is(err, ErrTruncated) {
		t.Errorf("negative size: %v", err)
	}
}
