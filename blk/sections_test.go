package blk_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/fault"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/iov"
)

// resizing is a Backend whose Truncate waits to be let go on.
type resizing struct {
	*memory
	inside atomic.Int32
	most   atomic.Int32
	goOn   chan struct{}
}

func (r *resizing) Truncate(size int64) error {
	if n := r.inside.Add(1); n > r.most.Load() {
		r.most.Store(n)
	}
	<-r.goOn
	r.checkOpen()
	r.size = size
	r.inside.Add(-1)
	return nil
}

// Resizes exclude each other, and sections of others; Close waits for one.
func TestResizeIsAlone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &resizing{memory: newMemory(mib), goOn: make(chan struct{})}
		d := newDevice(t, r, blk.Options{})
		if err := d.Drain(t.Context()); err != nil {
			t.Fatal(err)
		}
		var resizes sync.WaitGroup
		for i := range int64(3) {
			resizes.Go(func() {
				if err := d.Truncate(t.Context(), (i+1)*512); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if r.inside.Load() != 0 {
			t.Error("the backend was called in a drained section")
		}
		d.Undrain()
		synctest.Wait()
		var section atomic.Bool
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			if err := d.Drain(t.Context()); err != nil {
				t.Error(err)
				return
			}
			section.Store(true)
			d.Undrain()
		}()
		synctest.Wait()
		if section.Load() {
			t.Error("a section began during a resize")
		}
		close(r.goOn)
		resizes.Wait()
		<-drained
		if n := r.most.Load(); n != 1 {
			t.Errorf("%d resizes at once", n)
		}
		if d.Size() != r.Size() {
			t.Errorf("the disk says %d bytes, its backend %d", d.Size(), r.Size())
		}

		r.goOn = make(chan struct{})
		ended := make(chan error, 2)
		go func() { ended <- d.Truncate(t.Context(), 512) }()
		synctest.Wait()
		go func() { ended <- d.Close() }()
		synctest.Wait()
		if r.closed.Load() {
			t.Error("the backend was closed during a resize")
		}
		close(r.goOn)
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		if r.misused.Load() || !r.closed.Load() {
			t.Error("the resize met a closed backend")
		}
	})
}

// Whatever the order in which disks of a chain are named, those above are drained first: their requests need those below.
func TestDrainAllOfAChain(t *testing.T) {
	t.Parallel()
	var chain []*blk.Device
	var f *fault.Disk
	for range 3 {
		o := mem.Options{}
		if n := len(chain); n > 0 {
			o.Backing = chain[n-1]
		}
		m, err := mem.New(mib, o)
		if err != nil {
			t.Fatal(err)
		}
		f = fault.New(m, fault.Options{Observe: true})
		chain = append(chain, newDevice(t, f, blk.Options{}))
	}
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 0, 2}} {
		f.Break(blk.EventRead, "top")
		read := make(chan error, 1)
		go func() { read <- chain[2].Do(context.Background(), read0()) }()
		if err := f.Wait(t.Context(), "top"); err != nil {
			t.Fatal(err)
		}
		drained := make(chan error, 1)
		go func() {
			undrain, err := blk.DrainAll(t.Context(), chain[order[0]], chain[order[1]], chain[order[2]])
			if err == nil {
				undrain()
			}
			drained <- err
		}()
		f.Resume("top")
		if err := errors.Join(<-drained, <-read); err != nil {
			t.Errorf("%v: %v", order, err)
		}
	}
	if err := chain[2].Close(); err != nil { // which closes the others
		t.Error(err)
	}
}

func read0() *blk.Request { return read(0, make([]byte, 512)) }

