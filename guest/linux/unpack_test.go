package linux

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
)

var compressions = []string{"gzip", "bzip2", "lzma", "xz", "xz-x86", "lz4", "zstd"}

func TestUnpack(t *testing.T) {
	t.Parallel()
	want := testELF{}.build(t)
	for _, name := range compressions {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := parse(t, testBz{payload: pack(t, name, want)}.build(t))
			if method, _, _ := strings.Cut(name, "-"); k.Compression() != method || k.UnpackedSize() != int64(len(want)) {
				t.Fatalf("%q, %d bytes", k.Compression(), k.UnpackedSize())
			}
			var got bytes.Buffer
			if err := k.Unpack(&got); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Bytes(), want) {
				t.Fatal("the unpacked kernel differs")
			}
			// A second time, and through Load.
			mem := newMemory(t, 64<<20)
			e, err := Load(mem, k, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if e.Mode != Long64 || e.RIP != textAddr+0x10 {
				t.Errorf("%v at %#x", e.Mode, e.RIP)
			}
			checkProgram(t, mem)
		})
	}
}

// TestUnpackCorrupt damages payloads. Whatever the damage, the answer is ErrCorrupt, except where the damaged header
// asks for something that is merely unknown.
func TestUnpackCorrupt(t *testing.T) {
	t.Parallel()
	vmlinux := testELF{}.build(t)
	for _, name := range compressions {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			good := pack(t, name, vmlinux)
			bad := func(what string, payload []byte) {
				k := parse(t, testBz{payload: payload}.build(t))
				err := k.Unpack(io.Discard)
				if !errors.Is(err, ErrCorrupt) {
					t.Errorf("%s: Unpack: %v", what, err)
				}
				if _, err := Load(newMemory(t, 64<<20), k, Options{}); !errors.Is(err, ErrCorrupt) {
					t.Errorf("%s: Load: %v", what, err)
				}
			}
			resized := func(n int) []byte { return sized(good[:len(good)-4:len(good)-4], n) }
			bad("announces more", resized(len(vmlinux)+1))
			bad("announces less", resized(len(vmlinux)-1))
			bad("cut", sized(good[:len(good)/2:len(good)/2], len(vmlinux)))
			flipped := bytes.Clone(good)
			flipped[len(flipped)/2] ^= 0x55
			if name != "lz4" && name != "lzma" { // which have no checksum
				bad("flipped", flipped)
			}
		})
	}
}

// TestUnpackUnknown boots through the kernel's own decompressor what cannot be unpacked here.
func TestUnpackUnknown(t *testing.T) {
	t.Parallel()
	vmlinux := testELF{}.build(t)
	wideLZMA := pack(t, "lzma", vmlinux)
	binary.LittleEndian.PutUint32(wideLZMA[1:], maxWindow+1)
	for _, tt := range []struct {
		name    string
		payload []byte
	}{
		{"lzo", pack(t, "lzo", vmlinux)},
		{"unknown method", sized(bytes.Repeat([]byte{0xaa}, 100), len(vmlinux))},
		{"tiny payload", []byte{0x1f, 0x8b, 8, 0}},
		{"no payload", nil},
		{"unpacked size 0", sized(pack(t, "zstd", vmlinux), 0)},
		{"unpacked size 4 GiB", sized(pack(t, "zstd", vmlinux), 1<<32-1)},
		{"large LZMA dictionary", wideLZMA},
		{"large zstd window", sized([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 20 << 3, 1, 0, 0}, len(vmlinux))},
		{"zstd frame of 1 GiB in one segment", sized(zstdFrame(1<<30, 1), len(vmlinux))},
		{"xz with an unknown filter", sized(xzFilter(0x21), len(vmlinux))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := testBz{payload: tt.payload}.build(t)
			k := parse(t, b)
			if err := k.Unpack(io.Discard); !errors.Is(err, ErrUnsupported) {
				t.Errorf("Unpack: %v", err)
			}
			mem := newMemory(t, 64<<20)
			e, err := Load(mem, k, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if e.Mode != Long64 || e.RIP != textAddr+0x200 {
				t.Errorf("%v at %#x", e.Mode, e.RIP)
			}
			if got := bytesAt(t, mem, textAddr, len(b)-bzSetup); !bytes.Equal(got, b[bzSetup:]) {
				t.Error("the protected-mode code is not there")
			}
			// A kernel too old to have a 64-bit entry is refused, by Parse where that can tell.
			old := testBz{payload: tt.payload, header: func(h *setupHeader) { h.Version = 0x020b }}.build(t)
			k, err = Parse(bytes.NewReader(old), int64(len(old)))
			if err == nil {
				_, err = Load(newMemory(t, 64<<20), k, Options{})
			}
			if !errors.Is(err, ErrUnsupported) {
				t.Errorf("old kernel: %v", err)
			}
		})
	}
}

// xzFilter returns the start of an xz file whose one filter has a number that nobody uses.
func xzFilter(id byte) []byte {
	b := []byte("\xfd7zXZ\x00\x00\x01") // stream header: CRC32
	b = binary.LittleEndian.AppendUint32(b, crc32IEEE(b[6:8]))
	block := []byte{2, 0, id + 0x10, 0, 0, 0, 0, 0} // 12 bytes, one filter without properties
	block = binary.LittleEndian.AppendUint32(block, crc32IEEE(block))
	return append(b, block...)
}

func TestSetUnpacked(t *testing.T) {
	t.Parallel()
	vmlinux := testELF{}.build(t)
	k := parse(t, testBz{payload: pack(t, "zstd", vmlinux)}.build(t))
	open := func(b []byte) error { return k.SetUnpacked(bytes.NewReader(b), int64(len(b))) }

	if err := open(vmlinux[:len(vmlinux)-1]); !errors.Is(err, ErrCorrupt) {
		t.Errorf("short file: %v", err)
	}
	if err := open(make([]byte, len(vmlinux))); !errors.Is(err, ErrNotKernel) {
		t.Errorf("other file: %v", err)
	}
	if !k.Packed() {
		t.Error("unpacked by a bad file")
	}
	if err := open(vmlinux); err != nil {
		t.Fatal(err)
	}
	if k.Packed() || k.Format() != BzImage {
		t.Errorf("packed %v, %v", k.Packed(), k.Format())
	}
	mem := newMemory(t, 64<<20)
	if _, err := Load(mem, k, Options{}); err != nil {
		t.Fatal(err)
	}
	checkProgram(t, mem)

	if err := parse(t, vmlinux).SetUnpacked(bytes.NewReader(vmlinux), int64(len(vmlinux))); err == nil {
		t.Error("an ELF file took an unpacked kernel")
	}
}

// failingWriter is a full disk.
type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

func TestUnpackWriteError(t *testing.T) {
	t.Parallel()
	full := errors.New("disk full")
	k := parse(t, testBz{payload: pack(t, "zstd", testELF{}.build(t))}.build(t))
	if err := k.Unpack(failingWriter{full}); !errors.Is(err, full) {
		t.Errorf("got %v", err)
	}
}
