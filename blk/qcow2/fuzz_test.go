package qcow2

import (
	"context"
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// small returns a small image with something of everything in it.
func small(t testing.TB, o CreateOptions) []byte {
	t.Helper()
	m := &memory{}
	mustCreate(t, device(t, m), o)
	im := mustOpen(t, device(t, m), Options{NoBacking: true})
	im.h.backing = "" // as if there were none
	c := im.cluster
	writeAt(t, im, 0, fill(1, 3*c))
	writeAt(t, im, 5*c, fill(2, c/2))
	if err := im.WriteCompressed(iov.Of(fill(3, c)), 8*c); err != nil {
		t.Fatal(err)
	}
	if o.RefcountBits != 1 {
		if _, err := im.WriteStateAt(iov.Of(fill(9, c)), 0); err != nil {
			t.Fatal(err)
		}
		if err := im.CreateSnapshot("a", c, time.Second); err != nil {
			t.Fatal(err)
		}
	}
	writeAt(t, im, c, fill(4, c))
	if o.Compat != Compat010 {
		if err := im.WriteZeroes(2*c, c, false); err != nil && err != blk.ErrUnsupported {
			t.Fatal(err)
		}
	}
	mustClose(t, im)
	return m.b
}

// rooms are buffers that the files of hostile images grow in: there are very many.
var rooms = sync.Pool{New: func() any { b := make([]byte, 0, 4<<20); return &b }}

// hostile does everything to an image that it can, and expects errors at most.
func hostile(t *testing.T, b []byte) {
	room := rooms.Get().(*[]byte)
	defer rooms.Put(room)
	m := &memory{b: append((*room)[:0], b...), limit: int64(len(b)) + 8<<20}
	backing := func(string, string) (*blk.Device, error) { return device(t, &memory{b: make([]byte, 8192)}), nil }
	for _, o := range []Options{
		{ReadOnly: true, Backing: backing}, {Backing: backing, L2Cache: 1, RefcountCache: 1}, {Repair: true, NoBacking: true},
		{Backing: backing},
	} {
		im, err := Open(device(t, m), o)
		if err != nil {
			continue
		}
		if o.Repair {
			_, _ = Check(context.Background(), im, RepairLeaks)
			r, err := Check(context.Background(), im, RepairAll)
			if err == nil && r.Clean() {
				if again, err := Check(context.Background(), im, RepairNone); err != nil || !again.Clean() || again.Leaks > 0 {
					t.Errorf("repaired:\n%+v\nand checked again:\n%+v, %v", r, again, err)
				}
			}
			_ = im.Close()
			continue
		}
		size := im.Size()
		c := im.cluster
		p := make([]byte, min(2*c, 128<<10))
		for _, off := range []int64{0, c, 5 * c, 8 * c, size / 2, size - int64(len(p))} {
			if off < 0 || size-off < int64(len(p)) {
				continue
			}
			n := int64(len(p))
			_, _ = im.ReadVecAt(iov.Of(p), off)
			_, _, _ = im.BlockStatus(off, min(size-off, 1<<20))
			if o.ReadOnly {
				continue
			}
			_, _ = im.WriteVecAt(iov.Of(p[:n/2+1]), off)
			_ = im.WriteZeroes(off, n, true)
			_ = im.Discard(off, n)
			if off%c == 0 {
				_ = im.WriteCompressed(iov.Of(p[:min(c, n)]), off)
			}
			_ = im.Flush()
		}
		_, _ = im.ReadStateAt(iov.Of(p), 0)
		_, _ = Check(context.Background(), im, RepairNone)
		if !o.ReadOnly {
			_, _ = im.WriteStateAt(iov.Of(p), 0)
			_ = im.CreateSnapshot("x", 1, 0)
			for _, s := range im.Snapshots() {
				_ = im.ApplySnapshot(s.ID)
			}
			_ = im.DeleteSnapshot("x")
			_ = im.DeleteSnapshot("a")
			if size < 1<<40 {
				_ = im.Truncate(size + 1<<20)
				_ = im.Truncate(size / 2 &^ 511)
			}
		}
		_ = im.Info()
		_ = im.Close()
	}
}

func seeds(t testing.TB) [][]byte {
	var all [][]byte
	for _, o := range []CreateOptions{
		{Size: 64 << 10, ClusterSize: 512},
		{Size: 64 << 10, ClusterSize: 512, Compat: Compat010},
		{Size: 64 << 10, ClusterSize: 512, RefcountBits: 64, Compression: Zstd},
		{Size: 64 << 10, ClusterSize: 1024, RefcountBits: 1, LazyRefcounts: true},
		{Size: 128 << 10, ClusterSize: 4096, RefcountBits: 4, BackingFile: "b", BackingFormat: "raw"},
	} {
		all = append(all, small(t, o))
	}
	return all
}

// FuzzOpen opens whatever the fuzzer makes of real images.
func FuzzOpen(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) { hostile(t, b) })
}

// FuzzField changes one 64-bit number of a real image, which gets further than changing the file at random.
func FuzzField(f *testing.F) {
	images := seeds(f)
	for i := range images {
		f.Add(uint8(i), uint16(40), uint64(1<<63|512))
		f.Add(uint8(i), uint16(48), uint64(1024))
	}
	f.Fuzz(func(t *testing.T, i uint8, at uint16, v uint64) {
		b := append([]byte(nil), images[int(i)%len(images)]...)
		binary.BigEndian.PutUint64(b[int(at)%(len(b)-8):], v)
		hostile(t, b)
	})
}

// TestEveryField puts bad numbers in place of each number of the metadata, another one for each; fuzzing finds more.
func TestEveryField(t *testing.T) {
	t.Parallel()
	step := 8
	if hosttest.Race {
		step = 64
	}
	values := []uint64{1<<63 | 512, 1<<62 | 1<<61, 1<<63 | 0x600, 1<<56 - 512, ^uint64(0), 1<<63 | 1024 | 1}
	for k, image := range seeds(t)[:4] {
		for at := 0; at < min(len(image)-8, 24<<10); at += step {
			if binary.BigEndian.Uint64(image[at:]) == 0 && at > 128 {
				continue
			}
			k++
			b := append([]byte(nil), image...)
			binary.BigEndian.PutUint64(b[at:], values[k%len(values)])
			hostile(t, b)
		}
	}
}
