package queue_test

import (
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/guest/memory"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// touch reads the ends of every range of v, which faults unless they are mapped, and checks that there are no more
// bytes than a chain may have.
func touch(tb testing.TB, v iov.Vec, ram int) (sum byte) {
	total := 0
	for _, r := range v {
		b := r.Bytes()
		if len(b) == 0 || len(b) > ram {
			tb.Fatalf("a range of %d bytes in %d bytes of RAM", len(b), ram)
		}
		total += len(b)
		sum += b[0] + b[len(b)-1]
	}
	if total >= 1<<32 {
		tb.Fatalf("%d bytes in one chain", total)
	}
	return sum
}

// FuzzQueue lets the guest write anything into its rings. A worker may then pop no more chains than the queue has
// entries, each within bounds.
func FuzzQueue(f *testing.F) {
	good := queuetest.New(f, 8, queuetest.Options{Indirect: true, Len: smallLen})
	good.Add([][]byte{[]byte("read")}, [][]byte{[]byte("write"), {1}})
	good.Add([][]byte{[]byte("read"), {2}}, nil)
	seed := func(d *queuetest.Driver, state uint32) {
		flags := uint8(0)
		if d.Config.Indirect {
			flags |= 1
		}
		f.Add(flags, uint8(3), uint16(d.Config.Desc), uint16(d.Config.Driver), uint16(d.Config.Device), state,
			d.Bytes(0, smallLen))
	}
	seed(good, 0)
	seed(good, 0x0001_0000)
	for i := range malformed {
		seed(malformedQueue(f, i), 0)
	}

	f.Fuzz(func(t *testing.T, flags, order uint8, desc, driver, device uint16, state uint32, ram []byte) {
		mem, err := memory.New(smallLen)
		if err != nil {
			t.Fatal(err)
		}
		defer mem.Close()
		if _, err := mem.WriteAt(ram[:min(len(ram), smallLen)], 0); err != nil {
			t.Fatal(err)
		}
		ev, err := queue.NewEvent()
		if err != nil {
			t.Fatal(err)
		}
		defer ev.Close()
		q, err := queue.New(mem, queue.Config{
			Size: 1 << (order & 15), Desc: uint64(desc), Driver: uint64(driver), Device: uint64(device),
			Indirect: flags&1 != 0, EventIdx: flags&2 != 0, MaxChain: int(flags >> 2),
		}, ev)
		if err != nil {
			return
		}
		if state != 0 && q.SetState(queue.State{Avail: uint16(state), Used: uint16(state >> 16)}) != nil {
			return
		}
		// Where the device's writes do not land in the driver's rings, what it finds there does not grow.
		size := uint64(q.Size())
		d, a, u := uint64(desc), uint64(driver), uint64(device)
		apart := (u+6+8*size <= a || a+6+2*size <= u) && (u+6+8*size <= d || d+16*size <= u)
		var c queue.Chain
		steps := uint64(0)
		for steps < 2*size {
			ok, err := q.Pop(&c)
			if err != nil {
				if again := q.Wait(); again != err {
					t.Fatalf("Wait on a broken queue: %v", again)
				}
				break
			}
			if !ok {
				break
			}
			touch(t, c.Readable, smallLen)
			touch(t, c.Writable, smallLen)
			if steps++; steps > size && apart {
				t.Fatal("the worker spins")
			}
			switch {
			case flags&0x80 == 0:
				q.Push(&c, 1) // may well overwrite the rings
				q.ShouldNotify()
			case steps%3 == 0:
				q.Undo()
				if ok, err := q.Pop(&c); !ok && err == nil {
					t.Fatal("an undone chain is gone")
				}
			}
		}
		q.Stop()
		_ = q.Wait()
	})
}

// TestScribble changes the rings while the device reads them: what it checked must be what it uses.
func TestScribble(t *testing.T) {
	t.Parallel()
	const size = 8
	d := queuetest.New(t, size, queuetest.Options{Indirect: true, EventIdx: true, Len: smallLen})
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		r := rand.New(rand.NewPCG(seed, 1))
		for {
			select {
			case <-stop:
				return
			default:
			}
			i := uint16(r.IntN(size))
			d.SetDesc(i, desc{
				Addr:  uint64(r.IntN(smallLen * 5 / 4)),
				Len:   uint32(r.IntN(64)) * 16,
				Flags: uint16(r.IntN(8)),
				Next:  uint16(r.IntN(size + 1)),
			})
			d.SetAvailIdx(d.AvailIdx() + uint16(r.IntN(3)))
		}
	})
	chains := 0
	for n := 0; n < 20000 || chains == 0; n++ {
		q, err := queue.New(d.Mem, d.Config, d.Event)
		if err != nil {
			t.Fatal(err)
		}
		at := d.AvailIdx()
		if err := q.SetState(queue.State{Avail: at, Used: at}); err != nil {
			t.Fatal(err)
		}
		var c queue.Chain
		for range size {
			ok, err := q.Pop(&c)
			if err != nil {
				break
			}
			if ok {
				chains++
				touch(t, c.Readable, smallLen)
				touch(t, c.Writable, smallLen)
				q.Push(&c, 0)
			}
		}
	}
	close(stop)
	wg.Wait()
}
