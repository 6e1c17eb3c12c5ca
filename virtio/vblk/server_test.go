package vblk

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// All requests that a queue holds are under way at once, and end in any order: one that takes long holds up no other, and
// neither does the first, which a new device carries out on the spot.
func TestRequestsOverlap(t *testing.T) {
	t.Parallel()
	const requests = 16
	m := newMemory(2 * requests)
	release := make([]chan struct{}, requests)
	entered := make(chan int, requests)
	for i := range release {
		release[i] = make(chan struct{})
	}
	m.hold = func(off int64) {
		entered <- int(off / 1024)
		<-release[off/1024]
	}
	r := start(t, setup{memory: m, Options: Options{QueueSize: requests}})

	heads := map[uint16]int{}
	for i := range requests {
		// None beside another, which would make them one.
		heads[r.Add([][]byte{header(0, uint64(2*i))}, [][]byte{space(512), space(1)})] = i
	}
	r.Kick()
	var underway []int
	for range requests {
		underway = append(underway, <-entered)
	}
	for i := range underway {
		// The youngest ends first.
		last := underway[len(underway)-1-i]
		close(release[last])
		if head, written := r.Wait(); heads[head] != last || written != 513 {
			t.Fatalf("request %d came back with %d bytes, want %d", heads[head], written, last)
		}
	}
}

// Requests that lie side by side and come together reach the disk as one.
func TestMerge(t *testing.T) {
	t.Parallel()
	m := newMemory(1024)
	copy(m.data, pattern(len(m.data), 9))
	entered, release := make(chan struct{}, 100), make(chan struct{})
	m.hold = func(int64) {
		entered <- struct{}{}
		<-release
	}
	r := start(t, setup{memory: m})
	r.Add([][]byte{header(0, 1000)}, [][]byte{space(512), space(1)})
	r.Kick()
	<-entered // the disk is taken for a slow one once this has lasted
	rooms := map[uint16][]byte{}
	for i := range 32 {
		room := space(1024)
		rooms[r.Add([][]byte{header(0, uint64(2*i))}, [][]byte{room, space(1)})] = room
	}
	r.Kick()
	<-entered
	close(release)
	for range 33 {
		r.Wait()
	}
	got := make([]byte, 0, 32*1024)
	for i := range 32 {
		for head, room := range rooms {
			if bytes.Equal(room, m.data[i*1024:][:1024]) {
				got = append(got, room...)
				delete(rooms, head)
			}
		}
	}
	if !bytes.Equal(got, m.data[:32*1024]) {
		t.Error("the buffers hold something else")
	}
	if n := r.disk.Stats().Read.Merged; n == 0 {
		t.Error("nothing was merged")
	}
}

// Reset returns when the requests under way have ended.
func TestResetDrains(t *testing.T) {
	t.Parallel()
	for range 20 {
		const requests = 40
		m := newMemory(64)
		entered, release := make(chan struct{}, requests), make(chan struct{})
		m.hold = func(int64) {
			entered <- struct{}{}
			<-release
		}
		r := start(t, setup{memory: m})
		for range requests {
			r.Add([][]byte{header(0, 0)}, [][]byte{space(512), space(1)})
		}
		r.Kick()
		for range requests {
			<-entered
		}
		r.resetHeld(release)
		if m.underway.Load() != 0 || m.reads.Load() != requests || r.UsedIdx() != requests {
			t.Fatalf("after Reset: %d requests under way, %d started, %d returned",
				m.underway.Load(), m.reads.Load(), r.UsedIdx())
		}
	}
}

