package disk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/blk/qcow2"
	"github.com/kvmlet/kvmlet/iov"
)

// chain makes a chain of three layers with random contents in dir, and returns the path of its top.
func chain(t testing.TB, dir string, r *rand.Rand) string {
	t.Helper()
	at := func(name string) string { return filepath.Join(dir, name) }
	create(t, CreateSpec{Path: at("base"), Size: 3 << 20})
	create(t, CreateSpec{Path: at("middle"), Format: QCOW2, Size: 2 << 20, ClusterSize: 4096, BackingFile: "base", BackingFormat: Raw})
	create(t, CreateSpec{Path: at("top"), Format: QCOW2, Size: 4 << 20, BackingFile: "middle", BackingFormat: QCOW2})
	for name, format := range map[string]Format{"base": Raw, "middle": QCOW2, "top": QCOW2} {
		d := open(t, Spec{Path: at(name), Format: format, Backing: BackingOn})
		scribble(t, d, r, 12)
		must(t, d.Close())
	}
	return at("top")
}

// TestCopy copies chains into every kind of target, and lets QEMU compare.
func TestCopy(t *testing.T) {
	leaks(t)
	for seed := range uint64(4) {
		r := rand.New(rand.NewPCG(seed, 1))
		dir := t.TempDir()
		top := chain(t, dir, r)
		src, layers, err := OpenChain(t.Context(), Spec{Path: top, Format: QCOW2, Backing: BackingOn, ReadOnly: true})
		must(t, err)
		want := contents(t, src)
		made := make(map[string]Format)
		for name, c := range map[string]struct {
			c CreateSpec
			o CopyOptions
		}{
			"raw":           {CreateSpec{}, CopyOptions{TargetZero: true}},
			"raw, one":      {CreateSpec{}, CopyOptions{Workers: 1}},
			"raw, all":      {CreateSpec{}, CopyOptions{Sparse: -1}},
			"raw, coarse":   {CreateSpec{}, CopyOptions{TargetZero: true, Sparse: 64 << 10}},
			"qcow2":         {CreateSpec{Format: QCOW2}, CopyOptions{TargetZero: true}},
			"qcow2, unsaid": {CreateSpec{Format: QCOW2, ClusterSize: 512}, CopyOptions{}},
			"compressed":    {CreateSpec{Format: QCOW2}, CopyOptions{TargetZero: true, Compress: true}},
			"zstd":          {CreateSpec{Format: QCOW2, Compression: qcow2.Zstd, ClusterSize: 2 << 20}, CopyOptions{Compress: true, Sparse: -1}},
			"backed":        {CreateSpec{Format: QCOW2, BackingFile: "middle", BackingFormat: QCOW2}, CopyOptions{Base: layers[1].Device}},
			"backed deep":   {CreateSpec{Format: QCOW2, BackingFile: "base", BackingFormat: Raw}, CopyOptions{Base: layers[2].Device}},
			"backed, packed": {
				CreateSpec{Format: QCOW2, BackingFile: "middle", BackingFormat: QCOW2, ClusterSize: 128 << 10},
				CopyOptions{Base: layers[1].Device, Compress: true},
			},
		} {
			c.c.Path, c.c.Size = filepath.Join(dir, name), src.Size()
			if c.c.Format == "" {
				c.c.Format = Raw
			}
			create(t, c.c)
			dst := open(t, Spec{Path: c.c.Path, Format: c.c.Format, Backing: BackingOn})
			var done atomic.Int64
			c.o.Progress = func(n, total int64) {
				if n > total {
					t.Errorf("%s: %d of %d bytes are done", name, n, total)
				}
				for old := done.Load(); n > old && !done.CompareAndSwap(old, n); old = done.Load() {
				}
			}
			must(t, Copy(t.Context(), dst, src, c.o))
			if done.Load() != src.Size() {
				t.Errorf("%s: in the end %d of %d bytes are done", name, done.Load(), src.Size())
			}
			if !bytes.Equal(contents(t, dst), want) {
				t.Errorf("seed %d, %s: the copy is another", seed, name)
			}
			must(t, dst.Close())
			made[c.c.Path] = c.c.Format
		}
		must(t, src.Close())
		for path, format := range made { // now that nobody holds a lock
			qemuOK(t, "qemu-img", "compare", "-f", "qcow2", "-F", string(format), top, path)
			if format == QCOW2 {
				qemuOK(t, "qemu-img", "check", path)
			}
		}
	}
}

