package vconsole

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// wantOver checks that the port has ended for good.
func wantOver(t *testing.T, p *Port) {
	t.Helper()
	for range 3 {
		if n, err := p.Read(make([]byte, 8)); n != 0 || err != io.EOF {
			t.Errorf("read: %d, %v", n, err)
		}
	}
	if n, err := p.Write([]byte("late")); n != 0 || !errors.Is(err, ErrHungUp) {
		t.Errorf("write: %d, %v", n, err)
	}
	if err := p.WaitOpen(t.Context()); !errors.Is(err, ErrHungUp) || p.Open() {
		t.Errorf("wait: %v; open: %t", err, p.Open())
	}
}

// TestHangup hangs up with more under way than the ring holds. All of it is read, and what the guest's CPUs do until they
// have stopped changes nothing.
func TestHangup(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	g, p, id := open(t, d, agent)
	sent := noise(ringSize+30000, 6)
	g.push(txQueue(id), sent[:40000])
	g.push(txQueue(id), sent[40000:])
	writes := writeLater(p, make([]byte, 100))
	g.post(rxQueue(id), 30)
	g.take(rxQueue(id))
	p.Hangup()
	p.Hangup()
	if r := <-writes; r.n != 30 || !errors.Is(r.err, ErrHungUp) {
		t.Errorf("write: %+v", r)
	}
	g.control(p.id, eventPortOpen, 0)
	g.control(p.id, eventPortOpen, 1)
	if got, err := io.ReadAll(p); err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d of %d bytes, %v", len(got), len(sent), err)
	}
	wantOver(t, p)
	g.push(txQueue(id), []byte("later still"))
	if err := d.Reset(); err != nil {
		t.Fatal(err)
	}
	wantOver(t, p)
	p.Close()
	if err := readError(p); err != os.ErrClosed {
		t.Errorf("after Close: %v", err)
	}
}

func readError(p *Port) error {
	_, err := p.Read(make([]byte, 1))
	return err
}

// TestHangupEndsWaits has a reader, a writer and a waiter on a port that no guest has opened, without a driver and with one.
func TestHangupEndsWaits(t *testing.T) {
	t.Parallel()
	for name, driver := range map[string]bool{"no driver": false, "driver": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDevice(t, Options{Ports: []string{agent}})
			p := d.Port(agent)
			if driver {
				boot(t, d, all)
			}
			reads := later(func() error { return readError(p) })
			writes := writeLater(p, []byte("never taken"))
			waits := later(func() error { return p.WaitOpen(t.Context()) })
			waitFor(t, p, func() bool { return len(p.out) > 0 })
			p.Hangup()
			if err := <-reads; err != io.EOF {
				t.Errorf("read: %v", err)
			}
			if r := <-writes; r.n != 0 || !errors.Is(r.err, ErrHungUp) {
				t.Errorf("write: %+v", r)
			}
			if err := <-waits; !errors.Is(err, ErrHungUp) {
				t.Errorf("wait: %v", err)
			}
			wantOver(t, p)
		})
	}
}

// TestHangupBehindAnEnd hangs up with the end of an earlier session unread: both are seen.
func TestHangupBehindAnEnd(t *testing.T) {
	t.Parallel()
	g, p, id := open(t, newDevice(t, Options{Ports: []string{agent}}), agent)
	g.send(txQueue(id), []byte("one"))
	g.control(p.id, eventPortOpen, 0)
	readFull(t, p, 3)
	waitFor(t, p, func() bool { return p.eof })
	g.control(p.id, eventPortOpen, 1)
	g.push(txQueue(id), []byte("two"))
	p.Hangup()
	for _, want := range []string{"", "two", ""} {
		if got, err := io.ReadAll(p); string(got) != want || err != nil {
			t.Fatalf("%q, %v, want %q", got, err, want)
		}
	}
	wantOver(t, p)
}

// TestHangupAfterBreaking hangs up on a guest that broke its queue, which nobody drains any more.
func TestHangupAfterBreaking(t *testing.T) {
	t.Parallel()
	g, p, id := open(t, newDevice(t, Options{Ports: []string{agent}}), agent)
	drv := g.Drivers[txQueue(id)]
	drv.SetDesc(0, queuetest.Desc{Addr: 1 << 60, Len: 16})
	drv.MakeAvailable(0)
	drv.Kick()
	reads := later(func() error { return readError(p) })
	p.Hangup()
	if err := <-reads; err != io.EOF {
		t.Errorf("read: %v", err)
	}
	g.wantReset()
	wantOver(t, p)
}
