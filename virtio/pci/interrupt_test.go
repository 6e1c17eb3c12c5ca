package pci

import (
	"slices"
	"testing"

	"github.com/kvmlet/kvmlet/virtio"
)

// idleGuest boots a device without workers, so that the test alone notifies.
func idleGuest(t *testing.T, msix bool) *guest {
	dev := plainDevice()
	dev.idle = true
	g := newGuest(t, dev)
	if msix {
		g.enableMSIX()
	}
	g.boot(0)
	return g
}

func (g *guest) notifyQueue(i int) {
	g.tb.Helper()
	if err := g.f.NotifyQueue(i); err != nil {
		g.tb.Fatal(err)
	}
}

// wantSent checks which vectors' messages were sent since the last look.
func (g *guest) wantSent(what string, vectors ...int) {
	g.tb.Helper()
	var want []message
	for _, v := range vectors {
		want = append(want, testMessage(v))
	}
	if got := g.host.sent(); !slices.Equal(got, want) {
		g.tb.Errorf("%s: sent %x, want %x", what, got, want)
	}
}

// wantPending checks the pending bit array.
func (g *guest) wantPending(what string, want uint64) {
	g.tb.Helper()
	if got := g.read(g.pba, 8); got != want {
		g.tb.Errorf("%s: pending %#b, want %#b", what, got, want)
	}
}

func TestMSIX(t *testing.T) {
	t.Parallel()
	g := idleGuest(t, true)
	if got := g.host.routed(); !slices.Equal(got, []message{testMessage(0), testMessage(1), testMessage(2)}) {
		t.Errorf("messages %x", got)
	}
	g.wantSent("start")
	g.notifyQueue(0)
	g.wantSent("queue 0", 1)
	g.notifyQueue(1)
	g.notifyQueue(1)
	g.wantSent("queue 1", 2)
	if err := g.f.NotifyConfig(); err != nil {
		t.Fatal(err)
	}
	g.wantSent("configuration", 0)
	if got := g.read(g.isr, 1); got != isrConfig {
		t.Errorf("ISR %#x", got)
	}
	if g.host.edges != 0 || g.cfg(regStatus, 2)&statusInterrupt != 0 {
		t.Error("the line moved with MSI-X enabled")
	}
	g.f.NeedsReset()
	g.f.NeedsReset()
	g.wantSent("needs reset", 0)
	if c := g.f.Counters(); c.Interrupts != 5 || c.Held != 0 {
		t.Errorf("%+v", c)
	}

	// Two queues may share a vector, and have none.
	g.write(g.common+queueSelect, 2, 0)
	g.write(g.common+queueMSIXVector, 2, 2)
	g.notifyQueue(0)
	g.wantSent("shared", 2)
	if got := g.host.routed(); !slices.Equal(got, []message{testMessage(0), testMessage(2)}) {
		t.Errorf("messages %x with vector 1 unused", got)
	}
	g.write(g.common+queueMSIXVector, 2, noVector)
	g.notifyQueue(0)
	g.wantSent("none")
	g.notifyQueue(1)
	g.wantSent("the other", 2)
	for _, v := range []uint64{3, 0x7FF, 0xFFFE} {
		g.write(g.common+queueMSIXVector, 2, v)
		if got := g.read(g.common+queueMSIXVector, 2); got != noVector {
			t.Errorf("vector %#x reads %#x", v, got)
		}
	}
}

