package blk_test

import (
	"bytes"
	"errors"
	"io"
	"math"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

var errMedium = errors.New("medium error")

// memory is a Backend over a byte slice that can be told to misbehave.
type memory struct {
	data   []byte
	size   int64 // what Size says, where it is not len(data)
	limits blk.Limits
	err    error // what every request returns
	short  bool  // writes stop half-way without an error

	flushes  atomic.Int64
	underway atomic.Int64
	closed   atomic.Bool
	misused  atomic.Bool // a request met a closed backend, or Close met a request
}

func newMemory(size int) *memory { return &memory{data: make([]byte, size), size: int64(size)} }

func (m *memory) enter() *memory {
	m.underway.Add(1)
	m.checkOpen()
	return m
}

func (m *memory) leave() {
	m.checkOpen()
	m.underway.Add(-1)
}

func (m *memory) checkOpen() {
	if m.closed.Load() {
		m.misused.Store(true)
	}
}

func (m *memory) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	defer m.enter().leave()
	if m.err != nil {
		return 0, m.err
	}
	if off >= int64(len(m.data)) {
		return 0, nil
	}
	return dst.CopyFrom(0, m.data[off:min(int64(len(m.data)), off+int64(dst.Size()))])
}

func (m *memory) WriteVecAt(src iov.Vec, off int64) (int, error) {
	defer m.enter().leave()
	if m.err != nil {
		return 0, m.err
	}
	n := src.Size()
	if m.short {
		n /= 2
	}
	return src.CopyTo(m.data[off:off+int64(n)], 0)
}

func (m *memory) Flush() error {
	defer m.enter().leave()
	m.flushes.Add(1)
	return m.err
}

func (m *memory) Size() int64        { return m.size }
func (m *memory) Limits() blk.Limits { return m.limits }

func (m *memory) Close() error {
	m.closed.Store(true)
	if m.underway.Load() != 0 {
		m.misused.Store(true)
	}
	return m.err
}

func newDevice(t *testing.T, b blk.Backend, o blk.Options) *blk.Device {
	t.Helper()
	d, err := blk.New(b, o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// pattern returns n bytes that differ from their neighbours and from zero.
func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i%251) + 1
	}
	return p
}

