package fault_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/fault"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/iov"
)

var _ interface {
	blk.Backend
	blk.Discarder
	blk.ZeroWriter
	blk.StatusReporter
	blk.FUAWriter
	blk.CompressedWriter
	blk.Truncater
	blk.Backed
	blk.StateStore
	blk.Removable
	blk.Observer
	blk.Resetter
} = (*fault.Disk)(nil)

var _ blk.Starter = (*fault.Async)(nil)

var errMedium = errors.New("medium error")

const size = 1 << 20

// newDisk returns a fault disk in front of memory.
func newDisk(t *testing.T, o fault.Options) *fault.Disk {
	t.Helper()
	m, err := mem.New(size, mem.Options{MaxSize: 2 * size})
	if err != nil {
		t.Fatal(err)
	}
	d := fault.New(m, o)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// bare is a driver without anything optional.
type bare struct{ inner *mem.Disk }

func (b bare) ReadVecAt(dst iov.Vec, off int64) (int, error)  { return b.inner.ReadVecAt(dst, off) }
func (b bare) WriteVecAt(src iov.Vec, off int64) (int, error) { return b.inner.WriteVecAt(src, off) }
func (b bare) Flush() error                                   { return b.inner.Flush() }
func (b bare) Size() int64                                    { return b.inner.Size() }
func (b bare) Limits() blk.Limits                             { return b.inner.Limits() }
func (b bare) Close() error                                   { return b.inner.Close() }

func vec(n int) iov.Vec { return iov.Of(make([]byte, n)) }

// operations calls everything that a Rule tells apart.
var operations = map[fault.Op]func(d *fault.Disk) error{
	fault.OpRead:    func(d *fault.Disk) error { _, err := d.ReadVecAt(vec(512), 0); return err },
	fault.OpWrite:   func(d *fault.Disk) error { _, err := d.WriteVecAt(vec(512), 0); return err },
	fault.OpFlush:   func(d *fault.Disk) error { return d.Flush() },
	fault.OpDiscard: func(d *fault.Disk) error { return d.Discard(0, 512) },
	fault.OpZero:    func(d *fault.Disk) error { return d.WriteZeroes(0, 512, true) },
	fault.OpStatus: func(d *fault.Disk) error {
		s, n, err := d.BlockStatus(0, 512)
		if err == nil && (n != 512 || s.Flags == 0) {
			return errors.New("no status")
		}
		return err
	},
	fault.OpCompressed: func(d *fault.Disk) error { return d.WriteCompressed(vec(64<<10), 0) },
	fault.OpTruncate:   func(d *fault.Disk) error { return d.Truncate(size) },
	fault.OpState: func(d *fault.Disk) error {
		_, err := d.WriteStateAt(vec(5), 0)
		if err == nil {
			_, err = d.ReadStateAt(vec(5), 0)
		}
		return err
	},
	fault.OpRefresh: func(d *fault.Disk) error { return d.Refresh() },
}

func TestEveryOperation(t *testing.T) {
	for op, f := range operations {
		var mu sync.Mutex
		var log []string
		d := newDisk(t, fault.Options{Log: func(c *fault.Call) {
			mu.Lock()
			defer mu.Unlock()
			log = append(log, c.String())
		}})
		if err := f(d); err != nil {
			t.Errorf("%v without a rule: %v", op, err)
		}
		for other := range operations {
			if other != op {
				d.Add(fault.Rule{Op: other, Err: errMedium})
			}
		}
		if err := f(d); err != nil {
			t.Errorf("%v with rules for others: %v", op, err)
		}
		remove := d.Add(fault.Rule{Err: errMedium})
		before := d.Calls(op)
		if err := f(d); !errors.Is(err, errMedium) || d.Failed() != 1 || d.Calls(op) != before+1 || d.Calls(fault.OpAny) != before+1 {
			t.Errorf("%v with a rule for all: %v; %d failed, %d calls", op, err, d.Failed(), d.Calls(op))
		}
		remove()
		if err := f(d); err != nil {
			t.Errorf("%v after the rule was removed: %v", op, err)
		}
		if all := strings.Join(log, "\n"); strings.Count(all, op.String()) != len(log) || strings.Count(all, errMedium.Error()) != 1 {
			t.Errorf("%v: the log is\n%s", op, all)
		}
	}
}

func TestUnsupported(t *testing.T) {
	m, err := mem.New(size, mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := fault.New(bare{m}, fault.Options{})
	for op, f := range operations {
		want := blk.ErrUnsupported
		switch op {
		case fault.OpRead, fault.OpWrite, fault.OpFlush, fault.OpRefresh:
			want = nil
		}
		if err := f(d); !errors.Is(err, want) {
			t.Errorf("%v = %v, want %v", op, err, want)
		}
	}
	_, fua := d.WriteVecFUA(vec(512), 0)
	_, state := d.ReadStateAt(vec(512), 0)
	if !errors.Is(fua, blk.ErrUnsupported) || !errors.Is(state, blk.ErrUnsupported) {
		t.Errorf("FUA: %v; state: %v", fua, state)
	}
	if d.Backing() != nil || !d.Inserted() || d.Observing() || d.Inner() != (bare{m}) {
		t.Error("answers for a driver without backing disk, medium or observer")
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// TestRuleCounts checks which of 20 calls a rule hits.
func TestRuleCounts(t *testing.T) {
	for _, tt := range []struct {
		rule fault.Rule
		want string
	}{
		{fault.Rule{}, "xxxxxxxxxxxxxxxxxxxx"},
		{fault.Rule{After: 3}, "...xxxxxxxxxxxxxxxxx"},
		{fault.Rule{After: 3, Times: 1}, "...x................"},
		{fault.Rule{Every: 4}, "x...x...x...x...x..."},
		{fault.Rule{After: 2, Every: 5, Times: 3}, "..x....x....x......."},
		{fault.Rule{Off: 5 * 512, Len: 1}, ".....x.............."},
		{fault.Rule{Off: 5*512 + 511, Len: 2}, ".....xx............."},
		{fault.Rule{Off: 18 * 512, Len: 1<<63 - 1}, "..................xx"},
		{fault.Rule{Op: fault.OpWrite}, "...................."},
	} {
		d := newDisk(t, fault.Options{})
		tt.rule.Err = errMedium
		d.Add(tt.rule)
		got := ""
		for i := range int64(20) {
			if _, err := d.ReadVecAt(vec(512), i*512); err != nil {
				got += "x"
			} else {
				got += "."
			}
		}
		if got != tt.want {
			t.Errorf("%v: calls %s failed, want %s", tt.rule, got, tt.want)
		}
	}
}

func TestProbability(t *testing.T) {
	hits := func(seed uint64) (s string, n int) {
		d := newDisk(t, fault.Options{Seed: seed})
		d.Add(fault.Rule{Probability: 0.25, Err: errMedium})
		for range 400 {
			if d.Flush() != nil {
				s += "x"
				n++
			} else {
				s += "."
			}
		}
		return s, n
	}
	a, n := hits(1)
	b, _ := hits(1)
	c, _ := hits(2)
	if a != b || a == c || n < 60 || n > 140 {
		t.Errorf("%d of 400 calls failed at a quarter; same seed equal: %v; other seed equal: %v", n, a == b, a == c)
	}
}

func TestShort(t *testing.T) {
	d := newDisk(t, fault.Options{Limits: blk.Limits{RequestAlign: 512}})
	ones := bytes.Repeat([]byte{1}, 4096)
	d.Add(fault.Rule{Op: fault.OpWrite, Times: 1, Short: true, Keep: 1500, Err: errMedium})
	if n, err := d.WriteVecAt(iov.Of(ones[:100], ones[100:]), 0); n != 1024 || !errors.Is(err, errMedium) {
		t.Errorf("short write: %d, %v", n, err)
	}
	got := make([]byte, 4096)
	if _, err := d.ReadVecAt(iov.Of(got), 0); err != nil || bytes.Count(got, []byte{1}) != 1024 {
		t.Errorf("a short write of 1024 bytes stored %d, %v", bytes.Count(got, []byte{1}), err)
	}
	d.Add(fault.Rule{Op: fault.OpRead, Times: 1, Short: true, Keep: 512})
	if n, err := d.ReadVecAt(iov.Of(got), 0); n != 512 || err != nil {
		t.Errorf("short read: %d, %v", n, err)
	}
	d.Add(fault.Rule{Op: fault.OpZero, Times: 1, Short: true, Keep: 512, Err: errMedium})
	if err := d.WriteZeroes(0, 1024, false); !errors.Is(err, errMedium) {
		t.Errorf("short write of zeroes: %v", err)
	}
	if _, err := d.ReadVecAt(iov.Of(got), 0); err != nil || bytes.Count(got, []byte{1}) != 512 {
		t.Errorf("after it %d ones are left, want 512", bytes.Count(got, []byte{1}))
	}
	units := newDisk(t, fault.Options{Limits: blk.Limits{DiscardAlign: 1536}})
	units.Add(fault.Rule{Op: fault.OpDiscard, Short: true, Keep: 2000})
	if err := units.Discard(1536, 4608); err != nil {
		t.Errorf("short discard of whole units: %v", err)
	}
	d.Add(fault.Rule{Op: fault.OpRead, Times: 1, Err: errMedium})
	if _, err := d.ReadVecAt(iov.Of(got), 0); err == nil || !bytes.Equal(got, bytes.Repeat([]byte{0xa5}, 4096)) {
		t.Errorf("a failed read leaves no garbage, %v", err)
	}
}

// TestShortWriteIsNoticed has a driver that breaks its promise.
func TestShortWriteIsNoticed(t *testing.T) {
	d := newDisk(t, fault.Options{})
	d.Add(fault.Rule{Op: fault.OpWrite, Short: true, Keep: 10})
	dev, err := blk.New(d, blk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dev.WriteVecAt(vec(20), 0); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("write: %v, want ErrShortWrite", err)
	}
}

func TestDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(t, fault.Options{})
		d.Add(fault.Rule{Op: fault.OpFlush, Delay: time.Hour})
		d.Add(fault.Rule{Op: fault.OpFlush, After: 1, MaxDelay: time.Hour, Err: errMedium})
		begin := time.Now()
		if err := d.Flush(); err != nil || time.Since(begin) != time.Hour {
			t.Errorf("flush took %v, %v", time.Since(begin), err)
		}
		begin = time.Now()
		err := d.Flush()
		if took := time.Since(begin); !errors.Is(err, errMedium) || took <= time.Hour || took >= 2*time.Hour {
			t.Errorf("second flush took %v, %v; want one to two hours", took, err)
		}
		d.Clear()
		if err := d.Flush(); err != nil {
			t.Errorf("flush without rules: %v", err)
		}
	})
}

func TestForcedLimits(t *testing.T) {
	forced := blk.Limits{
		RequestAlign: 512, MemoryAlign: 8, MaxTransfer: 4096, MaxVec: 2, DiscardAlign: 1024, MaxDiscard: 2048,
		ZeroAlign: 1024, MaxZero: 4096, Cluster: 1 << 20, PhysicalBlock: 4096, OptimalTransfer: 12345,
	}
	d := newDisk(t, fault.Options{Limits: forced})
	if got := d.Limits(); got != forced {
		t.Errorf("Limits = %+v, want %+v", got, forced)
	}
	if got := newDisk(t, fault.Options{}).Limits(); got.Cluster != 64<<10 {
		t.Errorf("Limits without any forced = %+v", got)
	}
	_, read := d.ReadVecAt(vec(100), 0)
	_, write := d.WriteVecAt(vec(8192), 0)
	_, fua := d.WriteVecFUA(iov.Of(make([]byte, 512), make([]byte, 512), make([]byte, 512)), 0)
	_, _, status := d.BlockStatus(5, 512)
	for i, err := range []error{read, write, fua, status, d.Discard(512, 1024), d.WriteZeroes(0, 8192, true)} {
		if !errors.Is(err, fault.ErrLimits) {
			t.Errorf("call %d that breaks a limit: %v", i, err)
		}
	}
	if n := d.Calls(fault.OpAny); n != 0 {
		t.Errorf("%d calls came through", n)
	}
}

// TestBreak stops a padded write between its read and its write, as iotest 077 does.
func TestBreak(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(t, fault.Options{Observe: true, Limits: blk.Limits{RequestAlign: 4096}})
		dev, err := blk.New(d, blk.Options{})
		if err != nil {
			t.Fatal(err)
		}
		ctx := context.Background()
		d.Break(blk.EventPaddedAfterHead, "a")
		done := make(chan error, 2)
		write := func(off int64) {
			_, err := dev.WriteVecAt(vec(10), off)
			done <- err
		}
		go write(5)
		if err := d.Wait(ctx, "a"); err != nil || !d.Stopped("a") || d.Stopped("b") {
			t.Fatalf("Wait = %v", err)
		}
		go write(100) // overlaps once it is padded
		synctest.Wait()
		if d.Events(blk.EventPaddedHead) != 1 || d.Events(blk.EventWrite) != 0 || len(done) != 0 {
			t.Error("the second write did not wait for the first")
		}
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if err := d.Wait(short, "b"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), `"b"`) {
			t.Errorf("Wait for what does not come = %v", err)
		}
		if n := d.Resume("b"); n != 0 {
			t.Errorf("Resume of what is not there = %d", n)
		}
		if n := d.Resume("a"); n != 1 {
			t.Errorf("Resume = %d, want 1", n)
		}
		if err := errors.Join(<-done, <-done); err != nil {
			t.Error(err)
		}
		if d.Events(blk.EventPaddedHead) != 2 || d.Events(blk.EventWriteDone) != 2 {
			t.Error("events are missing")
		}
		d.Break(blk.EventWrite, "c")
		d.Break(blk.EventWrite, "c")
		go write(5)
		if err := d.Wait(ctx, "c"); err != nil {
			t.Fatal(err)
		}
		d.Remove("c")
		if err := <-done; err != nil {
			t.Error(err)
		}
		if write(5); d.Stopped("c") {
			t.Error("a breakpoint that was removed stopped a request")
		}
		if err := errors.Join(<-done, dev.Close()); err != nil {
			t.Error(err)
		}
	})
}

