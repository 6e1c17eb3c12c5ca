package blktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/fault"
	"github.com/kvmlet/kvmlet/iov"
)

// run is one run on one disk.
type run struct {
	tb     testing.TB
	o      Options
	seed   uint64
	rand   *rand.Rand // of what prepares the run; workers have their own
	random []byte     // bytes to write, none of them zero

	ctx    context.Context
	cancel context.CancelFunc
	failed atomic.Bool

	dev    *blk.Device
	faults *fault.Disk // nil in runs without

	model  []byte // what the disk holds. Each byte has one owner at a time, who alone looks at it
	first  []byte // what it held at first
	size   int64  // of the disk; the first worker's
	limit  int64  // never is the disk smaller than this
	told   atomic.Int64
	bitmap *blk.Bitmap // what changed, as the disk says
	saved  *blk.Bitmap // what was moved there from bitmap
	backup *backup     // nil in some runs
	group  *blk.ThrottleGroup
}

// init reads the disk and adds what is to follow its changes.
func (r *run) init() {
	r.size = r.dev.Size()
	r.model = make([]byte, max(r.size, r.o.MaxSize))
	copy(r.model[:r.size], r.o.Content)
	r.first = bytes.Clone(r.model)
	r.limit = r.size
	if r.o.MaxSize > 0 {
		r.limit = r.size / 2 / r.o.SizeUnit * r.o.SizeUnit
		if r.o.Workers == 1 && r.rand.IntN(2) == 0 {
			r.limit = 0
		}
	}
	if r.rand.IntN(2) == 0 { // not always: with copy on read, it leaves nothing to copy
		r.compare("at first")
	}
	var err, err2 error
	r.bitmap, err = r.dev.AddBitmap("blktest", blk.SectorSize<<r.rand.IntN(9))
	r.saved, err2 = r.dev.AddBitmap("blktest-saved", blk.SectorSize<<r.rand.IntN(9))
	if err = errors.Join(err, err2); err != nil {
		r.fatalf("%v", err)
	}
	r.saved.Disable()
	r.told.Store(r.size)
	r.dev.OnResize(func(size int64) { r.told.Store(size) })
	if r.group, err = blk.NewThrottleGroup(blk.Throttle{IOPSTotal: blk.Rate{Avg: 5000}}); err != nil {
		r.fatalf("%v", err)
	}
	if r.rand.IntN(2) == 0 {
		r.backup = &backup{run: r, bytes: make([]byte, r.limit), done: make([]bool, (r.limit+backupUnit-1)/backupUnit)}
		if _, err := r.dev.NotifyBeforeWrite(r.ctx, r.backup.beforeWrite); err != nil {
			r.fatalf("%v", err)
		}
	}
	r.addFaults()
}

// apart is a run whose workers own bytes of their own: in pieces of any length, side by side, so that they share blocks
// and clusters, but no byte. The first one resizes the disk and owns what may come and go.
func (r *run) apart() {
	workers := make([]*worker, r.o.Workers)
	for i := range workers {
		workers[i] = r.newWorker(i)
		defer putArena(workers[i].arena)
	}
	for off := int64(0); off < r.limit; {
		n := r.limit - off
		if len(workers) > 1 {
			n = min(1+r.rand.Int64N(1<<r.rand.IntN(18)), n)
		}
		w := workers[r.rand.IntN(len(workers))]
		w.spans = append(w.spans, span{off, n})
		off += n
	}
	workers[0].resizes = r.o.MaxSize > 0
	var wg sync.WaitGroup
	for _, w := range workers {
		wg.Go(func() {
			for range r.o.Ops {
				if r.failed.Load() {
					return
				}
				w.step()
			}
		})
	}
	wg.Wait()
	r.finish()
}

// together is a run in rounds: in each, all workers have requests for the same bytes under way at once. Afterwards every
// byte must be what one of them made of it.
func (r *run) together() {
	workers := make([]*worker, r.o.Workers)
	for i := range workers {
		workers[i] = r.newWorker(i)
		defer putArena(workers[i].arena)
	}
	main := workers[0]
	main.spans = []span{{0, r.size}}
	for range max(r.o.Ops/4, 1) {
		at := main.pick(1 << 16)
		if main.rand.IntN(2) == 0 { // whole blocks, of which the workers then have whole ones and parts
			at = widen(at, main.spans[0], int64(r.dev.Limits().RequestAlign))
		}
		old := bytes.Clone(r.model[at.off:][:at.n])
		changes := make([][]change, len(workers))
		reads := make([][]view, len(workers))
		var wg sync.WaitGroup
		for i, w := range workers {
			wg.Go(func() { changes[i], reads[i] = w.batch(at, 1+w.rand.IntN(3)) })
		}
		wg.Wait()
		if r.failed.Load() {
			return
		}
		var all []change
		for _, c := range changes {
			all = append(all, c...)
		}
		for i, w := range workers {
			w.checkViews(reads[i], at, old, all)
		}
		main.resolve(at, all)
		if !bytes.Equal(main.readBack(at), r.model[at.off:][:at.n]) {
			main.fatalf("%d bytes at %d: two reads in a row differ", at.n, at.off)
		}
	}
	r.finish()
}