// Requests that wait within the block layer, be it for their rate or for the end of a drained section, don't hold Reset up:
// they come back at once, and nothing of them reaches the disk. The device then works as before.
func TestResetEndsWaiting(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		hold func(t *testing.T, d *blk.Device) (reads int64, release func())
	}{
		{"drained", func(t *testing.T, d *blk.Device) (int64, func()) {
			if err := d.Drain(t.Context()); err != nil {
				t.Fatal(err)
			}
			return 0, d.Undrain
		}},
		{"throttled", func(t *testing.T, d *blk.Device) (int64, func()) {
			g, err := blk.NewThrottleGroup(blk.Throttle{IOPSTotal: blk.Rate{Avg: 1}})
			if err != nil {
				t.Fatal(err)
			}
			d.SetThrottle(g)
			return 1, func() { d.SetThrottle(nil) }
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			const requests = 20
			r := start(t, setup{})
			most, release := tc.hold(t, r.disk)
			for i := range requests {
				if i%2 == 0 {
					r.Add([][]byte{header(typeIn, 0)}, [][]byte{space(512), space(1)})
				} else {
					r.Add([][]byte{header(typeOut, 1), pattern(512, 1)}, [][]byte{space(1)})
				}
			}
			r.Kick()
			for r.Queue.Counters().Pops < requests {
				runtime.Gosched()
			}
			began := time.Now()
			if err := r.dev.Reset(); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("Reset took %v", took)
			}
			if n := r.memory.reads.Load(); n > most || r.UsedIdx() != requests {
				t.Errorf("%d reads, %d requests returned", n, r.UsedIdx())
			}
			release()
			tr := queuetest.Start(t, r.dev, ^virtio.Features(0), queuetest.Options{})
			r.Driver, r.transport = tr.Drivers[0], tr
			r.alive()
		})
	}
}

// Whoever drains the disk finds the device at rest: nothing is under way, and what the driver adds waits.
func TestDrainQuiesces(t *testing.T) {
	t.Parallel()
	r := start(t, setup{})
	for i := range 20 {
		for range 5 {
			r.Add([][]byte{header(0, 0)}, [][]byte{space(512), space(1)})
			r.Kick()
		}
		if err := r.disk.Drain(t.Context()); err != nil {
			t.Fatal(err)
		}
		used, reads := r.UsedIdx(), r.memory.reads.Load()
		r.Add([][]byte{header(0, 0)}, [][]byte{space(512), space(1)})
		r.Kick()
		if n := r.memory.underway.Load(); n != 0 {
			t.Fatalf("round %d: %d requests under way", i, n)
		}
		if n := r.memory.reads.Load(); n != reads {
			t.Fatalf("round %d: %d reads in a drained section", i, n-reads)
		}
		// A request may have ended before the section and come back within it; none of the others does.
		if n := r.UsedIdx() - used; n > 5 {
			t.Fatalf("round %d: %d requests came back", i, n)
		}
		r.disk.Undrain()
		for range 6 {
			r.Wait()
		}
	}
}

// Resets come at any moment of a stream of requests; the device is then used again. Nothing is left behind.
func TestResetLeavesNothing(t *testing.T) { // not parallel: it counts the goroutines of all devices
	m := newMemory(64)
	copy(m.data, pattern(len(m.data), 1))
	dev, _ := newDevice(t, m, false, Options{NumQueues: 2})
	if err := dev.Reset(); err != nil {
		t.Fatalf("before the first activation: %v", err)
	}
	for i := range 30 {
		tr := queuetest.Start(t, dev, ^virtio.Features(0), queuetest.Options{Len: 1 << 20})
		for j := range 20 {
			for _, d := range tr.Drivers {
				d.Add([][]byte{header(0, uint64(j))}, [][]byte{space(512), space(1)})
				d.Kick()
			}
			if j == i%20 {
				tr.Drivers[0].Wait()
			}
		}
		if hosttest.Running(t, "vblk.(*server).") == 0 {
			t.Fatal("no worker runs: this test counts the wrong thing")
		}
		for range 2 { // the second finds nothing to do
			if err := dev.Reset(); err != nil {
				t.Fatal(err)
			}
		}
		hosttest.Ended(t, "vblk.(*server).", queuetest.Timeout)
		if m.underway.Load() != 0 {
			t.Fatal("a request is under way after Reset")
		}
		// Guest memory is not touched any more.
		used := [2]uint16{tr.Drivers[0].UsedIdx(), tr.Drivers[1].UsedIdx()}
		for _, d := range tr.Drivers {
			d.Add([][]byte{header(0, 0)}, [][]byte{space(512), space(1)})
			d.Notify()
		}
		if now := [2]uint16{tr.Drivers[0].UsedIdx(), tr.Drivers[1].UsedIdx()}; now != used {
			t.Fatal("a request was served after Reset")
		}
	}
}

