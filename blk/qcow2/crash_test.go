package qcow2

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// recorder is a file in memory that remembers how it came about, so that it can be taken back to any moment.
type recorder struct {
	memory
	logMu   sync.Mutex
	base    []byte
	log     []change
	flushes []flushed
	room    []byte // for what killed and powerCut return, one at a time
}

// change is a write, or a new length.
type change struct {
	off  int64
	data []byte
	size int64 // of the file, if data is nil
}

// flushed is a flush: everything before from is stable once the log has come to done.
type flushed struct{ from, done int }

func (r *recorder) WriteVecAt(src iov.Vec, off int64) (int, error) {
	b := make([]byte, src.Size())
	_, _ = src.CopyTo(b, 0)
	n, err := r.memory.WriteVecAt(src, off)
	r.logMu.Lock()
	defer r.logMu.Unlock()
	r.log = append(r.log, change{off: off, data: b})
	return n, err
}

func (r *recorder) Flush() error {
	r.logMu.Lock()
	defer r.logMu.Unlock()
	r.flushes = append(r.flushes, flushed{len(r.log), len(r.log)})
	return nil
}

func (r *recorder) Truncate(size int64) error {
	r.logMu.Lock()
	r.log = append(r.log, change{size: size})
	r.logMu.Unlock()
	return r.memory.Truncate(size)
}

// at returns how far the log is.
func (r *recorder) at() int {
	r.logMu.Lock()
	defer r.logMu.Unlock()
	return len(r.log)
}

// start forgets how the file came about so far.
func (r *recorder) start() {
	r.logMu.Lock()
	defer r.logMu.Unlock()
	r.base, r.log, r.flushes = append([]byte(nil), r.b...), nil, nil
}

// apply adds one change to a file.
func apply(b []byte, c change) []byte {
	end := c.size
	if c.data != nil {
		end = max(c.off+int64(len(c.data)), int64(len(b)))
	}
	if end < int64(len(b)) {
		return b[:end]
	}
	old := int64(len(b))
	b = slices.Grow(b, int(end-old))[:end]
	clear(b[old:])
	copy(b[c.off:], c.data)
	return b
}

// killed returns the file as it is when the process is killed before change k: the host keeps what was written.
func (r *recorder) killed(k int) []byte {
	if r.room == nil {
		r.room = make([]byte, 16<<20)
	}
	b := append(r.room[:0], r.base...)
	for _, c := range r.log[:k] {
		b = apply(b, c)
	}
	return b
}

// powerCut returns the file as it may be when the host loses power after change k-1, before a flush that follows it: what
// was flushed is there, and of the rest any sectors.
func (r *recorder) powerCut(k int, rnd *rand.Rand) []byte {
	stable := 0
	for _, f := range r.flushes {
		if f.done < k {
			stable = max(stable, f.from)
		}
	}
	b := r.killed(stable)
	keep := rnd.IntN(5)
	for _, c := range r.log[stable:k] {
		if c.data == nil {
			if rnd.IntN(2) == 0 {
				b = apply(b, c)
			}
			continue
		}
		for at := int64(0); at < int64(len(c.data)); at += 512 {
			if rnd.IntN(5) >= keep {
				b = apply(b, change{off: c.off + at, data: c.data[at:min(at+512, int64(len(c.data)))]})
			}
		}
	}
	return b
}

// past is what a disk held at the last flush, and what was written since.
type past struct {
	at     int // in the log, when the flush was done
	disk   []byte
	writes []pastWrite
}

type pastWrite struct {
	at     int // in the log, before it began
	off, n int64
	b      byte
}

