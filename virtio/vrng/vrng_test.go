package vrng_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
	"github.com/kvmlet/kvmlet/virtio/vrng"
)

func start(t *testing.T, without virtio.Features) (*vrng.Device, *queuetest.Transport, *queuetest.Driver) {
	t.Helper()
	dev := vrng.New()
	tr := queuetest.Start(t, dev, ^without, queuetest.Options{})
	return dev, tr, tr.Drivers[0]
}

// random reports whether b looks random: it has no run of 16 equal bytes, which would have a chance of 2^-120 each.
func random(b []byte) bool {
	run := 1
	for i := 1; i < len(b); i++ {
		if b[i] != b[i-1] {
			run = 0
		}
		if run++; run >= 16 {
			return false
		}
	}
	return true
}

func TestIdentity(t *testing.T) {
	t.Parallel()
	dev := vrng.New()
	sizes := dev.QueueSizes()
	if dev.ID() != 4 || len(sizes) != 1 || sizes[0] != 64 || dev.Features() != 1<<28|1<<29 {
		t.Errorf("id %d, queues %v, features %#x", dev.ID(), sizes, dev.Features())
	}
	p := []byte{1, 2, 3, 4}
	dev.WriteConfig(p, 0)
	dev.ReadConfig(p, 0)
	if !bytes.Equal(p, make([]byte, 4)) {
		t.Errorf("configuration %x", p)
	}
}

func TestFillsBuffers(t *testing.T) {
	t.Parallel()
	for name, without := range map[string]virtio.Features{
		"plain": virtio.RingIndirectDesc | virtio.RingEventIdx, "all": 0,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dev, _, d := start(t, without)
			total := 0
			for _, lengths := range [][]int{{64}, {1}, {8}, {4096}, {1, 2, 3, 500}, {vrng.MaxBytes}, {40000, 25536}} {
				var bufs [][]byte
				want := 0
				for _, n := range lengths {
					bufs = append(bufs, make([]byte, n))
					want += n
				}
				if written := d.Do(nil, bufs); int(written) != want {
					t.Errorf("%v: %d bytes written, want %d", lengths, written, want)
				}
				for _, b := range bufs {
					if !random(b) {
						t.Errorf("%v: not filled", lengths)
					}
				}
				total += want
			}
			if c := dev.Counters(); c != (vrng.Counters{Requests: 7, Bytes: uint64(total)}) {
				t.Errorf("counters %+v", c)
			}
		})
	}
}

func TestAnswersDiffer(t *testing.T) {
	t.Parallel()
	_, _, d := start(t, 0)
	seen := map[string]bool{}
	for range 50 {
		var bufs [16][]byte
		for i := range bufs {
			bufs[i] = make([]byte, 16)
			d.Add(nil, [][]byte{bufs[i]})
		}
		d.Kick()
		for range bufs {
			d.Wait()
		}
		for _, b := range bufs {
			if seen[string(b)] {
				t.Fatalf("%x came twice", b)
			}
			seen[string(b)] = true
		}
	}
}

// The size of a buffer is the guest's choice, the work done for it is not.
func TestCap(t *testing.T) {
	t.Parallel()
	dev, _, d := start(t, 0)
	for _, lengths := range [][]int{
		{vrng.MaxBytes + 1}, {4 << 20}, {vrng.MaxBytes - 1, 1, 1}, {vrng.MaxBytes - 1, 4096}, {vrng.MaxBytes, 1},
	} {
		var bufs [][]byte
		for _, n := range lengths {
			bufs = append(bufs, make([]byte, n))
		}
		if written := d.Do(nil, bufs); written != vrng.MaxBytes {
			t.Errorf("%v: %d bytes written", lengths, written)
		}
		all := bytes.Join(bufs, nil)
		if !random(all[:vrng.MaxBytes]) || !bytes.Equal(all[vrng.MaxBytes:], make([]byte, len(all)-vrng.MaxBytes)) {
			t.Errorf("%v: filled too little or too much", lengths)
		}
	}
	if c := dev.Counters(); c.Bytes != 5*vrng.MaxBytes {
		t.Errorf("counters %+v", c)
	}
}

// A driver must not offer readable buffers (virtio 1.2, 5.4.6.1). They come back untouched, and what is writable behind
// them is filled.
func TestReadableBuffers(t *testing.T) {
	t.Parallel()
	dev, _, d := start(t, 0)
	for range 100 { // more than the queue holds
		if written := d.Do([][]byte{[]byte("readable")}, nil); written != 0 {
			t.Fatalf("%d bytes written", written)
		}
	}
	room := make([]byte, 32)
	if written := d.Do([][]byte{[]byte("readable")}, [][]byte{room}); written != 32 || !random(room) {
		t.Errorf("%d bytes written", written)
	}
	if c := dev.Counters(); c != (vrng.Counters{Requests: 101, Bytes: 32, Malformed: 100}) {
		t.Errorf("counters %+v", c)
	}
}

