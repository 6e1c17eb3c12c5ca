package blk_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/iov"
)

// A backup keeps what was there before every change, whatever changes it, even while the disk is being drained.
func TestNotifyBeforeWrite(t *testing.T) {
	t.Parallel()
	s := newStrict(t, mib, blk.Limits{RequestAlign: 4096})
	old := noise(1, mib)
	copy(s.data, old)
	d := s.open(blk.Options{})

	kept := make([]byte, mib)
	var draining sync.WaitGroup
	remove, err := d.NotifyBeforeWrite(t.Context(), func(_ context.Context, before iov.ReaderAt, off, n int64) error {
		draining.Go(func() {
			if err := d.Drain(context.Background()); err != nil {
				t.Error(err)
				return
			}
			d.Undrain()
		})
		got, err := before.ReadVecAt(iov.Of(kept[off:off+n]), off)
		if got != int(n) {
			t.Errorf("read %d of %d old bytes", got, n)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []*blk.Request{
		write(1000, pattern(5000)),
		{Op: blk.OpWriteZeroes, Off: 8192, Len: 100},
		{Op: blk.OpDiscard, Off: 16384, Len: 4096},
	} {
		n := r.Len + int64(r.Vec.Size())
		if err := d.Do(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(kept[r.Off:r.Off+n], old[r.Off:r.Off+n]) {
			t.Errorf("%d+%d: the old bytes were not kept", r.Off, n)
		}
	}
	draining.Wait()
	remove()
	clear(kept)
	if err := d.Do(t.Context(), write(0, pattern(4096))); err != nil || !bytes.Equal(kept, make([]byte, mib)) {
		t.Errorf("called after it was removed; %v", err)
	}

	// A write fails with the error of those who must see it first, and leaves the disk as it is.
	defer func() { _ = d.Close() }()
	if _, err := d.NotifyBeforeWrite(t.Context(), func(context.Context, iov.ReaderAt, int64, int64) error {
		return errMedium
	}); err != nil {
		t.Fatal(err)
	}
	s.took()
	if err := d.Do(t.Context(), write(0, make([]byte, 4096))); !errors.Is(err, errMedium) || s.took() != "" {
		t.Errorf("%v", err)
	}
}

func TestTruncate(t *testing.T) {
	t.Parallel()
	s := newStrict(t, mib, blk.Limits{RequestAlign: 4096})
	d := s.open(blk.Options{})
	b, err := d.AddBitmap("changes", 4096)
	if err != nil {
		t.Fatal(err)
	}
	var told []int64
	remove := d.OnResize(func(size int64) { told = append(told, size) })
	for _, size := range []int64{2 * mib, 2 * mib, mib / 2} {
		if err := d.Truncate(t.Context(), size); err != nil || d.Size() != size {
			t.Fatalf("to %d: %d, %v", size, d.Size(), err)
		}
		if err := d.Do(t.Context(), write(size-1, []byte{1})); err != nil {
			t.Errorf("the last byte of %d: %v", size, err)
		}
		if err := d.Do(t.Context(), write(size, []byte{1})); !errors.Is(err, blk.ErrRange) {
			t.Errorf("beyond %d: %v", size, err)
		}
		if !b.Get(size - 1) {
			t.Errorf("size %d: the bitmap does not follow", size)
		}
	}
	remove()
	if err := d.Truncate(t.Context(), mib); err != nil || fmt.Sprint(told) != "[2097152 524288]" {
		t.Errorf("told %v; %v", told, err)
	}
	for _, size := range []int64{-512, 100, 1<<63 - 512} {
		if err := d.Truncate(t.Context(), size); !errors.Is(err, blk.ErrRange) {
			t.Errorf("to %d: %v", size, err)
		}
	}
	if err := s.open(blk.Options{ReadOnly: true}).Truncate(t.Context(), mib); !errors.Is(err, blk.ErrReadOnly) {
		t.Error(err)
	}
	if err := newDevice(t, newMemory(mib), blk.Options{}).Truncate(t.Context(), mib); !errors.Is(err, blk.ErrUnsupported) {
		t.Error(err)
	}
}

// Requests that come in while the disk changes its size see the one or the other.
func TestTruncateUnderLoad(t *testing.T) {
	t.Parallel()
	s := newStrict(t, mib, blk.Limits{RequestAlign: 512})
	d := s.open(blk.Options{})
	var stop atomic.Bool
	var done sync.WaitGroup
	for i := range 4 {
		done.Go(func() {
			p := pattern(1000)
			for !stop.Load() {
				if err := d.Do(t.Context(), write(mib-5000+int64(i)*1000, p)); err != nil && !errors.Is(err, blk.ErrRange) {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range 200 {
		if err := d.Truncate(t.Context(), mib-int64(i%16)*512); err != nil {
			t.Error(err)
		}
	}
	stop.Store(true)
	done.Wait()
}

// growing is a Backend whose storage someone else changes.
type growing struct {
	*strict
	refreshed int
	err       error
}

func (g *growing) Refresh() error {
	g.refreshed++
	return g.err
}

func TestRefresh(t *testing.T) {
	t.Parallel()
	g := &growing{strict: newStrict(t, mib, blk.Limits{RequestAlign: 512})}
	d := newDevice(t, g, blk.Options{})
	told := int64(0)
	d.OnResize(func(size int64) { told = size })
	g.strict.size, g.strict.data = 2*mib, make([]byte, 2*mib)
	g.strict.limits = blk.Limits{RequestAlign: 4096}
	if err := d.Refresh(t.Context()); err != nil || d.Size() != 2*mib || told != 2*mib || g.refreshed != 1 {
		t.Errorf("%v: size %d, told %d", err, d.Size(), told)
	}
	if d.Limits().RequestAlign != 4096 {
		t.Errorf("%+v", d.Limits())
	}
	if err := d.Do(t.Context(), write(512, pattern(512))); err != nil { // padded by the new limits: strict checks it
		t.Error(err)
	}
	g.err = errMedium
	if err := d.Refresh(t.Context()); !errors.Is(err, errMedium) {
		t.Error(err)
	}
	g.err = nil
	g.strict.limits = blk.Limits{RequestAlign: 3}
	if err := d.Refresh(t.Context()); !errors.Is(err, blk.ErrLimits) || d.Limits().RequestAlign != 4096 {
		t.Errorf("%v, %+v", err, d.Limits())
	}
}

// drive is a drive whose medium can be taken out.
type drive struct {
	*strict
	in atomic.Bool
}

func (d *drive) Inserted() bool { return d.in.Load() }

func TestNoMedium(t *testing.T) {
	t.Parallel()
	b := &drive{strict: newStrict(t, mib, blk.Limits{})}
	d := newDevice(t, b, blk.Options{})
	if err := d.Do(t.Context(), read(0, make([]byte, 512))); !errors.Is(err, blk.ErrNoMedium) || b.took() != "" {
		t.Error(err)
	}
	b.in.Store(true)
	if err := d.Do(t.Context(), read(0, make([]byte, 512))); err != nil {
		t.Error(err)
	}
}

// A throttled disk keeps to its limit, in virtual time. Drain, Close, another limit and the end of a context do not wait
// for it.
func TestThrottledDevice(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		group, err := blk.NewThrottleGroup(blk.Throttle{IOPSTotal: blk.Rate{Avg: 10}})
		if err != nil {
			t.Fatal(err)
		}
		d := newDevice(t, newMemory(mib), blk.Options{Throttle: group})
		began := time.Now()
		for range 101 {
			if err := d.Do(t.Context(), read(0, make([]byte, 512))); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took < 9500*time.Millisecond || took > 10500*time.Millisecond {
			t.Errorf("101 requests at 10 a second took %v", took)
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := d.Do(ctx, read(0, make([]byte, 512))); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a cancelled request: %v", err)
		}

		var done sync.WaitGroup
		flood := func(n int) {
			for range n {
				done.Go(func() {
					if err := d.Do(context.Background(), read(0, make([]byte, 512))); err != nil && !errors.Is(err, blk.ErrClosed) {
						t.Error(err)
					}
				})
			}
			synctest.Wait()
		}
		for name, act := range map[string]func(){
			"drain": func() {
				if err := d.Drain(t.Context()); err != nil {
					t.Error(err)
				}
				d.Undrain()
			},
			"no limit": func() {
				d.SetThrottle(nil)
				d.SetThrottle(group)
			},
		} {
			flood(100)
			began = time.Now()
			act()
			done.Wait()
			if took := time.Since(began); took > time.Second {
				t.Errorf("%s: the requests took %v", name, took)
			}
		}
		flood(100)
		began = time.Now()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		done.Wait()
		if took := time.Since(began); took > time.Second {
			t.Errorf("close took %v", took)
		}
	})
}

func TestState(t *testing.T) {
	t.Parallel()
	disk, err := mem.New(mib, mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := newDevice(t, disk, blk.Options{})
	defer func() { _ = d.Close() }()
	state := noise(1, 100_000)
	if n, err := d.WriteStateAt(iov.Of(state), 77); n != len(state) || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	got := make([]byte, 200_000)
	if n, err := d.ReadStateAt(iov.Of(got), 77); n != len(state) || err != nil || !bytes.Equal(got[:n], state) {
		t.Fatalf("%d, %v", n, err)
	}
	if _, err := d.WriteStateAt(iov.Of(state), -1); !errors.Is(err, blk.ErrRange) {
		t.Error(err)
	}
	plain := newDevice(t, newMemory(512), blk.Options{})
	if _, err := plain.ReadStateAt(iov.Of(got), 0); !errors.Is(err, blk.ErrUnsupported) {
		t.Error(err)
	}
}

func TestFlushAll(t *testing.T) {
	t.Parallel()
	good, bad := newMemory(512), newMemory(512)
	d, e := newDevice(t, bad, blk.Options{}), newDevice(t, good, blk.Options{})
	for _, disk := range []*blk.Device{d, e} {
		if err := disk.Do(t.Context(), write(0, pattern(512))); err != nil {
			t.Fatal(err)
		}
	}
	bad.err = errMedium
	if err := blk.FlushAll(t.Context(), d, e); !errors.Is(err, errMedium) || good.flushes.Load() != 1 {
		t.Errorf("%v; %d flushes of the other disk", err, good.flushes.Load())
	}
}

func TestHistogram(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &slow{memory: newMemory(512)}
		d := newDevice(t, b, blk.Options{})
		for i := range 100 {
			b.delay = time.Millisecond
			if i >= 90 {
				b.delay = time.Second
			}
			if err := d.Do(t.Context(), read(0, make([]byte, 512))); err != nil {
				t.Fatal(err)
			}
		}
		h := d.Latency(blk.OpRead)
		if h.Total() != 100 || h.Sum != 90*time.Millisecond+10*time.Second || h.Mean() != h.Sum/100 {
			t.Errorf("%d times, sum %v, mean %v", h.Total(), h.Sum, h.Mean())
		}
		for _, tc := range []struct {
			q    float64
			want time.Duration
		}{{0, time.Millisecond}, {0.5, time.Millisecond}, {0.9, time.Millisecond}, {0.91, time.Second}, {1, time.Second}} {
			if got := h.Quantile(tc.q); got < tc.want || got > tc.want*5/4 {
				t.Errorf("quantile %v: %v, want %v", tc.q, got, tc.want)
			}
		}
		for i := range h.Count {
			if i > 0 && h.Limit(i) <= h.Limit(i-1) {
				t.Errorf("range %d ends at %v, the one before at %v", i, h.Limit(i), h.Limit(i-1))
			}
		}
	})
}

// slow is a Backend whose reads take time.
type slow struct {
	*memory
	delay time.Duration
}

func (s *slow) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	time.Sleep(s.delay) // virtual time
	return s.memory.ReadVecAt(dst, off)
}
