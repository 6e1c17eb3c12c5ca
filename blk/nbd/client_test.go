package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

func TestClientAndServer(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	s, m := serveMemory(t, size)
	c := dial(t, s.options())
	if c.Size() != size || c.ReadOnly() {
		t.Fatalf("size %d, read-only %t", c.Size(), c.ReadOnly())
	}
	l := c.Limits()
	if l.RequestAlign != 1 || l.OptimalTransfer != 4096 || l.MaxTransfer != 32<<20 {
		t.Errorf("limits %+v", l)
	}

	want := noise(100_000, 1)
	v := iov.Of(want[:1], nil, want[1:4097], want[4097:50_000], want[50_000:])
	if n, err := c.WriteVecAt(v, 12345); n != len(want) || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
	got := make([]byte, len(want))
	if n, err := c.ReadVecAt(iov.Of(got[:70_001], got[70_001:70_002], got[70_002:]), 12345); n != len(want) || err != nil {
		t.Fatalf("read: %d, %v", n, err)
	}
	if !bytes.Equal(got, want) || !bytes.Equal(m.bytes(12345, len(want)), want) {
		t.Fatal("read other bytes than were written")
	}

	if err := c.Flush(); err != nil || m.flushes.Load() != 1 {
		t.Errorf("flush: %v, %d reached the disk", err, m.flushes.Load())
	}
	if n, err := c.WriteVecFUA(iov.Of(want[:10]), 5); n != 10 || err != nil || m.fua.Load() != 1 {
		t.Errorf("FUA: %d, %v, %d reached the disk", n, err, m.fua.Load())
	}
	if err := c.WriteZeroes(16384, 8192, false); err != nil || !bytes.Equal(m.bytes(16384, 8192), make([]byte, 8192)) {
		t.Errorf("zeroes: %v", err)
	}
	if m.isHole(4) || m.isHole(5) {
		t.Error("zeroes without unmap made a hole")
	}
	if err := c.WriteZeroesFast(16384, 4096, true); err != nil || !m.isHole(4) {
		t.Errorf("zeroes with unmap: %v", err)
	}
	m.noFast.Store(true)
	if err := c.WriteZeroesFast(32768, 4096, true); !errors.Is(err, blk.ErrUnsupported) {
		t.Errorf("zeroes that are not fast: %v", err)
	}
	if err := c.WriteZeroes(32768, 4096, true); err != nil || m.bytes(32768, 1)[0] != 0 {
		t.Errorf("zeroes that are not fast, but need not be: %v", err)
	}
	m.noFast.Store(false)
	if err := c.Discard(65536, 65536); err != nil || !m.isHole(17) {
		t.Errorf("discard: %v", err)
	}

	st, run, err := c.BlockStatus(65536, size-65536)
	if err != nil || st.Flags != blk.StatusZero|blk.StatusAllocated|blk.StatusOffset || st.Offset != 65536 || run != size-65536 {
		t.Errorf("status of a hole: %+v, %d, %v", st, run, err)
	}
	st, run, err = c.BlockStatus(28672+5, 500_000)
	if err != nil || st.Flags != blk.StatusData|blk.StatusAllocated|blk.StatusOffset || run != 65536-28672-5 {
		t.Errorf("status of data: %+v, %d, %v", st, run, err)
	}
}

func TestManyRequestsAtOnce(t *testing.T) {
	t.Parallel()
	const workers, span = 32, 96 << 10
	s, _ := serveMemory(t, workers*span)
	c := dial(t, s.options())
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() { hammer(t, c, w, span, func(i int) bool { return i < 60 }) })
	}
	wg.Wait()
}

// hammer sends requests of all kinds, one after the other and as long as more wants them, to a part of the disk that no
// other worker has, and compares what it reads with what it wrote.
func hammer(t *testing.T, c *nbd.Client, worker, span int, more func(i int) bool) {
	r := rand.New(rand.NewPCG(uint64(worker), 2))
	model := make([]byte, span)
	for i := 0; more(i); i++ {
		off := r.IntN(span)
		n := r.IntN(min(span-off, 1<<r.IntN(18)) + 1)
		at := int64(worker*span + off)
		var k int
		var err error
		switch r.IntN(4) {
		case 0:
			p := noise(n, uint64(worker*10000+i))
			copy(model[off:], p)
			k, err = c.WriteVecAt(iov.Of(p), at)
		case 1:
			clear(model[off : off+n])
			k, err = n, c.WriteZeroes(at, int64(n), r.IntN(2) == 0)
		case 2:
			k, err = n, c.Flush()
		default:
			got := make([]byte, n)
			k, err = c.ReadVecAt(iov.Of(got[:n/2], got[n/2:]), at)
			if err == nil && !bytes.Equal(got, model[off:off+n]) {
				t.Errorf("worker %d: %d bytes at %d differ", worker, n, off)
			}
		}
		if k != n || err != nil {
			t.Errorf("worker %d: %d of %d bytes at %d, %v", worker, k, n, off, err)
			return
		}
	}
}

