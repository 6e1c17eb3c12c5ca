package iov

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// chooser supplies a test with decisions: random ones in the property test, the input's in the fuzz target.
type chooser interface {
	intN(n int) int // 0 to n-1; n is at least 1
	done() bool     // no more decisions worth making
}

type randomChooser struct {
	*rand.Rand
	steps int
}

func (c *randomChooser) intN(n int) int { return c.IntN(n) }

func (c *randomChooser) done() bool {
	c.steps--
	return c.steps < 0
}

type bytesChooser []byte

func (c *bytesChooser) intN(n int) int {
	x := 0
	for k := n - 1; k > 0; k >>= 8 {
		b := byte(0)
		if len(*c) > 0 {
			b, *c = (*c)[0], (*c)[1:]
		}
		x = x<<8 | int(b)
	}
	return x % n
}

func (c *bytesChooser) done() bool { return len(*c) == 0 }

// model is a Vec over an arena beside its plain description: the arena position of each of its bytes.
type model struct {
	arena []byte
	vec   Vec
	pos   []int
	count int // elements that are not empty
}

// newModel makes a Vec of count elements. Some are empty; where they lie is chosen, so that they may overlap.
func newModel(c chooser, arena []byte, count int) *model {
	m := &model{arena: arena}
	longest := 1 + c.intN(64)
	for range count {
		n := 0
		if c.intN(5) > 0 {
			n = c.intN(longest + 1)
		}
		m.add(c.intN(len(arena)-n+1), n)
	}
	return m
}

func (m *model) add(at, n int) {
	m.vec = m.vec.Append(m.arena[at : at+n])
	for i := range n {
		m.pos = append(m.pos, at+i)
	}
	if n > 0 {
		m.count++
	}
}

func (m *model) bytes() []byte { return m.at(m.arena, 0, len(m.pos)) }

// at gathers n model bytes from off on, out of a given arena.
func (m *model) at(arena []byte, off, n int) []byte {
	out := make([]byte, n)
	for i := range out {
		out[i] = arena[m.pos[off+i]]
	}
	return out
}

// span chooses an offset and a length, now and then outside of m, and says whether m holds them.
func (m *model) span(c chooser) (off, n int, ok bool) {
	size := len(m.pos)
	switch c.intN(12) {
	case 0:
		bad := [][2]int{{-1, 0}, {0, -1}, {size + 1, 0}, {0, size + 1}, {size, 1}, {math.MinInt, math.MinInt},
			{math.MaxInt, 1}, {1, math.MaxInt}, {math.MaxInt, math.MaxInt}, {math.MinInt, math.MaxInt}, {size, -1}}
		b := bad[c.intN(len(bad))]
		return b[0], b[1], false
	case 1:
		return size, 0, true
	case 2:
		return 0, size, true
	}
	off = c.intN(size + 1)
	return off, c.intN(size - off + 1), true
}

// sameBytes reports whether v describes the same bytes of memory as the model's from off to off+n.
func (m *model) sameBytes(v Vec, off, n int) error {
	if v.Size() != n {
		return fmt.Errorf("size is %d, want %d", v.Size(), n)
	}
	base := RangeOf(m.arena).addr()
	i := off
	for _, r := range v {
		for k := range r.Len() {
			if got := int(r.addr()-base) + k; got != m.pos[i] {
				return fmt.Errorf("byte %d is arena byte %d, want %d", i-off, got, m.pos[i])
			}
			i++
		}
	}
	return nil
}

const arenaSize = 4096

func newArena(c chooser) []byte {
	arena := make([]byte, arenaSize)
	seed := uint64(c.intN(math.MaxUint16))
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range arena {
		if rng.IntN(4) > 0 { // enough zeroes for runs of them
			arena[i] = byte(rng.IntN(4))
		}
	}
	return arena
}

