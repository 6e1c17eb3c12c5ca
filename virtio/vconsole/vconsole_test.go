package vconsole

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

const agent = "dev.kvmlet.agent"

func newDevice(tb testing.TB, o Options) *Device {
	tb.Helper()
	d, err := New(o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { d.Close() })
	return d
}

// later runs f in the background; its result comes out of the channel.
func later[T any](f func() T) <-chan T {
	c := make(chan T, 1)
	go func() { c <- f() }()
	return c
}

type result struct {
	n   int
	err error
}

func writeLater(p *Port, b []byte) <-chan result {
	return later(func() result { n, err := p.Write(b); return result{n, err} })
}

func readFull(tb testing.TB, p *Port, n int) []byte {
	tb.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(p, b); err != nil {
		tb.Fatalf("read %d bytes: %v", n, err)
	}
	return b
}

func noise(n int, seed uint64) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	for name, ports := range map[string][]string{
		"empty name":     {""},
		"long name":      {strings.Repeat("x", MaxName+1)},
		"line feed":      {"a\nb"},
		"zero byte":      {"a\x00"},
		"not UTF-8":      {"\xff"},
		"duplicate":      {"a", "b", "a"},
		"too many ports": make([]string, MaxPorts+1),
	} {
		if _, err := New(Options{Ports: ports}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := New(Options{Ports: []string{strings.Repeat("x", MaxName)}}); err != nil {
		t.Error(err)
	}
}

func TestShape(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Console: true, Ports: []string{"a", "b"}})
	if d.ID() != virtio.Console {
		t.Errorf("ID %d", d.ID())
	}
	if want := []uint16{64, 64, 32, 32, 64, 64, 64, 64}; !slices.Equal(d.QueueSizes(), want) {
		t.Errorf("queue sizes %d, want %d", d.QueueSizes(), want)
	}
	if !d.Features().Has(FeatureSize | FeatureMultiport | virtio.RingIndirectDesc | virtio.RingEventIdx) {
		t.Errorf("features %#x", d.Features())
	}
	if f := newDevice(t, Options{Ports: []string{"a"}}).Features(); f.Has(FeatureSize) {
		t.Errorf("features %#x: a size without a console", f)
	}
	d.Resize(80, 25)
	d.Resize(80, 25)
	if n := d.ConfigGeneration(); n != 1 {
		t.Errorf("generation %d after a change before any driver, was 0", n)
	}
	want := []byte{80, 0, 25, 0, 3, 0, 0, 0, 0, 0, 0, 0}
	got := bytes.Repeat([]byte{0xee}, 16)
	d.ReadConfig(got, 0)
	if !bytes.Equal(got, append(want, 0, 0, 0, 0)) {
		t.Errorf("config % x", got)
	}
	d.WriteConfig([]byte{1, 2, 3, 4}, 0)
	for _, off := range []int{0, 2, 4, 11, 12, 13, 1 << 40, -1} {
		got := []byte{0xee}
		d.ReadConfig(got, off)
		if off >= 0 && off < len(want) && got[0] != want[off] || (off < 0 || off >= len(want)) && got[0] != 0 {
			t.Errorf("config at %d: %#x", off, got[0])
		}
	}
	if d.Port("b").Name() != "b" || d.Port("c") != nil || d.Console() == nil || d.Port("") != nil {
		t.Error("ports are not found by name")
	}
}

// TestHandshake is the whole of what Linux and the device say to each other until every port is usable.
func TestHandshake(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Console: true, Ports: []string{"first", agent}})
	d.Resize(132, 50)
	g := boot(t, d, all)
	g.control(^uint32(0), eventDeviceReady, 1)
	for id := range uint32(3) {
		g.expect(id, eventDeviceAdd, 1, "")
	}
	g.control(0, eventPortReady, 1)
	g.expect(0, eventConsolePort, 1, "")
	g.expect(0, eventResize, 0, "\x84\x00\x32\x00")
	g.expect(0, eventPortOpen, 1, "")
	g.control(2, eventPortReady, 1)
	g.expect(2, eventPortOpen, 1, "") // before the name: see pendingAdd
	g.expect(2, eventPortName, 1, agent)
	g.control(1, eventPortReady, 0) // out of memory, say
	g.control(0, eventPortOpen, 1)
	if !d.Console().Open() || d.Port(agent).Open() || d.Port("first").Open() {
		t.Error("wrong ports are open")
	}
	d.Resize(80, 24)
	g.expect(0, eventResize, 0, "\x50\x00\x18\x00")
	d.Resize(80, 24)
	if n, gen := g.ConfigChanges(), d.ConfigGeneration(); n != 1 || gen != 2 {
		t.Errorf("%d configuration changes, want 1; generation %d, want 2", n, gen)
	}
	// A driver that starts over gets the same again.
	g.control(7, eventDeviceReady, 1)
	for id := range uint32(3) {
		g.expect(id, eventDeviceAdd, 1, "")
	}
	if s := d.Stats(); s.BadControl != 0 {
		t.Errorf("%+v", s)
	}
}

