package blk_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// cutUp returns a vector over p of elements of random length, empty ones among them.
func cutUp(random *rand.Rand, p []byte, most int) iov.Vec {
	var v iov.Vec
	for len(p) > 0 {
		n := min(random.IntN(most+1), len(p))
		v = v.Append(p[:n:n])
		p = p[n:]
	}
	return v
}

// elements returns a vector over p of exactly n elements, as equal as they come.
func elements(p []byte, n int) iov.Vec {
	v := make(iov.Vec, 0, n)
	for i := range n {
		v = v.Append(p[len(p)*i/n : len(p)*(i+1)/n])
	}
	return v
}

func noise(seed uint64, n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(p)
	return p
}

// Reads and writes at and around all borders of blocks, at every alignment, give what a plain array gives.
func TestEveryAlignment(t *testing.T) {
	t.Parallel()
	for align := 1; align <= 64<<10; align *= 2 {
		for name, more := range map[string]blk.Limits{
			"plain":     {},
			"memory":    {MemoryAlign: min(align, 4096)},
			"transfers": {MaxTransfer: int64(align)},
			"vectors":   {MaxVec: 3},
			"one":       {MaxVec: 1},
			"all":       {MemoryAlign: min(align, 512), MaxTransfer: 2 * int64(align), MaxVec: 2},
		} {
			t.Run(fmt.Sprint(align, " ", name), func(t *testing.T) {
				t.Parallel()
				testAlignment(t, align, more)
			})
		}
	}
}

func testAlignment(t *testing.T, align int, limits blk.Limits) {
	limits.RequestAlign = align
	size := int64(5*align+blk.SectorSize-1) &^ (blk.SectorSize - 1)
	if align > blk.SectorSize {
		size -= blk.SectorSize // the last block is not all there
	}
	s := newStrict(t, size, limits)
	d := s.open(blk.Options{})
	model := noise(1, int(size))
	copy(s.data, model)
	random := rand.New(rand.NewPCG(uint64(align), 0))
	var edges []int64
	for edge := int64(0); edge <= size; edge += int64(max(align, 128)) {
		for _, e := range []int64{edge - 1, edge, edge + 1, edge + int64(align)/2} {
			if e >= 0 && e <= size {
				edges = append(edges, e)
			}
		}
	}
	edges = append(edges, size-1, size)
	for i, from := range edges {
		for j, to := range edges {
			if from > to || align > 1024 && (i+j)%5 != 0 || align > 16384 && (i+j)%20 != 0 {
				continue
			}
			src := noise(uint64(i*100+j), int(to-from))
			if n, err := d.WriteVecAt(cutUp(random, src, int(to-from)/2+1), from); n != len(src) || err != nil {
				t.Fatalf("write %d to %d: %d, %v", from, to, n, err)
			}
			copy(model[from:], src)
			if !bytes.Equal(s.data[:size], model) {
				t.Fatalf("write %d to %d left other bytes than it should", from, to)
			}
			got := make([]byte, to-from)
			if n, err := d.ReadVecAt(cutUp(random, got, int(to-from)/2+1), from); n != len(got) || err != nil {
				t.Fatalf("read %d to %d: %d, %v", from, to, n, err)
			}
			if !bytes.Equal(got, src) {
				t.Fatalf("read %d to %d: other bytes than were written", from, to)
			}
		}
	}
	for _, b := range s.data[size:] {
		if b != 0 {
			t.Fatal("padding behind the end of the disk is not zero")
		}
	}
}

