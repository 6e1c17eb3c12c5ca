package queue_test

import (
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/memory"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

const page = memory.PageSize

// TestDirty checks that dirty logs get the pages that the device wrote, and no others. The used ring of 1024 entries lies
// on three pages: its index on the first, entry 700 on the second, avail_event on the third.
func TestDirty(t *testing.T) {
	t.Parallel()
	for _, eventIdx := range []bool{false, true} {
		d := queuetest.New(t, 1024, queuetest.Options{EventIdx: eventIdx, Indirect: true})
		mem, q, c := d.Mem, d.Queue, new(queue.Chain)
		log := mem.EnableDirty()
		t.Cleanup(log.Close)
		expect := func(what string, want ...uint64) {
			t.Helper()
			if got := queuetest.Dirty(t, mem, log); !slices.Equal(got, queuetest.Pages(want...)) {
				t.Errorf("event-idx %v, %s: pages %#x, want %#x", eventIdx, what, got, queuetest.Pages(want...))
			}
		}
		used := d.Config.Device
		event := used + 4 + 8*1024
		if n := len(queuetest.Pages(used, used+4+700*8, event)); n != 3 {
			t.Fatalf("the parts of the used ring are on %d pages", n)
		}
		buf := d.Alloc(16*page, page)

		// Three parts of the guest's memory in an order of their own, behind a readable one, by an indirect table.
		d.SetDesc(0, d.Table(
			queuetest.Desc{Addr: buf, Len: 64, Flags: queuetest.FlagNext, Next: 1},
			queuetest.Desc{Addr: buf + 8*page, Len: 2 * page, Flags: queuetest.FlagWrite | queuetest.FlagNext, Next: 2},
			queuetest.Desc{Addr: buf + 3*page + 1, Len: page - 1, Flags: queuetest.FlagWrite | queuetest.FlagNext, Next: 3},
			queuetest.Desc{Addr: buf + 5*page - 1, Len: 2, Flags: queuetest.FlagWrite},
		))
		for _, tc := range []struct {
			written uint32
			want    []uint64
		}{
			{0, nil},
			{1, []uint64{8}},
			{page + 1, []uint64{8, 9}},
			{2 * page, []uint64{8, 9}},
			{2*page + 1, []uint64{8, 9, 3}},
			{3*page - 1, []uint64{8, 9, 3}},
			{3 * page, []uint64{8, 9, 3, 4}},
			{3*page + 1, []uint64{8, 9, 3, 4, 5}},
			{1 << 31, []uint64{8, 9, 3, 4, 5}}, // a device's mistake marks nothing else
		} {
			d.MakeAvailable(0)
			pop(t, q, c)
			// A device may use the lists up, and the driver change its descriptors: what was popped counts.
			c.Writable = c.Writable[:0]
			expect("popped")
			q.Push(c, tc.written)
			want := []uint64{used}
			for _, p := range tc.want {
				want = append(want, buf+p*page)
			}
			expect("pushed", want...)
		}
		d.MakeAvailable(0)
		pop(t, q, c)
		c.Touched()
		q.Push(c, 1)
		expect("touched", used, buf+8*page, buf+9*page, buf+3*page, buf+4*page, buf+5*page)
		d.MakeAvailable(0)
		pop(t, q, c)
		q.Undo()
		pop(t, q, c)
		q.Push(c, 1)
		expect("touched no more", used, buf+8*page)

		// Entries of the used ring far behind its index, and two chains at once.
		for q.State().Used < 700 {
			d.MakeAvailable(0)
			pop(t, q, c)
			q.Push(c, 0)
		}
		queuetest.Dirty(t, mem, log)
		d.MakeAvailable(0, 0)
		c2 := new(queue.Chain)
		pop(t, q, c)
		pop(t, q, c2)
		q.PushAll([]queue.Used{{Chain: c, Written: 1}, {Chain: c2, Written: page + 1}})
		expect("entry 700", used, used+4+700*8, buf+8*page, buf+9*page)

		// What a worker writes when it goes to sleep: avail_event, or flags.
		done := make(chan error)
		go func() { done <- q.Wait() }()
		if eventIdx {
			for deadline := time.Now().Add(queuetest.Timeout); d.AvailEvent() != d.AvailIdx(); runtime.Gosched() {
				if time.Now().After(deadline) {
					t.Fatal("the worker does not go to sleep")
				}
			}
		}
		q.Wake()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if eventIdx {
			expect("asleep and awake", event)
		} else {
			expect("asleep and awake", used)
		}
		log.Close()
		d.MakeAvailable(0)
		pop(t, q, c)
		q.Push(c, 1)
		expect("no log")
	}
}
