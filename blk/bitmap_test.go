package blk

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// bitmapModel is a Bitmap made of one bool per granule.
type bitmapModel struct {
	size, unit int64
	content    []bool
	successor  []bool // nil where not frozen
	enabled    bool
}

func newBitmapModel(size, unit int64) *bitmapModel {
	return &bitmapModel{size: size, unit: unit, content: make([]bool, (size+unit-1)/unit), enabled: true}
}

// each calls f for each granule that a range touches, and says whether the range covers it.
func (m *bitmapModel) each(off, n int64, f func(i int64, whole bool)) {
	if n <= 0 {
		return
	}
	end := off + n
	if n > math.MaxInt64-max(off, 0) {
		end = math.MaxInt64
	}
	for i := range int64(len(m.content)) {
		from, to := i*m.unit, min((i+1)*m.unit, m.size)
		if off < to && end > from {
			f(i, off <= from && end >= to)
		}
	}
}

func (m *bitmapModel) mark(off, n int64) {
	to := m.content
	switch {
	case !m.enabled:
		return
	case m.successor != nil:
		to = m.successor
	}
	m.each(off, n, func(i int64, _ bool) { to[i] = true })
}

func (m *bitmapModel) clear(off, n int64) {
	m.each(off, n, func(i int64, whole bool) {
		if whole {
			m.content[i] = false
		}
	})
}

func (m *bitmapModel) resize(size int64) {
	m.size = size
	for _, s := range []*[]bool{&m.content, &m.successor} {
		if *s != nil {
			*s = append(*s, make([]bool, (size+m.unit-1)/m.unit)...)[:(size+m.unit-1)/m.unit]
			*s = slices.Clip(*s)
		}
	}
}

// runs lists the runs of equal granules.
func (m *bitmapModel) runs(marked bool) (runs [][2]int64) {
	for i := 0; i < len(m.content); {
		j := i
		for j < len(m.content) && m.content[j] == m.content[i] {
			j++
		}
		if m.content[i] == marked {
			runs = append(runs, [2]int64{int64(i) * m.unit, min(int64(j)*m.unit, m.size) - int64(i)*m.unit})
		}
		i = j
	}
	return runs
}

func collect(next func(off int64) (int64, int64, bool)) (runs [][2]int64) {
	for off := int64(0); ; {
		start, n, ok := next(off)
		if !ok {
			return runs
		}
		runs = append(runs, [2]int64{start, n})
		off = start + n
	}
}

func (m *bitmapModel) compare(t *testing.T, b *Bitmap) {
	t.Helper()
	var count int64
	for _, r := range m.runs(true) {
		count += r[1]
	}
	if got := b.Count(); got != count {
		t.Fatalf("Count = %d, want %d", got, count)
	}
	if got, want := collect(b.Next), m.runs(true); !slices.Equal(got, want) {
		t.Fatalf("marked runs are %v, want %v", got, want)
	}
	if got, want := collect(b.NextClear), m.runs(false); !slices.Equal(got, want) {
		t.Fatalf("unmarked runs are %v, want %v", got, want)
	}
	if b.Enabled() != m.enabled || b.Frozen() != (m.successor != nil) {
		t.Fatalf("enabled %v, frozen %v; want %v, %v", b.Enabled(), b.Frozen(), m.enabled, m.successor != nil)
	}
	for _, off := range []int64{-1, m.size, math.MinInt64, math.MaxInt64} {
		if b.Get(off) {
			t.Fatalf("Get(%d) = true outside of the disk", off)
		}
	}
}

// probe compares at one offset.
func (m *bitmapModel) probe(t *testing.T, b *Bitmap, off int64) {
	t.Helper()
	if off < 0 || off >= m.size {
		return
	}
	i := off / m.unit
	if got := b.Get(off); got != m.content[i] {
		t.Fatalf("Get(%d) = %v", off, got)
	}
	next := b.Next
	if !m.content[i] {
		next = b.NextClear
	}
	end := i
	for end < int64(len(m.content)) && m.content[end] == m.content[i] {
		end++
	}
	if start, n, ok := next(off); !ok || start != off || start+n != min(end*m.unit, m.size) {
		t.Fatalf("the run at %d is %d, %d, %v; want to %d", off, start, n, ok, min(end*m.unit, m.size))
	}
}

