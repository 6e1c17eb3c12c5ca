package iov

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
)

// Elements whose lengths add up to more than an int are told, not wrapped.
func TestSizeOverflow(t *testing.T) {
	t.Parallel()
	r := RangeOf(make([]byte, 1))
	r.n = math.MaxInt // only counted here, never touched
	for _, v := range []Vec{{r, r}, {r, r, r}, {r, r, r, r, r}} {
		if got := v.Size(); got != math.MaxInt {
			t.Errorf("Size of %d huge elements is %d", len(v), got)
		}
		if k, err := v.Count(math.MaxInt, math.MaxInt); k != 1 || err != nil {
			t.Errorf("Count of the second element is %d, %v", k, err)
		}
		if _, err := v.AppendPadded(nil, make([]byte, 1), 0, math.MaxInt, nil); !errors.Is(err, ErrRange) {
			t.Errorf("AppendPadded beyond an int: %v, want ErrRange", err)
		}
		if _, err := ReadAt(-1, v, 1); !errors.Is(err, ErrRange) {
			t.Errorf("ReadAt beyond 2^63: %v, want ErrRange", err)
		}
		if _, err := WriteAt(-1, v, math.MaxInt64); !errors.Is(err, ErrRange) {
			t.Errorf("WriteAt beyond 2^63: %v, want ErrRange", err)
		}
	}
}

func TestZeroVec(t *testing.T) {
	t.Parallel()
	for _, v := range []Vec{nil, {}, {Range{}}, Of(nil, []byte{})} {
		if v.Size() != 0 || !v.IsZero() || Mismatch(v, nil) != -1 {
			t.Errorf("%v is not empty", v)
		}
		if n, err := v.CopyTo(make([]byte, 5), 0); n != 0 || err != nil {
			t.Errorf("CopyTo from nothing is %d, %v", n, err)
		}
		if s, err := v.Slice(0, 0); len(s) != 0 || err != nil {
			t.Errorf("Slice of nothing is %v, %v", s, err)
		}
		if n, err := ReadAt(-1, v, 0); n != 0 || err != nil { // no call is made
			t.Errorf("ReadAt of nothing is %d, %v", n, err)
		}
		if c, err := v.Clone(nil); len(c) != len(v) || err != nil {
			t.Errorf("Clone of nothing is %v, %v", c, err)
		}
	}
	v := Of([]byte("abc"))
	Undo{}.Restore(&v)
	if v.Size() != 3 {
		t.Error("the zero Undo changes a vector")
	}
}

func TestSliceKeepsElementsApart(t *testing.T) {
	t.Parallel()
	v := Of([]byte("abc"), []byte("def"))
	s, err := v.Slice(0, 6)
	if err != nil {
		t.Fatal(err)
	}
	s.DiscardFront(1)
	s.DiscardBack(1)
	if v.Size() != 6 || s.Size() != 4 {
		t.Errorf("after discarding from the slice the sizes are %d and %d", v.Size(), s.Size())
	}
}

// A failed append must not disturb what dst's array holds beyond its length in a way that shows in dst.
func TestAppendSliceFails(t *testing.T) {
	t.Parallel()
	v := Of([]byte("abc"))
	dst := Of([]byte("x"), []byte("y"))
	got, err := v.AppendSlice(dst, 1, 3)
	if !errors.Is(err, ErrRange) || !slices.Equal(got, dst) {
		t.Errorf("AppendSlice = %v, %v", got, err)
	}
}

func TestCloneTooSmall(t *testing.T) {
	t.Parallel()
	b := []byte("abcdefgh")
	v := Of(b[0:4], b[2:6], b[3:5]) // six different bytes
	if _, err := v.Clone(make([]byte, 5)); !errors.Is(err, ErrRange) {
		t.Errorf("Clone into 5 bytes: %v, want ErrRange", err)
	}
	buf := make([]byte, 6)
	c, err := v.Clone(buf)
	if err != nil {
		t.Fatal(err)
	}
	if string(buf) != "abcdef" || Mismatch(c, v) != -1 {
		t.Errorf("the clone's buffer holds %q", buf)
	}
}

