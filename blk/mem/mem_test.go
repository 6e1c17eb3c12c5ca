package mem_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/iov"
)

var _ interface {
	blk.Backend
	blk.Discarder
	blk.ZeroWriter
	blk.StatusReporter
	blk.FUAWriter
	blk.CompressedWriter
	blk.Truncater
	blk.Backed
	blk.StateStore
} = (*mem.Disk)(nil)

var _ blk.Starter = (*mem.Async)(nil)

func newDisk(t *testing.T, size int64, o mem.Options) *mem.Disk {
	t.Helper()
	d, err := mem.New(size, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func read(t *testing.T, d blk.Backend, off, n int64) []byte {
	t.Helper()
	b := bytes.Repeat([]byte{0xee}, int(n))
	got, err := d.ReadVecAt(iov.Of(b), off)
	if err != nil {
		t.Fatal(err)
	}
	return b[:got]
}

func write(t *testing.T, d blk.Backend, off int64, b []byte) {
	t.Helper()
	if n, err := d.WriteVecAt(iov.Of(b), off); err != nil || n != len(b) {
		t.Fatalf("write %d bytes at %d: %d, %v", len(b), off, n, err)
	}
}

func random(r *rand.Rand, n int64) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32()) | 1 // never zero
	}
	return b
}

// backing returns a Device with random bytes.
func backing(t *testing.T, r *rand.Rand, size int64) (*blk.Device, []byte) {
	t.Helper()
	b := random(r, size)
	d := newDisk(t, size, mem.Options{})
	if size > 0 {
		write(t, d, 0, b)
	}
	dev, err := blk.New(d, blk.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	return dev, b
}

// TestModel compares random operations with a plain array, with and without a backing disk, at several clusters.
func TestModel(t *testing.T) {
	const most = 1 << 18
	for _, cluster := range []int64{512, 4096, 65536, 1 << 20} {
		for _, overlay := range []int64{-1, 0, most / 2, most} {
			r := rand.New(rand.NewPCG(uint64(cluster), uint64(overlay)))
			size := int64(most * 3 / 4)
			model := make([]byte, size)
			o := mem.Options{Limits: blk.Limits{Cluster: cluster}, MaxSize: most}
			if overlay >= 0 {
				var below []byte
				o.Backing, below = backing(t, r, overlay)
				copy(model, below)
			}
			d := newDisk(t, size, o)
			for range 1500 {
				step(t, r, d, &model, most)
			}
			if got := read(t, d, 0, int64(len(model))); len(got) > 0 && !bytes.Equal(got, model) {
				t.Fatalf("cluster %d over %d bytes: contents differ", cluster, overlay)
			}
		}
	}
}

func step(t *testing.T, r *rand.Rand, d *mem.Disk, model *[]byte, most int64) {
	t.Helper()
	size := int64(len(*model))
	if size == 0 || r.IntN(50) == 0 {
		next := r.Int64N(most/512+1) * 512
		if err := d.Truncate(next); err != nil {
			t.Fatal(err)
		}
		*model = append(*model, make([]byte, max(next-size, 0))...)[:next]
		clear((*model)[min(size, next):])
		return
	}
	off := r.Int64N(size)
	n := r.Int64N(min(size-off, 1<<r.IntN(18))) + 1
	if r.IntN(4) == 0 {
		off, n = off&^4095, (n+4095)&^4095 // hits whole clusters
		n = min(n, size-off)
	}
	old := (*model)[off : off+n]
	switch r.IntN(6) {
	case 0, 1:
		b := random(r, n)
		write(t, d, off, b)
		copy(old, b)
	case 2:
		if err := d.WriteZeroes(off, n, r.IntN(2) == 0); err != nil {
			t.Fatal(err)
		}
		clear(old)
	case 3:
		if err := d.Discard(off, n); err != nil {
			t.Fatal(err)
		}
		now := read(t, d, off, n)
		for i := range now {
			if now[i] != old[i] && now[i] != 0 {
				t.Fatalf("byte %d is %#x after a discard, was %#x", off+int64(i), now[i], old[i])
			}
		}
		copy(old, now)
	case 4:
		s, run, err := d.BlockStatus(off, n)
		if err != nil || run < 1 || run > n {
			t.Fatalf("BlockStatus = %v, %d of %d, %v", s, run, n, err)
		}
		if s.Flags&blk.StatusZero != 0 && !iov.Of(old[:run]).IsZero() {
			t.Fatalf("BlockStatus says zeroes at %d where there are none", off)
		}
	case 5:
		if got := read(t, d, off, n); !bytes.Equal(got, old) {
			t.Fatalf("read of %d bytes at %d: they differ", n, off)
		}
	}
}

// TestConcurrent has overlapping requests. The race detector watches; bytes must come from one of the writers.
func TestConcurrent(t *testing.T) {
	const size, workers = 1 << 18, 4
	r := rand.New(rand.NewPCG(1, 1))
	over, _ := backing(t, r, size)
	d := newDisk(t, size, mem.Options{Backing: over, Limits: blk.Limits{Cluster: 4096}})
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(2, uint64(w)))
			b := make([]byte, 1<<15)
			for range 300 {
				off := r.Int64N(size - 1<<15)
				v := iov.Of(b[:r.IntN(1<<15)+1])
				var err error
				switch r.IntN(5) {
				case 0:
					_, err = d.WriteVecAt(v, off)
				case 1:
					_, err = d.ReadVecAt(v, off)
				case 2:
					err = d.WriteZeroes(off, int64(v.Size()), true)
				case 3:
					err = d.Discard(off, int64(v.Size()))
				case 4:
					_, _, err = d.BlockStatus(off, int64(v.Size()))
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestStatus(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	over, _ := backing(t, r, 1<<20)
	const c = 4096
	for _, below := range []*blk.Device{nil, over} {
		d := newDisk(t, 16*c, mem.Options{Backing: below, Limits: blk.Limits{Cluster: c}})
		absent := blk.StatusZero | blk.StatusAllocated
		if below != nil {
			absent = 0
		}
		check := func(off, n int64, want blk.StatusFlags, run int64) {
			t.Helper()
			if s, got, err := d.BlockStatus(off, n); err != nil || s.Flags != want || got != run {
				t.Errorf("BlockStatus(%d, %d) = %b, %d, %v; want %b, %d", off, n, s.Flags, got, err, want, run)
			}
		}
		const data, zero = blk.StatusData | blk.StatusAllocated, blk.StatusZero | blk.StatusAllocated
		check(0, 16*c, absent, 16*c)
		write(t, d, 3*c+5, []byte("x"))
		write(t, d, 4*c+5, []byte("x"))
		check(0, 16*c, absent, 3*c)
		check(3*c+100, 16*c-3*c-100, data, 2*c-100)
		check(3*c+100, 10, data, 10)
		if err := d.WriteCompressed(iov.Of(random(r, c)), 8*c); err != nil {
			t.Error(err)
		}
		check(8*c, 2*c, data|blk.StatusCompressed, c)
		write(t, d, 8*c, []byte("x"))
		check(8*c, 2*c, data, c)
		if err := d.Discard(3*c, c); err != nil {
			t.Error(err)
		}
		run := int64(c)
		if below == nil {
			run = 4 * c
			check(0, 16*c, zero, run)
		} else {
			check(3*c, 16*c-3*c, zero, run)
		}
		if err := d.WriteZeroes(10*c, 2*c, false); err != nil {
			t.Error(err)
		}
		check(10*c, 6*c, data, 2*c) // stays allocated
		if err := d.WriteCompressed(iov.Of(make([]byte, c)), 5); !errors.Is(err, mem.ErrLimits) {
			t.Errorf("compressed write of no cluster: %v", err)
		}
	}
}

// TestOverlayFails has a backing disk that is closed: the overlay must say so, and not show what it could not copy.
func TestOverlayFails(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	over, _ := backing(t, r, 1<<16)
	d := newDisk(t, 1<<16, mem.Options{Backing: over, Limits: blk.Limits{Cluster: 4096}})
	if err := over.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadVecAt(iov.Of(make([]byte, 10)), 0); !errors.Is(err, blk.ErrClosed) {
		t.Errorf("read: %v", err)
	}
	if _, err := d.WriteVecAt(iov.Of([]byte("x")), 0); !errors.Is(err, blk.ErrClosed) {
		t.Errorf("partial write: %v", err)
	}
	if s, _, err := d.BlockStatus(0, 512); err != nil || s.Flags != 0 {
		t.Errorf("status after a failed write: %v, %v", s, err)
	}
	write(t, d, 0, make([]byte, 4096)) // needs nothing of it
}

// TestShortEnd checks the last block of a disk that is no multiple of its alignment.
func TestShortEnd(t *testing.T) {
	d := newDisk(t, 4096+512, mem.Options{Limits: blk.Limits{RequestAlign: 4096}, MaxSize: 8192})
	b := bytes.Repeat([]byte{7}, 4096)
	write(t, d, 4096, b)
	if got := read(t, d, 4096, 4096); !bytes.Equal(got, b[:512]) {
		t.Errorf("%d bytes were read, want the 512 within the disk", len(got))
	}
	if err := d.Truncate(8192); err != nil {
		t.Fatal(err)
	}
	if got := read(t, d, 4096, 4096); !bytes.Equal(got[512:], make([]byte, 4096-512)) {
		t.Error("bytes that were written beyond the end are there after it grew")
	}
}

func TestLimits(t *testing.T) {
	d := newDisk(t, 1<<20-512, mem.Options{Limits: blk.Limits{
		RequestAlign: 512, MemoryAlign: 64, MaxTransfer: 8192, MaxVec: 3,
		DiscardAlign: 1536, MaxDiscard: 1536 * 4, ZeroAlign: 4096, MaxZero: 16384,
	}})
	page := aligned(t, 64<<10)
	vec := func(lens ...int) (v iov.Vec) {
		at := 0
		for _, n := range lens {
			v = v.Append(page[at : at+n])
			at += n
		}
		return v
	}
	for _, tt := range []struct {
		v    iov.Vec
		off  int64
		want string
	}{
		{vec(512), 0, ""},
		{vec(64, 448), 512, ""},
		{vec(4096, 4096, 0), 1024, ""},
		{vec(8192), 1<<20 - 8192 - 512, ""},
		{vec(512), 256, "not aligned to 512"},
		{vec(448), 512, "not aligned to 512"},
		{vec(512), -512, "-512"},
		{vec(512, 512), 1<<20 - 1024, "of a disk of"},
		{iov.Of(), 0, "0 bytes"},
		{vec(8192, 512), 0, "8704 bytes at once, 8192 allowed"},
		{vec(128, 128, 128, 128), 0, "vector of 4 elements, 3 allowed"},
		{vec(32, 480), 0, "element 0 of 2 is 32 bytes at address"},
		{iov.Of(page[32:544]), 0, "element 0 of 1 is 512 bytes at address"},
	} {
		for name, f := range map[string]func(v iov.Vec, off int64) (int, error){
			"read": d.ReadVecAt, "write": d.WriteVecAt, "fua": d.WriteVecFUA,
		} {
			_, err := f(tt.v, tt.off)
			if tt.want == "" && err != nil || tt.want != "" && (!errors.Is(err, mem.ErrLimits) || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("%s of %d bytes at %d: %v, want %q", name, tt.v.Size(), tt.off, err, tt.want)
			}
		}
	}
	const size = 1<<20 - 512
	for _, tt := range []struct {
		op     string
		off, n int64
		want   string
	}{
		{"discard", 0, 1536, ""},
		{"discard", 1536, 3072, ""},
		{"discard", 512, 1024, ""},
		{"discard", 2048, 512, ""},
		{"discard", size / 1536 * 1536, size % 1536, ""},
		{"discard", 512, 1536, "neither whole units of 1536"},
		{"discard", 0, 2048, "neither whole units of 1536"},
		{"discard", 0, 1536 * 5, "7680 bytes at once, 6144 allowed"},
		{"discard", 0, 100, "not aligned"},
		{"zero", 0, 16384, ""},
		{"zero", 512, 3584, ""},
		{"zero", 4096, 4608, "neither whole units of 4096"},
		{"zero", 0, 20480, "at once"},
		{"zero", size, 512, "of a disk of"},
		{"status", 0, size, ""},
		{"status", 0, 5, "not aligned"},
	} {
		var err error
		switch tt.op {
		case "discard":
			err = d.Discard(tt.off, tt.n)
		case "zero":
			err = d.WriteZeroes(tt.off, tt.n, false)
		case "status":
			_, _, err = d.BlockStatus(tt.off, tt.n)
		}
		if tt.want == "" && err != nil || tt.want != "" && (!errors.Is(err, mem.ErrLimits) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s of %d bytes at %d: %v, want %q", tt.op, tt.n, tt.off, err, tt.want)
		}
	}
}

// aligned returns memory at a page border.
func aligned(t *testing.T, n int) []byte {
	t.Helper()
	d := newDisk(t, 4096, mem.Options{Limits: blk.Limits{MemoryAlign: 4096}})
	b := make([]byte, n+4096)
	for i := range 4096 {
		if _, err := d.ReadVecAt(iov.Of(b[i:i+4096]), 0); err == nil {
			return b[i : i+n]
		}
	}
	t.Fatal("no alignment found")
	return nil
}

func TestClosed(t *testing.T) {
	d := newDisk(t, 4096, mem.Options{})
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	b := iov.Of(make([]byte, 512))
	_, r := d.ReadVecAt(b, 0)
	_, w := d.WriteVecAt(b, 0)
	_, _, s := d.BlockStatus(0, 512)
	_, rs := d.ReadStateAt(b, 0)
	_, ws := d.WriteStateAt(b, 0)
	for i, err := range []error{r, w, s, rs, ws, d.Flush(), d.Discard(0, 512), d.WriteZeroes(0, 512, true), d.Truncate(512),
		d.WriteCompressed(iov.Of(make([]byte, 4096)), 0), d.Close()} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("call %d after Close: %v", i, err)
		}
	}
}

func TestNewErrors(t *testing.T) {
	for _, tt := range []struct {
		size int64
		o    mem.Options
		want string
	}{
		{100, mem.Options{}, "multiple of 512"},
		{-512, mem.Options{}, "multiple of 512"},
		{512, mem.Options{Limits: blk.Limits{Cluster: 3000}}, "clusters of 3000"},
		{512, mem.Options{Limits: blk.Limits{Cluster: 256}}, "clusters of 256"},
		{1 << 62, mem.Options{}, "address space"},
		{1<<63 - 512, mem.Options{}, "too large"},
	} {
		if _, err := mem.New(tt.size, tt.o); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("New(%d) = %v, want %q", tt.size, err, tt.want)
		}
	}
	d := newDisk(t, 0, mem.Options{MaxSize: 4096})
	for _, size := range []int64{-512, 100, 4608} {
		if err := d.Truncate(size); err == nil {
			t.Errorf("Truncate(%d) went well", size)
		}
	}
	if err := d.Truncate(4096); err != nil {
		t.Error(err)
	}
}