// TestCopyLeavesOut wants a copy over the source's own backing file to be as small as the source.
func TestCopyLeavesOut(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	create(t, CreateSpec{Path: at("base"), Size: 8 << 20, Preallocation: PreallocateFull})
	create(t, CreateSpec{Path: at("top"), Format: QCOW2, BackingFile: "base", BackingFormat: Raw})
	create(t, CreateSpec{Path: at("copy"), Format: QCOW2, BackingFile: "base", BackingFormat: Raw})
	d := open(t, Spec{Path: at("top"), Format: QCOW2, Backing: BackingOn})
	write(t, d, 1<<20, pattern(128<<10, 1))
	must(t, d.Close())
	src, layers, err := OpenChain(t.Context(), Spec{Path: at("top"), Format: QCOW2, Backing: BackingOn, ReadOnly: true})
	must(t, err)
	dst := open(t, Spec{Path: at("copy"), Format: QCOW2, Backing: BackingOn})
	must(t, Copy(t.Context(), dst, src, CopyOptions{Base: layers[1].Device}))
	must(t, errors.Join(dst.Close(), src.Close()))
	r, err := Check(t.Context(), Spec{Path: at("copy"), Format: QCOW2}, qcow2.RepairNone)
	if err != nil || r.Allocated != 2 {
		t.Errorf("%d clusters are copied, want 2 (%v)", r.Allocated, err)
	}
}

// TestCopyErrors breaks a copy off.
func TestCopyErrors(t *testing.T) {
	leaks(t)
	small, large := memory(t, 1<<20), memory(t, 2<<20)
	if err := Copy(t.Context(), small, large, CopyOptions{}); !errors.Is(err, blk.ErrRange) {
		t.Errorf("into a smaller disk: %v", err)
	}
	dir := t.TempDir()
	file := open(t, Spec{Path: create(t, CreateSpec{Path: filepath.Join(dir, "raw"), Size: 2 << 20})})
	if err := Copy(t.Context(), file, large, CopyOptions{Compress: true}); !errors.Is(err, blk.ErrUnsupported) {
		t.Errorf("compressed into a raw file: %v", err)
	}
	write(t, large, 0, pattern(2<<20, 1))
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("it is late")
	err := Copy(ctx, file, large, CopyOptions{Workers: 1, Progress: func(int64, int64) { cancel(stop) }})
	if !errors.Is(err, stop) {
		t.Errorf("cancelled: %v", err)
	}
	ro, err := Open(t.Context(), Spec{Path: create(t, CreateSpec{Path: filepath.Join(dir, "ro"), Size: 2 << 20}), ReadOnly: true})
	must(t, err)
	if err := Copy(t.Context(), ro, large, CopyOptions{}); !errors.Is(err, blk.ErrReadOnly) {
		t.Errorf("into a read-only disk: %v", err)
	}
	must(t, errors.Join(ro.Close(), file.Close(), small.Close(), large.Close()))
}

func memory(t testing.TB, size int64) *blk.Device {
	t.Helper()
	m, err := mem.New(size, mem.Options{})
	must(t, err)
	d, err := blk.New(m, blk.Options{})
	must(t, err)
	return d
}