// Resets come while requests are carried out on the spot, sent off, or pass the turn on because they take long. Nothing of
// them is left behind, and nothing comes back after the reset.
func TestResetOfSlowDisk(t *testing.T) { // not parallel: it counts goroutines
	check := queuetest.Leaks(t)
	t.Run("rounds", resetSlowDisk)
	check()
}

func resetSlowDisk(t *testing.T) {
	m := newMemory(64)
	copy(m.data, pattern(len(m.data), 1))
	var delay atomic.Int64
	m.hold = func(off int64) {
		if d := delay.Load(); d > 0 && off%3 == 0 {
			<-time.After(time.Duration(d))
		}
	}
	dev, _ := newDevice(t, m, false, Options{QueueSize: 64})
	rng := rand.New(rand.NewPCG(1, 2))
	mem := queuetest.New(t, 64, queuetest.Options{}).Mem
	for range 60 {
		tr := queuetest.Start(t, dev, ^virtio.Features(0), queuetest.Options{Memory: mem})
		d := tr.Drivers[0]
		for range rng.IntN(5) + 1 {
			delay.Store(rng.Int64N(int64(3 * time.Millisecond)))
			for range rng.IntN(8) {
				d.Add([][]byte{header(0, uint64(rng.IntN(64)))}, [][]byte{space(512), space(1)})
				d.Kick()
			}
			for range rng.IntN(d.InFlight() + 1) {
				d.Wait()
			}
		}
		if err := dev.Reset(); err != nil {
			t.Fatal(err)
		}
		if n := m.underway.Load(); n != 0 {
			t.Fatalf("%d requests under way after Reset", n)
		}
		// The driver does with its memory what it likes now.
		clear(d.Bytes(0, 1<<20))
		runtime.Gosched()
		if bytes.Count(d.Bytes(0, 1<<20), []byte{0}) != 1<<20 {
			t.Fatal("guest memory was written after Reset")
		}
	}
}