func TestFromGuest(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	g, p, id := open(t, d, agent)
	for _, s := range []string{"h", "ello", " guest"} {
		g.send(txQueue(id), []byte(s))
	}
	if got := readFull(t, p, 11); string(got) != "hello guest" {
		t.Errorf("%q", got)
	}
	// A chain of several parts, read in small pieces.
	g.Drivers[txQueue(id)].Do([][]byte{[]byte("ab"), []byte("c"), []byte("defg")}, nil)
	if got, _ := io.ReadAll(io.LimitReader(iotest.OneByteReader(p), 7)); string(got) != "abcdefg" {
		t.Errorf("%q", got)
	}
	if n, err := p.Read(nil); n != 0 || err != nil {
		t.Errorf("empty read: %d, %v", n, err)
	}
	if s := d.Stats(); s.FromGuest != 18 {
		t.Errorf("%+v", s)
	}
}

// TestFromGuestWaits fills the ring: the buffer that does not fit stays with the device until the host reads.
func TestFromGuestWaits(t *testing.T) {
	t.Parallel()
	g, p, id := open(t, newDevice(t, Options{Ports: []string{agent}}), agent)
	sent := noise(ringSize+5000, 1)
	tx := g.Drivers[txQueue(id)]
	g.send(txQueue(id), sent[:ringSize-10])
	g.push(txQueue(id), sent[ringSize-10:])
	if _, _, ok := tx.Used(); ok {
		t.Fatal("the device took more than it has room for")
	}
	if got := readFull(t, p, len(sent)); !bytes.Equal(got, sent) {
		t.Error("bytes differ")
	}
	tx.Wait()
}

// TestToGuestWaits checks that nothing is lost that was written before the guest opened the port.
func TestToGuestWaits(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	sent := noise(10000, 2)
	done := writeLater(d.Port(agent), sent)
	g, _, id := open(t, d, agent)
	rx := rxQueue(id)
	if got := g.takeAll(rx, 4096, 4096); !bytes.Equal(got, sent[:4096]) {
		t.Error("bytes differ")
	}
	select {
	case r := <-done:
		t.Fatalf("written before the guest took it: %+v", r)
	default:
	}
	if got := g.takeAll(rx, len(sent)-4096, 999); !bytes.Equal(got, sent[4096:]) {
		t.Error("bytes differ")
	}
	if r := <-done; r.n != len(sent) || r.err != nil {
		t.Errorf("%+v", r)
	}
	if s := d.Stats(); s.ToGuest != uint64(len(sent)) {
		t.Errorf("%+v", s)
	}
}

// TestWritesDoNotMix has many writers.
func TestWritesDoNotMix(t *testing.T) {
	t.Parallel()
	g, p, id := open(t, newDevice(t, Options{Ports: []string{agent}}), agent)
	const writers, size = 8, 700
	var done []<-chan result
	for i := range writers {
		done = append(done, writeLater(p, bytes.Repeat([]byte{byte(i)}, size)))
	}
	got := g.takeAll(rxQueue(id), writers*size, 64)
	for i := 0; i < len(got); i += size {
		if !bytes.Equal(got[i:i+size], bytes.Repeat(got[i:i+1], size)) {
			t.Fatalf("two writes are mixed in % x", got[i:i+size])
		}
	}
	for _, c := range done {
		if r := <-c; r.n != size || r.err != nil {
			t.Errorf("%+v", r)
		}
	}
}

// TestSessionEnds closes the port in the guest with data under way, more than the ring holds.
func TestSessionEnds(t *testing.T) {
	t.Parallel()
	g, p, id := open(t, newDevice(t, Options{Ports: []string{agent}}), agent)
	sent := noise(ringSize+30000, 3)
	g.push(txQueue(id), sent[:40000])
	g.push(txQueue(id), sent[40000:])
	g.control(p.id, eventPortOpen, 0)
	got, err := io.ReadAll(p)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d of %d bytes, %v", len(got), len(sent), err)
	}
	g.Drivers[txQueue(id)].Wait()
	g.Drivers[txQueue(id)].Wait()

	// The next session is not seen before the end of this one was.
	g.control(p.id, eventPortOpen, 1)
	g.control(p.id, eventPortOpen, 0)
	if got, err := io.ReadAll(p); len(got) != 0 || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	g.control(p.id, eventPortOpen, 1)
	g.send(txQueue(id), []byte("again"))
	g.control(p.id, eventPortOpen, 0)
	if got, err := io.ReadAll(p); string(got) != "again" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
}

