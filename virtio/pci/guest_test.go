package pci

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// probe brings the device up in the order of Linux's virtio_pci_modern and connects a driver to each queue.
func (g *guest) probe(msix bool, want virtio.Features) []*queuetest.Driver {
	g.tb.Helper()
	if !g.negotiate(g.offered() & (want | virtio.VersionOne)) {
		g.tb.Fatal("features refused")
	}
	n := int(g.read(g.common+numQueues, 2))
	if msix {
		g.enableMSIX()
		g.write(g.common+configMSIXVector, 2, 0)
		if got := g.read(g.common+configMSIXVector, 2); got != 0 {
			g.tb.Fatalf("configuration vector %#x", got)
		}
	}
	var drivers []*queuetest.Driver
	for i := range n {
		g.write(g.common+queueSelect, 2, uint64(i))
		size := uint16(g.read(g.common+queueSize, 2))
		if size == 0 || g.read(g.common+queueEnable, 2) != 0 {
			g.tb.Fatalf("queue %d is not there, or enabled", i)
		}
		d := queuetest.NewRings(g.tb, size, queuetest.Options{
			Memory: g.mem, Base: uint64(i+1) << 20, Len: 1 << 20,
			EventIdx: want.Has(virtio.RingEventIdx), Indirect: want.Has(virtio.RingIndirectDesc),
		})
		addr := g.notifyAddr(i)
		d.Notify = func() { g.write(addr, 2, uint64(i)) }
		g.setQueue(i, d.Config)
		if msix {
			g.write(g.common+queueMSIXVector, 2, uint64(i+1))
			if got := g.read(g.common+queueMSIXVector, 2); got != uint64(i+1) {
				g.tb.Fatalf("vector of queue %d reads %#x", i, got)
			}
		}
		drivers = append(drivers, d)
	}
	g.setStatus(g.status() | virtio.StatusDriverOK)
	return drivers
}

// interrupts plays the CPU: it takes the guest's interrupts to its drivers until stop is called.
func (g *guest) interrupts(drivers []*queuetest.Driver, msix bool) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				runtime.Gosched()
			}
			if msix {
				for _, m := range g.host.sent() {
					if i := int(m.data - testMessage(1).data); i >= 0 && i < len(drivers) {
						drivers[i].Interrupt()
					}
				}
			} else if g.host.asserted() && g.read(g.isr, 1)&isrQueue != 0 {
				for _, d := range drivers {
					d.Interrupt()
				}
			}
		}
	})
	return func() {
		close(done)
		wg.Wait()
	}
}

// TestLife takes a device from probe to removal and back, with traffic on every queue.
func TestLife(t *testing.T) {
	t.Parallel()
	const ring = virtio.RingEventIdx | virtio.RingIndirectDesc
	for _, tc := range []struct {
		msix    bool
		want    virtio.Features
		noEvent bool
	}{
		{true, ring, false},
		{true, 0, true},
		{false, ring, true},
		{false, 0, false},
	} {
		t.Run(fmt.Sprintf("msix=%v,features=%x,exits=%v", tc.msix, tc.want, tc.noEvent), func(t *testing.T) {
			t.Parallel()
			g := newGuest(t, plainDevice())
			g.host.noEvent = tc.noEvent
			for range 3 {
				drivers := g.probe(tc.msix, tc.want)
				stop := g.interrupts(drivers, tc.msix)
				for n := range 100 {
					d := drivers[n%2]
					in, out := []byte(fmt.Sprintf("request %d", n)), make([]byte, 12)
					got := d.Do([][]byte{in}, [][]byte{out})
					if int(got) != len(in) || !bytes.Equal(out[:got], in) {
						t.Fatalf("request %d came back as %q", n, out[:got])
					}
				}
				stop()
				g.setStatus(0)
				for _, d := range drivers { // the rings may serve another purpose now
					d.Reset()
				}
			}
			// A malformed chain makes the device ask for a reset, and a configuration interrupt says so.
			drivers := g.probe(tc.msix, tc.want)
			drivers[0].SetDesc(0, queuetest.Desc{Addr: 1 << 50, Len: 1})
			drivers[0].MakeAvailable(0)
			drivers[0].Kick()
			for g.status()&virtio.StatusNeedsReset == 0 {
				runtime.Gosched()
			}
			if c := g.f.Counters(); c.NeedsReset != 1 || (c.Doorbells > 0) != tc.noEvent {
				t.Errorf("%+v", c)
			}
		})
	}
}