// A disk that is cut and grows again has new bytes: a backup sees the old ones first, and a bitmap marks the new ones.
func TestCutAndGrown(t *testing.T) {
	t.Parallel()
	s := newStrict(t, mib, blk.Limits{})
	old := noise(1, mib)
	copy(s.data, old)
	d := s.open(blk.Options{})
	b, err := d.AddBitmap("b", 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	kept := make([]byte, mib)
	if _, err := d.NotifyBeforeWrite(t.Context(), func(_ context.Context, before iov.ReaderAt, off, n int64) error {
		_, err := before.ReadVecAt(iov.Of(kept[off:off+n]), off)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{mib / 2, mib} {
		if err := d.Truncate(t.Context(), size); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(kept[mib/2:], old[mib/2:]) {
		t.Error("the bytes cut off were not kept")
	}
	if start, n, ok := b.Next(0); !ok || start != mib/2 || n != mib/2 {
		t.Errorf("marked: %d bytes at %d, %v", n, start, ok)
	}
}

// A copy on read has its clusters for itself: a write to one of them waits, one beside them does not.
func TestCopyOnReadSerialises(t *testing.T) {
	t.Parallel()
	const cluster = 64 << 10
	below := newStrict(t, mib, blk.Limits{}).open(blk.Options{})
	m, err := mem.New(mib, mem.Options{Backing: below, Limits: blk.Limits{Cluster: cluster}})
	if err != nil {
		t.Fatal(err)
	}
	f := fault.New(m, fault.Options{Observe: true})
	d := newDevice(t, f, blk.Options{CopyOnRead: true})
	f.Break(blk.EventCopyOnRead, "copy")
	ended := make(chan string, 3)
	do := func(name string, r *blk.Request) {
		go func() {
			if err := d.Do(context.Background(), r); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			ended <- name
		}()
	}
	do("read", read(cluster+100, make([]byte, 512)))
	if err := f.Wait(t.Context(), "copy"); err != nil {
		t.Fatal(err)
	}
	do("overlapping", write(2*cluster-512, pattern(512)))
	do("beside", write(2*cluster, pattern(512)))
	if name := <-ended; name != "beside" {
		t.Errorf("%s went on first", name)
	}
	f.Resume("copy")
	<-ended
	<-ended
	got := make([]byte, 512)
	if err := d.Do(t.Context(), read(2*cluster-512, got)); err != nil || !bytes.Equal(got, pattern(512)) {
		t.Errorf("the write was lost: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// Flushes share the one under way or the next; where that fails, all that it was for fail, and later ones try again.
func TestSharedFlushes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &flushing{memory: newMemory(mib), goOn: make(chan error)}
		d := newDevice(t, b, blk.Options{})
		first := make(chan error, 1)
		go func() { first <- d.Flush() }()
		synctest.Wait() // it is with the backend
		if err := d.Do(t.Context(), write(0, pattern(512))); err != nil {
			t.Fatal(err)
		}
		results := make(chan error, 5)
		for range 5 {
			go func() { results <- d.Flush() }()
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancelled := make(chan error, 1)
		go func() { cancelled <- d.FlushContext(ctx) }()
		synctest.Wait()
		cancel()
		if err := <-cancelled; !errors.Is(err, context.Canceled) {
			t.Errorf("a cancelled flush: %v", err)
		}
		b.goOn <- nil
		if err := <-first; err != nil {
			t.Error(err)
		}
		b.goOn <- errMedium // the next one fails
		b.goOn <- nil       // and the one after it serves the other four
		failed := 0
		for range 5 {
			if err := <-results; errors.Is(err, errMedium) {
				failed++
			} else if err != nil {
				t.Error(err)
			}
		}
		if n := b.flushes.Load(); failed != 1 || n != 3 {
			t.Errorf("%d failed, %d reached the backend", failed, n)
		}
		if err := d.FlushContext(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("a flush that was cancelled before: %v", err)
		}
	})
}

// flushing is a Backend whose flushes wait for what they are to return.
type flushing struct {
	*memory
	goOn chan error
}

func (f *flushing) Flush() error {
	f.flushes.Add(1)
	return <-f.goOn
}

// What is known of bytes does not depend on the alignment that was asked for.
func TestStatusFinerThanAlignment(t *testing.T) {
	t.Parallel()
	b := newStrict(t, mib, blk.Limits{RequestAlign: 512, Cluster: 4096})
	b.gap = make([]byte, mib/4096)
	b.gap[1] = 1
	copy(b.data[4096:], pattern(4096))
	d := b.open(blk.Options{RequestAlign: 64 << 10})
	for off := int64(0); off < 16384; off += 1000 {
		s, n, err := d.BlockStatus(t.Context(), off, 16384)
		data := off >= 4096 && off < 8192
		if err != nil || s.Flags&blk.StatusData != 0 != data || n < 1 || off < 4096 && off+n > 4096 {
			t.Errorf("at %d: %+v for %d, %v", off, s, n, err)
		}
	}
	if err := d.MakeZero(t.Context(), 0); err != nil || !bytes.Equal(b.data, make([]byte, mib)) {
		t.Errorf("not all zero: %v", err)
	}
}
