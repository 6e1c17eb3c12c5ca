package vnet

import (
	"bytes"
	"errors"
	"io"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/net/pipe"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

func (c *card) reset() {
	c.tb.Helper()
	if err := c.dev.Reset(); err != nil {
		c.tb.Fatal(err)
	}
}

// fill transmits frames without waiting for them.
func (c *card) fill(frames int) {
	c.tb.Helper()
	for range frames {
		c.tx.Add([][]byte{none, frame(60, 0)}, nil)
	}
	c.tx.Kick()
}

// works sends a frame each way and takes it behind whatever is left from before.
func (c *card) works(seed int) {
	c.tb.Helper()
	f := frame(99, seed)
	c.tx.Add([][]byte{none, f}, nil)
	c.tx.Kick()
	for !bytes.Equal(c.farRecv(), f) {
	}
	c.tx.Wait()
	c.post(2000, 2000, 2000)
	c.farSend(f)
	for {
		if _, got, _ := c.take(); bytes.Equal(got, f) {
			return
		}
	}
}

// TestReset resets the device wherever its workers can be, and runs it again each time.
func TestReset(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(*card){
		"idle":       func(*card) {},
		"in Recv":    func(c *card) { c.post(1526) },
		"in Send":    func(c *card) { c.fill(4) },
		"with frame": func(c *card) { c.post(100); c.farSend(frame(500, 1)); c.farSend(frame(60, 2)) },
		"all":        func(c *card) { c.post(100); c.farSend(frame(500, 1)); c.fill(4) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := plug(t, all, 1, Options{})
			for i := range 10 {
				prepare(c)
				c.reset()
				c.reset()
				c.start(all)
				c.works(100 + i)
			}
		})
	}
}

func TestActivateRefuses(t *testing.T) {
	t.Parallel()
	c := plug(t, all, 0, Options{})
	if err := c.dev.Activate(all, nil, c); err == nil {
		t.Error("activated without queues")
	}
	if err := c.dev.Activate(all, []*queue.Queue{c.rx.Queue, c.tx.Queue}, c); err == nil {
		t.Error("activated twice")
	}
}

// TestDisabledQueues has a driver that uses one queue only.
func TestDisabledQueues(t *testing.T) {
	t.Parallel()
	c := plug(t, all, 0, Options{})
	c.reset()
	d := queuetest.New(t, 16, queuetest.Options{})
	c.Transport.Drivers = []*queuetest.Driver{nil, d}
	if err := c.dev.Activate(virtio.VersionOne, []*queue.Queue{nil, d.Queue}, c); err != nil {
		t.Fatal(err)
	}
	f := frame(60, 1)
	d.Do([][]byte{none, f}, nil)
	if got := c.farRecv(); !bytes.Equal(got, f) {
		t.Errorf("%d bytes", len(got))
	}
	c.reset() // before the queue's memory goes
}

// TestLink pulls the cable and plugs it in again.
func TestLink(t *testing.T) {
	t.Parallel()
	c := plug(t, all, 0, Options{})
	status := func() byte {
		var b [2]byte
		c.dev.ReadConfig(b[:], 6)
		return b[0]
	}
	changes := 0
	for _, step := range []struct {
		up      bool
		status  byte
		changes int
	}{{true, 1, 0}, {false, 0, 1}, {false, 0, 1}, {true, 1, 2}} {
		before := c.dev.ConfigGeneration()
		c.dev.SetLink(step.up)
		if got := c.dev.ConfigGeneration() - before; int(got) != step.changes-changes {
			t.Errorf("link %v: the generation stepped by %d", step.up, got)
		}
		changes = step.changes
		if status() != step.status || c.ConfigChanges() != step.changes {
			t.Errorf("link %v: status %d, %d changes", step.up, status(), c.ConfigChanges())
		}
	}
	c.reset()
	before := c.dev.ConfigGeneration()
	c.dev.SetLink(false)
	if got := c.dev.ConfigGeneration() - before; got != 1 {
		t.Errorf("after reset: the generation stepped by %d", got)
	}
	if status() != 0 || c.ConfigChanges() != 2 {
		t.Errorf("after reset: status %d, %d changes", status(), c.ConfigChanges())
	}
}

