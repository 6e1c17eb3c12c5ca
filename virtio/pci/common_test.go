package pci

import (
	"bytes"
	"errors"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

func TestFeatures(t *testing.T) {
	t.Parallel()
	dev := plainDevice()
	dev.features |= unsupported
	g := newGuest(t, dev)
	base := plainDevice().features | virtio.VersionOne
	if got := g.offered(); got != base {
		t.Errorf("offers %#x, want %#x", got, base)
	}
	for _, sel := range []uint64{2, 32, 0xFFFF_FFFF} {
		g.write(g.common+deviceFeatureSelect, 4, sel)
		g.write(g.common+driverFeatureSelect, 4, sel)
		g.write(g.common+driverFeature, 4, 1)
		if a, b := g.read(g.common+deviceFeature, 4), g.read(g.common+driverFeature, 4); a != 0 || b != 0 {
			t.Errorf("feature word %d: %#x, %#x", sel, a, b)
		}
	}
	for _, tc := range []struct {
		f  virtio.Features
		ok bool
	}{
		{base, true},
		{virtio.VersionOne, true},
		{0, false},
		{base &^ virtio.VersionOne, false}, // a legacy driver
		{base | 1, false},
		{base | virtio.RingPacked, false},
		{base | 1<<63, false},
	} {
		g.dev.told = nil
		if ok := g.negotiate(tc.f); ok != tc.ok {
			t.Errorf("features %#x accepted: %v", tc.f, ok)
		}
		g.setStatus(g.status()) // writes the same again
		if ok := slices.Equal(g.dev.told, []virtio.Features{tc.f}); ok != tc.ok {
			t.Errorf("features %#x: the device was told of %#x", tc.f, g.dev.told)
		}
		if tc.ok {
			g.accept(0) // too late
			g.setStatus(g.status() | virtio.StatusDriverOK)
			if g.dev.accepted != tc.f {
				t.Errorf("the device got %#x, want %#x", g.dev.accepted, tc.f)
			}
		}
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	const ack, driver, ok, features, failed = 1, 2, 4, 8, 128
	for _, tc := range []struct {
		name   string
		writes []virtio.Status
		want   virtio.Status
		active bool
	}{
		{"regular", []virtio.Status{ack, ack | driver, ack | driver | features, 15}, 15, true},
		{"at once", []virtio.Status{15}, 15, true},
		{"no FEATURES_OK", []virtio.Status{ack, ack | driver, ack | driver | ok}, 3, false},
		{"only DRIVER_OK", []virtio.Status{ok}, 0, false},
		{"bits cannot be cleared", []virtio.Status{15, ack}, 15, true},
		{"unknown bits", []virtio.Status{ack | 16 | 32 | 64}, ack, false},
		{"DRIVER_OK twice", []virtio.Status{15, 15}, 15, true},
		{"FAILED first", []virtio.Status{failed, failed | 15}, failed | 15, false},
		{"FAILED later", []virtio.Status{15, failed | 15}, failed | 15, false},
		{"FAILED and DRIVER_OK", []virtio.Status{11, failed | 15}, failed | 15, false},
		{"reset", []virtio.Status{15, 0}, 0, false},
		{"reset and again", []virtio.Status{15, 0, 11}, 3, false}, // the features are gone
	} {
		g := newGuest(t, plainDevice())
		g.accept(virtio.VersionOne)
		for _, s := range tc.writes {
			g.setStatus(s)
		}
		if got := g.status(); got != tc.want || g.dev.running() != tc.active {
			t.Errorf("%s: status %#x, active %v; want %#x, %v", tc.name, got, g.dev.running(), tc.want, tc.active)
		}
	}
}

// TestReset checks what a reset by the driver leaves.
func TestReset(t *testing.T) {
	t.Parallel()
	g := newGuest(t, plainDevice())
	g.enableMSIX()
	for range 3 {
		g.boot(virtio.RingEventIdx)
		g.f.NeedsReset()
		g.setStatus(0)
		if g.dev.running() || g.status() != 0 || len(g.host.doorbells()) != 0 || len(g.host.routed()) != 0 {
			t.Fatalf("after a reset: active %v, status %#x, doorbells %x, messages %v",
				g.dev.running(), g.status(), g.host.doorbells(), g.host.routed())
		}
		for i, size := range g.dev.sizes {
			g.write(g.common+queueSelect, 2, uint64(i))
			for off, want := range map[uint64]uint64{
				queueSize: uint64(size), queueEnable: 0, queueMSIXVector: noVector, queueNotifyOff: uint64(i),
			} {
				if got := g.read(g.common+off, 2); got != want {
					t.Errorf("queue %d, register %#x: %#x, want %#x", i, off, got, want)
				}
			}
			for _, off := range []uint64{queueDesc, queueDriver, queueDevice} {
				if got := g.read(g.common+off, 8); got != 0 {
					t.Errorf("queue %d, register %#x: %#x", i, off, got)
				}
			}
		}
		if got := g.read(g.common+configMSIXVector, 2); got != noVector {
			t.Errorf("configuration vector %#x", got)
		}
		// What belongs to PCI stays.
		if got := g.cfg(g.msix+2, 2); got != msixEnable|2 {
			t.Errorf("message control %#x", got)
		}
		if got := g.read(g.table+entryData, 4); got != uint64(testMessage(0).data) {
			t.Errorf("vector 0 carries %#x", got)
		}
	}
	if c := g.f.Counters(); c.Resets != 6 || c.NeedsReset != 3 || c.HostErrors != 0 {
		t.Errorf("%+v", c)
	}
}

// TestQueueLock writes every register of a queue after it was enabled, and of one left disabled after DRIVER_OK
// (CVE-2026-5747).
func TestQueueLock(t *testing.T) {
	t.Parallel()
	g := newGuest(t, plainDevice())
	if !g.negotiate(virtio.VersionOne) {
		t.Fatal("refused")
	}
	g.setQueue(0, queue.Config{Size: 8, Desc: 0x10000, Driver: 0x20000, Device: 0x30000})
	check := func(when string, i int) {
		t.Helper()
		g.write(g.common+queueSelect, 2, uint64(i))
		var before, after [commonSize - queueSize]byte
		g.f.ReadMMIO(g.common+queueSize, before[:])
		for off := uint64(queueSize); off < commonSize; off += 2 {
			if off != queueMSIXVector {
				g.write(g.common+off, 2, 0x0010)
				g.write(g.common+off, 2, 0x0001)
				g.write(g.common+off, 2, 0)
			}
		}
		g.f.ReadMMIO(g.common+queueSize, after[:])
		if before != after {
			t.Errorf("%s: queue %d: %x became %x", when, i, before, after)
		}
	}
	check("enabled", 0)
	g.setStatus(15)
	if !g.dev.running() || g.dev.queues[1] != nil {
		t.Error("want queue 0 alone")
	}
	check("active", 0)
	check("active", 1)
	if got := g.host.doorbells(); len(got) != 1 || got[0] != g.notifyAddr(0) {
		t.Errorf("doorbells %x", got)
	}
}

// TestBadQueues lets the driver enable what cannot be a queue: the device asks for a reset and is not started.
func TestBadQueues(t *testing.T) {
	t.Parallel()
	good := queue.Config{Size: 8, Desc: 0x10000, Driver: 0x20000, Device: 0x30000}
	for name, change := range map[string]func(c *queue.Config){
		"size 0":              func(c *queue.Config) { c.Size = 0 },
		"size 7":              func(c *queue.Config) { c.Size = 7 },
		"size above maximum":  func(c *queue.Config) { c.Size = 512 },
		"size 65535":          func(c *queue.Config) { c.Size = 65535 },
		"table unaligned":     func(c *queue.Config) { c.Desc++ },
		"available unaligned": func(c *queue.Config) { c.Driver++ },
		"used unaligned":      func(c *queue.Config) { c.Device += 2 },
		"table beyond RAM":    func(c *queue.Config) { c.Desc = 1 << 60 },
		"used in our own BAR": func(c *queue.Config) { c.Device = testBAR },
		"available overflows": func(c *queue.Config) { c.Driver = 1<<64 - 2 },
	} {
		g := newGuest(t, plainDevice())
		if !g.negotiate(virtio.VersionOne) {
			t.Fatal("refused")
		}
		c := good
		change(&c)
		g.setQueue(0, c)
		g.setStatus(15)
		if got := g.status(); got != 15|virtio.StatusNeedsReset || g.dev.running() {
			t.Errorf("%s: status %#x, active %v", name, got, g.dev.running())
		}
		if got := g.read(g.isr, 1); got != isrConfig {
			t.Errorf("%s: ISR %#x", name, got)
		}
		g.setStatus(15) // is not tried again
		g.boot(0)
		if !g.dev.running() {
			t.Errorf("%s: the device does not recover", name)
		}
	}
}

func TestNoSuchQueue(t *testing.T) {
	t.Parallel()
	g := newGuest(t, plainDevice())
	for _, i := range []uint64{2, 255, 0x7FFF, 0xFFFF} {
		g.write(g.common+queueSelect, 2, i)
		for off := uint64(queueSize); off < commonSize; off += 2 {
			g.write(g.common+off, 2, 0xFFFF)
			want := uint64(0)
			if off == queueMSIXVector {
				want = noVector
			}
			if got := g.read(g.common+off, 2); got != want {
				t.Errorf("queue %d, register %#x: %#x", i, off, got)
			}
		}
	}
	g.boot(0)
	for off := range uint64(pageSize) {
		for _, n := range []int{1, 2, 4, 8} {
			g.write(g.notify+off, n, 0xFFFF_FFFF)
		}
	}
	if err := g.f.NotifyQueue(2); err == nil {
		t.Error("a notification of queue 2 of 2")
	}
	if err := g.f.NotifyQueue(-1); err == nil {
		t.Error("a notification of queue -1")
	}
}

// TestCommonAccess reads and writes the common configuration in every size and at every alignment.
func TestCommonAccess(t *testing.T) {
	t.Parallel()
	g := newGuest(t, plainDevice())
	g.write(g.common+queueSelect, 2, 1)
	g.write(g.common+queueDesc, 8, 0x1122_3344_5566_7788)
	for off := range uint64(8) { // a byte at a time
		g.write(g.common+queueDriver+off, 1, 0xA0+off)
	}
	g.write(g.common+queueDevice+1, 4, 0xDDCC_BBAA) // across the halves
	for off, want := range map[uint64]uint64{
		queueDesc: 0x1122_3344_5566_7788, queueDriver: 0xA7A6_A5A4_A3A2_A1A0, queueDevice: 0xDD_CCBB_AA00,
	} {
		if got := g.read(g.common+off, 8); got != want {
			t.Errorf("register %#x: %#x, want %#x", off, got, want)
		}
	}
	// One write over several fields reaches them in order.
	g.write(g.common+configMSIXVector, 8, 0x0001_00_03_FFFF_0002)
	v, s, q := g.read(g.common+configMSIXVector, 2), g.status(), g.read(g.common+queueSelect, 2)
	if v != 2 || s != 3 || q != 1 {
		t.Errorf("vector %d, status %#x, queue %d", v, s, q)
	}

	var all [pageSize]byte
	for i := range all {
		all[i] = byte(g.read(g.common+uint64(i), 1))
	}
	if got := all[commonSize:]; !bytes.Equal(got, make([]byte, len(got))) {
		t.Error("something behind the common configuration")
	}
	for off := range pageSize {
		for n := 1; n <= 16; n++ {
			got := bytes.Repeat([]byte{0xEE}, n)
			if !g.f.ReadMMIO(g.common+uint64(off), got) {
				t.Fatalf("nobody answers at %#x", off)
			}
			want := make([]byte, n)
			copy(want, all[off:])
			if !bytes.Equal(got, want) {
				t.Fatalf("%d bytes at %#x: %x, want %x", n, off, got, want)
			}
		}
	}
}

// TestDeviceConfig passes accesses on to the device.
func TestDeviceConfig(t *testing.T) {
	t.Parallel()
	g := newGuest(t, plainDevice())
	g.write(g.device, 8, 0x0807_0605_0403_0201)
	g.write(g.device+22, 4, 0xDDCC_BBAA)
	for _, tc := range []struct {
		off  uint64
		n    int
		want uint64
	}{{0, 8, 0x0807_0605_0403_0201}, {3, 2, 0x0504}, {22, 4, 0xBBAA}, {24, 4, 0}, {0xFFF, 4, 0}} {
		if got := g.read(g.device+tc.off, tc.n); got != tc.want {
			t.Errorf("%d bytes at %#x: %#x, want %#x", tc.n, tc.off, got, tc.want)
		}
	}
}

// TestConfigGeneration has the device change its configuration in every state of its life, and while the driver reads.
func TestConfigGeneration(t *testing.T) {
	t.Parallel()
	g := newGuest(t, plainDevice())
	generation := func() uint64 { return g.read(g.common+configGeneration, 1) }
	for v, enter := range []func(){
		func() {}, // before any driver
		func() { g.boot(0) },
		g.f.NeedsReset,
		func() { g.setStatus(0) },
	} {
		before := generation()
		enter()
		if got := generation(); got != before {
			t.Errorf("state %d: generation %d, was %d; nothing has changed", v, got, before)
		}
		g.dev.change(byte(v))
		if got := generation(); got != (before+1)&0xFF {
			t.Errorf("state %d: generation %d, was %d before a change", v, got, before)
		}
	}

	// What a driver reads in parts belongs together if the generation has not stepped meanwhile (virtio 1.2, 2.5).
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for v := byte(0); ; v++ {
			select {
			case <-stop:
				return
			default:
				g.dev.change(v)
				_ = g.f.NotifyConfig()
				runtime.Gosched()
			}
		}
	})
	for whole := 0; whole < 200; {
		before := generation()
		a, b := g.read(g.device, 1), g.read(g.device+20, 1)
		if generation() != before {
			continue
		}
		if whole++; a != b {
			t.Fatalf("fields of two configurations, %d and %d, under generation %d", a, b, before)
		}
	}
	close(stop)
	wg.Wait()
}