// A request of more elements than a system call takes, and one of more bytes than a request may have.
func TestLongVectors(t *testing.T) {
	t.Parallel()
	const size = 40 << 20
	s, m := serveMemory(t, size)
	c := dial(t, s.options())
	want := noise(2500*100, 3)
	var out, in iov.Vec
	got := make([]byte, len(want))
	for i := range 2500 {
		out = out.Append(want[i*100 : i*100+100])
		in = in.Append(got[i*100 : i*100+100])
	}
	if n, err := c.WriteVecAt(out, 777); n != len(want) || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
	if n, err := c.ReadVecAt(in, 777); n != len(want) || err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read: %d, %v", n, err)
	}
	large := noise(size-1, 4)
	mustWrite(t, c, large, 1)
	if !bytes.Equal(m.bytes(1, size-1), large) {
		t.Error("a long write went wrong")
	}
	mustRead(t, c, large, 1)
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	m := newMemory(65536)
	d := newDevice(t, m, blk.Options{})
	s := serve(t, nbd.Export{Name: "rw", Disk: d}, nbd.Export{Name: "ro", Disk: d, ReadOnly: true})
	o := s.options()
	if _, err := nbd.Dial(testContext(t), o); err == nil {
		t.Error("there is no default export, but it was found")
	}
	o.Export = "ro"
	ro := dial(t, o)
	if !ro.ReadOnly() {
		t.Error("not read-only")
	}
	one := iov.Of(make([]byte, 1))
	_, err := ro.WriteVecAt(one, 0)
	for what, err := range map[string]error{"write": err, "zeroes": ro.WriteZeroes(0, 1, true), "discard": ro.Discard(0, 1)} {
		if !errors.Is(err, blk.ErrReadOnly) && !errors.Is(err, blk.ErrUnsupported) {
			t.Errorf("%s on a read-only export: %v", what, err)
		}
	}
	o.Export = "rw"
	c := dial(t, o)
	for _, off := range []int64{-1, 65536, 1 << 62} {
		_, rerr := c.ReadVecAt(one, off)
		_, werr := c.WriteVecAt(one, off)
		_, _, serr := c.BlockStatus(off, 1)
		for what, err := range map[string]error{"read": rerr, "write": werr, "zeroes": c.WriteZeroes(off, 1, true),
			"discard": c.Discard(off, 1), "status": serr} {
			if !errors.Is(err, blk.ErrRange) {
				t.Errorf("%s at %d: %v", what, off, err)
			}
		}
	}
	m.fail(unix.ENOSPC)
	_, werr := c.WriteVecAt(one, 0)
	secret := errors.New("a secret of the host")
	m.fail(secret)
	_, rerr := c.ReadVecAt(one, 4096)
	var refused *nbd.Error
	if !errors.Is(werr, unix.ENOSPC) || !errors.As(werr, &refused) || refused.Command != "write" {
		t.Errorf("write: %v", werr)
	}
	if !errors.Is(rerr, unix.EIO) || refused == nil || strings.Contains(rerr.Error(), secret.Error()) {
		t.Errorf("read: %v", rerr)
	}
	if err := c.Flush(); !errors.Is(err, unix.EIO) {
		t.Errorf("flush: %v", err)
	}
	m.fail(nil)
	mustRead(t, c, []byte{0}, 0)
}

// leavesNothing runs f with a disk and checks that nothing is left behind by it. No other test may run meanwhile.
func leavesNothing(t *testing.T, m *memory, f func(d *blk.Device)) {
	t.Helper()
	check := leaks(t)
	d, err := blk.New(m, blk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f(d)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	check()
}

func TestClose(t *testing.T) {
	m := newMemory(65536)
	m.gate = make(chan struct{})
	leavesNothing(t, m, func(d *blk.Device) {
		s := &server{Server: nbd.Server{Exports: []nbd.Export{{Disk: d}}}}
		s.listen(t)
		c, err := nbd.Dial(t.Context(), s.options())
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		var served atomic.Int64
		for i := range 300 { // more than may be under way
			wg.Go(func() {
				_, err := c.ReadVecAt(iov.Of(make([]byte, 100)), int64(i))
				if err == nil {
					served.Add(1)
				} else if !errors.Is(err, blk.ErrClosed) {
					t.Errorf("read while closed: %v", err)
				}
			})
		}
		m.gate <- struct{}{} // one has arrived
		_ = c.Close()
		wg.Wait()
		if n := served.Load(); n > 1 {
			t.Errorf("%d reads passed a gate for one", n)
		}
		if err := c.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("second Close: %v", err)
		}
		if err := c.Flush(); !errors.Is(err, blk.ErrClosed) {
			t.Errorf("flush after Close: %v", err)
		}
		close(m.gate)
		s.close(t)
	})
}