// finish compares everything at the end.
func (r *run) finish() {
	if r.failed.Load() {
		return
	}
	r.clearFaults()
	r.compare("in the end")
	r.compareBitmap()
	if r.backup != nil {
		r.backup.compare()
	}
	s := r.dev.Stats()
	if r.faults == nil && s.LastError != nil {
		r.fatalf("without any fault, the last error was %v", s.LastError)
	}
}

func (r *run) fatalf(format string, args ...any) {
	r.tb.Errorf("seed %d: %s", r.seed, fmt.Sprintf(format, args...))
	r.failed.Store(true)
	runtime.Goexit()
}

// compare reads the whole disk.
func (r *run) compare(when string) {
	if got := r.dev.Size(); got != r.size {
		r.fatalf("%s: the disk has %d bytes, want %d", when, got, r.size)
	}
	buf := make([]byte, 1<<18)
	for off := int64(0); off < r.size; off += int64(len(buf)) {
		b := buf[:min(int64(len(buf)), r.size-off)]
		if _, err := r.dev.ReadVecAt(iov.Of(b), off); err != nil {
			r.fatalf("%s: read %d bytes at %d: %v", when, len(b), off, err)
		}
		if want := r.model[off:][:len(b)]; !bytes.Equal(b, want) {
			r.fatalf("%s: %s", when, difference(b, want, off))
		}
	}
}

// difference describes the first byte that differs.
func difference(got, want []byte, off int64) string {
	i := iov.Mismatch(iov.Of(got), iov.Of(want))
	if i < 0 {
		return "no difference"
	}
	last := i
	for j := range got {
		if got[j] != want[j] {
			last = j
		}
	}
	show := func(b []byte) string { return strings.ReplaceAll(fmt.Sprintf("% x", b[i:min(i+8, len(b))]), " ", "") }
	return fmt.Sprintf("byte %d (%#x) is %s, want %s; the last that differs is %d",
		off+int64(i), off+int64(i), show(got), show(want), off+int64(last))
}

// compareBitmap checks that every byte that changed is marked. What was resized away and back is not looked at.
func (r *run) compareBitmap() {
	r.saved.Merge(r.bitmap)
	if r.bitmap.Frozen() {
		if err := r.bitmap.Commit(); err != nil {
			r.fatalf("%v", err)
		}
		r.saved.Merge(r.bitmap)
	}
	const unit = blk.SectorSize
	for off := int64(0); off < r.limit; off += unit {
		n := min(unit, r.limit-off)
		if !bytes.Equal(r.model[off:][:n], r.first[off:][:n]) && !r.saved.Get(off) {
			r.fatalf("bytes at %d changed and are not marked in the bitmap", off)
		}
	}
}

// backupUnit is how many bytes a backup copies at once.
const backupUnit = 64 << 10

// backup copies old bytes before they change, as a backup job does: in the end it holds the disk as it was at first.
type backup struct {
	run *run

	mu    sync.Mutex // held while old bytes are copied
	bytes []byte     // up to the run's limit
	done  []bool     // by unit
}

func (b *backup) beforeWrite(_ context.Context, old iov.ReaderAt, off, n int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := off / backupUnit; i*backupUnit < min(off+n, int64(len(b.bytes))); i++ {
		if err := b.copy(old, i); err != nil {
			return err
		}
	}
	return nil
}

func (b *backup) copy(old iov.ReaderAt, unit int64) error {
	if b.done[unit] {
		return nil
	}
	at := b.bytes[unit*backupUnit:]
	if _, err := old.ReadVecAt(iov.Of(at[:min(len(at), backupUnit)]), unit*backupUnit); err != nil {
		return fmt.Errorf("backup before a write: %w", err)
	}
	b.done[unit] = true
	return nil
}

func (b *backup) compare() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.done {
		if err := b.copy(b.run.dev, int64(i)); err != nil {
			b.run.fatalf("%v", err)
		}
	}
	if want := b.run.first[:len(b.bytes)]; !bytes.Equal(b.bytes, want) {
		b.run.fatalf("the backup by NotifyBeforeWrite: %s", difference(b.bytes, want, 0))
	}
}
