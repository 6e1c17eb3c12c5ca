package pci

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/kvmlet/kvmlet/guest/memory"
	"github.com/kvmlet/kvmlet/virtio"
)

func TestIdentity(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		id    virtio.ID
		class uint64
	}{
		{virtio.Net, 0x020000}, {virtio.Block, 0x018000}, {virtio.Console, 0x078000}, {virtio.RNG, 0xFF0000},
	} {
		dev := plainDevice()
		dev.id = tc.id
		g := newGuest(t, dev)
		for _, r := range []struct {
			name   string
			off, n int
			want   uint64
		}{
			{"vendor", 0x00, 2, 0x1AF4},
			{"device", 0x02, 2, 0x1040 + uint64(tc.id)},
			{"command", 0x04, 2, 0x0006},
			{"status", 0x06, 2, 0x0010},
			{"revision", 0x08, 1, 1},
			{"class", 0x09, 3, tc.class},
			{"header type", 0x0E, 1, 0},
			{"BAR 1", 0x14, 4, 0},
			{"subsystem vendor", 0x2C, 2, 0x1AF4},
			{"expansion ROM", 0x30, 4, 0},
			{"interrupt pin", 0x3D, 1, 1},
			{"vectors", g.msix + 2, 2, 2},
			{"common length", atCommon + capLength, 4, 56},
			{"notify multiplier", atNotify + 16, 4, 4},
			{"extended capabilities", 0x100, 4, 0},
			{"end of ECAM", 0xFFC, 4, 0},
		} {
			if got := g.cfg(r.off, r.n); got != r.want {
				t.Errorf("device type %d: %s: %#x, want %#x", tc.id, r.name, got, r.want)
			}
		}
		g.f.SetInterruptLine(11)
		if got := g.cfg(0x3C, 1); got != 11 {
			t.Errorf("interrupt line %d", got)
		}
		g.setCfg(0x3C, 1, 0xFF)
		if got := g.cfg(0x3C, 2); got != 0x1FF {
			t.Errorf("interrupt line and pin %#x", got)
		}
	}
}

// TestConfigAccess reads the configuration space in every size and at every offset, and writes ones everywhere.
func TestConfigAccess(t *testing.T) {
	t.Parallel()
	g := newGuest(t, plainDevice())
	var all [configSize]byte
	for i := range all {
		all[i] = byte(g.cfg(i, 1))
	}
	for off := -4; off < 4200; off++ {
		for n := 1; n <= 8; n++ {
			got := slices.Repeat([]byte{0xEE}, n)
			g.f.ReadConfig(got, off)
			want := make([]byte, n)
			if off >= 0 && off < configSize {
				copy(want, all[off:])
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("%d bytes at %#x: %x, want %x", n, off, got, want)
			}
		}
	}
	ones := slices.Repeat([]byte{0xFF}, 8)
	changed := map[int]byte{}
	for off := -4; off < 4200; off++ {
		if overlap(off, 1, atWindow+capExtra, 4) {
			continue
		}
		g.f.WriteConfig(ones[:1], off)
	}
	for i := range all {
		if d := all[i] ^ byte(g.cfg(i, 1)); d != 0 && !overlap(i, 1, atWindow, capSizeLong) {
			changed[i] = d
		}
	}
	want := map[int]byte{
		regCommand + 1: 0x04,
		regBAR + 1:     0x80, regBAR + 2: 0xFF, regBAR + 3: 0x3F,
		regLine:    0xFF,
		g.msix + 3: 0xC0,
	}
	for i := range configSize {
		if changed[i] != want[i] {
			t.Errorf("byte %#x: bits %#x changed, want %#x", i, changed[i], want[i])
		}
	}
}