// verify checks a disk: each sector as it was at the last flush before k, or as a write since made it.
func verify(t *testing.T, k int, history []*past, got []byte) {
	t.Helper()
	last := 0
	for i, p := range history {
		if p.at < k {
			last = i
		}
	}
	may := make(map[int64][]byte) // by sector
	for _, p := range history[last:] {
		for _, w := range p.writes {
			if w.at <= k {
				for s := w.off / 512; s < (w.off+w.n)/512; s++ {
					may[s] = append(may[s], w.b)
				}
			}
		}
	}
	want := history[last].disk
sectors:
	for s := range int64(len(got)) / 512 {
		sector := got[s*512 : (s+1)*512]
		if string(sector) == string(want[s*512:(s+1)*512]) {
			continue
		}
		for _, b := range may[s] {
			if string(sector) == string(fill(b, 512)) {
				continue sectors
			}
		}
		t.Fatalf("crash before change %d: sector %d is %x..., was %x... at the last flush, written since: %x", k, s, sector[:4],
			want[s*512:s*512+4], may[s])
	}
}

// work writes to an image at random and returns what must be there after a crash.
func work(t *testing.T, im *Image, r *recorder, rnd *rand.Rand, count int) []*past {
	size := im.Size()
	now := readAt(t, im, 0, size)
	history := []*past{{disk: append([]byte(nil), now...)}}
	for i := range count {
		last := history[len(history)-1]
		off := rnd.Int64N(size/512) * 512
		n := min((rnd.Int64N(1<<rnd.IntN(7))+1)*512, size-off)
		w := pastWrite{r.at(), off, n, byte(i%250) + 1}
		switch op := rnd.IntN(12); op {
		case 0, 1:
			if err := im.Flush(); err != nil {
				t.Fatal(err)
			}
			history = append(history, &past{at: r.at(), disk: append([]byte(nil), now...)})
			continue
		case 2:
			w.b = 0
			last.writes = append(last.writes, w)
			if err := im.Discard(off, n); err != nil {
				t.Fatal(err)
			}
			copy(now[off:], readAt(t, im, off, n))
			continue
		case 3:
			w.b = 0
			last.writes = append(last.writes, w)
			if err := im.WriteZeroes(off, n, i%2 == 0); err == nil {
				clear(now[off : off+n])
				continue
			}
			writeAt(t, im, off, fill(0, n))
		case 4:
			w.off, w.n = off&^(im.cluster-1), im.cluster
			last.writes = append(last.writes, w)
			if err := im.WriteCompressed(iov.Of(fill(w.b, w.n)), w.off); err != nil {
				t.Fatal(err)
			}
		default:
			last.writes = append(last.writes, w)
			writeAt(t, im, off, fill(w.b, n))
		}
		copy(now[w.off:], fill(w.b, w.n))
	}
	return history
}

