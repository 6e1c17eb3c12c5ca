package queue_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/internal/ring"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// TestShouldNotifyEventIdx checks the window of virtio 1.2, 2.7.7.2 around the wrap of the index too.
func TestShouldNotifyEventIdx(t *testing.T) {
	t.Parallel()
	for _, start := range []uint16{0, 100, 65533, 65535} {
		for pushes := range uint16(4) {
			for ahead := -3; ahead <= 5; ahead++ {
				d := queuetest.New(t, 8, queuetest.Options{EventIdx: true, Len: 1 << 16})
				if err := d.Queue.SetState(queue.State{Avail: start + 4, Used: start}); err != nil {
					t.Fatal(err)
				}
				d.Queue.ShouldNotify() // the one that SetState owes
				d.SetUsedEvent(start + uint16(ahead))
				for range pushes {
					d.Queue.Push(&queue.Chain{}, 0)
				}
				want := ahead >= 0 && ahead < int(pushes)
				if got := d.Queue.ShouldNotify(); got != want {
					t.Errorf("from %d, %d pushes, used_event %+d: %v", start, pushes, ahead, got)
				}
			}
		}
	}
}

// TestShouldNotifyAfterWrap pushes so much between two looks at the driver's wish that the 16-bit index comes around.
func TestShouldNotifyAfterWrap(t *testing.T) {
	t.Parallel()
	d := queuetest.New(t, queue.MaxSize, queuetest.Options{EventIdx: true})
	d.SetDesc(0, queuetest.Desc{Addr: d.Alloc(1, 1), Len: 1})
	var c queue.Chain
	for _, pushes := range []int{1 << 15, 1 << 16, 1<<16 + 1} {
		d.SetUsedEvent(d.UsedIdx() + 20000)
		for range pushes {
			d.MakeAvailable(0)
			pop(t, d.Queue, &c)
			d.Queue.Push(&c, 0)
		}
		if !d.Queue.ShouldNotify() {
			t.Errorf("no notification after %d chains, one of which the driver waits for", pushes)
		}
		if d.Queue.ShouldNotify() {
			t.Errorf("a second notification after %d chains", pushes)
		}
	}
}

func TestShouldNotifyFlags(t *testing.T) {
	t.Parallel()
	for _, skew := range []bool{false, true} {
		d := queuetest.New(t, 8, queuetest.Options{Skew: skew})
		var c queue.Chain
		for range 3 {
			d.Add([][]byte{{1}}, nil)
		}
		if d.Queue.ShouldNotify() {
			t.Error("a notification of nothing")
		}
		pop(t, d.Queue, &c)
		d.Queue.Push(&c, 0)
		if !d.Queue.ShouldNotify() || d.Queue.ShouldNotify() {
			t.Error("want one notification")
		}
		d.DisableInterrupts()
		pop(t, d.Queue, &c)
		d.Queue.Push(&c, 0)
		if d.Queue.ShouldNotify() {
			t.Error("a notification against the driver's wish")
		}
		d.EnableInterrupts()
		pop(t, d.Queue, &c)
		d.Queue.Push(&c, 0)
		if !d.Queue.ShouldNotify() {
			t.Error("no notification")
		}
		if got := d.Queue.Counters(); got != (queue.Counters{Pops: 3, Notifications: 2}) {
			t.Errorf("counters %+v", got)
		}
	}
}

// TestKickSuppression watches what the device asks of the driver while its worker is awake and asleep.
func TestKickSuppression(t *testing.T) {
	t.Parallel()
	for _, eventIdx := range []bool{false, true} {
		d := queuetest.New(t, 8, queuetest.Options{EventIdx: eventIdx})
		step := make(chan struct{})
		go func() {
			var c queue.Chain
			for d.Queue.Wait() == nil {
				step <- struct{}{} // awake
				<-step             // may go on
				for {
					ok, err := d.Queue.Pop(&c)
					if err != nil {
						t.Error(err)
					}
					if !ok {
						break
					}
					d.Queue.Push(&c, 0)
				}
			}
			close(step)
		}()
		asleep := func(used uint16) { // until the worker wants a kick
			for d.UsedIdx() != used || eventIdx && d.AvailEvent() != used || d.UsedFlags() != 0 {
				runtime.Gosched()
			}
		}
		d.SetAvailEvent(77)
		for used := uint16(0); used < 6; used += 2 {
			asleep(used)
			d.Add([][]byte{{1}}, nil)
			if !d.Kick() {
				t.Errorf("eventIdx %v: the sleeping worker does not want a kick", eventIdx)
			}
			<-step
			d.Add([][]byte{{1}}, nil)
			if d.Kick() {
				t.Errorf("eventIdx %v: kicked a worker that is awake", eventIdx)
			}
			step <- struct{}{}
		}
		asleep(6)
		if kicks := d.Queue.Counters().Kicks; kicks > 3 { // two may fall into one, none comes from nowhere
			t.Errorf("eventIdx %v: %d kicks of %d", eventIdx, kicks, d.Kicks)
		}
		d.Queue.Stop()
		for range step {
			t.Errorf("eventIdx %v: woken without a chain", eventIdx)
		}
	}
}