// What reaches the backend for which request.
func TestCallsOfPaddedRequests(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		off, n      int64
		read, write string
	}{
		{0, 4096, "read 0+4096", "write 0+4096"},
		{4096, 8192, "read 4096+8192", "write 4096+8192"},
		{512, 512, "read 0+4096", "read 0+4096, write 0+4096"},
		{0, 512, "read 0+4096", "read 0+4096, write 0+4096"},
		{3584, 512, "read 0+4096", "read 0+4096, write 0+4096"},
		{3584, 1024, "read 0+8192", "read 0+8192, write 0+8192"},
		{0, 4608, "read 0+8192", "read 4096+4096, write 0+8192"},
		{512, 7680, "read 0+8192", "read 0+4096, write 0+8192"},
		{512, 8192, "read 0+12288", "read 0+4096, read 8192+4096, write 0+12288"},
		{1, 12286, "read 0+12288", "read 0+4096, read 8192+4096, write 0+12288"},
	} {
		s := newStrict(t, 16384, blk.Limits{RequestAlign: 4096})
		d := s.open(blk.Options{})
		if _, err := d.ReadVecAt(iov.Of(make([]byte, tc.n)), tc.off); err != nil {
			t.Fatal(err)
		}
		if got := s.took(); got != tc.read {
			t.Errorf("read %d+%d: %s; want %s", tc.off, tc.n, got, tc.read)
		}
		if _, err := d.WriteVecAt(iov.Of(make([]byte, tc.n)), tc.off); err != nil {
			t.Fatal(err)
		}
		if got := s.took(); got != tc.write {
			t.Errorf("write %d+%d: %s; want %s", tc.off, tc.n, got, tc.write)
		}
	}
}

func TestMemoryAlignAlone(t *testing.T) {
	t.Parallel()
	m, err := mem.New(mib, mem.Options{Limits: blk.Limits{MemoryAlign: 512}})
	if err != nil {
		t.Fatal(err)
	}
	d := newDevice(t, m, blk.Options{})
	defer func() { _ = d.Close() }()
	if _, err := d.WriteVecAt(iov.Of(pattern(10)), 5); err != nil {
		t.Error(err)
	}
}

// An alignment that the caller asks for is kept like the backend's own.
func TestCoarserAlignment(t *testing.T) {
	t.Parallel()
	s := newStrict(t, mib, blk.Limits{RequestAlign: 512, MaxTransfer: 10 * 512, DiscardAlign: 1024, ZeroAlign: 512, MaxZero: 512})
	d := s.open(blk.Options{RequestAlign: 4096})
	want := blk.Limits{RequestAlign: 4096, MaxTransfer: 4096, DiscardAlign: 4096, ZeroAlign: 4096, MaxZero: 4096}
	if d.Limits() != want {
		t.Errorf("%+v, want %+v", d.Limits(), want)
	}
	if _, err := d.WriteVecAt(iov.Of(make([]byte, 512)), 512); err != nil || s.took() != "read 0+4096, write 0+4096" {
		t.Error(err)
	}
	if _, err := blk.New(newStrict(t, mib-512, blk.Limits{}), blk.Options{RequestAlign: 4096}); !errors.Is(err, blk.ErrLimits) {
		t.Errorf("a disk that is no multiple of it: %v", err)
	}
	if err := d.Truncate(t.Context(), mib/2+512); !errors.Is(err, blk.ErrLimits) || d.Size() != mib {
		t.Errorf("a resize to no multiple of it: %v", err)
	}
	for _, align := range []int{-1, 3000, 128 << 10} {
		if _, err := blk.New(newStrict(t, mib, blk.Limits{}), blk.Options{RequestAlign: align}); !errors.Is(err, blk.ErrLimits) == (align > 0) {
			t.Errorf("alignment %d: %v", align, err)
		}
	}
}

