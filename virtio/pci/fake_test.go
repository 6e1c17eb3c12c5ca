package pci

import (
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/memory"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

var errHost = errors.New("refused")

// fakeHost plays the machine: it remembers what is connected to what.
type fakeHost struct {
	mu      sync.Mutex
	nextID  int
	routes  map[int]fakeRoute
	updates int
	line    bool
	edges   int // changes of the line
	events  map[uint64]*queue.Event
	noMSI   bool // AddMSI and UpdateMSI fail
	noEvent bool // AddIOEvent fails
	tb      testing.TB
}

type fakeRoute struct {
	ev  *queue.Event
	msg message
}

func newFakeHost(tb testing.TB) *fakeHost {
	return &fakeHost{tb: tb, routes: map[int]fakeRoute{}, events: map[uint64]*queue.Event{}}
}

func (h *fakeHost) AddMSI(ev *queue.Event, addr uint64, data uint32) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.noMSI {
		return 0, errHost
	}
	h.nextID++
	h.routes[h.nextID] = fakeRoute{ev, message{addr, data}}
	return h.nextID, nil
}

func (h *fakeHost) UpdateMSI(id int, addr uint64, data uint32) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	r, ok := h.routes[id]
	if !ok {
		h.tb.Errorf("UpdateMSI of %d, which does not exist", id)
	}
	if h.noMSI {
		return errHost
	}
	h.updates++
	r.msg = message{addr, data}
	h.routes[id] = r
	return nil
}

func (h *fakeHost) RemoveMSI(id int, ev *queue.Event) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r, ok := h.routes[id]; !ok || r.ev != ev {
		h.tb.Errorf("RemoveMSI of %d, which does not exist or has another event", id)
	}
	delete(h.routes, id)
	return nil
}

func (h *fakeHost) SetINTx(asserted bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.line == asserted {
		h.tb.Errorf("the line is set to %v again", asserted)
	}
	h.line = asserted
	h.edges++
	return nil
}

func (h *fakeHost) AddIOEvent(addr uint64, ev *queue.Event) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.noEvent || h.events[addr] != nil {
		return errHost
	}
	h.events[addr] = ev
	return nil
}

func (h *fakeHost) RemoveIOEvent(addr uint64, ev *queue.Event) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.events[addr] != ev {
		h.tb.Errorf("RemoveIOEvent at %#x of an event that is not there", addr)
	}
	delete(h.events, addr)
	return nil
}

// asserted returns the level of the line.
func (h *fakeHost) asserted() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.line
}

// routed returns the messages that are connected, sorted by data.
func (h *fakeHost) routed() []message {
	h.mu.Lock()
	defer h.mu.Unlock()
	var m []message
	for _, r := range h.routes {
		m = append(m, r.msg)
	}
	slices.SortFunc(m, func(a, b message) int { return int(a.data) - int(b.data) })
	return m
}

// sent takes and returns the messages that were sent since the last call, sorted by data.
func (h *fakeHost) sent() []message {
	h.mu.Lock()
	defer h.mu.Unlock()
	var m []message
	for _, r := range h.routes {
		if take(r.ev) {
			m = append(m, r.msg)
		}
	}
	slices.SortFunc(m, func(a, b message) int { return int(a.data) - int(b.data) })
	return m
}

// doorbells returns the addresses that signal an event.
func (h *fakeHost) doorbells() []uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	var a []uint64
	for addr := range h.events {
		a = append(a, addr)
	}
	slices.Sort(a)
	return a
}

// take reports whether ev was signalled, and resets it.
func take(ev *queue.Event) bool {
	var b [8]byte
	_, err := unix.Read(ev.FD(), b[:])
	return err == nil
}

// fakeDevice echoes: it copies the readable bytes of a chain to its writable ones.
type fakeDevice struct {
	id       virtio.ID
	features virtio.Features
	sizes    []uint16
	idle     bool // starts no workers

	failActivate, failReset error

	resetting, resume chan struct{} // if not nil: Reset closes the first and waits for the second

	mu        sync.Mutex
	told      []virtio.Features // by Negotiated
	changes   uint8             // of config, by the device
	config    [24]byte
	active    bool
	accepted  virtio.Features
	queues    []*queue.Queue
	transport virtio.Transport
	activated int
	wg        sync.WaitGroup
}