// TestNeighbours checks that the device writes nothing beside its ring, and the driver's two bytes behind avail_event
// least of all, though they share a word with it.
func TestNeighbours(t *testing.T) {
	t.Parallel()
	d := queuetest.New(t, 2, queuetest.Options{EventIdx: true})
	used := d.Bytes(d.Config.Device-4, 4+ring.UsedEvents(2)+ring.EventSize+6)
	end := used[4+ring.UsedEvents(2)+ring.EventSize:]
	copy(end, "neigh!")
	before := bytes.Clone(used[:4])
	q := d.Queue
	d.SetDesc(0, desc{Addr: d.Alloc(1, 1), Len: 1})
	for range 1 << 10 {
		d.MakeAvailable(0)
		var c queue.Chain
		pop(t, q, &c)
		q.Push(&c, 0)
		// A worker that goes to sleep arms avail_event; a stop wakes it, and the next queue continues.
		done := make(chan error)
		go func() { done <- q.Wait() }()
		for d.AvailEvent() != d.AvailIdx() {
			runtime.Gosched()
		}
		q.Stop()
		<-done
		s := q.State()
		s.Avail += 63 // let the indexes move through all their bits
		s.Used = s.Avail
		var err error
		if q, err = queue.New(d.Mem, d.Config, d.Event); err != nil {
			t.Fatal(err)
		}
		if err := q.SetState(s); err != nil {
			t.Fatal(err)
		}
		d.SetAvailIdx(s.Avail)
		d.SetUsedIdx(s.Used)
	}
	if string(end) != "neigh!" || !bytes.Equal(used[:4], before) {
		t.Errorf("around the used ring: %q and %q", used[:4], end)
	}
}

// TestProducerConsumer runs a driver and a device against each other as fast as they go; a lost kick or a lost
// notification hangs it.
func TestProducerConsumer(t *testing.T) {
	t.Parallel()
	for _, opts := range []queuetest.Options{
		{},
		{Skew: true},
		{Indirect: true},
		{EventIdx: true},
		{EventIdx: true, Indirect: true, Skew: true},
	} {
		for _, pushers := range []int{1, 3} {
			name := fmt.Sprintf("event=%v,indirect=%v,skew=%v,pushers=%d", opts.EventIdx, opts.Indirect, opts.Skew, pushers)
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				produceConsume(t, opts, pushers)
			})
		}
	}
}

func produceConsume(t *testing.T, opts queuetest.Options, pushers int) {
	const total = 3000
	d := queuetest.New(t, 16, opts)

	// The device answers each number with its double; the pushers return chains concurrently and out of order.
	var wg sync.WaitGroup
	work := make(chan queue.Chain, 16)
	for range pushers {
		wg.Go(func() {
			for c := range work {
				var in [8]byte
				copy(in[copy(in[:], c.Readable[0].Bytes()):], c.Readable[1].Bytes())
				binary.LittleEndian.PutUint64(c.Writable[0].Bytes(), 2*binary.LittleEndian.Uint64(in[:]))
				d.Queue.Push(&c, 8)
				if d.Queue.ShouldNotify() {
					d.Interrupt()
				}
			}
		})
	}
	wg.Go(func() {
		defer close(work)
		for d.Queue.Wait() == nil {
			for {
				var c queue.Chain
				ok, err := d.Queue.Pop(&c)
				if err != nil {
					t.Error(err)
					return
				}
				if !ok {
					break
				}
				work <- c
			}
		}
	})

	sum := map[uint16]uint64{}
	out := map[uint16][]byte{}
	done := 0
	take := func() {
		head, n := d.Wait()
		done++
		if n != 8 || binary.LittleEndian.Uint64(out[head]) != 2*sum[head] {
			t.Errorf("chain %d: %d bytes, %x, want the double of %x", head, n, out[head], sum[head])
		}
	}
	for i := range uint64(total) {
		for d.Free() < 3 || rand.IntN(4) == 0 && d.InFlight() > 0 {
			take()
		}
		v := i * 0x0101_0101
		var in [8]byte
		binary.LittleEndian.PutUint64(in[:], v)
		res := make([]byte, 8)
		head := d.Add([][]byte{in[:3], in[3:]}, [][]byte{res})
		sum[head], out[head] = v, res
		d.Kick()
	}
	for d.InFlight() > 0 {
		take()
	}
	d.Queue.Stop()
	wg.Wait()
	c := d.Queue.Counters()
	if done != total || c.Pops != total || d.UsedIdx() != total {
		t.Errorf("%d chains came back, used index %d, %+v", done, d.UsedIdx(), c)
	}
	t.Logf("%d kicks sent, %+v", d.Kicks, c)
}

func TestEvent(t *testing.T) {
	t.Parallel()
	e, err := queue.NewEvent()
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := e.Signal(); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Wait(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		if err := e.Wait(); err != nil {
			t.Error(err)
		}
		done <- nil
		done <- e.Wait()
	}()
	if err := e.Signal(); err != nil {
		t.Fatal(err)
	}
	<-done
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != os.ErrClosed {
		t.Errorf("Wait on a closed event: %v", err)
	}
	for name, f := range map[string]func() error{"Wait": e.Wait, "Signal": e.Signal, "Close": e.Close} {
		if err := f(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}