// TestConcurrency lets several vCPUs and the device's workers at the function at once.
func TestConcurrency(t *testing.T) {
	t.Parallel()
	g := newGuest(t, plainDevice())
	drivers := g.probe(true, virtio.RingEventIdx)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	vcpu := func(f func(n int)) {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
					f(n)
				}
			}
		})
	}
	var b [8]byte
	vcpu(func(n int) { g.f.WriteConfig([]byte{0, byte(n)&0x40 | 0x80}, g.msix+2) })
	vcpu(func(n int) { g.f.WriteMMIO(g.table+entrySize+entryControl, []byte{byte(n & 1)}) })
	vcpu(func(n int) { g.f.ReadMMIO(g.pba, make([]byte, 8)) })
	vcpu(func(n int) { g.f.WriteConfig([]byte{commandMaster | byte(n)&commandMemory}, regCommand) })
	vcpu(func(n int) {
		if err := errors.Join(g.f.NotifyQueue(0), g.f.NotifyConfig()); err != nil {
			t.Error(err)
		}
	})
	done := make(chan struct{})
	go func() { // more requests than the ring has entries
		defer close(done)
		d := drivers[1]
		for range 200 {
			head := d.Add([][]byte{{1}}, nil)
			if err := g.f.queues[1].kick.Signal(); err != nil {
				t.Error(err)
			}
			for {
				if got, _, ok := d.Used(); ok {
					if got != head {
						t.Errorf("chain %d came back, want %d", got, head)
					}
					break
				}
				runtime.Gosched()
			}
		}
	}()
	<-done
	close(stop)
	wg.Wait()
	g.f.WriteConfig([]byte{commandMaster | commandMemory}, regCommand)
	g.f.WriteConfig([]byte{0, 0x80}, g.msix+2)
	g.f.WriteMMIO(g.table+entrySize+entryControl, b[:4])
	g.f.ReadMMIO(g.pba, b[:])
	if b != [8]byte{} {
		t.Errorf("pending bits %x with nothing masked", b)
	}
}

// TestResetUnderLoad resets a device whose driver never stops adding chains and kicking.
func TestResetUnderLoad(t *testing.T) {
	t.Parallel()
	g := newGuest(t, plainDevice())
	for range 20 {
		drivers := g.probe(true, 0)
		q := g.f.queues[0].kick
		stop := make(chan struct{})
		var wg sync.WaitGroup
		d := drivers[0]
		wg.Go(func() {
			d.SetDesc(0, queuetest.Desc{Addr: 0x1000, Len: 1})
			for {
				select {
				case <-stop:
					return
				default:
				}
				if d.AvailIdx()-d.UsedIdx() < d.Config.Size {
					d.MakeAvailable(0)
				}
				_ = q.Signal()
			}
		})
		for d.UsedIdx() < 100 {
			runtime.Gosched()
		}
		g.setStatus(0)
		if g.dev.running() {
			t.Fatal("the device runs after a reset")
		}
		used := d.UsedIdx()
		close(stop)
		wg.Wait()
		if d.UsedIdx() != used {
			t.Error("the device used a chain after its reset")
		}
	}
}