// TestCompare finds the first of several differences, wherever they are.
func TestCompare(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sizes  [2]int64
		change []int64 // bytes of the second disk that differ
		strict bool
		what   Difference
		at     int64
	}{
		"empty":             {sizes: [2]int64{4 << 20, 4 << 20}},
		"first byte":        {sizes: [2]int64{4 << 20, 4 << 20}, change: []int64{0, 5, 4<<20 - 1}, what: Contents},
		"last byte":         {sizes: [2]int64{4 << 20, 4 << 20}, change: []int64{4<<20 - 1}, what: Contents, at: 4<<20 - 1},
		"two":               {sizes: [2]int64{4 << 20, 4 << 20}, change: []int64{3 << 20, 1<<20 + 77}, what: Contents, at: 1<<20 + 77},
		"longer, zero":      {sizes: [2]int64{1 << 20, 4 << 20}},
		"longer, not zero":  {sizes: [2]int64{1 << 20, 4 << 20}, change: []int64{3 << 20}, what: Contents, at: 3 << 20},
		"shorter":           {sizes: [2]int64{4 << 20, 512}},
		"strict":            {sizes: [2]int64{4 << 20, 4 << 20}, strict: true},
		"strict, longer":    {sizes: [2]int64{1 << 20, 4 << 20}, strict: true, what: Sizes, at: 1 << 20},
		"strict, allocated": {sizes: [2]int64{4 << 20, 4 << 20}, change: []int64{2 << 20}, strict: true, what: Allocation, at: 2 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := memory(t, c.sizes[0]), memory(t, c.sizes[1])
			for _, off := range c.change {
				write(t, b, off, []byte{1})
			}
			what, at, err := Compare(t.Context(), a, b, CompareOptions{Strict: c.strict})
			must(t, err)
			if what != c.what || at != c.at {
				t.Errorf("difference %d at %d, want %d at %d", what, at, c.what, c.at)
			}
			what2, at2, err := Compare(t.Context(), b, a, CompareOptions{Strict: c.strict, Workers: 1})
			must(t, err)
			if what2 != what || at2 != at {
				t.Errorf("the other way round: difference %d at %d, not %d at %d", what2, at2, what, at)
			}
			must(t, errors.Join(a.Close(), b.Close()))
		})
	}
}

// TestCompareErrors breaks a comparison off.
func TestCompareErrors(t *testing.T) {
	t.Parallel()
	a, b := memory(t, 4<<20), memory(t, 4<<20)
	write(t, a, 0, pattern(4<<20, 1))
	write(t, b, 0, pattern(4<<20, 1))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := Compare(ctx, a, b, CompareOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	must(t, b.Close())
	if _, _, err := Compare(t.Context(), a, b, CompareOptions{}); !errors.Is(err, blk.ErrClosed) {
		t.Errorf("a disk that is closed: %v", err)
	}
	must(t, a.Close())
}

// TestExtents compares Extents with qemu-img map, byte for byte.
func TestExtents(t *testing.T) {
	leaks(t)
	for seed := range uint64(6) {
		dir := t.TempDir()
		top := chain(t, dir, rand.New(rand.NewPCG(seed, 2)))
		var theirs []Extent
		must(t, json.Unmarshal([]byte(qemuOK(t, "qemu-img", "map", "--output=json", "-f", "qcow2", top)), &theirs))
		d := open(t, Spec{Path: top, Format: QCOW2, Backing: BackingOn, ReadOnly: true})
		var ours []Extent
		must(t, Extents(t.Context(), d, func(e Extent) error {
			ours = append(ours, e)
			return nil
		}))
		a, b := flatten(ours, d.Size()), flatten(theirs, d.Size())
		for i := range a {
			if a[i] != b[i] {
				t.Errorf("seed %d: sector %d is %s, QEMU says %s", seed, i, a[i], b[i])
				break
			}
		}
		for i, e := range ours[1:] {
			if ours[i].goesOn(e) || e.Start != ours[i].Start+ours[i].Length {
				t.Errorf("%+v and %+v follow each other", ours[i], e)
			}
		}
		stop := errors.New("enough")
		if err := Extents(t.Context(), d, func(Extent) error { return stop }); !errors.Is(err, stop) {
			t.Error(err)
		}
		must(t, d.Close())
	}
}

// flatten spells extents out, a text for each sector. Where data of an image lies in a hole of its file, QEMU says so, and
// where zeroes that are not stored have their place; both are left out.
func flatten(list []Extent, size int64) []string {
	out := make([]string, size/512)
	for _, e := range list {
		for off := e.Start; off < e.Start+e.Length; off += 512 {
			at := int64(-1)
			if e.Offset != nil && e.Data {
				at = *e.Offset + off - e.Start
			}
			out[off/512] = fmt.Sprintf("depth %d, present %t, data %t, zero %t, at %d", e.Depth, e.Present, e.Data, e.Zero && !e.Data, at)
		}
	}
	return out
}

func BenchmarkCopy(b *testing.B) {
	src, dst := memory(b, 64<<20), memory(b, 64<<20)
	if _, err := src.WriteVecAt(iov.Of(pattern(64<<20, 1)), 0); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(64 << 20)
	for b.Loop() {
		if err := Copy(b.Context(), dst, src, CopyOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}