func TestMSIXMask(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name         string
		mask, unmask func(g *guest)
		all          bool
	}{
		{"vector",
			func(g *guest) { g.write(g.table+entrySize+entryControl, 4, 1) },
			func(g *guest) { g.write(g.table+entrySize+entryControl, 4, 0) }, false},
		{"vector by quad words",
			func(g *guest) { g.write(g.table+entrySize+entryData, 8, 1<<32|uint64(testMessage(1).data)) },
			func(g *guest) { g.write(g.table+entrySize+entryData, 8, uint64(testMessage(1).data)) }, false},
		{"vector by byte",
			func(g *guest) { g.write(g.table+entrySize+entryControl, 1, 1) },
			func(g *guest) { g.write(g.table+entrySize+entryControl, 1, 0xFE) }, false},
		{"function",
			func(g *guest) { g.setCfg(g.msix+2, 2, msixEnable|msixFuncMask) },
			func(g *guest) { g.setCfg(g.msix+2, 2, msixEnable) }, true},
		{"function by byte",
			func(g *guest) { g.setCfg(g.msix+3, 1, 0xC0) },
			func(g *guest) { g.setCfg(g.msix+3, 1, 0x80) }, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			g := idleGuest(t, true)
			routes := g.host.routed()
			tc.mask(g)
			g.wantPending("masked", 0)
			g.notifyQueue(0)
			g.notifyQueue(0)
			g.notifyQueue(1)
			if tc.all {
				g.wantSent("masked")
				g.wantPending("notified", 0b110)
			} else {
				g.wantSent("masked", 2)
				g.wantPending("notified", 0b010)
			}
			g.write(g.pba, 8, 0xFFFF) // read-only
			if got := g.host.routed(); !slices.Equal(got, routes) {
				t.Errorf("masking changed the messages to %x", got)
			}
			tc.unmask(g)
			if tc.all {
				g.wantSent("unmasked", 1, 2)
			} else {
				g.wantSent("unmasked", 1)
			}
			g.wantPending("unmasked", 0)
			g.notifyQueue(0)
			g.wantSent("after", 1)
			if g.host.updates != 0 {
				t.Errorf("%d updates of unchanged messages", g.host.updates)
			}
		})
	}
}

// TestMSIXMove rewrites a message as an operating system does when it moves an interrupt to another CPU.
func TestMSIXMove(t *testing.T) {
	t.Parallel()
	g := idleGuest(t, true)
	m := message{addr: 0x1_FEE0_2000, data: 0x99}
	g.write(g.table+entrySize+entryControl, 4, 1)
	g.notifyQueue(0)
	g.write(g.table+entrySize+entryAddr, 8, m.addr)
	g.write(g.table+entrySize+entryData, 4, uint64(m.data))
	if g.host.updates != 0 {
		t.Error("the message changed under the mask")
	}
	g.write(g.table+entrySize+entryControl, 4, 0)
	if got := g.host.sent(); !slices.Equal(got, []message{m}) || g.host.updates != 1 {
		t.Errorf("sent %x after %d updates", got, g.host.updates)
	}
	var want [entrySize]byte
	want[0], want[2], want[3], want[4], want[8], want[1] = 0x00, 0xE0, 0xFE, 0x01, 0x99, 0x20
	var got [entrySize]byte
	g.f.ReadMMIO(g.table+entrySize, got[:])
	if got != want {
		t.Errorf("entry %x, want %x", got, want)
	}
	if got := g.read(g.table+3*entrySize, 8); got != 0 {
		t.Errorf("an entry behind the last: %#x", got)
	}
	g.write(g.table+3*entrySize, 8, 1)
	g.write(g.table+3*entrySize-4, 8, 1<<32|1) // the last control, and beyond
	g.notifyQueue(1)
	g.wantPending("last vector masked", 0b100)
}

// TestMSIXRoutes checks that the host has routes for vectors in use only, whatever the order of set-up.
func TestMSIXRoutes(t *testing.T) {
	t.Parallel()
	dev := plainDevice()
	dev.idle = true
	g := newGuest(t, dev)
	check := func(what string, vectors ...int) {
		t.Helper()
		var want []message
		for _, v := range vectors {
			want = append(want, testMessage(v))
		}
		if got := g.host.routed(); !slices.Equal(got, want) {
			t.Errorf("%s: messages %x, want %x", what, got, want)
		}
	}
	g.boot(0) // vectors are mapped while MSI-X is off
	check("mapped")
	g.setCfg(g.msix+2, 2, msixEnable)
	check("enabled but masked")
	g.notifyQueue(0)
	g.wantPending("before the first unmask", 0b010)
	g.setVector(1, testMessage(1), false)
	check("one unmasked", 1)
	g.wantSent("one unmasked", 1)
	g.setVector(0, testMessage(0), false)
	g.setVector(2, testMessage(2), true)
	check("two unmasked", 0, 1)
	g.write(g.table+entrySize+entryControl, 4, 1)
	check("masked again", 0, 1)
	g.setCfg(g.msix+2, 2, 0)
	check("disabled")
	g.setCfg(g.msix+2, 2, msixEnable)
	check("enabled again", 0)
	g.setStatus(0)
	check("reset")
}