// TestResetDoesNotBlock resets a device whose I/O is stuck: nobody who does not ask for the device has to wait, and the
// status says when it is done.
func TestResetDoesNotBlock(t *testing.T) {
	t.Parallel()
	for name, begin := range map[string]func(g *guest){
		"reset":        func(g *guest) { g.f.WriteMMIO(g.common+deviceStatus, []byte{0}) },
		"window":       resetThroughWindow,
		"failed":       func(g *guest) { g.f.WriteMMIO(g.common+deviceStatus, []byte{byte(virtio.StatusFailed)}) },
		"no busmaster": func(g *guest) { g.f.WriteConfig([]byte{commandMemory, 0}, regCommand) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGuest(t, plainDevice())
			g.boot(0)
			g.dev.resetting, g.dev.resume = make(chan struct{}), make(chan struct{})
			returned := make(chan struct{})
			go func() {
				begin(g)
				close(returned)
			}()
			<-g.dev.resetting
			// All of these come back while the device is stuck, the access that began it too.
			done := make(chan struct{})
			go func() {
				defer close(done)
				b := []byte{1}
				if g.f.ReadMMIO(testBAR+barSize, b) || g.f.WriteMMIO(testBAR-1, b) {
					t.Error("answers for another function")
				}
				if g.cfg(regVendor, 2) != vendorID || g.status() == 0 {
					t.Errorf("vendor %#x, status %#x", g.cfg(regVendor, 2), g.status())
				}
				g.f.WriteMMIO(g.common+deviceStatus, []byte{0}) // joins
				g.f.WriteMMIO(g.common+queueSelect, b)          // has nothing to write to
				g.f.WriteMMIO(g.common+deviceStatus, []byte{15})
				g.read(g.isr, 1)
				if s := g.status(); s == 0 || len(g.host.doorbells()) != 0 {
					t.Errorf("status %#x, doorbells %x while the device is reset", s, g.host.doorbells())
				}
				<-returned
			}()
			select {
			case <-done:
			case <-time.After(queuetest.Timeout):
				t.Error("accesses wait for the device's reset")
			}
			close(g.dev.resume)
			<-done
			g.dev.resetting = nil
			for g.status() != 0 {
				runtime.Gosched()
			}
			if g.dev.running() || g.read(g.common+queueSelect, 2) != 0 {
				t.Error("not reset")
			}
			g.setCommand(commandMemory | commandMaster)
			g.boot(0)
			if !g.dev.running() {
				t.Error("the device does not come back")
			}
		})
	}
}

