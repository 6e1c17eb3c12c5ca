package vnet

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/net/pipe"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// all is every feature that the device may offer.
const all = ^virtio.Features(0)

// card plays the driver of a device whose backend is a pipe; far is the pipe's other end, without headers. Its methods
// belong to the test's goroutine.
type card struct {
	*queuetest.Transport
	tb     testing.TB
	dev    *Device
	far    *pipe.End
	rx, tx *queuetest.Driver
	posted map[uint16][]byte // receive buffers, by head
}

func newDevice(tb testing.TB, b net.Backend, o Options) *Device {
	tb.Helper()
	d, err := New(b, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
	})
	return d
}

// plug makes a device on a pipe of that depth with all offloads, and starts it.
func plug(tb testing.TB, want virtio.Features, depth int, o Options) *card {
	tb.Helper()
	near, far := pipe.New(pipe.Options{Features: net.Offloads, Depth: depth})
	c := &card{tb: tb, dev: newDevice(tb, near, o), far: far}
	c.start(want)
	return c
}

func (c *card) start(want virtio.Features) {
	c.tb.Helper()
	c.Transport = queuetest.Start(c.tb, c.dev, want, queuetest.Options{Len: 32 << 20})
	c.rx, c.tx = c.Drivers[rxQueue], c.Drivers[txQueue]
	c.posted = map[uint16][]byte{}
}

// post gives the device receive buffers of these sizes.
func (c *card) post(sizes ...int) {
	c.tb.Helper()
	for _, n := range sizes {
		b := bytes.Repeat([]byte{0xee}, n)
		c.posted[c.rx.Add(nil, [][]byte{b})] = b
	}
	c.rx.Kick()
}

// take waits for the next frame and puts it together. It returns the number of buffers that it was in.
func (c *card) take() (net.Header, []byte, int) {
	c.tb.Helper()
	var b []byte
	want := 1
	for got := 0; got < want; got++ {
		// The device returns all buffers of a frame at once: past the first there is no waiting.
		head, n, ok := c.rx.Used()
		if !ok && got > 0 {
			c.tb.Fatalf("the driver sees %d buffers of a frame that has %d", got, want)
		}
		if !ok {
			head, n = c.rx.Wait()
		}
		buf, ok := c.posted[head]
		if !ok {
			c.tb.Fatalf("chain %d was not posted", head)
		}
		delete(c.posted, head)
		b = append(b, buf[:n]...)
		if got == 0 {
			want = int(binary.LittleEndian.Uint16(b[numBuffersOffset:]))
		}
	}
	h, err := net.ParseHeader(b[:net.HeaderLen])
	if err != nil {
		c.tb.Fatal(err)
	}
	if int(h.NumBuffers) != want {
		c.tb.Fatalf("%d buffers, header says %d", want, h.NumBuffers)
	}
	return h, b[net.HeaderLen:], want
}

// expect takes a frame and compares it.
func (c *card) expect(frame []byte) {
	c.tb.Helper()
	if _, got, _ := c.take(); !bytes.Equal(got, frame) {
		c.tb.Fatalf("received %d bytes, want another frame of %d", len(got), len(frame))
	}
}

// send transmits a frame in parts and waits until the device returns it.
func (c *card) send(parts ...[]byte) {
	c.tb.Helper()
	c.tx.Do(parts, nil)
}

// farSend has the far end send a frame.
func (c *card) farSend(frame []byte) {
	c.tb.Helper()
	if n, err := c.far.Send(iov.Of(frame)); n != len(frame) || err != nil {
		c.tb.Fatalf("sent %d, %v", n, err)
	}
}

// farRecv has the far end receive a frame.
func (c *card) farRecv() []byte {
	c.tb.Helper()
	b := make([]byte, spillSize)
	if err := c.far.SetDeadline(time.Now().Add(queuetest.Timeout)); err != nil {
		c.tb.Fatal(err)
	}
	n, err := c.far.Recv(iov.Of(b))
	if err != nil {
		c.tb.Fatal(err)
	}
	return b[:n]
}

func (c *card) wantReset() {
	c.tb.Helper()
	select {
	case <-c.NeedingReset():
	case <-time.After(queuetest.Timeout):
		c.tb.Fatal("the device does not ask for a reset")
	}
}

// none is the header of a frame that needs nothing.
var none = make([]byte, net.HeaderLen)

func header(h net.Header) []byte {
	b := make([]byte, net.HeaderLen)
	h.Put(b)
	return b
}

// frame returns n bytes that depend on seed.
func frame(n int, seed int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return b
}

// later runs f in the background; its result comes out of the channel.
func later[T any](f func() T) <-chan T {
	c := make(chan T, 1)
	go func() { c <- f() }()
	return c
}