func (d *fakeDevice) ID() virtio.ID             { return d.id }
func (d *fakeDevice) Features() virtio.Features { return d.features }
func (d *fakeDevice) QueueSizes() []uint16      { return d.sizes }

func (d *fakeDevice) ReadConfig(p []byte, off int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(p)
	if off < len(d.config) {
		copy(p, d.config[off:])
	}
}

func (d *fakeDevice) WriteConfig(p []byte, off int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off < len(d.config) {
		copy(d.config[off:], p)
	}
}

func (d *fakeDevice) ConfigGeneration() uint8 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changes
}

func (d *fakeDevice) Negotiated(f virtio.Features) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.told = append(d.told, f)
}

// change fills the configuration with v.
func (d *fakeDevice) change(v byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.config {
		d.config[i] = v
	}
	d.changes++
}

func (d *fakeDevice) Activate(f virtio.Features, queues []*queue.Queue, t virtio.Transport) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.active {
		panic("activated twice")
	}
	if d.failActivate != nil {
		return d.failActivate
	}
	d.active, d.accepted, d.queues, d.transport = true, f, queues, t
	d.activated++
	for i, q := range queues {
		if q == nil || d.idle {
			continue
		}
		d.wg.Go(func() { echo(q, i, t) })
	}
	return nil
}

func echo(q *queue.Queue, i int, t virtio.Transport) {
	var c queue.Chain
	for q.Wait() == nil {
		for {
			ok, err := q.Pop(&c)
			if err != nil {
				t.NeedsReset()
				return
			}
			if !ok {
				break
			}
			n := 0
			if len(c.Readable) > 0 && len(c.Writable) > 0 {
				n = copy(c.Writable[0].Bytes(), c.Readable[0].Bytes())
			}
			q.Push(&c, uint32(n))
		}
		if q.ShouldNotify() {
			_ = t.NotifyQueue(i)
		}
	}
}

func (d *fakeDevice) Reset() error {
	if d.resetting != nil {
		close(d.resetting)
		<-d.resume
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failReset != nil {
		return d.failReset
	}
	for _, q := range d.queues {
		if q != nil {
			q.Stop()
		}
	}
	d.wg.Wait()
	d.active, d.queues = false, nil
	return nil
}

func (d *fakeDevice) running() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.active
}

// guest is a driver's view of a function, found through its capabilities as Linux's virtio_pci_modern finds it.
type guest struct {
	tb   testing.TB
	f    *Function
	dev  *fakeDevice
	host *fakeHost
	mem  *memory.Memory

	common, isr, device, notify, table, pba uint64 // guest-physical
	window, msix                            int    // capabilities in the configuration space
}

const (
	testBAR = 0xC000_0000
	ramSize = 32 << 20
)

func newFunction(tb testing.TB, dev *fakeDevice) *guest {
	tb.Helper()
	mem, err := memory.New(ramSize)
	if err != nil {
		tb.Fatal(err)
	}
	g := &guest{tb: tb, dev: dev, host: newFakeHost(tb), mem: mem}
	if g.f, err = New(dev, mem, g.host); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := g.f.Close(); err != nil && dev.failReset == nil {
			tb.Errorf("Close: %v", err)
		}
		if dev.failReset == nil && dev.running() {
			tb.Error("the device runs after Close")
		}
		if r, d := g.host.routed(), g.host.doorbells(); len(r) != 0 || len(d) != 0 || g.host.asserted() {
			tb.Errorf("after Close: messages %v, doorbells %x, line %v", r, d, g.host.asserted())
		}
		if err := mem.Close(); err != nil {
			tb.Error(err)
		}
	})
	if err := g.f.SetBAR(0, testBAR); err != nil {
		tb.Fatal(err)
	}
	return g
}

// newGuest makes a function and finds its parts, with memory and bus mastering enabled.
func newGuest(tb testing.TB, dev *fakeDevice) *guest {
	tb.Helper()
	g := newFunction(tb, dev)
	g.setCommand(commandMemory | commandMaster)
	g.scan()
	return g
}

