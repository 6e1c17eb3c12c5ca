package qcow2

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// faulty is a file whose requests fail every now and then.
type faulty struct {
	memory
	mu  sync.Mutex
	rnd *rand.Rand
	one int // in one of how many; 0: never
}

var errFault = errors.New("no luck")

func (f *faulty) fail() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.one > 0 && f.rnd.IntN(f.one) == 0 {
		return errFault
	}
	return nil
}

func (f *faulty) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	if err := f.fail(); err != nil {
		return 0, err
	}
	return f.memory.ReadVecAt(dst, off)
}

func (f *faulty) WriteVecAt(src iov.Vec, off int64) (int, error) {
	if err := f.fail(); err != nil {
		return 0, err
	}
	return f.memory.WriteVecAt(src, off)
}

func (f *faulty) Flush() error { return f.fail() }

func (f *faulty) Truncate(size int64) error {
	if err := f.fail(); err != nil {
		return err
	}
	return f.memory.Truncate(size)
}

// TestFaults: a request that fails leaves its bytes old or new and all others alone, and the image stays sound.
func TestFaults(t *testing.T) {
	t.Parallel()
	for i, s := range []shape{
		{512, Compat11, 64, false, false}, {4096, Compat11, 16, false, true}, {65536, Compat010, 16, false, false},
		{4096, Compat11, 16, true, false},
	} {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			const size = 1 << 20
			rnd := rand.New(rand.NewPCG(uint64(i), 3))
			f := &faulty{rnd: rand.New(rand.NewPCG(uint64(i), 2))}
			mustCreate(t, device(t, f), s.create(size))
			open := Options{L2Cache: 1, RefcountCache: 1}
			im := mustOpen(t, device(t, f), open)
			if err := im.CreateSnapshot("a", 0, 0); err != nil && s.bits > 1 {
				t.Fatal(err)
			}
			f.one = 12
			may := make([][]byte, size/512) // what a sector may hold: the last may be the only one
			for k := range may {
				may[k] = []byte{0}
			}
			failed := 0
			for n := range 1500 {
				b := byte(n%250) + 1
				off := rnd.Int64N(size/512) * 512
				n := min((rnd.Int64N(1<<rnd.IntN(7))+1)*512, size-off)
				var err error
				switch rnd.IntN(8) {
				case 0:
					if im.Flush() != nil {
						failed++
					}
					continue
				case 1:
					b = 0
					if err = im.WriteZeroes(off, n, n%1024 == 0); errors.Is(err, blk.ErrUnsupported) {
						_, err = im.WriteVecAt(iov.Of(fill(0, n)), off)
					}
				case 2:
					off = off &^ (s.cluster - 1)
					n = s.cluster
					err = im.WriteCompressed(iov.Of(fill(b, n)), off)
				case 3:
					got := fill(0xee, n)
					if _, err := im.ReadVecAt(iov.Of(got), off); err != nil {
						failed++
						continue
					}
					for k := range got {
						if !slices.Contains(may[(off+int64(k))/512], got[k]) {
							t.Fatalf("byte %#x is %#x, want one of %x", off+int64(k), got[k], may[(off+int64(k))/512])
						}
					}
					continue
				default:
					_, err = im.WriteVecAt(iov.Of(fill(b, n)), off)
				}
				if errors.Is(err, ErrCorrupt) {
					t.Fatal(err)
				}
				for k := off / 512; k < (off+n)/512; k++ {
					if err == nil {
						may[k] = may[k][:0]
					}
					may[k] = append(may[k], b)
				}
				if err != nil {
					failed++
				}
			}
			f.mu.Lock()
			f.one = 0
			f.mu.Unlock()
			if failed == 0 {
				t.Error("nothing failed")
			}
			verify := func(im *Image) {
				t.Helper()
				got := readAt(t, im, 0, size)
				for k := range got {
					if !slices.Contains(may[k/512], got[k]) {
						t.Fatalf("byte %#x is %#x, want one of %x", k, got[k], may[k/512])
					}
				}
				r, err := Check(context.Background(), im, RepairNone)
				if err != nil || r.Corruptions > 0 {
					t.Fatalf("check after %d failures: %+v, %v", failed, r, err)
				}
			}
			verify(im)
			mustClose(t, im)
			im = mustOpen(t, device(t, f), open)
			verify(im)
		})
	}
}