// checkOps compares chosen operations on a Vec of count elements with what its model says.
func checkOps(t *testing.T, c chooser, count int) {
	t.Helper()
	m := newModel(c, newArena(c), count)
	for !c.done() {
		before := slices.Clone(m.arena)
		elems := slices.Clone(m.vec)
		want := slices.Clone(m.arena) // changed below as the operation should change the arena
		op := c.intN(11)
		off, n, ok := m.span(c)
		fail := func(format string, args ...any) {
			t.Helper()
			t.Fatalf("op %d, %d elements, %d bytes, range %d+%d: %s", op, count, len(m.pos), off, n,
				fmt.Sprintf(format, args...))
		}
		rangeErr := func(err error) bool {
			t.Helper()
			if ok != (err == nil) || !ok && !errors.Is(err, ErrRange) {
				fail("error %v, in range: %v", err, ok)
			}
			return ok
		}
		switch op {
		case 0: // gather, and past the end
			buf := bytes.Repeat([]byte{0xee}, min(max(n, 0), arenaSize)+c.intN(10))
			inside := off >= 0 && off <= len(m.pos)
			got, err := m.vec.CopyTo(buf, off)
			if inside != (err == nil) {
				fail("CopyTo: %v", err)
			}
			if inside {
				k := min(len(buf), len(m.pos)-off)
				if got != k || !bytes.Equal(buf[:k], m.at(m.arena, off, k)) || bytes.Count(buf[k:], []byte{0xee}) != len(buf)-k {
					fail("CopyTo of %d gives %d", len(buf), got)
				}
			}
		case 1: // scatter, and past the end
			buf := bytes.Repeat([]byte{byte(c.intN(256)), byte(c.intN(256)), 7}, min(max(n, 0), arenaSize)/3+1)
			inside := off >= 0 && off <= len(m.pos)
			got, err := m.vec.CopyFrom(off, buf)
			if inside != (err == nil) {
				fail("CopyFrom: %v", err)
			}
			if inside {
				k := min(len(buf), len(m.pos)-off)
				if got != k {
					fail("CopyFrom of %d gives %d", len(buf), got)
				}
				for i := range k {
					want[m.pos[off+i]] = buf[i]
				}
			}
		case 2:
			b := byte(c.intN(3))
			if rangeErr(m.vec.Fill(off, n, b)) {
				for i := range n {
					want[m.pos[off+i]] = b
				}
			}
		case 3:
			got, err := m.vec.IsZeroRange(off, n)
			if rangeErr(err) && got != (len(bytes.Trim(m.at(m.arena, off, n), "\x00")) == 0) {
				fail("IsZeroRange is %v", got)
			}
			if got := m.vec.IsZero(); got != (len(bytes.Trim(m.bytes(), "\x00")) == 0) {
				fail("IsZero is %v", got)
			}
		case 4:
			s, err := m.vec.Slice(off, n)
			if rangeErr(err) {
				if err := m.sameBytes(s, off, n); err != nil {
					fail("Slice: %v", err)
				}
			}
			k, err := m.vec.Count(off, n)
			if rangeErr(err) && k != len(s) {
				fail("Count is %d, the slice has %d", k, len(s))
			}
			if k, err := m.vec.Count(0, len(m.pos)); k != m.count || err != nil {
				fail("Count of everything is %d, %v, want %d", k, err, m.count)
			}
		case 5:
			head, tail := make([]byte, c.intN(3)), make([]byte, c.intN(3))
			first := []byte{1, 2, 3}
			dst, err := m.vec.AppendPadded(Of(first), head, off, n, tail)
			if !rangeErr(err) {
				if len(dst) != 1 {
					fail("a failed AppendPadded returns %d elements", len(dst))
				}
				break
			}
			middle, _ := m.vec.Slice(off, n)
			parts := Of(first)
			if len(head) > 0 {
				parts = parts.Append(head)
			}
			parts = append(parts, middle...)
			if len(tail) > 0 {
				parts = parts.Append(tail)
			}
			if !slices.Equal(dst, parts) {
				fail("AppendPadded gives %d elements, want %d", len(dst), len(parts))
			}
		case 6:
			v := slices.Clone(m.vec)
			got, undo := v.DiscardFrontUndo(n)
			k := min(max(n, 0), len(m.pos))
			if got != k {
				fail("DiscardFront gives %d, want %d", got, k)
			}
			if err := m.sameBytes(v, k, len(m.pos)-k); err != nil {
				fail("DiscardFront: %v", err)
			}
			rest := len(m.pos) - k
			back, undoBack := v.DiscardBackUndo(off)
			if k := min(max(off, 0), rest); back != k {
				fail("DiscardBack of %d gives %d, want %d", off, back, k)
			}
			undoBack.Restore(&v)
			undo.Restore(&v)
			if !slices.Equal(v, m.vec) {
				fail("Restore does not restore")
			}
		case 7:
			v := slices.Clone(m.vec)
			got, undo := v.DiscardBackUndo(n)
			k := min(max(n, 0), len(m.pos))
			if got != k {
				fail("DiscardBack gives %d, want %d", got, k)
			}
			if err := m.sameBytes(v, 0, len(m.pos)-k); err != nil {
				fail("DiscardBack: %v", err)
			}
			undo.Restore(&v)
			if !slices.Equal(v, m.vec) {
				fail("Restore does not restore")
			}
		case 8:
			buf := make([]byte, len(m.pos))
			clone, err := m.vec.Clone(buf)
			if err != nil || len(clone) != len(m.vec) {
				fail("Clone gives %d elements, %v", len(clone), err)
			}
			for i := range clone {
				if clone[i].Len() != m.vec[i].Len() {
					fail("element %d of the clone has %d bytes, want %d", i, clone[i].Len(), m.vec[i].Len())
				}
			}
			if at := Mismatch(clone, m.vec); at >= 0 {
				fail("the clone differs at %d", at)
			}
			// The same scatter must leave both the same, which takes the same overlaps.
			data := newArena(c)[:min(len(m.pos), arenaSize)]
			for _, v := range []Vec{clone, m.vec} {
				if _, err := v.CopyFrom(0, data); err != nil {
					fail("CopyFrom: %v", err)
				}
			}
			if at := Mismatch(clone, m.vec); at >= 0 {
				fail("after the same write the clone differs at %d", at)
			}
			for i, b := range data {
				want[m.pos[i]] = b
			}
		case 9: // to a vector elsewhere, which overlaps itself as it likes
			o := newModel(c, newArena(c), 1+c.intN(50))
			offO, nO, _ := o.span(c)
			wantO := slices.Clone(o.arena)
			got, err := Copy(o.vec, offO, m.vec, off, min(n, nO))
			inside := off >= 0 && off <= len(m.pos) && offO >= 0 && offO <= len(o.pos) && n >= 0 && nO >= 0
			if inside != (err == nil) {
				fail("Copy to offset %d: %v", offO, err)
			}
			if inside {
				k := min(n, nO, len(m.pos)-off, len(o.pos)-offO)
				if got != k {
					fail("Copy gives %d, want %d", got, k)
				}
				for i := range k {
					wantO[o.pos[offO+i]] = m.arena[m.pos[off+i]]
				}
			}
			if !bytes.Equal(o.arena, wantO) {
				fail("Copy writes the wrong bytes")
			}
		case 10:
			other := m.bytes()
			at := -1
			if len(other) > 0 && c.intN(3) > 0 {
				at = c.intN(len(other))
				other[at] ^= byte(1 + c.intN(255))
			}
			cut := c.intN(len(other) + 1)
			divided := Of(other[:cut], nil, other[cut:])
			if got := Mismatch(m.vec, divided); got != at {
				fail("Mismatch is %d, want %d", got, at)
			}
			if at >= 0 {
				cut = c.intN(at + 1)
			}
			wantCut := cut
			if cut == len(other) {
				wantCut = -1
			}
			if got := Mismatch(Of(other[:cut]), m.vec); got != wantCut {
				fail("Mismatch with the first %d bytes is %d", cut, got)
			}
		}
		if !bytes.Equal(m.arena, want) {
			for i := range want {
				if m.arena[i] != want[i] {
					fail("arena byte %d is %#x, was %#x, want %#x", i, m.arena[i], before[i], want[i])
				}
			}
		}
		if !slices.Equal(m.vec, elems) {
			fail("the vector itself changed")
		}
	}
}

func TestModel(t *testing.T) {
	t.Parallel()
	for _, count := range []int{0, 1, 2, 3, 7, 64, 1023, 1024, 1025, 2000} {
		t.Run(fmt.Sprint(count), func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(40) {
				c := &randomChooser{rand.New(rand.NewPCG(seed, uint64(count))), 100}
				if count > 64 {
					c.steps = 12
				}
				checkOps(t, c, count)
			}
		})
	}
}

func FuzzModel(f *testing.F) {
	for _, count := range []uint16{0, 1, 3, 40, 1024} {
		rng := rand.New(rand.NewPCG(uint64(count), 9))
		script := make([]byte, 300)
		for i := range script {
			script[i] = byte(rng.Uint32())
		}
		f.Add(count, script)
	}
	f.Fuzz(func(t *testing.T, count uint16, script []byte) {
		c := bytesChooser(script)
		checkOps(t, &c, int(count)%2001)
	})
}