// plainDevice is a device with two queues.
func plainDevice() *fakeDevice {
	return &fakeDevice{
		id:       virtio.Block,
		features: 1<<3 | virtio.RingEventIdx | virtio.RingIndirectDesc,
		sizes:    []uint16{256, 16},
	}
}

// scan walks the capability list.
func (g *guest) scan() {
	g.tb.Helper()
	seen := map[int]bool{}
	for at := int(g.cfg(regCapPointer, 1)); at != 0; at = int(g.cfg(at+1, 1)) {
		if seen[at] || at%4 != 0 {
			g.tb.Fatalf("capability list comes to %#x", at)
		}
		seen[at] = true
		switch g.cfg(at, 1) {
		case capMSIX:
			g.msix = at
			g.table = g.bar(g.cfg(at+4, 4)&7) + g.cfg(at+4, 4)&^7
			g.pba = g.bar(g.cfg(at+8, 4)&7) + g.cfg(at+8, 4)&^7
		case capVendor:
			if n, least := g.cfg(at+capLen, 1), uint64(capSize); n < least {
				g.tb.Fatalf("capability at %#x is %d long", at, n)
			}
			where := g.bar(g.cfg(at+capBAR, 1)) + g.cfg(at+capOffset, 4)
			switch g.cfg(at+capType, 1) {
			case capCommon:
				g.common = where
			case capNotify:
				g.notify = where
			case capISR:
				g.isr = where
			case capDevice:
				g.device = where
			case capPCICfg:
				g.window = at
			}
		}
	}
	if g.common == 0 || g.notify == 0 || g.isr == 0 || g.device == 0 || g.window == 0 || g.msix == 0 {
		g.tb.Fatalf("capabilities missing: %+v", g)
	}
}

func (g *guest) bar(i uint64) uint64 { return g.cfg(regBAR+4*int(i), 4) &^ 0xF }

// cfg reads n bytes of the configuration space.
func (g *guest) cfg(off, n int) uint64 {
	var b [8]byte
	g.f.ReadConfig(b[:n], off)
	return binary.LittleEndian.Uint64(b[:])
}

func (g *guest) setCfg(off, n int, v uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	g.f.WriteConfig(b[:n], off)
	g.settle()
}

// settle waits until a reset that is under way has ended, which on a busy host may take longer than the function's grace.
func (g *guest) settle() {
	g.f.mu.Lock()
	h := g.f.halting
	g.f.mu.Unlock()
	if h != nil {
		<-h.done
	}
}

func (g *guest) setCommand(v uint64) { g.setCfg(regCommand, 2, v) }

// read reads n bytes of device memory.
func (g *guest) read(addr uint64, n int) uint64 {
	g.tb.Helper()
	var b [8]byte
	if !g.f.ReadMMIO(addr, b[:n]) {
		g.tb.Fatalf("nobody answers at %#x", addr)
	}
	return binary.LittleEndian.Uint64(b[:])
}

// write writes n bytes of device memory, or rings a doorbell as KVM does.
func (g *guest) write(addr uint64, n int, v uint64) {
	g.tb.Helper()
	g.host.mu.Lock()
	ev := g.host.events[addr]
	g.host.mu.Unlock()
	if ev != nil && n == 2 {
		if err := ev.Signal(); err != nil {
			g.tb.Error(err)
		}
		return
	}
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	if !g.f.WriteMMIO(addr, b[:n]) {
		g.tb.Fatalf("nobody answers at %#x", addr)
	}
	g.settle()
}

// Offsets in struct virtio_pci_common_cfg, from the table of virtio 1.2, 4.1.4.3.
const (
	deviceFeatureSelect = 0x00
	deviceFeature       = 0x04
	driverFeatureSelect = 0x08
	driverFeature       = 0x0C
	configMSIXVector    = 0x10
	numQueues           = 0x12
	deviceStatus        = 0x14
	configGeneration    = 0x15
	queueSelect         = 0x16
	queueSize           = 0x18
	queueMSIXVector     = 0x1A
	queueEnable         = 0x1C
	queueNotifyOff      = 0x1E
	queueDesc           = 0x20
	queueDriver         = 0x28
	queueDevice         = 0x30
)