// TestSessionsStayApart checks that a later session's bytes wait until the end of the earlier one has been read.
func TestSessionsStayApart(t *testing.T) {
	t.Parallel()
	g, p, id := open(t, newDevice(t, Options{Ports: []string{agent}}), agent)
	g.send(txQueue(id), []byte("one"))
	g.control(p.id, eventPortOpen, 0)
	readFull(t, p, 3) // so that the queue is known to be empty when the worker looks
	waitFor(t, p, func() bool { return p.eof })
	g.control(p.id, eventPortOpen, 1)
	g.push(txQueue(id), []byte("two"))
	if n, err := p.Read(make([]byte, 8)); n != 0 || err != io.EOF {
		t.Fatalf("%d, %v", n, err)
	}
	if got := readFull(t, p, 3); string(got) != "two" {
		t.Fatalf("%q", got)
	}
}

// waitFor waits until the port's state makes ok true.
func waitFor(tb testing.TB, p *Port, ok func() bool) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), queuetest.Timeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		p.dev.mu.Lock()
		defer p.dev.mu.Unlock()
		p.changed.Broadcast()
	})()
	p.dev.mu.Lock()
	defer p.dev.mu.Unlock()
	for !ok() {
		if ctx.Err() != nil {
			tb.Fatal("the port did not get there")
		}
		p.changed.Wait()
	}
}

func TestGuestClosesDuringWrite(t *testing.T) {
	t.Parallel()
	g, p, id := open(t, newDevice(t, Options{Ports: []string{agent}}), agent)
	done := writeLater(p, make([]byte, 100))
	g.post(rxQueue(id), 30)
	if b := g.take(rxQueue(id)); len(b) != 30 {
		t.Fatalf("%d bytes", len(b))
	}
	g.control(p.id, eventPortOpen, 0)
	g.control(p.id, eventPortOpen, 1)
	if r := <-done; r.n != 30 || !errors.Is(r.err, ErrGuestClosed) {
		t.Errorf("%+v", r)
	}
	// The next write belongs to the new session.
	done = writeLater(p, []byte("new"))
	if got := g.takeAll(rxQueue(id), 3, 8); string(got) != "new" {
		t.Errorf("%q", got)
	}
	if r := <-done; r.n != 3 || r.err != nil {
		t.Errorf("%+v", r)
	}
	// A write of which nothing was taken waits for the guest to come back.
	done = writeLater(p, []byte("wait"))
	waitFor(t, p, func() bool { return len(p.out) > 0 })
	g.control(p.id, eventPortOpen, 0)
	g.control(p.id, eventPortOpen, 1)
	if got := g.takeAll(rxQueue(id), 4, 8); string(got) != "wait" {
		t.Errorf("%q", got)
	}
	if r := <-done; r.n != 4 || r.err != nil {
		t.Errorf("%+v", r)
	}
}

// TestReset resets with everything under way, then runs the device again.
func TestReset(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Console: true, Ports: []string{agent}})
	for round := range 3 {
		g, p, id := openWithConsole(t, d)
		sent := noise(50000, uint64(round))
		for _, part := range [][]byte{sent[:20000], sent[20000:20001], sent[20001:]} {
			g.push(txQueue(id), part)
		}
		done := writeLater(p, make([]byte, 100))
		g.post(rxQueue(id), 40)
		g.take(rxQueue(id))
		if err := d.Reset(); err != nil {
			t.Fatal(err)
		}
		if r := <-done; r.n != 40 || r.err != os.ErrClosed {
			t.Errorf("%+v", r)
		}
		if p.Open() {
			t.Error("the port is still open")
		}
		got, err := io.ReadAll(p)
		if err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("round %d: %d of %d bytes, %v", round, len(got), len(sent), err)
		}
		if err := d.Reset(); err != nil {
			t.Fatal(err)
		}
	}
}

func openWithConsole(tb testing.TB, d *Device) (*guest, *Port, int) {
	tb.Helper()
	g := boot(tb, d, all)
	g.control(0, eventDeviceReady, 1)
	g.expect(0, eventDeviceAdd, 1, "")
	g.expect(1, eventDeviceAdd, 1, "")
	g.control(1, eventPortOpen, 1)
	return g, d.ports[1], 1
}

