package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/iov"
)

// restartable is a server on a disk in memory that comes and goes.
type restartable struct {
	tb     testing.TB
	m      *memory
	d      *blk.Device
	socket string
	s      *server
}

func newRestartable(tb testing.TB, size int) *restartable {
	tb.Helper()
	r := &restartable{tb: tb, m: newMemory(size), socket: filepath.Join(tb.TempDir(), "nbd.sock")}
	r.d = newDevice(tb, r.m, blk.Options{})
	r.up()
	tb.Cleanup(r.down)
	return r
}

func (r *restartable) up() {
	r.s = &server{Server: nbd.Server{Exports: []nbd.Export{{Disk: r.d}}}, socket: r.socket}
	r.s.listen(r.tb)
}

func (r *restartable) down() {
	if r.s != nil {
		r.s.close(r.tb)
		r.s = nil
	}
}

func (r *restartable) dial(delay time.Duration, survive bool) *nbd.Client {
	return dial(r.tb, nbd.Options{Network: "unix", Address: r.socket, ReconnectDelay: delay, WritesSurvive: survive})
}

// Requests of every kind from many goroutines, while the server goes away and comes back again and again.
func TestReconnectUnderLoad(t *testing.T) {
	t.Parallel()
	const workers, span = 8, 64 << 10
	r := newRestartable(t, workers*span)
	c := r.dial(timeout, true)
	var wg sync.WaitGroup
	var stop atomic.Bool
	var ops atomic.Int64
	for w := range workers {
		wg.Go(func() {
			hammer(t, c, w, span, func(int) bool {
				ops.Add(1)
				return !stop.Load()
			})
		})
	}
	r.comeAndGo(&ops)
	stop.Store(true)
	wg.Wait()
}

// comeAndGo takes the server down and up again, eight times, each after 50 more of what ops counts.
func (r *restartable) comeAndGo(ops *atomic.Int64) {
	r.tb.Helper()
	for range 8 {
		seen := ops.Load()
		eventually(r.tb, "requests go on", func() bool { return ops.Load() > seen+50 || r.tb.Failed() })
		r.down()
		r.up()
	}
}

func TestReconnectDelay(t *testing.T) {
	t.Parallel()
	r := newRestartable(t, 4096)
	c := r.dial(50*time.Millisecond, false)
	mustRead(t, c, make([]byte, 10), 0)
	v := iov.Of(make([]byte, 10))
	began := time.Now()
	r.down()
	if _, err := c.ReadVecAt(v, 0); !errors.Is(err, nbd.ErrLost) || time.Since(began) < 50*time.Millisecond {
		t.Errorf("%v after %v", err, time.Since(began))
	}
	if _, err := c.ReadVecAt(v, 0); !errors.Is(err, nbd.ErrLost) {
		t.Errorf("when the delay is over: %v", err)
	}
	r.up()
	eventually(t, "back", func() bool {
		_, err := c.ReadVecAt(v, 0)
		return err == nil
	})
}

func TestNoReconnectDelay(t *testing.T) {
	t.Parallel()
	r := newRestartable(t, 4096)
	c := r.dial(0, false)
	v := iov.Of(make([]byte, 10))
	r.down()
	if _, err := c.ReadVecAt(v, 0); !errors.Is(err, nbd.ErrLost) {
		t.Error(err)
	}
	r.up()
	eventually(t, "back", func() bool {
		_, err := c.ReadVecAt(v, 0)
		return err == nil
	})
}