func TestState(t *testing.T) {
	d := newDisk(t, 4096, mem.Options{Limits: blk.Limits{RequestAlign: 4096}})
	r := rand.New(rand.NewPCG(5, 5))
	b := random(r, 200_000)
	if n, err := d.WriteStateAt(iov.Of(b[:100], b[100:]), 77_777); n != len(b) || err != nil {
		t.Fatal(n, err)
	}
	got := bytes.Repeat([]byte{9}, 300_000)
	n, err := d.ReadStateAt(iov.Of(got[:5], got[5:]), 0)
	if want := append(make([]byte, 77_777), b...); err != nil || !bytes.Equal(got[:n], want) {
		t.Errorf("%d bytes, %v; want %d", n, err, len(want))
	}
	if n, err := d.ReadStateAt(iov.Of(got), 1<<60); n != 0 || err != nil {
		t.Errorf("read behind the state: %d, %v", n, err)
	}
	if _, err := d.WriteStateAt(iov.Of(got), -1); !errors.Is(err, mem.ErrLimits) {
		t.Errorf("write before the state: %v", err)
	}
}

// TestGivesBack checks that memory is given back, by what the kernel says that this process has.
func TestGivesBack(t *testing.T) {
	const size = 64 << 20
	d := newDisk(t, size, mem.Options{})
	resident := func() int64 {
		t.Helper()
		b, err := os.ReadFile("/proc/self/statm")
		if err != nil {
			t.Fatal(err)
		}
		pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return pages * int64(os.Getpagesize())
	}
	ones := bytes.Repeat([]byte{1}, 1<<20)
	for name, f := range map[string]func() error{
		"discard":  func() error { return d.Discard(0, size) },
		"zero":     func() error { return d.WriteZeroes(0, size, true) },
		"truncate": func() error { return errors.Join(d.Truncate(0), d.Truncate(size)) },
	} {
		for off := int64(0); off < size; off += 1 << 20 {
			write(t, d, off, ones)
		}
		before := resident()
		if err := f(); err != nil {
			t.Fatal(err)
		}
		if freed := before - resident(); freed < size*3/4 {
			t.Errorf("%s of %d bytes gave back %d", name, size, freed)
		}
	}
}

