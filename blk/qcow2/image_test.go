package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// TestRefused: what can't be opened says why, and no worse.
func TestRefused(t *testing.T) {
	t.Parallel()
	m := &memory{}
	mustCreate(t, device(t, m), CreateOptions{Size: 1 << 20, BackingFile: "base.img", BackingFormat: "raw"})
	put := func(at int, n int, v uint64) []byte {
		b := append([]byte(nil), m.b...)
		var e [8]byte
		binary.BigEndian.PutUint64(e[:], v)
		copy(b[at:], e[8-n:])
		return b
	}
	allow := func(string, string) (*blk.Device, error) { return device(t, &memory{b: make([]byte, 512)}), nil }
	for name, c := range map[string]struct {
		b    []byte
		o    Options
		err  error
		text string
	}{
		"raw file":           {make([]byte, 4096), Options{}, ErrFormat, "does not begin"},
		"empty":              {nil, Options{}, ErrFormat, ""},
		"version 4":          {put(4, 4, 4), Options{}, ErrFeature, "version 4"},
		"backing":            {m.b, Options{}, ErrBacking, `"base.img" with format "raw" (allow it`},
		"backing name":       {put(16, 4, 1024), Options{}, ErrFormat, "1024 bytes"},
		"backing elsewhere":  {put(8, 8, 1<<40), Options{}, ErrFormat, "backing"},
		"clusters of 4 MiB":  {put(20, 4, 22), Options{}, ErrFormat, "2^22"},
		"size":               {put(24, 8, 1<<62), Options{Backing: allow}, ErrFormat, "L1 table of"},
		"encrypted":          {put(32, 4, 1), Options{}, ErrFeature, "encrypted"},
		"huge L1":            {put(36, 4, 1<<31), Options{Backing: allow}, ErrFormat, "L1 table of"},
		"L1 beyond the end":  {put(40, 8, 1<<40), Options{Backing: allow}, ErrFormat, "L1 table at"},
		"L1 not aligned":     {put(40, 8, 513), Options{Backing: allow}, ErrFormat, "L1 table at"},
		"refcount table":     {put(56, 4, 1<<20), Options{Backing: allow}, ErrFormat, "refcount table of"},
		"no refcount table":  {put(56, 4, 0), Options{Backing: allow}, ErrFormat, "refcount table of"},
		"snapshots":          {put(60, 4, 1<<20), Options{Backing: allow}, ErrFormat, "snapshots"},
		"data file":          {put(72, 8, 1<<2), Options{}, ErrFeature, "incompatible bit 2"},
		"extended L2":        {put(72, 8, 1<<4), Options{}, ErrFeature, "incompatible bit 4"},
		"unknown bit":        {put(72, 8, 1<<40), Options{}, ErrFeature, "bit 40"},
		"corrupt":            {put(72, 8, 1<<1), Options{Backing: allow}, ErrCorrupt, "--repair=all"},
		"refcount order":     {put(96, 4, 7), Options{}, ErrFormat, "2^7 bits"},
		"header length":      {put(100, 4, 1<<20), Options{}, ErrFormat, "header of"},
		"compression":        {put(104, 1, 1), Options{}, ErrFormat, "compression"},
		"compression type 2": {append(put(72, 8, 1<<3)[:104], append([]byte{2}, m.b[105:]...)...), Options{}, ErrFeature, "type 2"},
	} {
		im, err := Open(device(t, &memory{b: c.b}), c.o)
		if err == nil {
			_ = im.Close()
		}
		if !errors.Is(err, c.err) || !strings.Contains(fmt.Sprint(err), c.text) {
			t.Errorf("%s: %v, want %v ... %q", name, err, c.err, c.text)
		}
	}
	// The names of the image's own table are used.
	b := put(72, 8, 1<<40)
	i := strings.Index(string(b), "extended L2 entries")
	copy(b[i:], "frobnicated entries")
	b[i-1] = 40
	if _, err := Open(device(t, &memory{b: b}), Options{}); !strings.Contains(fmt.Sprint(err), `"frobnicated entries"`) {
		t.Errorf("unknown feature with a name: %v", err)
	}
	failing := func(string, string) (*blk.Device, error) { return nil, ErrBackingLoop }
	if _, err := Open(device(t, m), Options{Backing: failing}); !errors.Is(err, ErrBackingLoop) {
		t.Errorf("backing file that can't be opened: %v", err)
	}
	im := mustOpen(t, device(t, m), Options{NoBacking: true})
	if _, err := im.ReadVecAt(iov.Of(make([]byte, 512)), 0); !errors.Is(err, ErrBacking) {
		t.Errorf("read without the backing file: %v", err)
	}
}

