package vconsole

import (
	"io"
	"testing"

	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// ping has a driver echo through raw rings, which do not allocate: n bytes to the guest, n bytes back.
type ping struct {
	p      *Port
	rx, tx *queuetest.Driver
	buf    []byte
}

func newPing(tb testing.TB, n int) *ping {
	g, p, id := open(tb, newDevice(tb, Options{Ports: []string{agent}}), agent)
	x := &ping{p: p, rx: g.Drivers[rxQueue(id)], tx: g.Drivers[txQueue(id)], buf: make([]byte, n)}
	x.rx.SetDesc(0, queuetest.Desc{Addr: x.rx.Alloc(n, 64), Len: uint32(n), Flags: queuetest.FlagWrite})
	x.tx.SetDesc(0, queuetest.Desc{Addr: x.tx.Alloc(n, 64), Len: uint32(n)})
	return x
}

func (x *ping) run(tb testing.TB) {
	x.rx.MakeAvailable(0)
	x.rx.Kick()
	if _, err := x.p.Write(x.buf); err != nil {
		tb.Fatal(err)
	}
	x.tx.MakeAvailable(0)
	x.tx.Kick()
	if _, err := io.ReadFull(x.p, x.buf); err != nil {
		tb.Fatal(err)
	}
}

func TestNoAllocations(t *testing.T) {
	x := newPing(t, 1000)
	if n := testing.AllocsPerRun(200, func() { x.run(t) }); n != 0 {
		t.Errorf("%v allocations for a write and a read", n)
	}
}

func BenchmarkPort(b *testing.B) {
	x := newPing(b, 4096)
	b.ReportAllocs()
	b.SetBytes(2 * 4096)
	for b.Loop() {
		x.run(b)
	}
}

// TestNoLeaks runs and resets devices and looks at what is left.
func TestNoLeaks(t *testing.T) {
	check := queuetest.Leaks(t)
	for range 20 {
		t.Run("", func(t *testing.T) {
			d := newDevice(t, Options{Console: true, Ports: []string{agent, "other"}})
			openWithConsole3(t, d)
		})
	}
	check()
}

func openWithConsole3(tb testing.TB, d *Device) {
	g := boot(tb, d, all)
	g.control(0, eventDeviceReady, 1)
	for id := range uint32(3) {
		g.expect(id, eventDeviceAdd, 1, "")
		g.control(id, eventPortOpen, 1)
	}
	writeLater(d.Port(agent), []byte("never taken"))
}
