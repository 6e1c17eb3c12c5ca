package linux

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	// The module with the kernel. It is found through the module cache and not through this package.
	_ "github.com/gokrazy/kernel.amd64"

	"github.com/kvmlet/kvmlet/guest/memory"
)

// realKernel returns the path of the pinned kernel: Linux 7.1, zstd, no PVH note.
func realKernel(tb testing.TB) string {
	tb.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/gokrazy/kernel.amd64").Output()
	if err != nil {
		tb.Fatalf("find the pinned kernel's module: %v", err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), "vmlinuz")
}

func TestRealKernel(t *testing.T) {
	t.Parallel()
	checkRealKernel(t, realKernel(t))
}

// TestRealKernelLZ4 does the same with the pinned kernel packed as Debian packs its own: in blocks of 8 MiB, of which the
// kernels that tests make fill one.
func TestRealKernelLZ4(t *testing.T) {
	t.Parallel()
	pinned, err := Open(realKernel(t))
	if err != nil {
		t.Fatal(err)
	}
	defer pinned.Close()
	var vmlinux bytes.Buffer
	if err := pinned.Unpack(&vmlinux); err != nil {
		t.Fatal(err)
	}
	b := testBz{payload: pack(t, "lz4", vmlinux.Bytes()), header: func(h *setupHeader) {
		h.PrefAddress, h.InitSize = pinned.bz.header.PrefAddress, pinned.bz.header.InitSize
	}}.build(t)
	path := filepath.Join(t.TempDir(), "vmlinuz")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	checkRealKernel(t, path)
}

// checkRealKernel unpacks a kernel and checks that each way to load it puts the segments where debug/elf finds them.
func checkRealKernel(t *testing.T, path string) {
	k, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	t.Logf("%v %s, %s, %d MiB unpacked", k.Format(), k.Version(), k.Compression(), k.UnpackedSize()>>20)
	if !strings.Contains(k.Version(), "#") {
		t.Errorf("version %q", k.Version())
	}
	if !k.Packed() {
		if _, err := Load(newMemory(t, 256<<20), k, Options{Cmdline: "quiet"}); err != nil {
			t.Fatal(err)
		}
		return
	}
	var vmlinux bytes.Buffer
	if err := k.Unpack(&vmlinux); err != nil {
		t.Fatal(err)
	}
	want, err := elf.NewFile(bytes.NewReader(vmlinux.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	load := func(what string) {
		mem := newMemory(t, 256<<20)
		e, err := Load(mem, k, Options{Cmdline: "quiet", Initrd: blobs("initrd")})
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if e.Mode != Long64 || e.RIP != want.Entry {
			t.Errorf("%s: %v %#x, want %#x", what, e.Mode, e.RIP, want.Entry)
		}
		for _, p := range want.Progs {
			got := bytesAt(t, mem, p.Paddr, int(p.Filesz))
			if p.Type == elf.PT_LOAD && !bytes.Equal(got, vmlinux.Bytes()[p.Off:p.Off+p.Filesz]) {
				t.Errorf("%s: the segment at %#x differs", what, p.Paddr)
			}
		}
	}
	load("packed")
	if err := k.SetUnpacked(bytes.NewReader(vmlinux.Bytes()), int64(vmlinux.Len())); err != nil {
		t.Fatal(err)
	}
	load("unpacked")
	t.Logf("it ends at %#x; PVH entry %#x", k.program.end(), k.program.pvh)

	if _, err := Load(newMemory(t, 16<<20), k, Options{}); !errors.Is(err, ErrKernelTooLarge) {
		t.Errorf("in 16 MiB: %v", err)
	}
}

// TestRealKernelTruncated cuts the pinned kernel at places all over it.
func TestRealKernelTruncated(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile(realKernel(t))
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; n < len(b); n += 1 + n/3 {
		if _, err := Parse(bytes.NewReader(b[:n]), int64(n)); !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrNotKernel) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func openReal(b *testing.B) *Kernel {
	b.Helper()
	k, err := Open(realKernel(b))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = k.Close() })
	b.ReportAllocs()
	return k
}

func BenchmarkOpen(b *testing.B) {
	path := realKernel(b)
	b.ReportAllocs()
	for b.Loop() {
		k, err := Open(path)
		if err != nil {
			b.Fatal(err)
		}
		_ = k.Close()
	}
}

func BenchmarkUnpack(b *testing.B) {
	k := openReal(b)
	b.SetBytes(k.UnpackedSize())
	for b.Loop() {
		if err := k.Unpack(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLoad measures Load into fresh memory with a 32 MiB initrd and without.
func BenchmarkLoad(b *testing.B) {
	for _, initrd := range []int64{0, 32 << 20} {
		b.Run(fmt.Sprintf("packed/initrd=%dMiB", initrd>>20), func(b *testing.B) { benchLoad(b, openReal(b), initrd) })
		b.Run(fmt.Sprintf("unpacked/initrd=%dMiB", initrd>>20), func(b *testing.B) {
			k := openReal(b)
			f, err := os.Create(filepath.Join(b.TempDir(), "vmlinux"))
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			start := time.Now()
			if err := k.Unpack(f); err != nil {
				b.Fatal(err)
			}
			b.Logf("unpacked to a file in %v", time.Since(start).Round(time.Millisecond))
			if err := k.SetUnpacked(f, k.UnpackedSize()); err != nil {
				b.Fatal(err)
			}
			benchLoad(b, k, initrd)
		})
	}
}

func benchLoad(b *testing.B, k *Kernel, initrd int64) {
	o := Options{Cmdline: "console=ttyS0 quiet"}
	if initrd > 0 {
		f, err := os.Create(filepath.Join(b.TempDir(), "initrd"))
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		if _, err := f.Write(make([]byte, initrd)); err != nil {
			b.Fatal(err)
		}
		o.Initrd = []Blob{io.NewSectionReader(f, 0, initrd)}
	}
	for b.Loop() {
		b.StopTimer()
		mem, err := memory.New(512 << 20)
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if _, err := Load(mem, k, o); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := mem.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
