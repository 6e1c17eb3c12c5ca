package linux

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"

	"github.com/kvmlet/kvmlet/guest/memory"
)

var update = flag.Bool("update", false, "make the files in testdata anew, with xz and bzip2")

// Where the test kernel's segments go: text at 16 MiB as Linux's, data with zeroes behind it.
const (
	textAddr = 16 << 20
	dataAddr = 20 << 20
	dataBSS  = 1 << 20
	pvhAddr  = textAddr + 0x40
)

func textBytes() []byte {
	// Calls to one far address from many places: what the x86 filter of xz exists for.
	b := make([]byte, 0, 20<<10)
	for len(b) < 20<<10 {
		b = append(b, 0x90, 0x48, 0x89, byte(len(b)), 0xe8)
		b = binary.LittleEndian.AppendUint32(b, uint32(0x8000-len(b)-4))
	}
	return b
}

func dataBytes() []byte { return bytes.Repeat([]byte("kernel data "), 500) }

// testELF describes the ELF file that build makes. The zero value of a field means what a small Linux kernel has there.
type testELF struct {
	entry  uint64
	phys   func(i int, ph *elf.Prog64)
	header func(*elf.Header64)
	noNote bool
	note   []byte
}

func note(name string, typ uint32, desc []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(name)+1))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(desc)))
	b = binary.LittleEndian.AppendUint32(b, typ)
	b = append(append(b, name...), 0)
	b = append(b, make([]byte, -len(b)&3)...)
	b = append(b, desc...)
	return append(b, make([]byte, -len(b)&3)...)
}

func (e testELF) build(tb testing.TB) []byte {
	tb.Helper()
	text, data, notes := textBytes(), dataBytes(), e.note
	if notes == nil && !e.noNote {
		notes = append(note("GNU", 3, []byte("build id")), note("Xen", 6, []byte("linux\x00"))...)
		notes = append(notes, note("Xen", xenPhys32Entry, binary.LittleEndian.AppendUint32(nil, pvhAddr))...)
	}
	const textOff, dataOff = 0x1000, 0x8000
	noteOff := uint64(dataOff + len(data))
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Entry: textAddr + 0x10, Phoff: 64, Ehsize: 64,
		Phentsize: 56, Phnum: 4,
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	if e.entry != 0 {
		h.Entry = e.entry
	}
	if e.header != nil {
		e.header(&h)
	}
	b, err := binary.Append(nil, binary.LittleEndian, &h)
	if err != nil {
		tb.Fatal(err)
	}
	for i, ph := range []elf.Prog64{
		// Linux's are sorted by offset; these are not.
		{Type: uint32(elf.PT_LOAD), Off: dataOff, Paddr: dataAddr, Filesz: uint64(len(data)),
			Memsz: uint64(len(data) + dataBSS)},
		{Type: uint32(elf.PT_LOAD), Off: textOff, Paddr: textAddr, Vaddr: 1<<64 - 1<<31 + textAddr,
			Filesz: uint64(len(text)), Memsz: uint64(len(text))},
		{Type: uint32(elf.PT_GNU_STACK)},
		{Type: uint32(elf.PT_NOTE), Off: noteOff, Paddr: dataAddr, Filesz: uint64(len(notes))},
	} {
		if e.phys != nil {
			e.phys(i, &ph)
		}
		if b, err = binary.Append(b, binary.LittleEndian, &ph); err != nil {
			tb.Fatal(err)
		}
	}
	b = append(b, make([]byte, textOff-len(b))...)
	b = append(b, text...)
	b = append(b, make([]byte, dataOff-len(b))...)
	b = append(b, data...)
	b = append(b, notes...)
	return append(b, "relocations, which are not applied"...)
}

// testBz describes the bzImage that build makes around a payload.
type testBz struct {
	payload []byte // compressed, with its size behind it
	header  func(*setupHeader)
}

const (
	bzSetup   = 2 * 512 // boot sector and one sector of setup code
	bzVersion = "7.1.0-test (someone@somewhere) #1 SMP"
	// The protected-mode code before the payload: the entry is at 0x200.
	bzStub = 0x400
)