// step does one operation to both.
func (m *bitmapModel) step(t *testing.T, b *Bitmap, op byte, off, n int64) {
	t.Helper()
	wantFrozen := func(err error, frozen bool) bool {
		t.Helper()
		if bad := frozen != (m.successor != nil); bad != errors.Is(err, ErrFrozen) {
			t.Fatalf("error %v", err)
		}
		return err == nil
	}
	switch op % 16 {
	case 0, 1, 2, 3, 4:
		b.mark(off, n)
		m.mark(off, n)
	case 5, 6, 7:
		b.Clear(off, n)
		m.clear(off, n)
	case 8:
		b.Mark(off, n)
		m.each(off, n, func(i int64, _ bool) { m.content[i] = true })
	case 9:
		if wantFrozen(b.Freeze(), false) {
			m.successor = make([]bool, len(m.content))
		}
	case 10:
		if wantFrozen(b.Commit(), true) {
			m.content, m.successor = m.successor, nil
		}
	case 11:
		if wantFrozen(b.Reclaim(), true) {
			for i, marked := range m.successor {
				m.content[i] = m.content[i] || marked
			}
			m.successor = nil
		}
	case 12:
		if m.enabled = n%4 != 0; m.enabled {
			b.Enable()
		} else {
			b.Disable()
		}
	case 13:
		size := max(n, 0) % (m.unit * 300)
		if err := b.resize(size); err != nil {
			t.Fatal(err)
		}
		m.resize(size)
	case 14:
		other, err := newBitmap("other", m.size+off%2000, minGranularity<<(n&7))
		if err != nil {
			t.Fatal(err)
		}
		other.Mark(off, n)
		b.Merge(other)
		if start, n, ok := other.Next(0); ok {
			m.each(start, n, func(i int64, _ bool) { m.content[i] = true })
		}
	case 15:
		if b.SetAll(); n%2 == 0 {
			b.ClearAll()
		}
		for i := range m.content {
			m.content[i] = n%2 != 0
		}
	}
	m.probe(t, b, off)
}

func TestBitmapModel(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 1))
		unit := int64(minGranularity) << r.IntN(8)
		size := r.Int64N(unit * 20000)
		b, err := newBitmap("b", size, unit)
		if err != nil {
			t.Fatal(err)
		}
		m := newBitmapModel(size, unit)
		for i := range 400 {
			off := r.Int64N(size+1) - 10
			n := r.Int64N(1 << r.IntN(24))
			switch r.IntN(40) {
			case 0:
				n = math.MaxInt64
			case 1:
				off, n = math.MinInt64, math.MaxInt64
			case 2:
				off = math.MaxInt64
			case 3:
				n = -n
			}
			m.step(t, b, byte(r.IntN(256)), off, n)
			if i%20 == 0 {
				m.compare(t, b)
			}
		}
		m.compare(t, b)
	}
}

func FuzzBitmap(f *testing.F) {
	f.Add(uint8(0), uint32(100_000), []byte{0, 1, 0, 4, 9, 0, 0, 0, 5, 1, 0, 2, 10, 0, 0, 0})
	f.Add(uint8(3), uint32(1<<22), []byte{15, 1, 0, 1, 6, 200, 3, 90, 13, 0, 0, 77, 14, 9, 9, 9, 11, 0, 0, 0})
	f.Fuzz(func(t *testing.T, shift uint8, size uint32, ops []byte) {
		unit := int64(minGranularity) << (shift % 12)
		limit := int64(size) % (unit * 10000)
		b, err := newBitmap("b", limit, unit)
		if err != nil {
			t.Fatal(err)
		}
		m := newBitmapModel(limit, unit)
		for ops = ops[:min(len(ops), 2000)]; len(ops) >= 4; ops = ops[4:] {
			off := (int64(ops[1]) | int64(ops[2])<<8) * unit / 16
			m.step(t, b, ops[0], off, int64(ops[3])*int64(ops[3])*unit/100)
		}
		m.compare(t, b)
	})
}