// TestResetFullRing resets while the guest's data waits for room: what fits can be read, the rest is gone.
func TestResetFullRing(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	g, p, id := open(t, d, agent)
	sent := noise(ringSize+100, 4)
	g.push(txQueue(id), sent)
	waitFor(t, p, func() bool { return p.in.n == ringSize })
	if err := d.Reset(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(p); err != nil || !bytes.Equal(got, sent[:ringSize]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestActivateTwice(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	g := boot(t, d, all)
	if err := d.Activate(all, nil, g); err == nil {
		t.Error("activated with no queues")
	}
	var qs = g.queues()
	if err := d.Activate(all, qs, g); err == nil {
		t.Error("activated twice")
	}
}

func TestClosePort(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	g, p, id := open(t, d, agent)
	g.send(txQueue(id), []byte("never read"))
	g.push(txQueue(id), make([]byte, ringSize)) // waits for room
	reads := later(func() error { _, err := io.Copy(io.Discard, &slowReader{p}); return err })
	writes := writeLater(p, []byte("never taken"))
	waits := later(func() error {
		waitFor(t, p, func() bool { return !p.open })
		return p.WaitOpen(t.Context())
	})
	waitFor(t, p, func() bool { return len(p.out) > 0 })
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	g.expect(p.id, eventPortOpen, 0, "")
	if r := <-writes; r.n != 0 || r.err != os.ErrClosed {
		t.Errorf("write: %+v", r)
	}
	if err := <-reads; err != os.ErrClosed {
		t.Errorf("read: %v", err)
	}
	g.Drivers[txQueue(id)].Wait()
	g.send(txQueue(id), []byte("discarded"))
	g.control(p.id, eventPortOpen, 0)
	if err := <-waits; err != os.ErrClosed {
		t.Errorf("wait: %v", err)
	}
	if _, err := p.Write(nil); err != os.ErrClosed {
		t.Errorf("write: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if s := d.Stats(); s.Discarded < 9 {
		t.Errorf("%+v", s)
	}
}

// slowReader hides the rest of Port, and makes many small reads.
type slowReader struct{ r io.Reader }

func (s *slowReader) Read(b []byte) (int, error) { return s.r.Read(b[:1]) }

func TestWaitOpen(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	ctx, cancel := context.WithCancel(t.Context())
	waiting := later(func() error { return d.Port(agent).WaitOpen(ctx) })
	cancel()
	if err := <-waiting; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	waiting = later(func() error { return d.Port(agent).WaitOpen(t.Context()) })
	open(t, d, agent)
	if err := <-waiting; err != nil {
		t.Error(err)
	}
}

// TestPlainConsole has a driver that knows nothing of several ports.
func TestPlainConsole(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Console: true, Ports: []string{agent}})
	g := boot(t, d, FeatureSize)
	p := d.Console()
	g.send(1, []byte("login: "))
	if got := readFull(t, p, 7); string(got) != "login: " {
		t.Errorf("%q", got)
	}
	done := writeLater(p, []byte("root\n"))
	if got := g.takeAll(0, 5, 16); string(got) != "root\n" {
		t.Errorf("%q", got)
	}
	if r := <-done; r.err != nil {
		t.Error(r.err)
	}
	d.Resize(100, 40)
	if g.ConfigChanges() != 1 {
		t.Error("the driver was not told the size")
	}
	if err := d.Reset(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Read(make([]byte, 1)); err != io.EOF {
		t.Error(err)
	}
}

// TestNoPlainConsole has the same driver where there is no console: its output goes nowhere, without holding it up.
func TestNoPlainConsole(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Ports: []string{agent}})
	g := boot(t, d, 0)
	for range 200 {
		g.send(1, []byte("into the void"))
	}
	d.Resize(1, 1)
	if g.ConfigChanges() != 0 {
		t.Error("a size without a console")
	}
}

// TestConsoleNeverWaits fills a console that nobody reads: Linux would spin with interrupts off.
func TestConsoleNeverWaits(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Console: true})
	g := boot(t, d, all)
	g.control(0, eventPortOpen, 1)
	chunk := noise(ringSize/2, 5)
	for range 4 {
		g.send(1, chunk)
	}
	if got := readFull(t, d.Console(), ringSize); !bytes.Equal(got, append(slices.Clone(chunk), chunk...)) {
		t.Error("the oldest bytes are not kept")
	}
	if s := d.Stats(); s.Discarded != ringSize {
		t.Errorf("%+v", s)
	}
}