func (z testBz) build(tb testing.TB) []byte {
	tb.Helper()
	code := append(bytes.Repeat([]byte{0xcc}, bzStub), z.payload...)
	code = append(code, make([]byte, -len(code)&15)...)
	h := setupHeader{
		SetupSects: 1, SysSize: uint32(len(code) / 16), VidMode: 0xffff, BootFlag: bootFlag, Jump: [2]uint8{0xeb, 0x6a},
		Magic: [4]uint8{'H', 'd', 'r', 'S'}, Version: protocol215, KernelVersion: 0x100, LoadFlags: loadedHigh,
		Code32Start: 0x100000, InitrdAddrMax: 0x7fffffff, KernelAlignment: 2 << 20, RelocatableKernel: 1, MinAlignment: 21,
		XLoadFlags: xlfKernel64 | xlfAbove4GiB, CmdlineSize: 2047, PayloadOffset: bzStub,
		PayloadLength: uint32(len(z.payload)), PrefAddress: textAddr, InitSize: 8 << 20,
	}
	if z.header != nil {
		z.header(&h)
	}
	raw, err := binary.Append(nil, binary.LittleEndian, &h)
	if err != nil {
		tb.Fatal(err)
	}
	b := make([]byte, bzSetup, bzSetup+len(code))
	copy(b[offSetupHeader:], raw)
	copy(b[0x300:], bzVersion+"\x00")
	return append(b, code...)
}

// sized appends n, as the kernel's build does.
func sized(b []byte, n int) []byte { return binary.LittleEndian.AppendUint32(b, uint32(n)) }

func writeWith(tb testing.TB, data []byte, open func(io.Writer) (io.WriteCloser, error)) []byte {
	tb.Helper()
	var buf bytes.Buffer
	w, err := open(&buf)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

// pack compresses a kernel in the way of the kernel's build. For "xz-x86", "bzip2" and "lzo" the kernel must be
// testELF{}, as there are no encoders here and the data comes from testdata.
func pack(tb testing.TB, name string, data []byte) []byte {
	tb.Helper()
	with := func(open func(io.Writer) (io.WriteCloser, error)) []byte { return writeWith(tb, data, open) }
	switch name {
	case "gzip":
		return with(func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil })
	case "zstd":
		return sized(with(func(w io.Writer) (io.WriteCloser, error) {
			return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(128<<10))
		}), len(data))
	case "lz4":
		return sized(with(func(w io.Writer) (io.WriteCloser, error) {
			z := lz4.NewWriter(w)
			return z, z.Apply(lz4.LegacyOption(true))
		}), len(data))
	case "xz":
		return sized(with(func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) }), len(data))
	case "lzma":
		return sized(with(func(w io.Writer) (io.WriteCloser, error) { return lzma.NewWriter(w) }), len(data))
	case "bzip2":
		return sized(golden(tb, "kernel.bz2", data, "bzip2", "-9"), len(data))
	case "xz-x86": // the options of scripts/xz_wrap.sh
		return sized(golden(tb, "kernel.xz", data, "xz", "--check=crc32", "--x86", "--lzma2=dict=128MiB"), len(data))
	case "lzo": // only its magic: it is not unpacked
		return sized([]byte("\x89LZO\x00\r\n\x1a\n and so on"), len(data))
	}
	tb.Fatalf("no compression %q", name)
	return nil
}

// golden returns a file of testdata, made by a command that compresses its standard input to its standard output.
func golden(tb testing.TB, name string, data []byte, command ...string) []byte {
	tb.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		cmd := exec.Command(command[0], append(command[1:], "-c")...)
		cmd.Stdin, cmd.Stderr = bytes.NewReader(data), os.Stderr
		out, err := cmd.Output()
		if err != nil {
			tb.Fatal(err)
		}
		if err := os.WriteFile(path, out, 0o644); err != nil {
			tb.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func parse(tb testing.TB, b []byte) *Kernel {
	tb.Helper()
	k, err := Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func newMemory(tb testing.TB, size uint64) *memory.Memory {
	tb.Helper()
	m, err := memory.New(size)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := m.Close(); err != nil {
			tb.Error(err)
		}
	})
	return m
}