func TestMSIXHostFull(t *testing.T) {
	t.Parallel()
	dev := plainDevice()
	dev.idle = true
	g := newGuest(t, dev)
	g.enableMSIX()
	g.host.noMSI = true
	g.write(g.common+configMSIXVector, 2, 0)
	if got := g.read(g.common+configMSIXVector, 2); got != noVector {
		t.Errorf("a vector without a route reads %#x", got)
	}
	// A mapping that was accepted under the mask cannot be refused any more.
	g.write(g.table+2*entrySize+entryControl, 4, 1)
	g.write(g.common+queueSelect, 2, 1)
	g.write(g.common+queueMSIXVector, 2, 2)
	if got := g.read(g.common+queueMSIXVector, 2); got != 2 {
		t.Errorf("a masked vector reads %#x", got)
	}
	g.write(g.table+2*entrySize+entryControl, 4, 0)
	if g.status()&virtio.StatusNeedsReset == 0 {
		t.Error("no reset asked for")
	}
	if c := g.f.Counters(); c.HostErrors != 2 {
		t.Errorf("%+v", c)
	}
	g.notifyQueue(1)
	g.wantPending("no route", 0b100)
	g.host.noMSI = false
	g.boot(0)
	g.notifyQueue(1)
	g.wantSent("again", 2)
}

func TestINTx(t *testing.T) {
	t.Parallel()
	g := idleGuest(t, false)
	check := func(what string, asserted bool) {
		t.Helper()
		if got := g.host.asserted(); got != asserted {
			t.Errorf("%s: line %v", what, got)
		}
	}
	check("start", false)
	g.notifyQueue(0)
	g.notifyQueue(1)
	check("notified", true)
	for _, s := range []uint64{g.cfg(regStatus, 2), g.cfg(regStatus, 1), g.cfg(regCommand, 4) >> 16} {
		if s&statusInterrupt == 0 {
			t.Errorf("status register %#x does not show the interrupt", s)
		}
	}
	if err := g.f.NotifyConfig(); err != nil {
		t.Fatal(err)
	}
	if got := g.read(g.isr, 4); got != isrQueue|isrConfig {
		t.Errorf("ISR %#x", got)
	}
	check("read", false)
	if got := g.read(g.isr, 1); got != 0 || g.cfg(regStatus, 2)&statusInterrupt != 0 {
		t.Errorf("ISR %#x when read again", got)
	}
	g.notifyQueue(0)
	g.read(g.isr+1, 2)
	check("the bytes behind the ISR read", true)

	g.setCommand(commandMemory | commandMaster | commandINTxDisable)
	check("disabled", false)
	if g.cfg(regStatus, 2)&statusInterrupt == 0 {
		t.Error("the status register forgets a disabled interrupt")
	}
	g.setCommand(commandMemory | commandMaster)
	check("enabled", true)
	g.setCfg(g.msix+2, 2, msixEnable)
	check("MSI-X", false)
	g.setCommand(commandMemory | commandMaster | commandINTxDisable)
	g.setCommand(commandMemory | commandMaster)
	check("MSI-X still", false)
	g.setCfg(g.msix+2, 2, 0)
	check("no MSI-X", true)
	g.setStatus(0)
	check("reset", false)
	if c := g.f.Counters(); c.Interrupts != 4 {
		t.Errorf("%+v", c)
	}
}