// TestBitmapSparse searches a bitmap with few marks and all levels.
func TestBitmapSparse(t *testing.T) {
	const unit, size = 4096, 4096 * (1<<30 + 5)
	b, err := newBitmap("b", size, unit)
	if err != nil {
		t.Fatal(err)
	}
	want := [][2]int64{{0, unit}, {unit * 63, 2 * unit}, {unit * (1 << 18), unit}, {unit*(1<<24) - unit, 2 * unit}, {size - unit, unit}}
	for _, r := range want {
		b.mark(r[0]+17, r[1]-20)
	}
	for range 1000 {
		if got := collect(b.Next); !slices.Equal(got, want) {
			t.Fatalf("runs are %v, want %v", got, want)
		}
	}
	for i, r := range want {
		b.Clear(r[0], r[1])
		if got := collect(b.Next); !slices.Equal(got, want[i+1:]) {
			t.Fatalf("runs are %v, want %v", got, want[i+1:])
		}
	}
	if b.Count() != 0 {
		t.Errorf("Count = %d", b.Count())
	}
}

// TestBitmapConcurrent has goroutines that mark and clear neighbouring granules, which share words at every level. What
// one marked it must find at once, whatever the others clear.
func TestBitmapConcurrent(t *testing.T) {
	const unit, granules, workers, rounds = 512, 64 * 64 * 3, 8, 3000
	b, err := newBitmap("b", granules*unit, unit)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	left := make([][]bool, workers)
	for w := range workers {
		left[w] = make([]bool, granules)
		wg.Go(func() {
			r := rand.New(rand.NewPCG(7, uint64(w)))
			for range rounds {
				i := int64(r.IntN(granules/workers)*workers + w)
				if r.IntN(2) == 0 {
					b.Clear(i*unit, unit)
					left[w][i] = false
					continue
				}
				b.mark(i*unit, unit)
				left[w][i] = true
				if start, _, ok := b.Next(i * unit); !ok || start != i*unit {
					t.Errorf("Next(%d) = %d, %v right after a mark there", i*unit, start, ok)
				}
			}
		})
	}
	wg.Wait()
	m := newBitmapModel(granules*unit, unit)
	for i := range m.content {
		m.content[i] = left[i%workers][i]
	}
	m.compare(t, b)
}

// TestBitmapOneWord does the same to a word that is empty most of the time, which is when the levels above change.
func TestBitmapOneWord(t *testing.T) {
	const unit, rounds = 512, 100_000
	b, err := newBitmap("b", 64*64*3*unit, unit)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range int64(3) {
		wg.Go(func() {
			off := (64*64 + 5 + w) * unit
			for range rounds {
				b.mark(off, unit)
				if start, _, ok := b.Next(off); !ok || start != off {
					t.Errorf("Next(%d) = %d, %v right after a mark there", off, start, ok)
					return
				}
				b.Clear(off, unit)
			}
		})
	}
	wg.Wait()
	if _, _, ok := b.Next(0); ok || b.Count() != 0 {
		t.Errorf("%d bytes are marked in the end", b.Count())
	}
}

// TestBitmapClearAbove sets a bit at each moment of a clear, which the two before hit too seldom.
func TestBitmapClearAbove(t *testing.T) {
	const granules, bit = 64 * 64 * 64, 64*64 + 5
	for level := range 3 {
		s := newDirtyBits(granules*512, 9)
		s.set(bit, bit)
		w := int64(bit / 64)
		for l := range level + 1 {
			s.levels[l][w].Store(0)
			if l < level {
				w /= 64
			}
		}
		s.set(bit+1, bit+1)
		s.clearAbove(level, w)
		if got := s.next(0); got != bit+1 {
			t.Errorf("set after a clear reached level %d: next = %d, want %d", level, got, bit+1)
		}
	}
}