// TestCrash takes images back to every moment of their making and to what a power cut may leave of it.
func TestCrash(t *testing.T) {
	t.Parallel()
	for _, s := range []struct {
		shape
		size     int64
		snapshot bool
		cache    int64
		prefill  int64
		events   []blk.Event // which must happen
	}{
		{shape{512, Compat11, 64, false, false}, 3 << 20, false, 0, 1880 << 10, []blk.Event{"qcow2_reftable_update", "qcow2_reftable_grow"}},
		{shape{512, Compat010, 16, false, false}, 1 << 20, true, 1, 0, nil},
		{shape{4096, Compat11, 16, false, true}, 1 << 20, true, 0, 0, nil},
		{shape{4096, Compat11, 8, true, false}, 1 << 20, false, 0, 0, nil},
		{shape{65536, Compat11, 1, false, false}, 1 << 20, false, 0, 0, nil},
		{shape{1024, Compat11, 16, true, true}, 1 << 20, true, 1, 0, nil},
	} {
		t.Run(fmt.Sprint(s.shape, s.snapshot), func(t *testing.T) {
			t.Parallel()
			rnd := rand.New(rand.NewPCG(uint64(s.cluster), uint64(s.bits)))
			seen := make(map[blk.Event]int)
			r := &recorder{}
			r.events = func(e blk.Event) { seen[e]++ }
			mustCreate(t, device(t, r), s.create(s.size))
			o := Options{L2Cache: s.cache, RefcountCache: s.cache}
			im := mustOpen(t, device(t, r), o)
			writeAt(t, im, 0, fill(1, s.prefill))
			if s.snapshot {
				work(t, im, r, rnd, 40)
				if err := im.CreateSnapshot("one", 0, 0); err != nil {
					t.Fatal(err)
				}
			}
			if err := im.settle(); err != nil {
				t.Fatal(err)
			}
			r.start()
			history := work(t, im, r, rnd, 150)
			mustClose(t, im)
			end := len(r.log)
			t.Logf("%d changes, %d flushes, %v", end, len(r.flushes), seen)
			for _, e := range s.events {
				if seen[e] == 0 {
					t.Errorf("%s never happened", e)
				}
			}

			check := func(k int, b []byte, what string) {
				t.Helper()
				m := &memory{b: b}
				im, err := Open(device(t, m), o)
				if err != nil {
					t.Fatalf("%s before change %d: open: %v", what, k, err)
				}
				defer im.Close()
				rep, err := Check(context.Background(), im, RepairNone)
				if err != nil || rep.Corruptions > 0 {
					t.Fatalf("%s before change %d of %d: %v\n%v", what, k, end, err, rep.Problems)
				}
				verify(t, k, history, readAt(t, im, 0, s.size))
			}
			step := max(end/60, 1)
			if hosttest.Race {
				step *= 5
			}
			for k := 0; k <= end; k += 1 + rnd.IntN(step) {
				check(k, r.killed(k), "killed")
				for range 2 {
					check(k, r.powerCut(k, rnd), "power cut")
				}
			}
			if s.lazy {
				return // QEMU's check does not look at the dirty bit
			}
			for range 3 {
				path := filepath.Join(t.TempDir(), "image")
				if err := os.WriteFile(path, r.powerCut(rnd.IntN(end), rnd), 0o600); err != nil {
					t.Fatal(err)
				}
				if out, err := tryQEMU(t, "qemu-img", "check", "-f", "qcow2", path); err != nil && exitCode(err) != 3 { // 3: leaks
					t.Fatalf("qemu-img check: %v\n%s", err, out)
				}
			}
		})
	}
}

func exitCode(err error) int {
	if e, ok := err.(interface{ ExitCode() int }); ok {
		return e.ExitCode()
	}
	return -1
}

var _ blk.Truncater = (*recorder)(nil)

// TestCrashParallel is TestCrash with several writers at once, for the metadata only.
func TestCrashParallel(t *testing.T) {
	t.Parallel()
	for i, s := range []shape{{512, Compat11, 64, false, false}, {4096, Compat11, 16, false, true}, {16384, Compat010, 16, false, false}} {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			const size, workers = 512 << 10, 4
			rnd := rand.New(rand.NewPCG(uint64(i), 5))
			r := &recorder{}
			mustCreate(t, device(t, r), s.create(size))
			im := mustOpen(t, device(t, r), Options{L2Cache: 1, RefcountCache: 1})
			if err := im.CreateSnapshot("a", 0, 0); err != nil {
				t.Fatal(err)
			}
			r.start()
			model := make([]byte, size)
			var wg sync.WaitGroup
			for w := range workers {
				seed := rnd.Uint64()
				wg.Go(func() {
					if err := modelWorker(im, model, w, workers, 60, rand.New(rand.NewPCG(seed, 0))); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			mustClose(t, im)
			step := 1
			if hosttest.Race {
				step = 10
			}
			for k := rnd.IntN(step); k <= len(r.log); k += step {
				for cut := range 2 {
					b := r.killed(k)
					if cut == 1 {
						b = r.powerCut(k, rnd)
					}
					im := mustOpen(t, device(t, &memory{b: b}), Options{})
					rep, err := Check(context.Background(), im, RepairNone)
					if err != nil || rep.Corruptions > 0 {
						t.Fatalf("before change %d of %d: %v\n%v", k, len(r.log), err, rep.Problems)
					}
					mustClose(t, im)
				}
			}
		})
	}
}
