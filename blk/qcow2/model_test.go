package qcow2

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// slot is what one operation of the model test touches: workers own different ones, which lie side by side in clusters.
const slot = 4096

// modelWorker does count operations on the slots that are w modulo workers, and keeps model up to date.
func modelWorker(im *Image, model []byte, w, workers, count int, rnd *rand.Rand) error {
	slots := len(model) / slot
	for i := range count {
		k := rnd.IntN(slots/workers)*workers + w
		at := int64(k * slot)
		own := model[at : at+slot]
		off := rnd.IntN(slot)
		n := rnd.IntN(slot-off) + 1
		if rnd.IntN(2) == 0 {
			off, n = 0, slot
		}
		b := byte(rnd.IntN(256))
		switch op := rnd.IntN(16); {
		case op < 7:
			// In two elements, so that vectors are cut.
			p := fill(b, int64(n))
			if _, err := im.WriteVecAt(iov.Of(p[:n/3], p[n/3:]), at+int64(off)); err != nil {
				return err
			}
			copy(own[off:], p)
		case op < 11:
			got := make([]byte, n)
			if _, err := im.ReadVecAt(iov.Of(got[:n/2], got[n/2:]), at+int64(off)); err != nil {
				return err
			}
			if m := iov.Mismatch(iov.Of(got), iov.Of(own[off:off+n])); m >= 0 {
				return fmt.Errorf("operation %d of worker %d: byte %#x is %#x, want %#x", i, w, at+int64(off+m), got[m], own[off+m])
			}
		case op == 11:
			if err := im.Discard(at, slot); err != nil {
				return err
			}
			got := make([]byte, slot)
			if _, err := im.ReadVecAt(iov.Of(got), at); err != nil {
				return err
			}
			for s := range own {
				if got[s] != own[s] && got[s] != 0 {
					return fmt.Errorf("discard: byte %#x is %#x, was %#x", at+int64(s), got[s], own[s])
				}
			}
			copy(own, got)
		case op == 12:
			err := im.WriteZeroes(at, slot, rnd.IntN(2) == 0)
			if errors.Is(err, blk.ErrUnsupported) {
				_, err = im.WriteVecAt(iov.Of(make([]byte, slot)), at)
			}
			if err != nil {
				return err
			}
			clear(own)
		case op == 13 && im.cluster == slot:
			p := make([]byte, slot)
			for s := range p {
				p[s] = b + byte(s>>(rnd.IntN(3)+4))
			}
			if err := im.WriteCompressed(iov.Of(p), at); err != nil {
				return err
			}
			copy(own, p)
		case op == 14:
			if err := im.Flush(); err != nil {
				return err
			}
		case op == 15:
			if _, _, err := im.BlockStatus(at, slot); err != nil {
				return err
			}
		}
	}
	return nil
}

// TestModel compares images with plain arrays: workers write side by side, and between their turns the image is opened
// again, snapshots come and go, the disk changes its size.
func TestModel(t *testing.T) {
	t.Parallel()
	rounds, count := 12, 120
	if hosttest.Race {
		rounds = 6
	}
	for i, s := range []shape{
		{512, Compat11, 64, false, false}, {512, Compat010, 16, false, false}, {4096, Compat11, 16, false, true},
		{4096, Compat11, 16, true, false}, {65536, Compat11, 8, false, false}, {65536, Compat010, 16, false, false},
		{1 << 20, Compat11, 16, false, false},
	} {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			rnd := rand.New(rand.NewPCG(uint64(i), 1))
			const workers = 4
			m := &memory{}
			d := device(t, m)
			o := s.create(1 << 20)
			var base []byte
			open := Options{L2Cache: 1, RefcountCache: 1} // the smallest caches
			if i%2 == 0 {
				base = make([]byte, 768<<10)
				for k := range base {
					base[k] = byte(k >> 9)
				}
				o.BackingFile = "b"
				open.Backing = func(string, string) (*blk.Device, error) { return device(t, &memory{b: base}), nil }
			}
			mustCreate(t, d, o)
			im := mustOpen(t, d, open)
			model := make([]byte, 1<<20)
			copy(model, base)
			type saved struct {
				name  string
				model []byte
			}
			var snaps []saved
			for round := range rounds {
				var wg sync.WaitGroup
				for w := range workers {
					seed := rnd.Uint64()
					wg.Go(func() {
						if err := modelWorker(im, model, w, workers, count, rand.New(rand.NewPCG(seed, 0))); err != nil {
							t.Errorf("round %d: %v", round, err)
						}
					})
				}
				wg.Wait()
				if t.Failed() {
					return
				}
				wantBytes(t, fmt.Sprintf("round %d", round), readAt(t, im, 0, int64(len(model))), model)
				switch op := rnd.IntN(7); {
				case op <= 1:
					mustClose(t, im)
					d = device(t, &memory{b: m.b})
					m = d.Backend().(*memory)
					im = mustOpen(t, d, open)
				case op == 2:
					name := fmt.Sprint("s", round)
					if err := im.CreateSnapshot(name, 0, 0); err != nil {
						t.Fatal(err)
					}
					snaps = append(snaps, saved{name, append([]byte(nil), model...)})
				case op == 3 && len(snaps) > 0:
					s := snaps[rnd.IntN(len(snaps))]
					if err := im.ApplySnapshot(s.name); err != nil {
						t.Fatal(err)
					}
					model = append([]byte(nil), s.model...)
				case op == 4 && len(snaps) > 0:
					k := rnd.IntN(len(snaps))
					if err := im.DeleteSnapshot(snaps[k].name); err != nil {
						t.Fatal(err)
					}
					snaps = append(snaps[:k], snaps[k+1:]...)
				case s.compat == Compat11 || len(snaps) == 0:
					size := (rnd.Int64N(1<<20/slot/workers) + 32) * slot * workers
					if err := im.Truncate(size); err != nil {
						t.Fatal(err)
					}
					if size > int64(len(model)) {
						model = append(model, make([]byte, size-int64(len(model)))...)
					}
					model = model[:size:size]
				}
				if im.Size() != int64(len(model)) {
					t.Fatalf("round %d: size %d, want %d", round, im.Size(), len(model))
				}
				wantBytes(t, fmt.Sprintf("after round %d", round), readAt(t, im, 0, int64(len(model))), model)
				wantClean(t, im)
			}
			mustClose(t, im)
			if base == nil && len(m.b) > 0 {
				needQEMU(t)
				path := filepath.Join(t.TempDir(), "image")
				writeFile(t, path, m.b)
				qemuCheck(t, path)
				wantBytes(t, "QEMU's read", qemuRead(t, path), model)
			}
		})
	}
}