func TestBrokenQueue(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(d *queuetest.Driver){
		"buffer beyond memory": func(d *queuetest.Driver) {
			d.SetDesc(3, queuetest.Desc{Addr: d.Alloc(64, 1), Len: 0xffffffff, Flags: queuetest.FlagWrite})
			d.MakeAvailable(3)
		},
		"buffer of length zero": func(d *queuetest.Driver) {
			d.SetDesc(3, queuetest.Desc{Addr: d.Alloc(64, 1), Flags: queuetest.FlagWrite})
			d.MakeAvailable(3)
		},
		"loop": func(d *queuetest.Driver) {
			d.SetDesc(3, queuetest.Desc{Addr: d.Alloc(8, 1), Len: 8, Flags: queuetest.FlagWrite | queuetest.FlagNext, Next: 3})
			d.MakeAvailable(3)
		},
		"available index far ahead": func(d *queuetest.Driver) { d.SetAvailIdx(1000) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dev, tr, d := start(t, 0)
			spoil(d)
			d.Notify()
			<-tr.NeedingReset()
			if err := dev.Reset(); err != nil {
				t.Fatal(err)
			}
			if d.UsedIdx() != 0 || dev.Counters().Requests != 0 {
				t.Error("something was answered")
			}
			d = queuetest.Start(t, dev, ^virtio.Features(0), queuetest.Options{}).Drivers[0]
			if d.Do(nil, [][]byte{make([]byte, 8)}) != 8 {
				t.Error("dead after the reset")
			}
		})
	}
}

// A driver that never stops asking does not keep Reset from ending.
func TestResetUnderLoad(t *testing.T) { // not parallel: it counts the workers of all devices
	dev := vrng.New()
	if err := dev.Reset(); err != nil {
		t.Fatalf("before the first activation: %v", err)
	}
	for range 20 {
		d := queuetest.Start(t, dev, ^virtio.Features(0), queuetest.Options{Len: 1 << 20}).Drivers[0]
		for range d.Config.Size {
			d.Add(nil, [][]byte{make([]byte, 4096)})
		}
		d.Kick()
		d.Wait()
		for range 2 { // the second finds nothing to do
			if err := dev.Reset(); err != nil {
				t.Fatal(err)
			}
		}
		used := d.UsedIdx()
		hosttest.Ended(t, "vrng.(*Device).work(", queuetest.Timeout)
		d.Notify()
		if d.UsedIdx() != used {
			t.Fatal("a request was answered after Reset")
		}
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

func startSignal(t *testing.T, err error) (*vrng.Device, func()) {
	t.Helper()
	dev := vrng.New()
	d := queuetest.New(t, 64, queuetest.Options{})
	d.SetDesc(0, queuetest.Desc{Addr: d.Alloc(64, 1), Len: 64, Flags: queuetest.FlagWrite})
	s := &signal{make(chan struct{}, 1), err}
	if err := dev.Activate(virtio.VersionOne, []*queue.Queue{d.Queue}, s); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dev.Reset() })
	return dev, func() {
		d.MakeAvailable(0)
		d.Kick()
		<-s.notified
	}
}

func TestLostNotification(t *testing.T) {
	t.Parallel()
	dev, request := startSignal(t, errors.New("no interrupt"))
	for range 3 {
		request()
	}
	if err := dev.Reset(); err != nil {
		t.Fatal(err)
	}
	if n := dev.Counters().LostNotifications; n != 3 {
		t.Errorf("%d lost notifications counted", n)
	}
}

func TestRequestDoesNotAllocate(t *testing.T) {
	_, request := startSignal(t, nil)
	request()
	if n := testing.AllocsPerRun(500, request); n != 0 {
		t.Errorf("%v allocations per request", n)
	}
}

func TestActivateRefuses(t *testing.T) {
	t.Parallel()
	dev, tr, d := start(t, 0)
	if err := dev.Activate(0, []*queue.Queue{d.Queue}, tr); err == nil {
		t.Error("activated twice")
	}
	other := vrng.New()
	if err := other.Activate(0, nil, tr); err == nil {
		t.Error("activated without a queue")
	}
	for range 2 { // the driver left the queue disabled
		if err := other.Activate(0, []*queue.Queue{nil}, tr); err != nil {
			t.Error(err)
		}
		if err := other.Activate(0, []*queue.Queue{nil}, tr); err == nil {
			t.Error("activated twice, without a queue")
		}
		if err := other.Reset(); err != nil {
			t.Error(err)
		}
	}
}