// resetThroughWindow writes status 0 by way of VIRTIO_PCI_CAP_PCI_CFG.
func resetThroughWindow(g *guest) {
	g.f.WriteConfig([]byte{deviceStatus, 0, 0, 0, 1, 0, 0, 0}, g.window+capOffset)
	g.f.WriteConfig([]byte{0}, g.window+capExtra)
}

// TestCloseDuringReset closes a function while its reset is under way.
func TestCloseDuringReset(t *testing.T) {
	t.Parallel()
	g := newGuest(t, plainDevice())
	g.boot(0)
	g.dev.resetting, g.dev.resume = make(chan struct{}), make(chan struct{})
	g.f.WriteMMIO(g.common+deviceStatus, []byte{0})
	closed := make(chan error, 1)
	go func() { closed <- g.f.Close() }()
	for g.f.ReadMMIO(g.common, make([]byte, 1)) {
		runtime.Gosched()
	}
	select {
	case err := <-closed:
		t.Fatalf("Close did not wait for the device: %v", err)
	default:
	}
	close(g.dev.resume)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	g.dev.resetting = nil
}

// TestDeviceErrors lets the device refuse to start and to stop.
func TestDeviceErrors(t *testing.T) {
	t.Parallel()
	dev := plainDevice()
	dev.failActivate = errors.New("no")
	g := newGuest(t, dev)
	if !g.negotiate(virtio.VersionOne) {
		t.Fatal("refused")
	}
	g.setStatus(15)
	if got := g.status(); got != 15|virtio.StatusNeedsReset {
		t.Errorf("status %#x after a failed activation", got)
	}
	dev.failActivate = nil
	g.boot(0)
	dev.failReset = errors.New("stuck")
	for range 2 {
		// A driver waits for a status of zero, so a device that cannot be stopped shows it too, but starts no more.
		if !g.negotiate(virtio.VersionOne) {
			t.Fatal("refused")
		}
		g.f.NeedsReset() // by what is left of the device
		if got := g.status(); got&virtio.StatusNeedsReset != 0 || len(g.host.doorbells()) != 0 {
			t.Errorf("status %#x, doorbells %x after a failed reset", got, g.host.doorbells())
		}
		g.setStatus(15)
		if got := g.status(); got != 15|virtio.StatusNeedsReset {
			t.Errorf("status %#x of a broken device", got)
		}
	}
	if c := g.f.Counters(); c.HostErrors != 2 || dev.activated != 1 {
		t.Errorf("%+v, activated %d times", c, dev.activated)
	}
	dev.failReset = nil
	g.boot(0) // and one that recovers
	dev.failReset = errors.New("stuck")
	if err := g.f.Close(); !errors.Is(err, dev.failReset) {
		t.Errorf("Close: %v", err)
	}
	dev.failReset = nil
	if err := dev.Reset(); err != nil {
		t.Error(err)
	}
}