// A vector of as many elements as the backend takes goes through at any misalignment, and as one transfer: elements at
// its front make room for head and tail (QEMU's tests/iov-padding; qemu-io 7.2 answers EINVAL).
func TestLongestVectorsPadded(t *testing.T) {
	t.Parallel()
	const align, most = 4096, iov.MaxElems
	for _, count := range []int{most - 2, most - 1, most} {
		for _, head := range []int64{0, 512, 4095} {
			for _, tail := range []int64{0, 1, 512} {
				s := newStrict(t, 1<<20, blk.Limits{RequestAlign: align, MaxVec: most})
				d := s.open(blk.Options{})
				old := noise(3, len(s.data))
				copy(s.data, old)
				off, end := align+head, 129*align+tail
				if tail == 0 {
					end = 130 * align
				}
				src := noise(4, int(end-off))
				if _, err := d.WriteVecAt(elements(src, count), off); err != nil {
					t.Fatalf("%d elements, %d to %d: %v", count, off, end, err)
				}
				want := slices.Concat(old[:off], src, old[end:])
				if !bytes.Equal(s.data, want) {
					t.Fatalf("%d elements, %d to %d: the disk holds other bytes", count, off, end)
				}
				s.took()
				got := make([]byte, len(src))
				if _, err := d.ReadVecAt(elements(got, count), off); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, src) {
					t.Fatalf("%d elements, %d to %d: read other bytes", count, off, end)
				}
				if call := fmt.Sprintf("read %d+%d", align, (end+align-1)&^(align-1)-align); s.took() != call {
					t.Errorf("%d elements, %d to %d: not one call", count, off, end)
				}
			}
		}
	}
}

// Elements that nothing can be done with one by one are copied, a bounded part at a time.
func TestTinyElements(t *testing.T) {
	t.Parallel()
	s := newStrict(t, 4<<20, blk.Limits{RequestAlign: 4096, MaxVec: 16, MaxTransfer: 1 << 20})
	d := s.open(blk.Options{})
	src := noise(5, 3<<20+77)
	v := make(iov.Vec, 0, len(src)/3)
	for p := range slices.Chunk(src, 3) {
		v = v.Append(p)
	}
	if _, err := d.WriteVecAt(v, 1000); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(s.data[1000:1000+len(src)], src) {
		t.Fatal("the disk holds other bytes")
	}
	got := make([]byte, len(src))
	for i, p := range slices.Collect(slices.Chunk(got, 3)) {
		v[i] = iov.RangeOf(p)
	}
	if _, err := d.ReadVecAt(v, 1000); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, src) {
		t.Fatal("read other bytes")
	}
}

// A padded write that fails leaves old or new bytes, and none of its neighbours' changed.
func TestFailedPaddedWrite(t *testing.T) {
	t.Parallel()
	for _, failing := range []string{"read 0+4096", "read 8192+4096", "write 0+12288"} {
		s := newStrict(t, 16384, blk.Limits{RequestAlign: 4096})
		d := s.open(blk.Options{})
		s.fail = func(call string) error {
			if call == failing {
				return errMedium
			}
			return nil
		}
		n, err := d.WriteVecAt(iov.Of(pattern(8192)), 512)
		if n != 0 || !errors.Is(err, errMedium) {
			t.Errorf("%s fails: %d, %v", failing, n, err)
		}
		if !bytes.Equal(s.data, make([]byte, 16384)) {
			t.Errorf("%s fails: bytes changed", failing)
		}
		if d.Stats().LastError == nil {
			t.Errorf("%s fails: not counted", failing)
		}
	}
}

func TestPaddedRequestsDoNotAllocate(t *testing.T) {
	b := newMemory(1 << 20)
	b.limits = blk.Limits{RequestAlign: 4096, MaxVec: 16}
	d := newDevice(t, b, blk.Options{})
	v, long := iov.Of(make([]byte, 5000)), elements(make([]byte, 16*4096), 16)
	for name, f := range map[string]func(){
		"aligned read":    func() { _, _ = d.ReadVecAt(long, 4096) },
		"aligned write":   func() { _, _ = d.WriteVecAt(long, 4096) },
		"padded read":     func() { _, _ = d.ReadVecAt(v, 512) },
		"padded write":    func() { _, _ = d.WriteVecAt(v, 512) },
		"collapsed write": func() { _, _ = d.WriteVecAt(long, 512) },
		"zeroes":          func() { _ = d.WriteZeroes(context.Background(), 512, 5000, 0) },
	} {
		f() // the first fills the pool
		if n := testing.AllocsPerRun(100, f); n >= 1 && !hosttest.Race {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