// TestDescriptors makes and closes many functions and counts the process's files.
func TestDescriptors(t *testing.T) {
	count := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	g := newGuest(t, plainDevice())
	if err := g.f.Close(); err != nil {
		t.Fatal(err)
	}
	before := count()
	for range 100 {
		f, err := New(plainDevice(), g.mem, newFakeHost(t))
		if err != nil {
			t.Fatal(err)
		}
		h := &guest{tb: t, f: f, dev: f.dev.(*fakeDevice), host: f.host.(*fakeHost), mem: g.mem}
		if err := f.SetBAR(0, testBAR); err != nil {
			t.Fatal(err)
		}
		h.setCommand(commandMemory | commandMaster)
		h.scan()
		h.enableMSIX()
		h.boot(0)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if f.ReadMMIO(testBAR, make([]byte, 1)) {
			t.Fatal("answers after Close")
		}
		f.WriteConfig([]byte{0xFF, 0xFF}, regCommand)
		f.ReadConfig(make([]byte, 4), atWindow+capExtra)
		if _, err := New(&fakeDevice{sizes: []uint16{8, 8, 3}}, g.mem, newFakeHost(t)); !errors.Is(err, ErrDevice) {
			t.Fatal(err)
		}
	}
	if after := count(); after != before {
		t.Errorf("%d files open, were %d", after, before)
	}
}

// FuzzFunction makes a guest do anything with the configuration space and the BAR. An input is a list of operations of
// four bytes: kind, two bytes of offset, value.
func FuzzFunction(f *testing.F) {
	up := []byte{
		0, 0x04, 0x00, 6, // command: memory, bus master
		0, msixControl + 1, 0, 0x80,
		2, 0x0C, 0x40, 0, // unmask vector 0
		2, 0x08, 0x00, 1, // feature word 1
		4, 0x0C, 0x00, 1, // VERSION_1
		2, 0x14, 0x00, 11,
		4, 0x21, 0x00, 0x10, 4, 0x29, 0x00, 0x20, 4, 0x31, 0x00, 0x30,
		2, 0x1C, 0x00, 1,
		2, 0x14, 0x00, 15, // DRIVER_OK
	}
	f.Add(up)
	f.Add(append(bytes.Clone(up), 4, 0x00, 0x30, 0, 3, 0x00, 0x10, 0, 2, 0x14, 0, 0, 2, 0x14, 0, 15)) // kick, ISR, reset
	f.Add(append(bytes.Clone(up), 0, 4, 0, 2, 0, 4, 0, 4, 0, 0x11, 0, 0x80, 0, 4, 0, 6))              // command, BAR
	f.Add([]byte{0, atWindow + 8, 0, 0x14, 0, atWindow + 12, 0, 1, 0, atWindow + 16, 0, 3, 1, atWindow + 16, 0, 0})
	f.Add([]byte{
		6, 0x00, 0x40, 1, 7, 0x00, 0x50, 0, // table, pending bits
		5, 0xFF, 0x7F, 0, 7, 0xFD, 0x4F, 0, 6, 0xFF, 0x2F, 9, // the ends of pages
		8, 0, 0, 0, 9, 1, 0, 0,
	})

	f.Fuzz(func(t *testing.T, ops []byte) {
		g := newFunction(t, plainDevice())
		g.host.noMSI = len(ops)%7 == 6
		g.host.noEvent = len(ops)%5 == 4
		widths := [...]int{1, 2, 4, 8}
		for len(ops) >= 4 {
			kind, off, v := ops[0]%10, int(ops[1])|int(ops[2])<<8, ops[3]
			ops = ops[4:]
			p := bytes.Repeat([]byte{v}, widths[kind/2%4])
			base := g.cfg(regBAR, 4)
			switch {
			case kind == 8:
				if off%2 == 0 {
					_ = g.f.NotifyQueue(off % 3)
				} else {
					_ = g.f.NotifyConfig()
				}
			case kind == 9:
				g.f.NeedsReset()
			case off < 0x100 && kind < 2:
				if kind == 0 {
					g.f.WriteConfig(p, off)
				} else {
					g.f.ReadConfig(p, off)
				}
			case kind%2 == 0:
				g.f.WriteMMIO(base+uint64(off), p)
			default:
				g.f.ReadMMIO(base+uint64(off), p)
			}
		}
		g.settle()
		if g.dev.running() && (g.f.readStatus()&virtio.StatusDriverOK == 0 || !g.f.master) {
			t.Errorf("the device runs with status %#x, bus master %v", g.f.readStatus(), g.f.master)
		}
		if n := len(g.host.doorbells()); n > 0 && !g.dev.running() {
			t.Errorf("%d doorbells of a device that does not run", n)
		}
	})
}
