package vnet

import (
	"bytes"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/net/pipe"
	"github.com/kvmlet/kvmlet/net/tap/taptest"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// within waits for something that another goroutine brings about.
func within(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(queuetest.Timeout); !ok(); runtime.Gosched() {
		if time.Now().After(deadline) {
			tb.Fatal(what)
		}
	}
}

// TestBothFull stops both directions everywhere at once: the driver has no receive buffers and waits for its transmit
// queue, the cable is full both ways, and there are senders behind it. Nothing may be lost when buffers come back, and
// traffic must resume each time, in whatever order and however few they are (CVE-2020-16843).
func TestBothFull(t *testing.T) {
	t.Parallel()
	for name, want := range ringModes {
		for _, depth := range []int{1, 4} {
			for _, rxFirst := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s,depth=%d,rxFirst=%v", name, depth, rxFirst), func(t *testing.T) {
					t.Parallel()
					bothFull(t, plug(t, want, depth, Options{QueueSize: 8}), depth, rxFirst)
				})
			}
		}
	}
}

func bothFull(t *testing.T, c *card, depth int, rxFirst bool) {
	const waiting = 5 // frames for which the cable has no room
	frames := depth + waiting
	number := func(round, i int) []byte { return frame(60+i, 100*round+i) }
	for round := range 8 {
		// Towards the guest: the cable fills up, since there is no buffer to receive into.
		for i := range depth {
			c.farSend(number(round, i))
		}
		blocked := later(func() error {
			for i := depth; i < frames; i++ {
				if _, err := c.far.Send(iov.Of(number(round, i))); err != nil {
					return err
				}
			}
			return nil
		})
		// From the guest: the cable fills up and then the queue, as nobody receives.
		sent := c.dev.Stats().TxFrames
		added := 0
		for ; c.tx.Free() >= 2; added++ {
			c.tx.Add([][]byte{none, number(round, 50+added)}, nil)
			c.tx.Kick()
		}
		within(t, "the cable does not fill up", func() bool {
			return c.dev.Stats().TxFrames == sent+uint64(min(depth, added))
		})
		if s := c.dev.Stats(); int(s.RxFrames) != round*frames {
			t.Fatalf("round %d: %+v", round, s)
		}

		receive := func() {
			for i := range frames {
				if round%2 == 0 {
					c.post(200) // the device has emptied the queue and sleeps: one at a time
				} else if i == 0 {
					c.post(200, 200, 200, 200)
				} else if i < frames-3 {
					c.post(200)
				}
				c.expect(number(round, i))
			}
			if err := <-blocked; err != nil {
				t.Fatal(err)
			}
		}
		transmit := func() {
			for i := range added {
				if got := c.farRecv(); !bytes.Equal(got, number(round, 50+i)) {
					t.Fatalf("round %d: frame %d is another one, of %d bytes", round, i, len(got))
				}
			}
			for c.tx.InFlight() > 0 {
				c.tx.Wait()
			}
		}
		if rxFirst {
			receive()
			transmit()
		} else {
			transmit()
			receive()
		}
	}
	if s := c.dev.Stats(); s.RxTooLong+s.RxInvalid+s.TxRefused+s.TxBadLength+s.TxBadHeader != 0 {
		t.Errorf("%+v", s)
	}
}

// TestTapFull is the same with a real tap: the host's stack fills the tap's queue, far beyond its length, while the
// driver has no buffers, and the driver transmits meanwhile.
func TestTapFull(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	c, e := tapCard(t)
	dropped := func() uint64 {
		l, err := netlink.LinkByName("vm0")
		if err != nil {
			t.Fatal(err)
		}
		return l.Attrs().Statistics.TxDropped
	}
	c.start(all)
	for round := range 4 {
		// Each request makes the host answer, until its answers have no place in the tap.
		before, seq := dropped(), uint16(0)
		for full := false; !full; full = dropped() > before {
			for range 100 {
				c.send(none, e.Request(seq, 100))
				seq++
			}
			if seq > 20000 {
				t.Fatalf("round %d: the tap does not fill up", round)
			}
		}
		// Buffers come back: everything that had a place arrives, and what is sent from now on.
		for taken, found := 0, false; !found; taken++ {
			for c.rx.InFlight() < 3 {
				c.post(600)
			}
			_, f, _ := c.take()
			if found = e.IsReply(f, seq, 200); taken == 100 { // the tap frees its slots in batches
				c.send(none, e.Request(seq, 200)) // its answer comes behind the others
			}
		}
		c.reset() // takes the buffers back
		c.start(all)
	}
	if s := c.dev.Stats(); s.TxRefused != 0 {
		t.Errorf("%+v", s)
	}
}

// busy is a backend whose guest adds the next frame whenever one is sent.
type busy struct {
	*pipe.End
	again func()
}

func (b *busy) Send(v iov.Vec) (int, error) {
	b.again()
	return v.Size(), nil
}

// listener is a transport that takes note of the first notification.
type listener struct {
	once     sync.Once
	notified chan struct{}
}

func (l *listener) NotifyQueue(int) error {
	l.once.Do(func() { close(l.notified) })
	return nil
}
func (l *listener) NotifyConfig() error { return nil }
func (l *listener) NeedsReset()         {}

// TestTransmitNeverPauses has a driver whose transmit queue is never empty, and which waits for a notification all the
// same.
func TestTransmitNeverPauses(t *testing.T) {
	t.Parallel()
	const size, enough = 16, 1000
	near, _ := pipe.New(pipe.Options{})
	b := &busy{End: near}
	dev := newDevice(t, b, Options{QueueSize: size})
	d := queuetest.New(t, size, queuetest.Options{EventIdx: true})
	d.SetDesc(0, queuetest.Desc{Addr: d.Alloc(100, 1), Len: 100})
	d.SetUsedEvent(0)
	l := &listener{notified: make(chan struct{})}
	frames := 0
	b.again = func() {
		frames++
		select {
		case <-l.notified:
		default:
			if frames < enough {
				d.MakeAvailable(0)
			}
		}
	}
	d.MakeAvailable(0)
	if err := dev.Activate(virtio.VersionOne|virtio.RingEventIdx, []*queue.Queue{nil, d.Queue}, l); err != nil {
		t.Fatal(err)
	}
	select {
	case <-l.notified:
	case <-time.After(queuetest.Timeout):
		t.Error("no notification")
	}
	if err := dev.Reset(); err != nil {
		t.Fatal(err)
	}
	if frames > 2*size {
		t.Errorf("the notification came after %d frames", frames)
	}
}