func TestFlushAfterLoss(t *testing.T) {
	t.Parallel()
	p := []byte("data")
	for _, tc := range []struct {
		name    string
		survive bool
		write   func(c *nbd.Client) error
		want    error
	}{
		{"write", false, func(c *nbd.Client) error { _, err := c.WriteVecAt(iov.Of(p), 0); return err }, nbd.ErrUnflushed},
		{"zeroes", false, func(c *nbd.Client) error { return c.WriteZeroes(0, 10, true) }, nbd.ErrUnflushed},
		{"write that survives", true, func(c *nbd.Client) error { _, err := c.WriteVecAt(iov.Of(p), 0); return err }, nil},
		{"FUA", false, func(c *nbd.Client) error { _, err := c.WriteVecFUA(iov.Of(p), 0); return err }, nil},
		{"discard", false, func(c *nbd.Client) error { return c.Discard(0, 4096) }, nil},
		{"nothing", false, func(*nbd.Client) error { return nil }, nil},
		{"write and flush", false, func(c *nbd.Client) error {
			_, err := c.WriteVecAt(iov.Of(p), 0)
			return errors.Join(err, c.Flush())
		}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := newRestartable(t, 8192)
			c := r.dial(timeout, tc.survive)
			if err := tc.write(c); err != nil {
				t.Fatal(err)
			}
			r.down()
			r.up()
			mustRead(t, c, make([]byte, 10), 4096) // on the new connection
			flushes := r.m.flushes.Load()
			mustWrite(t, c, p, 4096)
			if err := c.Flush(); !errors.Is(err, tc.want) {
				t.Errorf("first flush: %v", err)
			}
			if r.m.flushes.Load() != flushes+1 {
				t.Error("the flush that fails does not flush")
			}
			if err := c.Flush(); err != nil {
				t.Errorf("second flush: %v", err)
			}
		})
	}
}

func TestExportChanges(t *testing.T) {
	t.Parallel()
	r := newRestartable(t, 4096)
	c := r.dial(50*time.Millisecond, false)
	r.down()
	small := r.d
	r.d = newDevice(t, newMemory(8192), blk.Options{})
	r.up()
	v := iov.Of(make([]byte, 10))
	eventually(t, "the change is told", func() bool {
		_, err := c.ReadVecAt(v, 0)
		if err == nil {
			t.Fatal("the change is not noticed")
		}
		return errors.Is(err, nbd.ErrLost) && errors.Is(err, nbd.ErrChanged)
	})
	r.down()
	r.d = small
	r.up()
	eventually(t, "back", func() bool {
		_, err := c.ReadVecAt(v, 0)
		return err == nil
	})
	// The owner of the client may ask for the change.
	r.down()
	r.d = newDevice(t, newMemory(8192), blk.Options{})
	r.up()
	eventually(t, "refreshed", func() bool { return c.Refresh() == nil })
	if c.Size() != 8192 {
		t.Errorf("size %d", c.Size())
	}
	mustWrite(t, c, []byte("x"), 8191)
	for range 3 {
		if err := c.Refresh(); err != nil {
			t.Error(err)
		}
	}
	mustRead(t, c, []byte("x"), 8191)
}

func TestCloseDuringOutage(t *testing.T) {
	r := newRestartable(t, 4096)
	check := leaks(t)
	c, err := nbd.Dial(t.Context(), nbd.Options{Network: "unix", Address: r.socket, ReconnectDelay: timeout})
	if err != nil {
		t.Fatal(err)
	}
	r.down()
	failed := make(chan error)
	for range 10 {
		go func() {
			_, err := c.ReadVecAt(iov.Of(make([]byte, 10)), 0)
			failed <- err
		}()
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	for range 10 {
		if err := <-failed; !errors.Is(err, blk.ErrClosed) {
			t.Error(err)
		}
	}
	r.up() // what was open at first
	check()
}

// A server that hangs up on every request does not keep one for ever.
func TestServerHangsUp(t *testing.T) {
	t.Parallel()
	s, _ := serveMemory(t, 4096)
	var dials atomic.Int64
	o := nbd.Options{ReconnectDelay: 100 * time.Millisecond, Dial: func(ctx context.Context) (net.Conn, error) {
		dials.Add(1)
		var d net.Dialer
		nc, err := d.DialContext(ctx, "unix", s.socket)
		if err != nil {
			return nil, err
		}
		return &hangsUp{Conn: nc}, nil
	}}
	c := dial(t, o)
	if _, err := c.ReadVecAt(iov.Of(make([]byte, 10)), 0); !errors.Is(err, nbd.ErrLost) {
		t.Error(err)
	}
	if n := dials.Load(); n > 20 { // few on a busy machine
		t.Errorf("%d connections in 100 ms", n)
	}
}

// hangsUp is a connection that ends with the first request.
type hangsUp struct{ net.Conn }

func (h *hangsUp) Write(p []byte) (int, error) {
	if bytes.HasPrefix(p, []byte{0x25, 0x60, 0x95, 0x13}) {
		h.Close()
		return 0, net.ErrClosed
	}
	return h.Conn.Write(p)
}