func TestReadsWhatWasWritten(t *testing.T) {
	t.Parallel()
	b := newMemory(64 * blk.SectorSize)
	d := newDevice(t, b, blk.Options{})
	if d.Size() != 64*blk.SectorSize || d.ReadOnly() {
		t.Fatalf("size %d, read-only %v", d.Size(), d.ReadOnly())
	}

	want := pattern(3000)
	if n, err := d.WriteVecAt(iov.Of(want[:1], want[1:1000], nil, want[1000:]), 777); n != 3000 || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
	got := make([]byte, 3000)
	if n, err := d.ReadVecAt(iov.Of(got[:2999], got[2999:]), 777); n != 3000 || err != nil {
		t.Fatalf("read: %d, %v", n, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("read other bytes than were written")
	}
	if err := d.Flush(); err != nil || b.flushes.Load() != 1 {
		t.Fatalf("flush: %v, %d reached the backend", err, b.flushes.Load())
	}
	wantStats := blk.Stats{
		Read:  blk.Counters{Ops: 1, Bytes: 3000},
		Write: blk.Counters{Ops: 1, Bytes: 3000},
		Flush: blk.Counters{Ops: 1},
	}
	if s := d.Stats(); s != wantStats {
		t.Errorf("stats %+v, want %+v", s, wantStats)
	}
}

func TestRange(t *testing.T) {
	t.Parallel()
	const size = 8 * blk.SectorSize
	for _, tc := range []struct {
		name string
		off  int64
		n    int
		want error
	}{
		{"first byte", 0, 1, nil},
		{"last byte", size - 1, 1, nil},
		{"everything", 0, size, nil},
		{"nothing at the end", size, 0, nil},
		{"nothing beyond the end", size + 1, 0, blk.ErrRange},
		{"one byte at the end", size, 1, blk.ErrRange},
		{"one byte too long", 0, size + 1, blk.ErrRange},
		{"across the end", size - 1, 2, blk.ErrRange},
		{"before the start", -1, 1, blk.ErrRange},
		{"far before the start", math.MinInt64, 1, blk.ErrRange},
		{"far beyond the end", math.MaxInt64, 1, blk.ErrRange},
		{"the sum overflows", math.MaxInt64 - 1, size, blk.ErrRange},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			d := newDevice(t, newMemory(size), blk.Options{})
			v := iov.Of(make([]byte, tc.n))
			want := tc.n
			if tc.want != nil {
				want = 0
			}
			if n, err := d.ReadVecAt(v, tc.off); n != want || !errors.Is(err, tc.want) {
				t.Errorf("read: %d, %v", n, err)
			}
			if n, err := d.WriteVecAt(v, tc.off); n != want || !errors.Is(err, tc.want) {
				t.Errorf("write: %d, %v", n, err)
			}
			if s := d.Stats(); (s.Read.Errors == 1) != (tc.want != nil) || s.LastError != nil {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

func TestReadOnly(t *testing.T) {
	t.Parallel()
	b := newMemory(blk.SectorSize)
	d := newDevice(t, b, blk.Options{ReadOnly: true})
	if n, err := d.WriteVecAt(iov.Of(pattern(512)), 0); n != 0 || !errors.Is(err, blk.ErrReadOnly) {
		t.Errorf("write: %d, %v", n, err)
	}
	if err := d.Flush(); err != nil || b.flushes.Load() != 0 {
		t.Errorf("flush: %v, %d reached the backend", err, b.flushes.Load())
	}
	if _, err := d.ReadVecAt(iov.Of(make([]byte, 512)), 0); err != nil {
		t.Error(err)
	}
	if !d.ReadOnly() || !bytes.Equal(b.data, make([]byte, 512)) {
		t.Error("the disk was written")
	}
}

func TestMissingBytesReadAsZeroes(t *testing.T) {
	t.Parallel()
	for _, have := range []int{0, 1, 511, 700, 1023} {
		b := newMemory(1024)
		b.data = pattern(have)
		d := newDevice(t, b, blk.Options{})
		got := bytes.Repeat([]byte{0xee}, 1024)
		if n, err := d.ReadVecAt(iov.Of(got[:600], got[600:]), 0); n != 1024 || err != nil {
			t.Fatalf("%d bytes stored: read %d, %v", have, n, err)
		}
		if want := append(pattern(have), make([]byte, 1024-have)...); !bytes.Equal(got, want) {
			t.Errorf("%d bytes stored: the rest is not zero", have)
		}
	}
}

func TestBackendErrors(t *testing.T) {
	t.Parallel()
	b := newMemory(1024)
	d := newDevice(t, b, blk.Options{})

	b.short = true
	if n, err := d.WriteVecAt(iov.Of(pattern(1024)), 0); n != 0 || !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("short write: %d, %v", n, err)
	}
	b.err = errMedium
	if _, err := d.ReadVecAt(iov.Of(make([]byte, 512)), 0); !errors.Is(err, errMedium) {
		t.Errorf("read: %v", err)
	}
	if _, err := d.WriteVecAt(iov.Of(make([]byte, 512)), 0); !errors.Is(err, errMedium) {
		t.Errorf("write: %v", err)
	}
	if err := d.Flush(); !errors.Is(err, errMedium) {
		t.Errorf("flush: %v", err)
	}
	want := blk.Stats{
		Read:      blk.Counters{Ops: 1, Errors: 1},
		Write:     blk.Counters{Ops: 2, Errors: 2},
		Flush:     blk.Counters{Ops: 1, Errors: 1},
		LastError: errMedium,
	}
	if s := d.Stats(); s != want {
		t.Errorf("stats %+v, want %+v", s, want)
	}
}

func TestClose(t *testing.T) {
	t.Parallel()
	d := newDevice(t, newMemory(1024), blk.Options{})
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	v := iov.Of(make([]byte, 512))
	_, rerr := d.ReadVecAt(v, 0)
	_, werr := d.WriteVecAt(v, 0)
	for what, err := range map[string]error{"read": rerr, "write": werr, "flush": d.Flush(), "close": d.Close()} {
		if !errors.Is(err, blk.ErrClosed) || !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after Close: %v", what, err)
		}
	}

	b := newMemory(1024)
	b.err = errMedium
	if err := newDevice(t, b, blk.Options{}).Close(); !errors.Is(err, errMedium) {
		t.Errorf("the backend's error is lost: %v", err)
	}
}

// Close comes in the middle of requests from many goroutines: each ends well or with ErrClosed, and the backend sees
// none of them from Close on.
func TestCloseUnderLoad(t *testing.T) {
	t.Parallel()
	for range 10 {
		const workers, span = 8, 1024
		b := newMemory(workers * span)
		d := newDevice(t, b, blk.Options{})
		var ready, done sync.WaitGroup
		for w := range workers {
			ready.Add(1)
			done.Go(func() {
				want, got := pattern(span), make([]byte, span)
				for i := 0; ; i++ {
					_, err := d.WriteVecAt(iov.Of(want), int64(w*span))
					if err == nil {
						_, err = d.ReadVecAt(iov.Of(got), int64(w*span))
					}
					if err == nil {
						err = d.Flush()
					}
					runtime.Gosched()
					if i == 0 {
						ready.Done()
					}
					if errors.Is(err, blk.ErrClosed) {
						return
					}
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("worker %d: %v", w, err)
						return
					}
				}
			})
		}
		ready.Wait()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if n := b.underway.Load(); n != 0 {
			t.Errorf("%d requests under way after Close", n)
		}
		done.Wait()
		if b.misused.Load() {
			t.Fatal("requests and Close met in the backend")
		}
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		size   int64
		limits blk.Limits
		want   error
	}{
		{name: "negative size", size: -512},
		{name: "half a sector", size: 768},
		{name: "request alignment", size: 512, limits: blk.Limits{RequestAlign: 500}, want: blk.ErrLimits},
		{name: "negative alignment", size: 512, limits: blk.Limits{RequestAlign: -1}, want: blk.ErrLimits},
		{name: "vast alignment", size: 512, limits: blk.Limits{RequestAlign: 128 << 10}, want: blk.ErrLimits},
		{name: "memory alignment", size: 512, limits: blk.Limits{MemoryAlign: 3}, want: blk.ErrLimits},
		{name: "transfer", size: 512, limits: blk.Limits{RequestAlign: 4096, MaxTransfer: 4097}, want: blk.ErrLimits},
		{name: "vector", size: 512, limits: blk.Limits{MaxVec: -1}, want: blk.ErrLimits},
		{name: "discard", size: 512, limits: blk.Limits{RequestAlign: 4096, DiscardAlign: 512}, want: blk.ErrLimits},
		{name: "zeroes", size: 512, limits: blk.Limits{RequestAlign: 4096, MaxZero: 512}, want: blk.ErrLimits},
		{name: "cluster", size: 512, limits: blk.Limits{Cluster: 1000}, want: blk.ErrLimits},
		{name: "too large", size: math.MaxInt64 &^ 511},
		{name: "physical block", size: 512, limits: blk.Limits{PhysicalBlock: 1000}, want: blk.ErrLimits},
		{name: "optimal transfer", size: 512, limits: blk.Limits{OptimalTransfer: -1}, want: blk.ErrLimits},
	} {
		b := newMemory(0)
		b.size, b.limits = tc.size, tc.limits
		d, err := blk.New(b, blk.Options{})
		if d != nil || err == nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
		if b.closed.Load() {
			t.Errorf("%s: the backend was closed, though it stays the caller's", tc.name)
		}
	}
}

func TestRequestsDoNotAllocate(t *testing.T) {
	b := newMemory(8192)
	d := newDevice(t, b, blk.Options{})
	v, tooLong := iov.Of(make([]byte, 4096)), iov.Of(make([]byte, 8193))
	for name, f := range map[string]func(){
		"read":    func() { _, _ = d.ReadVecAt(v, 512) },
		"write":   func() { _, _ = d.WriteVecAt(v, 512) },
		"flush":   func() { _ = d.Flush() },
		"refused": func() { _, _ = d.WriteVecAt(tooLong, 0) },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkRead4K(b *testing.B) {
	d, err := blk.New(newMemory(1<<20), blk.Options{})
	if err != nil {
		b.Fatal(err)
	}
	v := iov.Of(make([]byte, 4096))
	b.SetBytes(4096)
	for b.Loop() {
		if _, err := d.ReadVecAt(v, 8192); err != nil {
			b.Fatal(err)
		}
	}
}
