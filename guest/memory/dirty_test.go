package memory_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/guest/memory"
)

const page = memory.PageSize

// collect returns the guest addresses of the pages that l hands out.
func collect(t *testing.T, m *memory.Memory, l *memory.DirtyLog) []uint64 {
	t.Helper()
	var addrs []uint64
	for i, r := range m.Regions() {
		log := make([]uint64, (len(r.Bytes)/page+63)/64)
		n, err := l.Collect(i, log)
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for p := range uint64(len(log) * 64) {
			if log[p/64]&(1<<(p%64)) != 0 {
				addrs = append(addrs, r.Addr+p*page)
				found++
			}
		}
		if n != found {
			t.Errorf("Collect says %d pages of region %d, its bitmap has %d", n, i, found)
		}
	}
	return addrs
}

func TestMarkDirty(t *testing.T) {
	t.Parallel()
	const size = 3*gib + 100*page
	m := newMemory(t, size)
	l := m.EnableDirty()
	defer l.Close()
	const low, high, top = 3 * gib, 4 * gib, 4*gib + 100*page
	for _, c := range []struct {
		addr, n uint64
		want    []uint64
	}{
		{0, 0, nil},
		{0, 1, []uint64{0}},
		{page - 1, 1, []uint64{0}},
		{page - 1, 2, []uint64{0, page}},
		{63 * page, 2 * page, []uint64{63 * page, 64 * page}},
		{64 * page, page, []uint64{64 * page}},
		{low - 1, 1, []uint64{low - page}},
		{low - 1, 2, []uint64{low - page}},
		{low, gib, nil},
		{high - 1, 2, []uint64{high}},
		{low - 1, gib + 2, []uint64{low - page, high}},
		{top - 1, 1, []uint64{top - page}},
		{top - 1, math.MaxUint64, []uint64{top - page}},
		{top, math.MaxUint64, nil},
		{math.MaxUint64, 1, nil},
		{math.MaxUint64, math.MaxUint64, nil},
	} {
		m.MarkDirty(c.addr, c.n)
		if got := collect(t, m, l); !slices.Equal(got, c.want) {
			t.Errorf("MarkDirty(%#x, %#x) marks %#x, want %#x", c.addr, c.n, got, c.want)
		}
		if got := collect(t, m, l); got != nil {
			t.Errorf("a second collection still finds %#x", got)
		}
	}
	m.MarkDirty(1, math.MaxUint64)
	if got := collect(t, m, l); len(got) != size/page {
		t.Errorf("marking everything marks %d pages of %d", len(got), size/page)
	}
}

func TestDirtyModel(t *testing.T) {
	t.Parallel()
	const pages = 1000 // not a multiple of 64
	m := newMemory(t, pages*page)
	l := m.EnableDirty()
	defer l.Close()
	rng := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		want := map[uint64]bool{}
		for range rng.IntN(4) {
			addr, n := rng.Uint64N(pages*page), rng.Uint64N(200*page)
			m.MarkDirty(addr, n)
			for a := addr; a < min(addr+n, pages*page); a++ {
				if a == addr || a%page == 0 {
					want[a/page*page] = true
				}
				a |= page - 1
			}
		}
		got := collect(t, m, l)
		if len(got) != len(want) {
			t.Fatalf("%d pages are dirty, want %d", len(got), len(want))
		}
		for _, a := range got {
			if !want[a] {
				t.Fatalf("page %#x is dirty without a write", a)
			}
		}
	}
}

func TestDirtyLogsAreIndependent(t *testing.T) {
	t.Parallel()
	m := newMemory(t, 64*mib)
	m.MarkDirty(0, page) // before anyone listens
	a := m.EnableDirty()
	m.MarkDirty(page, page)
	b := m.EnableDirty()
	if _, err := m.WriteAt([]byte{1}, 2*page); err != nil {
		t.Fatal(err)
	}
	if err := m.MergeDirty(0, append([]uint64{1 << 5}, make([]uint64, 64*mib/page/64-1)...)); err != nil {
		t.Fatal(err)
	}
	if got := collect(t, m, b); !slices.Equal(got, []uint64{2 * page, 5 * page}) {
		t.Errorf("the later log has %#x", got)
	}
	if got := collect(t, m, a); !slices.Equal(got, []uint64{page, 2 * page, 5 * page}) {
		t.Errorf("the earlier log has %#x", got)
	}
	a.Close()
	m.MarkDirty(7*page, 1)
	if got := collect(t, m, b); !slices.Equal(got, []uint64{7 * page}) {
		t.Errorf("after the other log closed there is %#x", got)
	}
	if got := collect(t, m, a); got != nil {
		t.Errorf("a closed log still records %#x", got)
	}
	for range 2 {
		a.Close()
		b.Close()
	}
	m.MarkDirty(8*page, 1)
	if got := collect(t, m, m.EnableDirty()); got != nil {
		t.Errorf("a new log starts with %#x", got)
	}
}

func TestCollectKeepsWhatIsSet(t *testing.T) {
	t.Parallel()
	m := newMemory(t, 64*page)
	l := m.EnableDirty()
	defer l.Close()
	m.MarkDirty(3*page, page)
	log := []uint64{1<<1 | 1<<3}
	if n, err := l.Collect(0, log); n != 1 || err != nil || log[0] != 1<<1|1<<3 {
		t.Errorf("Collect = %d, %v, bitmap %#x", n, err, log[0])
	}
}

func TestDirtyBadBitmap(t *testing.T) {
	t.Parallel()
	m := newMemory(t, 65*page)
	l := m.EnableDirty()
	defer l.Close()
	for _, c := range []struct {
		region, words int
		want          error
	}{
		{0, 0, memory.ErrSize}, {0, 1, memory.ErrSize}, {0, 3, memory.ErrSize},
		{-1, 2, memory.ErrUnmapped}, {1, 2, memory.ErrUnmapped},
	} {
		name := fmt.Sprintf("region %d, %d words", c.region, c.words)
		if _, err := l.Collect(c.region, make([]uint64, c.words)); !errors.Is(err, c.want) {
			t.Errorf("Collect of %s: %v, want %v", name, err, c.want)
		}
		if err := m.MergeDirty(c.region, make([]uint64, c.words)); !errors.Is(err, c.want) {
			t.Errorf("MergeDirty of %s: %v, want %v", name, err, c.want)
		}
	}
}

// Writers, collectors and logs that come and go at once lose no page: each page is found by a log that was there all
// along.
func TestDirtyConcurrent(t *testing.T) {
	t.Parallel()
	const pages, writers = 4096, 4
	m := newMemory(t, pages*page)
	l := m.EnableDirty()
	defer l.Close()
	var wg sync.WaitGroup
	for w := range uint64(writers) {
		wg.Go(func() {
			for p := w; p < pages; p += writers {
				m.MarkDirty(p*page, page)
			}
		})
	}
	wg.Go(func() {
		for range 100 {
			m.EnableDirty().Close()
		}
	})
	all := make([]uint64, pages/64)
	found := 0
	gather := func() {
		n, err := l.Collect(0, all)
		if err != nil {
			t.Error(err)
		}
		found += n
	}
	for range 50 {
		gather()
	}
	wg.Wait()
	gather()
	if found != pages {
		t.Errorf("%d pages were collected, want %d", found, pages)
	}
	for i, w := range all {
		if w != math.MaxUint64 {
			t.Errorf("word %d of the collected bitmap is %#x", i, w)
		}
	}
}