// Copy within one piece is a move, as the built-in copy is.
func TestCopyOverSelf(t *testing.T) {
	t.Parallel()
	b := []byte("0123456789")
	if n, err := Copy(Of(b), 2, Of(b), 0, 8); n != 8 || err != nil || string(b) != "0101234567" {
		t.Errorf("Copy = %d, %v, %q", n, err, b)
	}
}

func TestIsZeroFindsEveryByte(t *testing.T) {
	t.Parallel()
	for n := range 300 {
		b := make([]byte, n)
		if !Of(b).IsZero() {
			t.Fatalf("%d zeroes are not zero", n)
		}
		for i := range b {
			b[i] = 1
			if Of(b).IsZero() {
				t.Fatalf("byte %d of %d goes unseen", i, n)
			}
			b[i] = 0
		}
	}
}

func TestMismatchFindsEveryByte(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 7, 8, 9, 1023, 1024, 1025, 3000} {
		a, b := make([]byte, n), make([]byte, n)
		for i := range b {
			b[i] = 0x80
			if got := Mismatch(Of(a), Of(b)); got != i {
				t.Fatalf("Mismatch of %d bytes is %d, want %d", n, got, i)
			}
			b[i] = 0
		}
	}
}

func TestDump(t *testing.T) {
	t.Parallel()
	data := []byte("kvmlet\x00\x7f 0123456789\xff")
	for _, c := range []struct {
		limit int
		want  string
	}{
		{100, "> 00000000  6b 76 6d 6c 65 74 00 7f  20 30 31 32 33 34 35 36  |kvmlet.. 0123456|\n" +
			"> 00000010  37 38 39 ff                                       |789.|\n"},
		{2, "> 00000000  6b 76                                             |kv|\n> 18 more bytes\n"},
		{0, "> 20 more bytes\n"},
		{-1, "> 20 more bytes\n"},
	} {
		var out strings.Builder
		if err := Of(data[:3], nil, data[3:17], data[17:]).Dump(&out, "> ", c.limit); err != nil {
			t.Fatal(err)
		}
		if out.String() != c.want {
			t.Errorf("limit %d:\n%swant\n%s", c.limit, out.String(), c.want)
		}
	}
	var out bytes.Buffer
	if err := (Vec)(nil).Dump(&out, "", 10); err != nil || out.Len() != 0 {
		t.Errorf("the dump of nothing is %q, %v", out.String(), err)
	}
}

func TestNoAllocations(t *testing.T) {
	arena := make([]byte, 1<<20)
	v := make(Vec, 0, 2000)
	for i := range 256 {
		v = v.Append(arena[i*4096 : i*4096+4096])
	}
	flat := make([]byte, len(arena))
	dst := make(Vec, 0, 512)
	for name, op := range map[string]func() error{
		"Append":   func() error { dst = dst[:0].Append(flat); return nil },
		"Size":     func() error { v.Size(); return nil },
		"CopyTo":   func() error { _, err := v.CopyTo(flat[100:], 100); return err },
		"CopyFrom": func() error { _, err := v.CopyFrom(100, flat[100:]); return err },
		"Fill":     func() error { return v.Fill(5, 10000, 1) },
		"Copy":     func() error { _, err := Copy(v, 7, v, 4100, 10000); return err },
		"Count":    func() error { _, err := v.Count(100, 10000); return err },
		"AppendSlice": func() (err error) {
			dst, err = v.AppendSlice(dst[:0], 100, 10000)
			return err
		},
		"AppendPadded": func() (err error) {
			dst, err = v.AppendPadded(dst[:0], flat[:512], 100, 10000, flat[:512])
			return err
		},
		"IsZero":      func() error { v.IsZero(); return nil },
		"IsZeroRange": func() error { _, err := v.IsZeroRange(20000, 20000); return err },
		"Mismatch":    func() error { Mismatch(v, v); return nil },
		"Discard": func() error {
			w := v
			_, front := w.DiscardFrontUndo(5000)
			_, back := w.DiscardBackUndo(5000)
			back.Restore(&w)
			front.Restore(&w)
			return nil
		},
	} {
		allocs := testing.AllocsPerRun(20, func() {
			if err := op(); err != nil {
				t.Fatal(err)
			}
		})
		if allocs != 0 {
			t.Errorf("%s: %v allocations, want none", name, allocs)
		}
	}
}