// Shutdown lets the requests under way end, and disconnects then.
func TestShutdown(t *testing.T) {
	m := newMemory(65536)
	m.gate = make(chan struct{})
	leavesNothing(t, m, func(d *blk.Device) {
		s := &server{Server: nbd.Server{Exports: []nbd.Export{{Disk: d}}}}
		s.listen(t)
		busy, idle := dial(t, s.options()), dial(t, s.options())
		read := make(chan error)
		go func() {
			_, err := busy.ReadVecAt(iov.Of(make([]byte, 100)), 0)
			read <- err
		}()
		eventually(t, "a request under way", func() bool { return m.arrived.Load() == 1 })
		down := make(chan error)
		go func() { down <- s.Shutdown(testContext(t)) }()
		eventually(t, "idle client disconnected", func() bool {
			_, _, err := idle.BlockStatus(0, 1) // does not wait at the gate
			return errors.Is(err, nbd.ErrLost)
		})
		close(m.gate)
		if err := <-read; err != nil {
			t.Errorf("the request under way: %v", err)
		}
		if err := <-down; err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-s.served; !errors.Is(err, nbd.ErrServerClosed) {
			t.Error(err)
		}
		busy.Close()
		idle.Close()
	})
}

func TestServeEndsWithItsContext(t *testing.T) {
	leavesNothing(t, newMemory(4096), func(d *blk.Device) {
		ctx, cancel := context.WithCancel(t.Context())
		ln := listenUnix(t)
		served := make(chan error)
		go func() { served <- nbd.Serve(ctx, ln, nbd.Export{Disk: d}) }()
		c, err := nbd.Dial(t.Context(), nbd.Options{Network: "unix", Address: ln.Addr().String()})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		mustWrite(t, c, []byte("hello"), 0)
		cancel()
		if err := <-served; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

func TestHandshakeTimesOut(t *testing.T) {
	t.Parallel()
	ln := listenUnix(t) // nobody accepts
	start := time.Now()
	_, err := nbd.Dial(testContext(t), nbd.Options{Network: "unix", Address: ln.Addr().String(), HandshakeTimeout: 50 * time.Millisecond})
	if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) > timeout/2 {
		t.Errorf("%v after %v", err, time.Since(start))
	}
	ctx, cancel := context.WithCancel(testContext(t))
	failed := make(chan error)
	go func() {
		_, err := nbd.Dial(ctx, nbd.Options{Network: "unix", Address: ln.Addr().String()})
		failed <- err
	}()
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// Neither side allocates for a request.
func TestAllocations(t *testing.T) {
	s, _ := serveMemory(t, 1<<20)
	c := dial(t, s.options())
	v := iov.Of(make([]byte, 4096), make([]byte, 4096))
	for what, f := range map[string]func() error{
		"read":   func() error { _, err := c.ReadVecAt(v, 4096); return err },
		"write":  func() error { _, err := c.WriteVecAt(v, 4096); return err },
		"flush":  c.Flush,
		"zeroes": func() error { return c.WriteZeroes(8192, 4096, true) },
		"status": func() error { _, _, err := c.BlockStatus(0, 1<<20); return err },
	} {
		var failed error
		n := testing.AllocsPerRun(2000, func() {
			if err := f(); err != nil {
				failed = err
			}
		})
		if n != 0 && !hosttest.Race || failed != nil {
			t.Errorf("%s: %v allocations, %v", what, n, failed)
		}
	}
}

func BenchmarkLoopback(b *testing.B) {
	s, _ := serveMemory(b, 64<<20)
	for _, depth := range []int{1, 64} {
		for _, n := range []int{4 << 10, 64 << 10} {
			b.Run(fmt.Sprintf("read %d KiB, depth %d", n>>10, depth), func(b *testing.B) {
				c := dial(b, s.options())
				b.SetBytes(int64(n))
				b.ReportAllocs()
				var wg sync.WaitGroup
				next := make(chan int64, depth)
				for range depth {
					wg.Go(func() {
						v := iov.Of(make([]byte, n))
						for off := range next {
							if _, err := c.ReadVecAt(v, off); err != nil {
								b.Error(err)
							}
						}
					})
				}
				for i := 0; b.Loop(); i++ {
					next <- int64(i*n) % (64 << 20)
				}
				close(next)
				wg.Wait()
			})
		}
	}
}