// TestBusMaster checks that without bus mastering the device neither works nor sends messages.
func TestBusMaster(t *testing.T) {
	t.Parallel()
	g := newGuest(t, plainDevice())
	g.setCommand(commandMemory)
	g.enableMSIX()
	g.boot(0)
	if g.dev.running() || len(g.host.doorbells()) != 0 || len(g.host.routed()) != 0 {
		t.Errorf("active %v, doorbells %x, messages %x", g.dev.running(), g.host.doorbells(), g.host.routed())
	}
	if err := g.f.NotifyConfig(); err != nil {
		t.Fatal(err)
	}
	g.setCommand(commandMemory | commandMaster)
	if !g.dev.running() || len(g.host.doorbells()) != 2 {
		t.Errorf("active %v, doorbells %x", g.dev.running(), g.host.doorbells())
	}
	g.wantSent("what was pending", 0)

	// Taking it away from a device at work stops that for good.
	g.setCommand(commandMemory)
	if g.dev.running() || g.status() != 15|virtio.StatusNeedsReset || len(g.host.doorbells()) != 0 {
		t.Errorf("active %v, status %#x, doorbells %x", g.dev.running(), g.status(), g.host.doorbells())
	}
	g.wantSent("no bus master")
	g.wantPending("no bus master", 1)
	g.setCommand(commandMemory | commandMaster)
	g.wantSent("bus master", 0)
	if g.dev.running() {
		t.Error("the device goes on without a reset")
	}
	g.boot(0)
	if !g.dev.running() {
		t.Error("the device does not come back")
	}
}

// TestDoorbells follows the notification registers through moves of the BAR and of memory decoding.
func TestDoorbells(t *testing.T) {
	t.Parallel()
	dev := plainDevice()
	dev.idle = true
	g := newGuest(t, dev)
	check := func(what string, base uint64) {
		t.Helper()
		var want []uint64
		if base != 0 {
			want = []uint64{base + notifyOffset, base + notifyOffset + 4}
		}
		if got := g.host.doorbells(); !slices.Equal(got, want) {
			t.Errorf("%s: doorbells %x, want %x", what, got, want)
		}
	}
	check("before DRIVER_OK", 0)
	g.boot(0)
	check("active", testBAR)
	if a, b := g.notifyAddr(0), g.notifyAddr(1); a != testBAR+notifyOffset || b != a+4 {
		t.Errorf("notification at %#x and %#x", a, b)
	}
	g.setCommand(commandMaster)
	check("no decoding", 0)
	g.setCfg(regBAR, 4, 0xFFFF_FFFF)
	g.setCfg(regBAR, 4, 0xD000_0000)
	check("moved without decoding", 0)
	g.setCommand(commandMaster | commandMemory)
	check("decoding", 0xD000_0000)
	g.setCfg(regBAR, 4, 0xD800_0000)
	check("moved with decoding", 0xD800_0000)
	g.setCfg(regBAR, 4, 0)
	check("unassigned", 0)
	g.setCfg(regBAR, 4, testBAR)
	check("back", testBAR)

	// A write of another width, or one that the host did not take, comes as an exit.
	kick := g.f.queues[1].kick
	take(kick)
	g.write(g.notifyAddr(1), 4, 1)
	if !take(kick) || take(g.f.queues[0].kick) {
		t.Error("a notification of 4 bytes did not come to queue 1 alone")
	}
	g.setStatus(0)
	check("reset", 0)
	take(kick) // stopping the queue signals it
	g.write(g.notify+4, 2, 1)
	if take(kick) {
		t.Error("a notification of a device that is not active")
	}
	g.host.noEvent = true
	g.boot(0)
	check("refused", 0)
	for i := range 2 {
		g.write(g.notifyAddr(i), 2, uint64(i))
		if !take(g.f.queues[i].kick) {
			t.Errorf("queue %d was not kicked", i)
		}
	}
	if c := g.f.Counters(); c.Doorbells != 3 || c.HostErrors != 2 {
		t.Errorf("%+v", c)
	}
}

func TestInterruptAllocs(t *testing.T) {
	for _, msix := range []bool{true, false} {
		dev := plainDevice()
		dev.idle = true
		g := newGuest(t, dev)
		if msix {
			g.enableMSIX()
		}
		g.boot(0)
		var b [2]byte
		addr, isr := g.notifyAddr(0), g.isr
		n := testing.AllocsPerRun(100, func() {
			if g.f.NotifyQueue(0) != nil || g.f.NotifyConfig() != nil {
				t.Fatal("notify")
			}
			g.f.WriteMMIO(addr, b[:])
			g.f.ReadMMIO(isr, b[:1])
		})
		if n != 0 {
			t.Errorf("MSI-X %v: %v allocations", msix, n)
		}
	}
}