// TestBARSizing measures and moves the BAR as the PCI core of an operating system does, byte by byte too.
func TestBARSizing(t *testing.T) {
	t.Parallel()
	g := newFunction(t, plainDevice())
	if g.f.BARSize(0) != 0x8000 || g.f.BARSize(1) != 0 || g.f.BARSize(-1) != 0 {
		t.Errorf("BAR sizes %#x, %#x, %#x", g.f.BARSize(0), g.f.BARSize(1), g.f.BARSize(-1))
	}
	old := g.cfg(regBAR, 4)
	g.setCfg(regBAR, 4, 0xFFFF_FFFF)
	if got := g.cfg(regBAR, 4); got != 0xFFFF_8000 {
		t.Errorf("sizing reads %#x", got)
	}
	g.setCfg(regBAR, 4, old)
	if old != testBAR || g.cfg(regBAR, 4) != old {
		t.Errorf("BAR %#x, then %#x", old, g.cfg(regBAR, 4))
	}
	var b [1]byte
	if g.f.ReadMMIO(testBAR, b[:]) || g.f.WriteMMIO(testBAR, b[:]) {
		t.Error("answers without memory decoding")
	}
	g.setCommand(commandMemory)
	for i, v := range []uint64{0, 0x80, 0xAB, 0xD0} {
		g.setCfg(regBAR+i, 1, v)
	}
	const moved = 0xD0AB_8000
	for addr, want := range map[uint64]bool{
		testBAR: false, 0: false, 1<<32 + moved: false,
		moved - 1: false, moved: true, moved + 0x7FFF: true, moved + 0x8000: false,
	} {
		if got := g.f.ReadMMIO(addr, b[:]); got != want {
			t.Errorf("decodes %#x: %v", addr, got)
		}
	}
	g.setCfg(regBAR, 4, 0)
	if g.f.ReadMMIO(0, b[:]) {
		t.Error("an unassigned BAR answers")
	}
	for _, tc := range []struct {
		i    int
		addr uint64
	}{{1, testBAR}, {-1, testBAR}, {0, testBAR + 0x1000}, {0, 1 << 32}} {
		if err := g.f.SetBAR(tc.i, tc.addr); err == nil {
			t.Errorf("SetBAR(%d, %#x) succeeds", tc.i, tc.addr)
		}
	}
}

func TestNewErrors(t *testing.T) {
	t.Parallel()
	mem, err := memory.New(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	for _, sizes := range [][]uint16{{0}, {16, 3}, {65535}, make([]uint16, 256)} {
		if _, err := New(&fakeDevice{sizes: sizes}, mem, newFakeHost(t)); !errors.Is(err, ErrDevice) {
			t.Errorf("New with queues of %v: %v", sizes[:min(len(sizes), 4)], err)
		}
	}
	most := slices.Repeat([]uint16{16}, MaxQueues)
	f, err := New(&fakeDevice{sizes: most}, mem, newFakeHost(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Close(), f.Close()); err != nil {
		t.Error(err)
	}
}

// TestWindow reaches the registers through VIRTIO_PCI_CAP_PCI_CFG, with and without memory decoding.
func TestWindow(t *testing.T) {
	t.Parallel()
	g := newFunction(t, plainDevice())
	copy(g.dev.config[:], "configuration")
	g.setCommand(commandMemory)
	g.scan()
	g.setCommand(0)
	sel := func(bar, off, n uint64) {
		g.setCfg(g.window+capBAR, 1, bar)
		g.setCfg(g.window+capOffset, 4, off)
		g.setCfg(g.window+capLength, 4, n)
	}
	data := g.window + capExtra
	sel(0, g.device-testBAR, 4)
	if got := g.cfg(data, 4); got != 0x666E6F63 {
		t.Errorf("device configuration reads %#x", got)
	}
	sel(0, g.device-testBAR+4, 2)
	if got := g.cfg(data, 2); got != 0x6769 {
		t.Errorf("device configuration reads %#x", got)
	}
	sel(0, g.common-testBAR+deviceStatus, 1)
	g.setCfg(data, 1, 3)
	sel(0, g.common-testBAR+numQueues, 2)
	if got := g.cfg(data, 4); got&0xFFFF != 2 {
		t.Errorf("number of queues %d", got)
	}
	sel(0, g.common-testBAR+deviceStatus, 1)
	if got := g.cfg(data, 1); got != 3 {
		t.Errorf("status %#x", got)
	}
	// The ISR status is cleared by a read through the window as by any other.
	if err := g.f.NotifyConfig(); err != nil {
		t.Fatal(err)
	}
	sel(0, g.isr-testBAR, 1)
	if a, b := g.cfg(data, 1), g.cfg(data, 1); a != isrConfig || b != 0 {
		t.Errorf("ISR reads %#x, then %#x", a, b)
	}

	// What selects no access reads back what was written and touches nothing.
	for _, s := range []struct{ bar, off, n uint64 }{
		{1, g.common - testBAR + deviceStatus, 1},
		{0, g.common - testBAR + deviceStatus, 0},
		{0, g.common - testBAR + deviceStatus, 3},
		{0, g.common - testBAR + deviceStatus, 8},
		{0, g.common - testBAR + deviceStatus + 1, 2},
		{0, 0x8000, 4},
		{0, 0xFFFF_FFFC, 4},
	} {
		sel(s.bar, s.off, s.n)
		g.setCfg(data, 4, 0)
		if got := g.cfg(data, 4); got != 0 {
			t.Errorf("%+v reads %#x", s, got)
		}
	}
	g.setCommand(commandMemory)
	if got := g.status(); got != 3 {
		t.Errorf("status %#x: an access that selects nothing reached it", got)
	}
}
