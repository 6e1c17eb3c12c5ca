package linux

import (
	"bytes"
	"io"
	"testing"
)

// FuzzBzImage parses, unpacks and loads what claims to be a bzImage.
func FuzzBzImage(f *testing.F) {
	vmlinux := testELF{}.build(f)
	for _, name := range append(compressions, "lzo") {
		b := testBz{payload: pack(f, name, vmlinux)}.build(f)
		f.Add(b)
		f.Add(b[:len(b)/2])
	}
	f.Add(testBz{}.build(f))
	f.Fuzz(fuzzKernel)
}

// FuzzELF parses and loads what claims to be an ELF file.
func FuzzELF(f *testing.F) {
	f.Add(testELF{}.build(f))
	f.Add(testELF{noNote: true, entry: 1 << 63}.build(f))
	f.Add(testELF{}.build(f)[:300])
	f.Fuzz(fuzzKernel)
}

func fuzzKernel(t *testing.T, b []byte) {
	k, err := Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return
	}
	_ = k.Version()
	// Larger ones only take longer.
	if n := k.UnpackedSize(); n > 0 && n <= 1<<20 {
		_ = k.Unpack(io.Discard)
	} else if n > 0 {
		return
	}
	for _, pvh := range []bool{false, true} {
		mem := newMemory(t, 64<<20)
		e, err := Load(mem, k, Options{Cmdline: "quiet", Initrd: blobs("initrd"), PVH: pvh})
		if err != nil {
			continue
		}
		if _, err := mem.Bytes(e.RIP, 1); err != nil || e.RIP < highAddr {
			t.Errorf("entry %#x lies outside the kernel", e.RIP)
		}
	}
}