// TestBackendEnds closes the far end: the link goes down, and the guest can still transmit into nothing.
func TestBackendEnds(t *testing.T) {
	t.Parallel()
	c := plug(t, all, 0, Options{})
	f := frame(60, 1)
	c.farSend(f)
	if err := c.far.Close(); err != nil {
		t.Fatal(err)
	}
	c.post(100)
	c.expect(f)
	if err := c.dev.Err(); err != nil {
		t.Errorf("%v before the worker can have met the end", err)
	}
	before := c.dev.ConfigGeneration()
	c.post(100)
	for deadline := time.Now().Add(queuetest.Timeout); c.dev.Err() == nil; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("the end of the backend went unnoticed")
		}
	}
	if err := c.dev.Err(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	b := []byte{1, 1}
	c.dev.ReadConfig(b, 6)
	if b[0] != 0 {
		t.Error("the link is up")
	}
	c.send(none, f)
	c.reset()
	c.start(all) // up again, until there is a buffer to receive into
	if got := c.dev.ConfigGeneration() - before; got != 2 {
		t.Errorf("the generation stepped by %d while the link went down and up", got)
	}
}

// stubborn is a backend on which something fails.
type stubborn struct {
	*pipe.End
	features, deadline error
	short              bool
}

func (s *stubborn) SetFeatures(f net.Features, n int) error {
	if s.features != nil {
		return s.features
	}
	return s.End.SetFeatures(f, n)
}

func (s *stubborn) SetDeadline(t time.Time) error {
	if s.deadline != nil && (t.IsZero() == (s.features == nil && s.short)) {
		return s.deadline
	}
	return s.End.SetDeadline(t)
}

func (s *stubborn) Recv(v iov.Vec) (int, error) {
	n, err := s.End.Recv(v)
	if err == nil && s.short {
		return net.HeaderLen - 1, nil
	}
	return n, err
}