// TestBitmapNoneLost marks from many goroutines while others freeze, commit, reclaim and resize: every mark must be in
// what was committed or in what is left.
func TestBitmapNoneLost(t *testing.T) {
	const unit, granules, workers = 512, 200_000, 4
	b, err := newBitmap("b", granules*unit, unit)
	if err != nil {
		t.Fatal(err)
	}
	saved, err := newBitmap("saved", granules*unit, unit)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var stop atomic.Bool
	for w := range workers {
		wg.Go(func() {
			for i := w; i < granules; i += workers {
				b.mark(int64(i)*unit, 1)
			}
		})
	}
	var copier sync.WaitGroup
	copier.Go(func() {
		r := rand.New(rand.NewPCG(3, 3))
		for !stop.Load() {
			if err := b.Freeze(); err != nil {
				t.Error(err)
			}
			if r.IntN(2) == 0 {
				if err := b.resize(granules * unit); err != nil {
					t.Error(err)
				}
			}
			var end func() error
			if r.IntN(2) == 0 {
				saved.Merge(b)
				end = b.Commit
			} else {
				end = b.Reclaim
			}
			if err := end(); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	stop.Store(true)
	copier.Wait()
	saved.Merge(b)
	if got := saved.Count(); got != granules*unit {
		t.Errorf("%d of %d bytes are marked", got, granules*unit)
	}
}

func TestBitmapErrors(t *testing.T) {
	for _, tt := range []struct {
		name              string
		size, granularity int64
		want              string
	}{
		{"", 512, 512, "name of 0 bytes"},
		{strings.Repeat("x", maxBitmapName+1), 512, 512, "name of 1024 bytes"},
		{"b", 512, 256, "granularity 256"},
		{"b", 512, 3 << 10, "granularity 3072"},
		{"b", 512, maxGranularity * 2, "granularity 4294967296"},
		{"b", 512, -1 << 63, "granularity -"},
		{"b", 1 << 50, 512, "use larger ones"},
	} {
		if _, err := newBitmap(tt.name, tt.size, tt.granularity); !errors.Is(err, ErrBitmap) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%d bytes by %d: %v, want %q", tt.size, tt.granularity, err, tt.want)
		}
	}
	b, err := newBitmap(strings.Repeat("x", maxBitmapName), 1024, 512)
	if err != nil {
		t.Fatal(err)
	}
	b.SetAll()
	if err := b.resize(1 << 50); !errors.Is(err, ErrBitmap) || b.Count() != 1024 {
		t.Errorf("resize = %v; %d bytes are marked", err, b.Count())
	}
	if b.Name() != strings.Repeat("x", maxBitmapName) || b.Granularity() != 512 {
		t.Errorf("name %q, granularity %d", b.Name(), b.Granularity())
	}
}

func TestBitmapAllocs(t *testing.T) {
	b, err := newBitmap("b", 1<<30, 4096)
	if err != nil {
		t.Fatal(err)
	}
	off := int64(0)
	if n := testing.AllocsPerRun(1000, func() {
		b.mark(off, 65536)
		off += 77777
	}); n != 0 {
		t.Errorf("%v allocations per mark", n)
	}
}

func BenchmarkBitmapMark(b *testing.B) {
	m, err := newBitmap("b", 1<<30, 65536)
	if err != nil {
		b.Fatal(err)
	}
	off := int64(0)
	for b.Loop() {
		m.mark(off, 4096)
		off = (off + 4096*977) & (1<<30 - 1)
	}
}

func BenchmarkBitmapNext(b *testing.B) {
	m, err := newBitmap("b", 1<<42, 4096)
	if err != nil {
		b.Fatal(err)
	}
	m.mark(1<<42-1, 1)
	for b.Loop() {
		if _, _, ok := m.Next(0); !ok {
			b.Fatal("not found")
		}
	}
}