func (g *guest) status() virtio.Status     { return virtio.Status(g.read(g.common+deviceStatus, 1)) }
func (g *guest) setStatus(s virtio.Status) { g.write(g.common+deviceStatus, 1, uint64(s)) }

func (g *guest) offered() virtio.Features {
	var f virtio.Features
	for i := range uint64(2) {
		g.write(g.common+deviceFeatureSelect, 4, i)
		f |= virtio.Features(g.read(g.common+deviceFeature, 4)) << (32 * i)
	}
	return f
}

func (g *guest) accept(f virtio.Features) {
	for i := range uint64(2) {
		g.write(g.common+driverFeatureSelect, 4, i)
		g.write(g.common+driverFeature, 4, uint64(f>>(32*i)))
	}
}

// negotiate takes a reset device to FEATURES_OK and reports whether it agreed.
func (g *guest) negotiate(f virtio.Features) bool {
	g.tb.Helper()
	g.setStatus(0)
	if s := g.status(); s != 0 {
		g.tb.Fatalf("status %#x after a reset", s)
	}
	g.setStatus(virtio.StatusAcknowledge)
	g.setStatus(g.status() | virtio.StatusDriver)
	g.accept(f)
	g.setStatus(g.status() | virtio.StatusFeaturesOK)
	return g.status()&virtio.StatusFeaturesOK != 0
}

// setQueue describes a queue and enables it; its vector and size stay as they are.
func (g *guest) setQueue(i int, c queue.Config) {
	g.write(g.common+queueSelect, 2, uint64(i))
	g.write(g.common+queueSize, 2, uint64(c.Size))
	for _, r := range []struct{ off, addr uint64 }{
		{queueDesc, c.Desc}, {queueDriver, c.Driver}, {queueDevice, c.Device},
	} {
		g.write(g.common+r.off, 4, r.addr&0xFFFF_FFFF) // as two halves (virtio 1.2, 4.1.3.1)
		g.write(g.common+r.off+4, 4, r.addr>>32)
	}
	g.write(g.common+queueEnable, 2, 1)
}

// notifyAddr is where the driver notifies queue i.
func (g *guest) notifyAddr(i int) uint64 {
	g.write(g.common+queueSelect, 2, uint64(i))
	return g.notify + g.read(g.common+queueNotifyOff, 2)*notifyMultiplier
}

// enableMSIX switches MSI-X on with every vector programmed to testMessage and unmasked.
func (g *guest) enableMSIX() {
	n := int(g.cfg(g.msix+2, 2)&0x7FF) + 1
	g.setCfg(g.msix+2, 2, msixEnable|msixFuncMask)
	for i := range n {
		g.setVector(i, testMessage(i), false)
	}
	g.setCfg(g.msix+2, 2, msixEnable)
}

func testMessage(i int) message { return message{addr: 0xFEE0_1000, data: 0x4030 + uint32(i)} }

func (g *guest) setVector(i int, m message, masked bool) {
	at := g.table + uint64(entrySize*i)
	g.write(at+entryControl, 4, controlMasked)
	g.write(at+entryAddr, 4, m.addr&0xFFFF_FFFF)
	g.write(at+entryAddr+4, 4, m.addr>>32)
	g.write(at+entryData, 4, uint64(m.data))
	if !masked {
		g.write(at+entryControl, 4, 0)
	}
}

// boot takes the device to DRIVER_OK with all its queues at small addresses and vector 0 for the configuration, i+1
// for queue i.
func (g *guest) boot(f virtio.Features) {
	g.tb.Helper()
	if !g.negotiate(f | virtio.VersionOne) {
		g.tb.Fatalf("features %#x refused", f)
	}
	g.write(g.common+configMSIXVector, 2, 0)
	for i := range g.dev.sizes {
		base := 0x10000 * uint64(i+1)
		g.setQueue(i, queue.Config{Size: 8, Desc: base, Driver: base + 0x1000, Device: base + 0x2000})
		g.write(g.common+queueMSIXVector, 2, uint64(i+1))
	}
	g.setStatus(g.status() | virtio.StatusDriverOK)
	if s := g.status(); s != 0xF {
		g.tb.Fatalf("status %#x after DRIVER_OK", s)
	}
}