func TestBackendFails(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	t.Run("features", func(t *testing.T) {
		t.Parallel()
		near, _ := pipe.New(pipe.Options{})
		d := newDevice(t, &stubborn{End: near, features: boom}, Options{})
		if err := d.Activate(all, make([]*queue.Queue, 2), nil); !errors.Is(err, boom) {
			t.Error(err)
		}
	})
	t.Run("start", func(t *testing.T) {
		t.Parallel()
		near, _ := pipe.New(pipe.Options{})
		d := newDevice(t, &stubborn{End: near, deadline: boom, short: true}, Options{})
		if err := d.Activate(all, make([]*queue.Queue, 2), nil); !errors.Is(err, boom) {
			t.Error(err)
		}
	})
	t.Run("stop", func(t *testing.T) {
		t.Parallel()
		near, far := pipe.New(pipe.Options{Depth: 1})
		d, err := New(&stubborn{End: near, deadline: boom}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		c := &card{tb: t, dev: d, far: far}
		c.start(all)
		c.post(1526)
		c.fill(4)
		if err := d.Reset(); !errors.Is(err, boom) {
			t.Error(err)
		}
		if _, err := near.Send(iov.Of(none)); !errors.Is(err, os.ErrClosed) {
			t.Errorf("the backend is still there: %v", err)
		}
	})
	t.Run("short frame", func(t *testing.T) {
		t.Parallel()
		near, far := pipe.New(pipe.Options{Depth: 1})
		c := &card{tb: t, dev: newDevice(t, &stubborn{End: near, short: true}, Options{}), far: far}
		c.start(all)
		c.post(1526)
		for i := range 3 { // the third leaves when the first is gone
			c.farSend(frame(60, i))
		}
		if s := c.dev.Stats(); s.RxInvalid == 0 || s.RxFrames != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// TestNegotiation checks that the backend is told what the driver took, without what cannot stand alone.
func TestNegotiation(t *testing.T) {
	t.Parallel()
	near, far := pipe.New(pipe.Options{Features: net.Offloads})
	b := &witness{End: near}
	c := &card{tb: t, dev: newDevice(t, b, Options{}), far: far}
	c.start(virtio.Features(net.GuestTSO4 | net.GuestTSO6 | net.CSum | net.HostTSO4))
	if want := net.CSum | net.HostTSO4; b.features != want || b.headerLen != net.HeaderLen {
		t.Errorf("features %#x, want %#x; header of %d", b.features, want, b.headerLen)
	}
}

type witness struct {
	*pipe.End
	features  net.Features
	headerLen int
}

func (w *witness) SetFeatures(f net.Features, n int) error {
	w.features, w.headerLen = f, n
	return w.End.SetFeatures(f, n)
}

// raw drives one chain of n bytes per queue without allocating.
type raw struct {
	*card
	n        int
	buf      iov.Vec
	received chan struct{} // a notification of the receive queue
}

func newRaw(tb testing.TB, n int) *raw {
	near, far := pipe.New(pipe.Options{})
	c := &card{tb: tb, dev: newDevice(tb, near, Options{}), far: far}
	c.rx, c.tx = queuetest.New(tb, 64, queuetest.Options{}), queuetest.New(tb, 64, queuetest.Options{})
	size := n + net.HeaderLen
	c.rx.SetDesc(0, queuetest.Desc{Addr: c.rx.Alloc(size, 64), Len: uint32(size), Flags: queuetest.FlagWrite})
	c.tx.SetDesc(0, queuetest.Desc{Addr: c.tx.Alloc(size, 64), Len: uint32(size)})
	r := &raw{card: c, n: n, buf: iov.Of(make([]byte, n)), received: make(chan struct{}, 1)}
	if err := c.dev.Activate(virtio.VersionOne, []*queue.Queue{c.rx.Queue, c.tx.Queue}, r); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(c.reset)
	return r
}

func (r *raw) NotifyQueue(i int) error {
	if i == rxQueue {
		r.received <- struct{}{}
	}
	return nil
}

func (r *raw) NotifyConfig() error { return nil }
func (r *raw) NeedsReset()         {}

func (r *raw) transmit(tb testing.TB) {
	r.tx.MakeAvailable(0)
	r.tx.Kick()
	if n, err := r.far.Recv(r.buf); n != r.n || err != nil {
		tb.Fatal(n, err)
	}
}

func (r *raw) receive(tb testing.TB) {
	r.rx.MakeAvailable(0)
	r.rx.Kick()
	if n, err := r.far.Send(r.buf); n != r.n || err != nil {
		tb.Fatal(n, err)
	}
	<-r.received
}

func TestNoAllocations(t *testing.T) {
	r := newRaw(t, 1500)
	if n := testing.AllocsPerRun(500, func() { r.transmit(t) }); n != 0 {
		t.Errorf("%v allocations to transmit a frame", n)
	}
	if n := testing.AllocsPerRun(500, func() { r.receive(t) }); n != 0 {
		t.Errorf("%v allocations to receive a frame", n)
	}
}

func BenchmarkTransmit(b *testing.B) { bench(b, (*raw).transmit) }
func BenchmarkReceive(b *testing.B)  { bench(b, (*raw).receive) }

func bench(b *testing.B, op func(*raw, testing.TB)) {
	r := newRaw(b, 1514)
	b.ReportAllocs()
	b.SetBytes(1514)
	for b.Loop() {
		op(r, b)
	}
}

// TestNoLeaks runs and resets devices and looks at what is left.
func TestNoLeaks(t *testing.T) {
	check := queuetest.Leaks(t)
	for range 20 {
		t.Run("", func(t *testing.T) {
			c := plug(t, all, 1, Options{})
			c.post(100)
			c.farSend(frame(500, 1))
			c.fill(4)
		})
	}
	check()
}