// TestCloseResumes has a caller without a Device, which would wait for its requests first.
func TestCloseResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(t, fault.Options{Observe: true})
		d.Break("x", "x")
		done := make(chan struct{})
		go func() {
			d.Event("x")
			close(done)
		}()
		synctest.Wait()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
}

func TestAsync(t *testing.T) {
	m, err := mem.NewAsync(size, mem.Options{}, 2, 1)
	if err != nil {
		t.Fatal(err)
	}
	var logged atomic.Int64
	o := fault.Options{Log: func(*fault.Call) { logged.Add(1) }, Limits: blk.Limits{RequestAlign: 512}}
	for _, d := range []*fault.Disk{newDisk(t, o), fault.New(m, o)} {
		logged.Store(0)
		a := d.Async()
		start := func(ios ...*blk.IO) {
			var wg sync.WaitGroup
			for _, io := range ios {
				wg.Add(1)
				io.Done = func(*blk.IO) { wg.Done() }
			}
			a.Start(ios)
			wg.Wait()
		}
		write := &blk.IO{Op: blk.OpWrite, Vec: iov.Of(bytes.Repeat([]byte{1}, 512)), Off: 512}
		unaligned := &blk.IO{Op: blk.OpWrite, Vec: vec(100)}
		start(write, unaligned)
		if write.Err != nil || write.N != 512 || !errors.Is(unaligned.Err, fault.ErrLimits) {
			t.Errorf("results %d, %v, %v", write.N, write.Err, unaligned.Err)
		}
		good, bad := &blk.IO{Op: blk.OpRead, Vec: vec(512), Off: 1024}, &blk.IO{Op: blk.OpRead, Vec: vec(512), Off: 512}
		start(bad)
		if bad.N != 512 || bad.Err != nil || bad.Vec.IsZero() {
			t.Errorf("read without a rule: %d, %v", bad.N, bad.Err)
		}
		remove := d.Add(fault.Rule{Op: fault.OpRead, Off: 512, Len: 1, Err: errMedium})
		start(good, bad)
		if good.Err != nil || !errors.Is(bad.Err, errMedium) {
			t.Errorf("results %v, %v", good.Err, bad.Err)
		}
		remove()
		if n := d.Calls(fault.OpAny); n != 4 || logged.Load() != 5 {
			t.Errorf("%d calls, %d logged; want 4 and the refused one", n, logged.Load())
		}
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}