// A queue that can't be followed stops, asks for a reset once, and returns what was under way.
func TestBrokenQueue(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		spoil func(r *rig)
	}{
		{"available index far ahead", func(r *rig) { r.SetAvailIdx(r.AvailIdx() + r.Config.Size + 1) }},
		{"head outside the table", func(r *rig) { r.MakeAvailable(r.Config.Size) }},
		{"looped chain", func(r *rig) {
			r.SetDesc(9, queuetest.Desc{Addr: r.Alloc(16, 1), Len: 16, Flags: queuetest.FlagNext, Next: 9})
			r.MakeAvailable(9)
		}},
		{"next outside the table", func(r *rig) {
			r.SetDesc(9, queuetest.Desc{Addr: r.Alloc(16, 1), Len: 16, Flags: queuetest.FlagNext, Next: 0xffff})
			r.MakeAvailable(9)
		}},
		{"buffer outside memory", func(r *rig) {
			r.SetDesc(9, queuetest.Desc{Addr: 1 << 40, Len: 16})
			r.MakeAvailable(9)
		}},
		{"buffer whose end overflows", func(r *rig) {
			r.SetDesc(9, queuetest.Desc{Addr: ^uint64(0) - 7, Len: 16})
			r.MakeAvailable(9)
		}},
		{"readable after writable", func(r *rig) {
			const flags = queuetest.FlagNext | queuetest.FlagWrite
			r.SetDesc(9, queuetest.Desc{Addr: r.Alloc(16, 1), Len: 16, Flags: flags, Next: 10})
			r.SetDesc(10, queuetest.Desc{Addr: r.Alloc(16, 1), Len: 16})
			r.MakeAvailable(9)
		}},
		{"indirect table of odd size", func(r *rig) {
			r.SetDesc(9, queuetest.Desc{Addr: r.Alloc(64, 16), Len: 17, Flags: queuetest.FlagIndirect})
			r.MakeAvailable(9)
		}},
		{"indirect table within itself", func(r *rig) {
			r.SetDesc(9, r.Table(queuetest.Desc{Addr: r.Alloc(64, 16), Len: 16, Flags: queuetest.FlagIndirect}))
			r.MakeAvailable(9)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := newMemory(64)
			entered, release := make(chan struct{}), make(chan struct{})
			var once sync.Once
			m.hold = func(int64) { once.Do(func() { close(entered); <-release }) }
			r := start(t, setup{memory: m})
			room, status := space(512), space(1)
			head := r.Add([][]byte{header(0, 0)}, [][]byte{room, status})
			r.Kick()
			<-entered
			tc.spoil(r)
			r.Notify()
			<-r.transport.NeedingReset()
			close(release)
			if got, written := r.Wait(); got != head || written != 513 || status[0] != 0 {
				t.Errorf("the request under way: chain %d, %d bytes, status %d", got, written, status[0])
			}
			if err := r.dev.Reset(); err != nil {
				t.Fatal(err)
			}
			if m.reads.Load() != 1 || r.UsedIdx() != 1 {
				t.Errorf("%d reads, %d chains returned, want 1 and 1", m.reads.Load(), r.UsedIdx())
			}

			// After the reset the driver may start over.
			tr := queuetest.Start(t, r.dev, ^virtio.Features(0), queuetest.Options{})
			r.Driver, r.transport = tr.Drivers[0], tr
			r.alive()
		})
	}
}

// Many requests at once on two queues: every sector ends up with what was last written to it, every read sees it.
func TestManyRequests(t *testing.T) {
	t.Parallel()
	const slots, sectors, rounds = 32, 8, 60 // slots are parts of the disk, each used by one request at a time
	dev, _ := newDevice(t, newMemory(2*slots*sectors), false, Options{NumQueues: 2, QueueSize: 64})
	tr := queuetest.Start(t, dev, ^virtio.Features(0), queuetest.Options{Len: 8 << 20})
	var drivers sync.WaitGroup
	for i, d := range tr.Drivers {
		drivers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			model := make([]byte, slots*sectors*512)
			base := uint64(i * slots * sectors)
			type pending struct {
				want, room, status []byte
			}
			for range rounds {
				inFlight := map[uint16]pending{}
				for _, slot := range rng.Perm(slots) {
					first := rng.IntN(sectors)
					n := (1 + rng.IntN(sectors-first)) * 512
					at := (slot*sectors + first) * 512
					sector, status := base+uint64(at/512), space(1)
					if rng.IntN(2) == 0 {
						copy(model[at:at+n], pattern(n, rng.IntN(1000)))
						data := bytes.Clone(model[at : at+n])
						head := d.Add(cut(append(header(1, sector), data...), rng.IntN(16)+1, rng.IntN(n)+1), [][]byte{status})
						inFlight[head] = pending{status: status}
					} else {
						room := space(n)
						head := d.Add([][]byte{header(0, sector)}, append(cut(room, rng.IntN(n)+1), status))
						inFlight[head] = pending{want: bytes.Clone(model[at : at+n]), room: room, status: status}
					}
					if rng.IntN(3) == 0 {
						d.Kick()
					}
				}
				d.Kick()
				for range slots {
					head, written := d.Wait()
					p := inFlight[head]
					if p.status[0] != 0 || int(written) != len(p.room)+1 || !bytes.Equal(p.room, p.want) {
						t.Errorf("queue %d, chain %d: status %d, %d bytes written", i, head, p.status[0], written)
						return
					}
				}
			}
		})
	}
	drivers.Wait()
}