func TestCreateRefused(t *testing.T) {
	t.Parallel()
	for text, o := range map[string]CreateOptions{
		"multiple of 512":     {Size: 513},
		"clusters of 300":     {Size: 512, ClusterSize: 300},
		"refcounts of 3 bits": {Size: 512, RefcountBits: 3},
		"compat 0.10":         {Size: 512, Compat: Compat010, LazyRefcounts: true},
		"compat \"2\"":        {Size: 512, Compat: "2"},
		"extended L2":         {Size: 512, ExtendedL2: true},
		"data file":           {Size: 512, DataFile: "x"},
		"larger clusters":     {Size: 1 << 40, ClusterSize: 512},
		"backing format":      {Size: 512, BackingFormat: "raw"},
		"does not fit":        {Size: 512, ClusterSize: 512, BackingFile: strings.Repeat("x", 500)},
		"1024 bytes":          {Size: 512, BackingFile: strings.Repeat("x", 1024)},
	} {
		if err := Create(t.Context(), device(t, &memory{}), o); !strings.Contains(fmt.Sprint(err), text) {
			t.Errorf("%+v: %v, want %q", o, err, text)
		}
	}
}

// TestInfoOfQEMU: the header of an image that QEMU made.
func TestInfoOfQEMU(t *testing.T) {
	t.Parallel()
	needQEMU(t)
	path := filepath.Join(t.TempDir(), "image")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "some/base", "-F", "qcow2", "-o",
		"cluster_size=4096,lazy_refcounts=on,refcount_bits=8,compression_type=zstd", path, "1G")
	im := mustOpen(t, onDisk(t, path), Options{NoBacking: true, ReadOnly: true})
	want := Info{Size: 1 << 30, ClusterSize: 4096, Compat: Compat11, RefcountBits: 8, Compression: "zstd", LazyRefcounts: true,
		BackingFile: "some/base", BackingFormat: "qcow2"}
	got := im.Info()
	got.FileLength = 0
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("info:\n%+v, want\n%+v", got, want)
	}
}

// TestUnknownParts: header fields, extensions and compatible bits that nobody knows stay; autoclear bits go with the
// first write, and not before.
func TestUnknownParts(t *testing.T) {
	t.Parallel()
	m := &memory{}
	mustCreate(t, device(t, m), CreateOptions{Size: 1 << 20})
	be := binary.BigEndian
	old := append([]byte(nil), m.b[112:4096]...)
	be.PutUint32(m.b[100:], 120) // a field of 8 bytes that is not known
	be.PutUint64(m.b[112:], 0x1122334455667788)
	copy(m.b[120:], []byte{0xab, 0xcd, 0, 1, 0, 0, 0, 3, 'x', 'y', 'z', 0, 0, 0, 0, 0})
	copy(m.b[136:4096], old)
	be.PutUint64(m.b[80:], 1<<33)      // compatible
	be.PutUint64(m.b[88:], 1<<40|1<<0) // autoclear
	before := append([]byte(nil), m.b[:4096]...)
	im := mustOpen(t, device(t, m), Options{})
	readAt(t, im, 0, 1<<20)
	if !im.Info().Bitmaps || string(before) != string(m.b[:4096]) {
		t.Error("the header changed without a write")
	}
	writeAt(t, im, 0, fill(1, 512))
	if err := im.Truncate(2 << 20); err != nil {
		t.Fatal(err)
	}
	if err := im.CreateSnapshot("a", 0, 0); err != nil {
		t.Fatal(err)
	}
	mustClose(t, im)
	if string(before[104:]) != string(m.b[104:4096]) || be.Uint64(m.b[80:]) != 1<<33 || be.Uint64(m.b[88:]) != 0 {
		t.Errorf("header: compatible %#x, autoclear %#x", be.Uint64(m.b[80:]), be.Uint64(m.b[88:]))
	}
}

