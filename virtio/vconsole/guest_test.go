package vconsole

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// all is every feature that the device may offer.
const all = ^virtio.Features(0)

// guest plays the driver as Linux's virtio_console.c does. Its methods belong to the test's goroutine.
type guest struct {
	*queuetest.Transport
	tb     testing.TB
	posted map[int]map[uint16][]byte // by queue, by head: the receive buffers
}

// boot activates d and posts buffers for control messages.
func boot(tb testing.TB, d *Device, want virtio.Features) *guest {
	tb.Helper()
	g := &guest{tb: tb, posted: map[int]map[uint16][]byte{}}
	g.Transport = queuetest.Start(tb, d, want, queuetest.Options{Len: 1 << 20})
	if g.Features.Has(FeatureMultiport) {
		g.post(controlRx, 256, 256, 256, 256)
	}
	return g
}

// open boots a guest in which a program has the named port open.
func open(tb testing.TB, d *Device, name string) (*guest, *Port, int) {
	tb.Helper()
	g := boot(tb, d, all)
	p := d.Port(name)
	id := int(p.id)
	g.control(^uint32(0), eventDeviceReady, 1)
	g.expect(p.id, eventDeviceAdd, 1, "")
	g.control(p.id, eventPortReady, 1)
	g.expect(p.id, eventPortOpen, 1, "")
	g.expect(p.id, eventPortName, 1, name)
	g.control(p.id, eventPortOpen, 1)
	return g, p, id
}

// post gives the device receive buffers.
func (g *guest) post(queue int, sizes ...int) {
	g.tb.Helper()
	if g.posted[queue] == nil {
		g.posted[queue] = map[uint16][]byte{}
	}
	for _, n := range sizes {
		b := make([]byte, n)
		g.posted[queue][g.Drivers[queue].Add(nil, [][]byte{b})] = b
	}
	g.Drivers[queue].Kick()
}

// take waits for the next filled receive buffer.
func (g *guest) take(queue int) []byte {
	g.tb.Helper()
	head, n := g.Drivers[queue].Wait()
	b := g.posted[queue][head]
	delete(g.posted[queue], head)
	return b[:n]
}

// takeAll takes n bytes from a port, posting buffers of that size for them.
func (g *guest) takeAll(queue, n, size int) []byte {
	g.tb.Helper()
	var got []byte
	for len(got) < n {
		g.post(queue, size)
		got = append(got, g.take(queue)...)
	}
	return got
}

func message(id uint32, event, value uint16, tail string) []byte {
	b := binary.LittleEndian.AppendUint32(nil, id)
	b = binary.LittleEndian.AppendUint16(b, event)
	b = binary.LittleEndian.AppendUint16(b, value)
	return append(b, tail...)
}

// control sends a control message and waits until it is consumed, as Linux does.
func (g *guest) control(id uint32, event, value uint16) {
	g.tb.Helper()
	g.Drivers[controlTx].Do([][]byte{message(id, event, value, "")}, nil)
}

// expect takes the next control message and posts a buffer for another.
func (g *guest) expect(id uint32, event, value uint16, tail string) {
	g.tb.Helper()
	if got, want := g.take(controlRx), message(id, event, value, tail); !bytes.Equal(got, want) {
		g.tb.Fatalf("control message %x, want %x", got, want)
	}
	g.post(controlRx, 256)
}

// send sends one buffer through a port and waits until the device returns it.
func (g *guest) send(queue int, b []byte) {
	g.tb.Helper()
	g.Drivers[queue].Do([][]byte{b}, nil)
}

// push sends one buffer and does not wait.
func (g *guest) push(queue int, b []byte) {
	g.tb.Helper()
	g.Drivers[queue].Add([][]byte{b}, nil)
	g.Drivers[queue].Kick()
}