func TestActivateRefuses(t *testing.T) {
	t.Parallel()
	r := start(t, setup{})
	if err := r.dev.Activate(0, []*queue.Queue{r.Queue}, r.transport); err == nil {
		t.Error("activated twice")
	}
	r.alive()
	dev, _ := newDevice(t, newMemory(1), false, Options{NumQueues: 2})
	if err := dev.Activate(0, []*queue.Queue{r.Queue}, r.transport); err == nil {
		t.Error("activated with a queue missing")
	}
	// Both queues left disabled by the driver: nothing to do, nothing to go wrong.
	if err := dev.Activate(0, make([]*queue.Queue, 2), r.transport); err != nil {
		t.Error(err)
	}
	if err := dev.Activate(0, make([]*queue.Queue, 2), r.transport); err == nil {
		t.Error("activated twice, without queues")
	}
	if err := dev.Reset(); err != nil {
		t.Error(err)
	}
}

// signal is a transport that passes notifications on by a channel, or fails to.
type signal struct {
	notified chan struct{}
	err      error
}

func (s *signal) NotifyQueue(int) error { s.notified <- struct{}{}; return s.err }
func (s *signal) NotifyConfig() error   { return nil }
func (s *signal) NeedsReset()           {}

// startSignal starts a device with one request of a type prepared, with room for 4 KiB, as descriptors 0 to 2, and without
// event-idx, so that every request is notified.
func startSignal(tb testing.TB, err error, typ uint32) (*Device, *queuetest.Driver, *signal) {
	dev, _ := newDevice(tb, newMemory(64), false, Options{})
	d := queuetest.New(tb, 256, queuetest.Options{})
	tb.Cleanup(func() { _ = dev.Reset() })
	s := &signal{make(chan struct{}, 1), err}
	h := d.Alloc(16, 16)
	copy(d.Bytes(h, 16), header(typ, 8))
	d.SetDesc(0, queuetest.Desc{Addr: h, Len: 16, Flags: queuetest.FlagNext, Next: 1})
	const flags = queuetest.FlagNext | queuetest.FlagWrite
	d.SetDesc(1, queuetest.Desc{Addr: d.Alloc(4096, 4096), Len: 4096, Flags: flags, Next: 2})
	d.SetDesc(2, queuetest.Desc{Addr: d.Alloc(1, 1), Len: 1, Flags: queuetest.FlagWrite})
	if err := dev.Activate(FeatureFlush, []*queue.Queue{d.Queue}, s); err != nil {
		tb.Fatal(err)
	}
	return dev, d, s
}

func TestLostNotification(t *testing.T) {
	t.Parallel()
	dev, d, s := startSignal(t, errors.New("no interrupt"), typeIn)
	for range 3 {
		d.MakeAvailable(0)
		d.Kick()
		<-s.notified
	}
	if err := dev.Reset(); err != nil {
		t.Fatal(err)
	}
	if c := dev.Counters(); c != (Counters{LostNotifications: 3}) {
		t.Errorf("counters %+v", c)
	}
}

// From kick to interrupt, in steady state: a request that is carried out on the spot, and one that is sent off.
func TestRequestDoesNotAllocate(t *testing.T) {
	for _, typ := range []uint32{typeIn, typeFlush} {
		_, d, s := startSignal(t, nil, typ)
		request := func() {
			d.MakeAvailable(0)
			d.Kick()
			<-s.notified
		}
		for range 1000 { // lists and pools grow once
			request()
		}
		if n := testing.AllocsPerRun(1000, request); n != 0 {
			t.Errorf("type %d: %v allocations per request", typ, n)
		}
	}
}