func TestAsync(t *testing.T) {
	const n = 200
	a, err := mem.NewAsync(n*512, mem.Options{Limits: blk.Limits{RequestAlign: 512}}, 3, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, op := range []blk.Op{blk.OpWrite, blk.OpRead} {
		var wg sync.WaitGroup
		ios := make([]*blk.IO, n)
		bufs := make([][]byte, n)
		for i := range ios {
			bufs[i] = bytes.Repeat([]byte{byte(i)}, 512)
			if op == blk.OpRead {
				clear(bufs[i])
			}
			wg.Add(1)
			ios[i] = &blk.IO{Op: op, Vec: iov.Of(bufs[i]), Off: int64(i) * 512, Done: func(*blk.IO) { wg.Done() }}
		}
		a.Start(ios[:n/2])
		a.Start(ios[n/2:])
		wg.Wait()
		for i, io := range ios {
			if io.N != 512 || io.Err != nil || !bytes.Equal(bufs[i], bytes.Repeat([]byte{byte(i)}, 512)) {
				t.Fatalf("IO %d: %d, %v", i, io.N, io.Err)
			}
		}
	}
	done := make(chan error, 1)
	a.Start([]*blk.IO{{Op: blk.OpRead, Vec: iov.Of(make([]byte, 5)), Done: func(io *blk.IO) { done <- io.Err }}})
	if err := <-done; !errors.Is(err, mem.ErrLimits) {
		t.Errorf("unaligned transfer: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	a.Start([]*blk.IO{{Op: blk.OpRead, Vec: iov.Of(make([]byte, 512)), Done: func(io *blk.IO) { done <- io.Err }}})
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("transfer after Close: %v", err)
	}
}

// TestUnderDevice has a Device in front, with every limit at once.
func TestUnderDevice(t *testing.T) {
	d := newDisk(t, 1<<20, mem.Options{Limits: blk.Limits{RequestAlign: 4096, MemoryAlign: 512, MaxTransfer: 16384, MaxVec: 2}})
	dev, err := blk.New(d, blk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b := random(rand.New(rand.NewPCG(6, 6)), 100_001)
	if _, err := dev.WriteVecAt(iov.Of(b[:7], b[7:50_000], b[50_000:]), 333); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(b))
	if _, err := dev.ReadVecAt(iov.Of(got[:99], got[99:]), 333); err != nil || !bytes.Equal(got, b) {
		t.Fatalf("read: %v", err)
	}
	if err := dev.WriteZeroes(context.Background(), 500, 50_000, 0); err != nil {
		t.Fatal(err)
	}
	clear(b[500-333 : 50_500-333])
	if _, err := dev.ReadVecAt(iov.Of(got), 333); err != nil || !bytes.Equal(got, b) {
		t.Fatalf("read after zeroes: %v", err)
	}
}

func BenchmarkRead4K(b *testing.B) {
	d, err := mem.New(1<<26, mem.Options{})
	if err != nil {
		b.Fatal(err)
	}
	v := iov.Of(make([]byte, 4096))
	off := int64(0)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.ReadVecAt(v, off); err != nil {
			b.Fatal(err)
		}
		off = (off + 40960) & (1<<26 - 1)
	}
	_ = d.Close()
}
