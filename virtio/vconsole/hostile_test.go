package vconsole

import (
	"runtime"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

func (g *guest) queues() []*queue.Queue {
	var qs []*queue.Queue
	for _, d := range g.Drivers {
		qs = append(qs, d.Queue)
	}
	return qs
}

func (g *guest) wantReset() {
	g.tb.Helper()
	select {
	case <-g.NeedingReset():
	case <-time.After(queuetest.Timeout):
		g.tb.Fatal("the device does not ask for a reset")
	}
}

// TestBadControl sends messages that make no sense, between ones that do.
func TestBadControl(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	g := boot(t, d, all)
	g.control(0, eventDeviceReady, 1)
	g.expect(1, eventDeviceAdd, 1, "")
	for _, msg := range [][]byte{
		message(1, eventPortReady, 1, "")[:7],     // short
		{0},                                       // shorter
		message(0, eventPortReady, 1, ""),         // port 0 does not exist without a console
		message(2, eventPortReady, 1, ""),         // beyond the last port
		message(1<<31, eventPortOpen, 1, ""),      // far beyond
		message(^uint32(0), eventPortOpen, 1, ""), // a signed -1
		message(1, eventDeviceAdd, 1, ""),         // the device's to send
		message(1, eventPortName, 1, "mine"),      // the same
		message(1, 0xffff, 1, ""),                 // unknown
	} {
		g.send(controlTx, msg)
	}
	if s := d.Stats(); s.BadControl != 9 {
		t.Errorf("%+v", s)
	}
	g.send(controlTx, message(1, eventPortReady, 1, "and a tail that is ignored"))
	g.expect(1, eventPortOpen, 1, "")
	g.expect(1, eventPortName, 1, agent)
}

// TestControlBacklog repeats itself without ever taking an answer: the answers do not pile up.
func TestControlBacklog(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Console: true, Ports: []string{agent}})
	g := &guest{tb: t, posted: map[int]map[uint16][]byte{}}
	g.Transport = queuetest.Start(t, d, all, queuetest.Options{Len: 1 << 20})
	for range 1000 {
		g.control(0, eventDeviceReady, 1)
		g.control(1, eventPortReady, 1)
		g.control(0, eventPortReady, 1)
	}
	g.post(controlRx, 256)
	g.expect(0, eventConsolePort, 1, "")
	g.expect(0, eventPortOpen, 1, "")
	g.expect(1, eventPortOpen, 1, "")
	g.expect(1, eventPortName, 1, agent)
	d.mu.Lock()
	defer d.mu.Unlock()
	if p := d.pendingPort(); p != nil {
		t.Errorf("port %d has more to tell: %b", p.id, p.pending)
	}
}

// TestShortControlBuffer posts a buffer that a port's name does not fit.
func TestShortControlBuffer(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	g := &guest{tb: t, posted: map[int]map[uint16][]byte{}}
	g.Transport = queuetest.Start(t, d, all, queuetest.Options{Len: 1 << 20})
	g.post(controlRx, 8, controlSize+len(agent)-1)
	g.control(1, eventPortReady, 1)
	if got := g.take(controlRx); string(got) != string(message(1, eventPortOpen, 1, "")) {
		t.Errorf("% x", got)
	}
	g.wantReset()
}

// TestMalformedChains breaks each queue in turn.
func TestMalformedChains(t *testing.T) {
	t.Parallel()
	for name, q := range map[string]int{
		"no port": 1, "control receive": controlRx, "control transmit": controlTx, "receive": 4, "transmit": 5,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDevice(t, Options{Ports: []string{agent}})
			g := &guest{tb: t, posted: map[int]map[uint16][]byte{}}
			g.Transport = queuetest.Start(t, d, all, queuetest.Options{Len: 1 << 20})
			g.control(1, eventPortOpen, 1)
			switch q {
			case controlRx:
				g.control(1, eventPortReady, 1)
			case 4:
				writeLater(d.Port(agent), []byte("x"))
			}
			drv := g.Drivers[q]
			drv.SetDesc(0, queuetest.Desc{Addr: 1 << 60, Len: 16})
			drv.MakeAvailable(0)
			drv.Kick()
			g.wantReset()
			if err := d.Reset(); err != nil {
				t.Fatal(err)
			}
			open(t, d, agent) // and it runs again
		})
	}
}

// TestWrongDirections puts buffers of the other direction into every queue: harmless, and no chain is lost.
func TestWrongDirections(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	g, p, id := open(t, d, agent)
	for _, q := range []int{1, controlTx, txQueue(id)} {
		g.Drivers[q].Do(nil, [][]byte{make([]byte, 32)})
	}
	done := writeLater(p, []byte("x"))
	g.Drivers[rxQueue(id)].Do([][]byte{make([]byte, 32)}, nil)
	g.takeAll(rxQueue(id), 1, 1)
	if r := <-done; r.n != 1 || r.err != nil {
		t.Errorf("%+v", r)
	}
}

// TestResetEndsBusyQueues resets while the guest's other CPUs keep every queue full.
func TestResetEndsBusyQueues(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	g, p, id := open(t, d, agent)
	p.Close() // so that nothing waits for the host
	stop := make(chan struct{})
	var running []<-chan int
	for _, q := range []int{1, controlTx, txQueue(id)} {
		drv := g.Drivers[q]
		drv.SetDesc(0, queuetest.Desc{Addr: drv.Alloc(64, 64), Len: 64})
		running = append(running, later(func() (n int) {
			for {
				select {
				case <-stop:
					return n
				default:
					// Never more than the queue holds: the device may be a little behind.
					if drv.AvailIdx()-drv.UsedIdx() < 16 {
						drv.MakeAvailable(0)
						drv.Kick()
						n++
					}
					runtime.Gosched()
				}
			}
		}))
	}
	if err := d.Reset(); err != nil {
		t.Fatal(err)
	}
	close(stop)
	for _, c := range running {
		<-c
	}
}

// FuzzControl feeds the device any sequence of control messages, each preceded by its length, and then checks that a
// driver that behaves gets through.
func FuzzControl(f *testing.F) {
	f.Add([]byte{})
	f.Add(append([]byte{8}, message(0, eventDeviceReady, 1, "")...))
	f.Add(append([]byte{8}, message(1, eventPortReady, 1, "")...))
	f.Add(append([]byte{8}, message(1, eventPortOpen, 1, "")...))
	f.Add(append(append([]byte{8}, message(1, eventPortOpen, 1, "")...), append([]byte{8}, message(1, eventPortOpen, 0, "")...)...))
	f.Add(append([]byte{12}, message(^uint32(0), 0xffff, 0xffff, "tail")...))
	f.Add([]byte{3, 1, 2, 3, 0, 1, 9})
	f.Fuzz(func(t *testing.T, script []byte) {
		d := newDevice(t, Options{Console: true, Ports: []string{agent}})
		g := boot(t, d, all)
		for len(script) > 0 {
			n := min(int(script[0]), len(script)-1)
			msg := script[1 : 1+n]
			script = script[1+n:]
			if n > 0 {
				g.send(controlTx, msg)
			}
		}
		g.control(1, eventPortOpen, 1)
		if !d.Port(agent).Open() {
			t.Error("the port is not open")
		}
		g.push(5, []byte("x")) // taken once the ends of the script's sessions have been read
		b := make([]byte, 1)
		for {
			if n, err := d.Port(agent).Read(b); n == 1 {
				break
			} else if err == nil {
				t.Fatal("read nothing")
			}
		}
	})
}