// TestLazy: the dirty bit is there as long as the image is open, and repaired where it was not closed.
func TestLazy(t *testing.T) {
	t.Parallel()
	needQEMU(t)
	m := &memory{}
	mustCreate(t, device(t, m), CreateOptions{Size: 4 << 20, LazyRefcounts: true})
	im := mustOpen(t, device(t, m), Options{})
	if im.Info().Dirty {
		t.Error("dirty before the first write")
	}
	want := fill(1, 1<<20)
	writeAt(t, im, 512, want)
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	if !im.Info().Dirty {
		t.Error("not dirty after a write")
	}
	killed := append([]byte(nil), m.b...)
	mustClose(t, im)
	if m.b[79]&1 != 0 {
		t.Error("dirty after it was closed")
	}
	path := filepath.Join(t.TempDir(), "image")
	writeFile(t, path, m.b)
	qemuCheck(t, path)
	writeFile(t, path, killed)
	if out, err := tryQEMU(t, "qemu-img", "check", path); err == nil {
		t.Errorf("QEMU finds nothing wrong with refcounts that were never written:\n%s", out)
	}
	im = mustOpen(t, onDisk(t, path), Options{})
	wantClean(t, im)
	wantBytes(t, "read", readAt(t, im, 512, 1<<20), want)
	mustClose(t, im)
	qemuCheck(t, path)
	// Off overrides what the image says.
	im = mustOpen(t, onDisk(t, path), Options{LazyRefcounts: Off})
	writeAt(t, im, 2<<20, fill(1, 4096))
	if im.Info().Dirty {
		t.Error("dirty with lazy refcounts off")
	}
}

// TestOverlap: an image whose refcounts say that metadata is free, or whose L2 tables map it, is not written over.
func TestOverlap(t *testing.T) {
	t.Parallel()
	make4k := func() *memory {
		m := &memory{}
		mustCreate(t, device(t, m), CreateOptions{Size: 1 << 20, ClusterSize: 4096})
		im := mustOpen(t, device(t, m), Options{})
		writeAt(t, im, 0, fill(1, 8192))
		mustClose(t, im)
		return m
	}
	m := make4k()
	im := mustOpen(t, device(t, m), Options{Repair: true})
	rb, l1 := int64(im.refs.table[0]), int64(im.h.l1Off)
	l2 := int64(im.l1[0] & entryOffset)
	t.Run("refcounts", func(t *testing.T) {
		m := make4k()
		clear(m.b[rb : rb+4096])
		im := mustOpen(t, device(t, m), Options{})
		before := append([]byte(nil), m.b[4096:]...)
		if _, err := im.WriteVecAt(iov.Of(fill(2, 4096)), 65536); !errors.Is(err, ErrCorrupt) {
			t.Errorf("write: %v", err)
		}
		if _, err := im.WriteVecAt(iov.Of(fill(2, 4096)), 0); !errors.Is(err, ErrCorrupt) {
			t.Errorf("write to an image that is known to be corrupt: %v", err)
		}
		if string(m.b[4096:4096+len(before)]) != string(before) || m.b[79]&incompatCorrupt == 0 {
			t.Error("something was changed besides the corrupt bit")
		}
		_ = im.Close()
		repaired := mustOpen(t, device(t, m), Options{Repair: true})
		r, err := Check(context.Background(), repaired, RepairAll)
		if err != nil || r.Corruptions == 0 || !r.Clean() {
			t.Fatalf("repair: %+v, %v", r, err)
		}
		wantClean(t, repaired)
		mustClose(t, repaired)
		im = mustOpen(t, device(t, m), Options{})
		wantBytes(t, "read", readAt(t, im, 0, 8192), fill(1, 8192))
	})
	for name, at := range map[string]int64{"header": 0x0, "L1": l1, "refcount block": rb, "L2": l2} {
		t.Run(name, func(t *testing.T) {
			m := make4k()
			binary.BigEndian.PutUint64(m.b[l2:], uint64(at)|entryCopied)
			im := mustOpen(t, device(t, m), Options{})
			_, err := im.WriteVecAt(iov.Of(fill(2, 4096)), 0)
			if at == 0 {
				if err != nil { // an offset of 0 means that there is none
					t.Error(err)
				}
			} else if !errors.Is(err, ErrCorrupt) {
				t.Errorf("write: %v", err)
			}
		})
	}
}

