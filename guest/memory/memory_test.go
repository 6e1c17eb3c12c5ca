package memory_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/memory"
	"github.com/kvmlet/kvmlet/iov"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

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

func TestLayout(t *testing.T) {
	t.Parallel()
	type region struct{ addr, size uint64 }
	for _, c := range []struct {
		size uint64
		want []region
	}{
		{memory.PageSize, []region{{0, memory.PageSize}}},
		{64 * mib, []region{{0, 64 * mib}}},
		{3 * gib, []region{{0, 3 * gib}}},
		{3*gib + memory.PageSize, []region{{0, 3 * gib}, {4 * gib, memory.PageSize}}},
		{5 * gib, []region{{0, 3 * gib}, {4 * gib, 2 * gib}}},
		{64 * gib, []region{{0, 3 * gib}, {4 * gib, 61 * gib}}},
	} {
		m := newMemory(t, c.size)
		var got []region
		for _, r := range m.Regions() {
			got = append(got, region{r.Addr, uint64(len(r.Bytes))})
			if addr := hostAddr(r.Bytes); addr%(2*mib) != r.Addr%(2*mib) {
				t.Errorf("guest %#x is host %#x: huge pages cannot map it", r.Addr, addr)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%d bytes lie at %v, want %v", c.size, got, c.want)
		}
		if m.Size() != c.size {
			t.Errorf("Size is %d, want %d", m.Size(), c.size)
		}
	}
}

func TestBadSize(t *testing.T) {
	t.Parallel()
	for _, size := range []uint64{0, 1, memory.PageSize + 1, 64*gib + memory.PageSize, math.MaxUint64, 1 << 63} {
		if m, err := memory.New(size); !errors.Is(err, memory.ErrSize) {
			t.Errorf("New(%d) = %v, %v, want ErrSize", size, m, err)
		}
	}
}

// Only pages that are touched may cost the host anything.
func TestReservedLazily(t *testing.T) {
	t.Parallel()
	m := newMemory(t, 64*gib)
	high := m.Regions()[1].Bytes
	high[len(high)-1] = 1
	vec := make([]byte, gib/memory.PageSize)
	if err := mincore(high[len(high)-gib:], vec); err != nil {
		t.Fatal(err)
	}
	resident := 0
	for _, v := range vec {
		resident += int(v & 1)
	}
	if resident == 0 || resident > 2*mib/memory.PageSize { // one huge page where the host makes them by itself
		t.Errorf("%d pages are resident after touching one", resident)
	}
}

func TestBytesBounds(t *testing.T) {
	t.Parallel()
	m := newMemory(t, 5*gib)
	const top = 4*gib + 2*gib
	for _, c := range []struct {
		addr, n uint64
		ok      bool
	}{
		{0, 0, true}, {0, 1, true}, {0, 3 * gib, true}, {0, 3*gib + 1, false},
		{3*gib - 1, 1, true}, {3*gib - 1, 2, false}, {3 * gib, 0, false}, {3 * gib, 1, false},
		{3*gib - 1, gib + 2, false}, // from one region into the other
		{4*gib - 1, 1, false}, {4*gib - 1, 2, false}, {4 * gib, 0, true}, {4 * gib, 2 * gib, true},
		{4 * gib, 2*gib + 1, false}, {top - 1, 1, true}, {top - 1, 2, false}, {top, 0, false},
		{0, math.MaxUint64, false}, {1, math.MaxUint64, false}, {4096, math.MaxUint64 - 4095, false},
		{math.MaxUint64, 0, false}, {math.MaxUint64, 1, false}, {math.MaxUint64, 2, false},
		{math.MaxUint64 - 4095, 4096, false}, {math.MaxUint64 - 4095, 8192, false},
		{1 << 63, 1 << 63, false}, {1 << 63, 1, false}, {4*gib + 4096, math.MaxUint64 - 4095, false},
	} {
		b, err := m.Bytes(c.addr, c.n)
		if c.ok && (err != nil || uint64(len(b)) != c.n || uint64(cap(b)) != c.n) {
			t.Errorf("Bytes(%#x, %#x) = %d bytes, %v", c.addr, c.n, len(b), err)
		}
		if !c.ok && (b != nil || !errors.Is(err, memory.ErrUnmapped)) {
			t.Errorf("Bytes(%#x, %#x) = %d bytes, %v, want ErrUnmapped", c.addr, c.n, len(b), err)
		}
		dst := iov.Of([]byte{1})
		v, err := m.AppendVec(dst, c.addr, c.n)
		switch {
		case c.ok && (err != nil || len(v) != 2 || uint64(v[1].Len()) != c.n):
			t.Errorf("AppendVec(%#x, %#x) = %d elements, %v", c.addr, c.n, len(v), err)
		case !c.ok && (len(v) != 1 || !errors.Is(err, memory.ErrUnmapped)):
			t.Errorf("AppendVec(%#x, %#x) = %d elements, %v, want ErrUnmapped", c.addr, c.n, len(v), err)
		}
	}
}

func TestReadWriteAt(t *testing.T) {
	t.Parallel()
	m := newMemory(t, 5*gib)
	data := []byte("guest")
	for _, addr := range []int64{0, 0xffff, 3*gib - 5, 4 * gib, 4*gib + 12345, 6*gib - 5} {
		if n, err := m.WriteAt(data, addr); n != len(data) || err != nil {
			t.Fatalf("WriteAt(%#x) = %d, %v", addr, n, err)
		}
		got := make([]byte, len(data))
		if n, err := m.ReadAt(got, addr); n != len(data) || err != nil || !bytes.Equal(got, data) {
			t.Fatalf("ReadAt(%#x) = %d, %v, %q", addr, n, err, got)
		}
		b, err := m.Bytes(uint64(addr), uint64(len(data)))
		if err != nil || !bytes.Equal(b, data) {
			t.Fatalf("Bytes(%#x) = %q, %v", addr, b, err)
		}
	}
	for _, addr := range []int64{-1, -5, math.MinInt64, math.MaxInt64, 3*gib - 4, 3 * gib, 4*gib - 1, 6*gib - 4} {
		if n, err := m.WriteAt(data, addr); n != 0 || !errors.Is(err, memory.ErrUnmapped) {
			t.Errorf("WriteAt(%#x) = %d, %v, want ErrUnmapped", addr, n, err)
		}
		if n, err := m.ReadAt(make([]byte, 5), addr); n != 0 || !errors.Is(err, memory.ErrUnmapped) {
			t.Errorf("ReadAt(%#x) = %d, %v, want ErrUnmapped", addr, n, err)
		}
	}
}

func TestClose(t *testing.T) {
	t.Parallel()
	m, err := memory.New(4 * gib)
	if err != nil {
		t.Fatal(err)
	}
	l := m.EnableDirty()
	host := m.Regions()[0].Bytes
	for range 2 {
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := mincore(host[:memory.PageSize], make([]byte, 1)); err != unix.ENOMEM {
		t.Errorf("after Close the host page is still there: %v", err)
	}
	if _, err := m.Bytes(0, 1); !errors.Is(err, memory.ErrUnmapped) {
		t.Errorf("Bytes after Close: %v, want ErrUnmapped", err)
	}
	if m.Size() != 0 || len(m.Regions()) != 0 {
		t.Errorf("after Close there are %d bytes in %d regions", m.Size(), len(m.Regions()))
	}
	m.MarkDirty(0, math.MaxUint64)
	if _, err := l.Collect(0, nil); !errors.Is(err, memory.ErrUnmapped) {
		t.Errorf("Collect after Close: %v, want ErrUnmapped", err)
	}
	l.Close()
}

// Many guests in one process leave no mapping behind.
func TestNoMappingLeak(t *testing.T) {
	reserved := func() (n int) { // kilobytes of address space
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(status), "VmSize:")
		if _, err := fmt.Sscan(rest, &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := reserved()
	for range 100 {
		m, err := memory.New(gib)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if grown := reserved() - before; grown > gib>>10 {
		t.Errorf("100 guests of 1 GiB left %d KiB of address space in use", grown)
	}
}

func TestNoAllocations(t *testing.T) {
	m := newMemory(t, 5*gib)
	l := m.EnableDirty()
	defer l.Close()
	dst := make(iov.Vec, 0, 4)
	page := make([]byte, memory.PageSize)
	log := make([]uint64, 3*gib/memory.PageSize/64)
	allocs := testing.AllocsPerRun(10, func() {
		v, _ := m.AppendVec(dst[:0], 4*gib, 65536)
		v, _ = m.AppendVec(v, 4096, 16)
		if len(v) != 2 {
			t.Fatal("AppendVec failed")
		}
		_, _ = m.WriteAt(page, 4*gib+8192)
		_, _ = m.ReadAt(page, 8192)
		m.MarkDirty(0, 10*memory.PageSize)
		_, _ = l.Collect(0, log)
	})
	if allocs != 0 {
		t.Errorf("%v allocations per run, want none", allocs)
	}
}

func BenchmarkBytes(b *testing.B) {
	m := newMemory(b, 5*gib)
	for _, addr := range []uint64{4096, 4*gib + 4096} {
		b.Run(fmt.Sprintf("%#x", addr), func(b *testing.B) {
			for b.Loop() {
				if _, err := m.Bytes(addr, 4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkMarkDirty(b *testing.B) {
	m := newMemory(b, 5*gib)
	for logs := range 3 {
		b.Run(fmt.Sprintf("logs=%d", logs), func(b *testing.B) {
			for b.Loop() {
				m.MarkDirty(4*gib+4096, 4096)
			}
		})
		defer m.EnableDirty().Close()
	}
}