// TestCloseOfCorrupt: an image that is found to be corrupt says on Close what becomes of writes that were acknowledged.
func TestCloseOfCorrupt(t *testing.T) {
	t.Parallel()
	for _, pending := range []bool{false, true} {
		m := &memory{}
		mustCreate(t, device(t, m), CreateOptions{Size: 1 << 20, ClusterSize: 4096})
		im := mustOpen(t, device(t, m), Options{})
		writeAt(t, im, 0, fill(1, 8192))
		l1, l2 := im.h.l1Off, int64(im.l1[0]&entryOffset)
		mustClose(t, im)
		binary.BigEndian.PutUint64(m.b[l2:], l1|entryCopied)
		im = mustOpen(t, device(t, m), Options{})
		if pending {
			writeAt(t, im, 512<<10, fill(3, 4096))
		}
		if _, err := im.WriteVecAt(iov.Of(fill(2, 4096)), 0); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("write over metadata: %v", err)
		}
		if err := im.Close(); errors.Is(err, ErrCorrupt) != pending {
			t.Errorf("pending writes %v: close: %v", pending, err)
		}
	}
}

// TestCheckLikeQEMU breaks images and counts what is wrong beside qemu-img check, before and after repairs.
func TestCheckLikeQEMU(t *testing.T) {
	t.Parallel()
	needQEMU(t)
	m := &memory{}
	mustCreate(t, device(t, m), CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	im := mustOpen(t, device(t, m), Options{})
	writeAt(t, im, 0, fill(1, 64<<10))
	mustClose(t, im)
	im = mustOpen(t, device(t, m), Options{Repair: true})
	rb, rt, l2 := int64(im.refs.table[0]), int64(im.h.rtOff), int64(im.l1[0]&entryOffset)
	l1 := int64(im.h.l1Off)
	be := binary.BigEndian
	for name, spoil := range map[string]func(b []byte){
		"nothing":           func([]byte) {},
		"leak":              func(b []byte) { be.PutUint16(b[rb+2*60:], 1) },
		"two leaks":         func(b []byte) { be.PutUint16(b[rb+2*60:], 1); be.PutUint16(b[rb+2*61:], 3) },
		"refcount too low":  func(b []byte) { be.PutUint16(b[rb+2*10:], 0) },
		"no refcount block": func(b []byte) { be.PutUint64(b[rt:], 0) },
		"copied flag":       func(b []byte) { b[l2] &^= 0x80 },
		"L1 copied flag":    func(b []byte) { b[l1] &^= 0x80 },
		"shared cluster":    func(b []byte) { copy(b[l2+8:l2+16], b[l2:l2+8]) },
	} {
		t.Run(name, func(t *testing.T) {
			b := append(append([]byte(nil), m.b...), make([]byte, 256<<10)...) // QEMU looks no further than the end
			spoil(b)
			path := filepath.Join(t.TempDir(), "image")
			writeFile(t, path, b)
			out, _ := tryQEMU(t, "qemu-img", "check", "--output=json", path)
			number := func(key string) int64 {
				var n int64
				if i := strings.Index(out, `"`+key+`": `); i >= 0 {
					_, _ = fmt.Sscan(strings.TrimRight(strings.Fields(out[i+len(key)+4:])[0], ","), &n)
				}
				return n
			}
			im := mustOpen(t, onDisk(t, path), Options{Repair: true})
			r, err := Check(context.Background(), im, RepairNone)
			if err != nil {
				t.Fatal(err)
			}
			if r.Leaks != number("leaks") || (r.Corruptions > 0) != (number("corruptions") > 0) ||
				r.Allocated != number("allocated-clusters") || r.Total != number("total-clusters") {
				t.Errorf("ours: %+v\nQEMU's: %s", r, out)
			}
			if r.Leaks > 0 && r.Corruptions == 0 {
				if r, err := Check(context.Background(), im, RepairLeaks); err != nil || !r.Clean() {
					t.Errorf("repair of leaks: %+v, %v", r, err)
				}
			} else if r, err := Check(context.Background(), im, RepairAll); err != nil || !r.Clean() {
				t.Errorf("repair of all: %+v, %v", r, err)
			}
			mustClose(t, im)
			qemuCheck(t, path)
			im = mustOpen(t, onDisk(t, path), Options{})
			wantBytes(t, "read", readAt(t, im, 0, 64<<10), fill(1, 64<<10))
			writeAt(t, im, 512, fill(5, 1<<19))
			mustClose(t, im)
			qemuCheck(t, path)
		})
	}
}

// TestParallelAllocations: a write that waits in the file keeps writes to the same cluster waiting, and no others.
func TestParallelAllocations(t *testing.T) {
	t.Parallel()
	m := &memory{}
	var first atomic.Bool
	stopped, goOn := make(chan struct{}), make(chan struct{})
	m.events = func(e blk.Event) {
		if e == "qcow2_write_data" && !first.Swap(true) {
			close(stopped)
			<-goOn
		}
	}
	mustCreate(t, device(t, m), CreateOptions{Size: 1 << 20})
	im := mustOpen(t, device(t, m), Options{})
	var all sync.WaitGroup
	all.Go(func() { writeAt(t, im, 0, fill(1, 4096)) })
	<-stopped
	same := make(chan struct{})
	all.Go(func() { defer close(same); writeAt(t, im, 8192, fill(2, 4096)) })
	writeAt(t, im, 65536, fill(3, 4096)) // another cluster
	readAt(t, im, 0, 1<<20)
	if err := im.Flush(); err != nil {
		t.Error(err)
	}
	select {
	case <-same:
		t.Error("a write overtook one that gives its cluster a place")
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	all.Wait()
	want := make([]byte, 1<<20)
	copy(want, fill(1, 4096))
	copy(want[8192:], fill(2, 4096))
	copy(want[65536:], fill(3, 4096))
	wantBytes(t, "read", readAt(t, im, 0, 1<<20), want)
	wantClean(t, im)
}

// TestReuse: what a discard frees is used again after a flush, and the file ends where its last cluster does.
func TestReuse(t *testing.T) {
	t.Parallel()
	m := &memory{}
	mustCreate(t, device(t, m), CreateOptions{Size: 16 << 20})
	im := mustOpen(t, device(t, m), Options{})
	for i := range 20 {
		writeAt(t, im, 0, fill(byte(i), 4<<20))
		if err := im.Discard(0, 4<<20); err != nil {
			t.Fatal(err)
		}
		if err := im.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	writeAt(t, im, 0, fill(1, 4<<20))
	mustClose(t, im)
	if n := len(m.b); n > 10<<20 {
		t.Errorf("the file has %d bytes for 4 MiB of data", n)
	}
	im = mustOpen(t, device(t, m), Options{})
	wantClean(t, im)
}

// TestNoSpace: a file that can't grow fails the write that needs it to, and nothing else.
func TestNoSpace(t *testing.T) {
	t.Parallel()
	m := &memory{}
	mustCreate(t, device(t, m), CreateOptions{Size: 16 << 20, ClusterSize: 4096})
	im := mustOpen(t, device(t, m), Options{})
	m.limit = 4 << 20
	var failed error
	off := int64(0)
	for ; off < 8<<20 && failed == nil; off += 4096 {
		_, failed = im.WriteVecAt(iov.Of(fill(1, 4096)), off)
	}
	if failed == nil || off < 1<<20 {
		t.Fatalf("the write at %d: %v", off, failed)
	}
	writeAt(t, im, 0, fill(2, 4096))
	wantClean(t, im)
	m.limit = 0
	writeAt(t, im, off, fill(3, 4096))
	wantClean(t, im)
	mustClose(t, im)
}

// TestCompressedInQEMU: what we compress QEMU unpacks, from one cluster packed with several and from those that
// straddle two.
func TestCompressedInQEMU(t *testing.T) {
	t.Parallel()
	needQEMU(t)
	for _, s := range []shape{
		{512, Compat11, 16, false, false}, {4096, Compat11, 16, false, true}, {65536, Compat11, 16, false, false},
		{65536, Compat11, 2, false, true}, {2 << 20, Compat11, 16, false, false},
	} {
		path := filepath.Join(t.TempDir(), "image")
		count := min(16, 6<<20/s.cluster)
		size := count * s.cluster
		d := onDisk(t, path)
		mustCreate(t, d, s.create(size))
		im := mustOpen(t, d, Options{})
		want := make([]byte, size)
		for i := range count {
			p := want[i*s.cluster : (i+1)*s.cluster]
			x := uint32(i)
			for k := range p {
				if x = x*1664525 + 1013904223; k%int(i+2) < 2 { // harder from one to the next
					p[k] = byte(x >> 24)
				} else if k >= 6000 {
					p[k] = p[k-6000] // a match that is farther than the window
				}
			}
			if err := im.WriteCompressed(iov.Of(p), i*s.cluster); err != nil {
				t.Fatal(err)
			}
		}
		wantBytes(t, "own read", readAt(t, im, 0, size), want)
		wantClean(t, im)
		mustClose(t, im)
		qemuCheck(t, path)
		wantBytes(t, s.String(), qemuRead(t, path), want)
	}
}

// gated is a file that holds back the next write to one offset.
type gated struct {
	memory
	off           atomic.Int64
	stopped, goOn chan struct{}
}

func (g *gated) WriteVecAt(src iov.Vec, off int64) (int, error) {
	if g.off.CompareAndSwap(off, -1) {
		close(g.stopped)
		<-g.goOn
	}
	return g.memory.WriteVecAt(src, off)
}

// TestFreedTooEarly: a cluster that a write under way still goes to is not given to somebody else.
func TestFreedTooEarly(t *testing.T) {
	t.Parallel()
	g := &gated{stopped: make(chan struct{}), goOn: make(chan struct{})}
	g.off.Store(-1)
	mustCreate(t, device(t, g), CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	im := mustOpen(t, device(t, g), Options{})
	writeAt(t, im, 0, fill(1, 4096))
	s, _, err := im.BlockStatus(0, 4096)
	if err != nil || s.Flags&blk.StatusOffset == 0 {
		t.Fatal(s, err)
	}
	g.off.Store(s.Offset)
	var late sync.WaitGroup
	late.Go(func() { writeAt(t, im, 0, fill(2, 4096)) })
	<-g.stopped
	if err := im.Discard(0, 4096); err != nil {
		t.Fatal(err)
	}
	for i := range int64(4) {
		if err := im.Flush(); err != nil {
			t.Fatal(err)
		}
		writeAt(t, im, 8192+i*4096, fill(3, 4096))
	}
	close(g.goOn)
	late.Wait()
	wantBytes(t, "others", readAt(t, im, 8192, 4*4096), fill(3, 4*4096))
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	writeAt(t, im, 128<<10, fill(4, 4096))
	if again, _, err := im.BlockStatus(128<<10, 4096); err != nil || again.Offset != s.Offset {
		t.Errorf("the cluster at %#x was not used again: %+v, %v", s.Offset, again, err)
	}
	wantClean(t, im)
}
