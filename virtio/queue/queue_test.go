package queue_test

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"testing"

	"github.com/kvmlet/kvmlet/guest/memory"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// flatten copies out what v describes.
func flatten(v iov.Vec) []byte {
	var b []byte
	for _, r := range v {
		b = append(b, r.Bytes()...)
	}
	return b
}

// pop takes a chain that must be there.
func pop(tb testing.TB, q *queue.Queue, c *queue.Chain) {
	tb.Helper()
	if ok, err := q.Pop(c); !ok || err != nil {
		tb.Fatalf("Pop = %v, %v", ok, err)
	}
}

// none checks that there is no chain.
func none(tb testing.TB, q *queue.Queue) {
	tb.Helper()
	var c queue.Chain
	if ok, err := q.Pop(&c); ok || err != nil {
		tb.Fatalf("Pop = %v, %v; want nothing", ok, err)
	}
}

func TestNewErrors(t *testing.T) {
	t.Parallel()
	const ram = 1 << 20
	mem, err := memory.New(ram)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	good := queue.Config{Size: 16, Desc: 0x1000, Driver: 0x2002, Device: 0x3004, EventIdx: true}
	if _, err := queue.New(mem, good, nil); err != nil {
		t.Fatalf("New(%+v): %v", good, err)
	}
	for name, change := range map[string]func(c *queue.Config){
		"size 0":                  func(c *queue.Config) { c.Size = 0 },
		"size 3":                  func(c *queue.Config) { c.Size = 3 },
		"size 65535":              func(c *queue.Config) { c.Size = 65535 },
		"table unaligned":         func(c *queue.Config) { c.Desc = 0x1008 },
		"available unaligned":     func(c *queue.Config) { c.Driver = 0x2001 },
		"used unaligned":          func(c *queue.Config) { c.Device = 0x3002 },
		"table beyond RAM":        func(c *queue.Config) { c.Desc = ram },
		"table across the end":    func(c *queue.Config) { c.Desc = ram - 16*15 },
		"table overflow":          func(c *queue.Config) { c.Desc = 1<<64 - 16 },
		"available across":        func(c *queue.Config) { c.Driver = ram - 4 - 2*16 },
		"available overflow":      func(c *queue.Config) { c.Driver = 1<<64 - 2 },
		"used across the end":     func(c *queue.Config) { c.Device = ram - 4 - 8*16 },
		"used beyond RAM":         func(c *queue.Config) { c.Device = 1 << 50 },
		"negative maximum chain":  func(c *queue.Config) { c.MaxChain = -1 },
		"maximum chain too large": func(c *queue.Config) { c.MaxChain = 1 << 20 },
	} {
		cfg := good
		change(&cfg)
		if _, err := queue.New(mem, cfg, nil); !errors.Is(err, queue.ErrConfig) {
			t.Errorf("%s: New: %v, want ErrConfig", name, err)
		}
	}
	// Without event-idx the rings end two bytes earlier and may end with RAM.
	for _, change := range []func(c *queue.Config){
		func(c *queue.Config) { c.Driver = ram - 4 - 2*16 },
		func(c *queue.Config) { c.Device = ram - 4 - 8*16 },
	} {
		cfg := good
		cfg.EventIdx = false
		change(&cfg)
		if _, err := queue.New(mem, cfg, nil); err != nil {
			t.Errorf("New(%+v): %v", cfg, err)
		}
	}
}

func TestChains(t *testing.T) {
	t.Parallel()
	in := [][]byte{[]byte("abc"), []byte("d"), []byte("efgh")}
	out := func() [][]byte { return [][]byte{[]byte("...."), []byte("..")} }
	for _, opts := range []queuetest.Options{{}, {Indirect: true}, {EventIdx: true, Skew: true}} {
		for _, size := range []uint16{8, 32768} {
			d := queuetest.New(t, size, opts)
			var c queue.Chain
			none(t, d.Queue)
			w := out()
			head := d.Add(in, w)
			pop(t, d.Queue, &c)
			if c.Head != head || string(flatten(c.Readable)) != "abcdefgh" || c.Writable.Size() != 6 {
				t.Fatalf("popped %d, %q, %d writable", c.Head, flatten(c.Readable), c.Writable.Size())
			}
			copy(c.Writable[0].Bytes(), "WXYZ")
			copy(c.Writable[1].Bytes(), "!")
			d.Queue.Push(&c, 5)
			if got, n, ok := d.Used(); got != head || n != 5 || !ok {
				t.Fatalf("Used = %d, %d, %v", got, n, ok)
			}
			if string(bytes.Join(w, nil)) != "WXYZ!." {
				t.Errorf("driver got %q", w)
			}
			none(t, d.Queue)
		}
	}
}

// TestIndirectTail follows direct descriptors into a table, and ignores the write flag on the descriptor that refers to
// it (virtio 1.2, 2.7.5.3.2).
func TestIndirectTail(t *testing.T) {
	t.Parallel()
	d := queuetest.New(t, 4, queuetest.Options{Indirect: true})
	a := d.Alloc(16, 1)
	copy(d.Bytes(a, 16), "0123456789abcdef")
	d.SetDesc(2, desc{Addr: a, Len: 2, Flags: next, Next: 0})
	d.SetDesc(0, desc{Addr: a + 4, Len: 3, Flags: next, Next: 3})
	table := d.Table(
		desc{Addr: a + 8, Len: 1, Flags: next, Next: 2},
		desc{Addr: a + 15, Len: 1, Flags: write},
		desc{Addr: a + 10, Len: 2, Flags: next, Next: 1})
	table.Flags |= write
	d.SetDesc(3, table)
	d.MakeAvailable(2)
	var c queue.Chain
	pop(t, d.Queue, &c)
	if r, w := string(flatten(c.Readable)), string(flatten(c.Writable)); c.Head != 2 || r != "014568ab" || w != "f" {
		t.Errorf("popped %d, %q, %q", c.Head, r, w)
	}
}

func TestChainLengths(t *testing.T) {
	t.Parallel()
	long := func(n int) [][]byte { return slices.Repeat([][]byte{{1}}, n) }
	for _, tc := range []struct {
		opts queuetest.Options
		n    int
		ok   bool
	}{
		{queuetest.Options{}, 8, true}, // the whole table
		{queuetest.Options{MaxChain: 7}, 8, false},
		{queuetest.Options{MaxChain: 7}, 7, true},
		{queuetest.Options{Indirect: true}, 129, true}, // longer than the queue, as some drivers do
		{queuetest.Options{Indirect: true}, 1024, true},
		{queuetest.Options{Indirect: true}, 1025, false},
		{queuetest.Options{Indirect: true, MaxChain: 16}, 16, true},
		{queuetest.Options{Indirect: true, MaxChain: 16}, 17, false},
	} {
		d := queuetest.New(t, 8, tc.opts)
		d.Add(long(tc.n), nil)
		var c queue.Chain
		ok, err := d.Queue.Pop(&c)
		if ok != tc.ok || (err == nil) != tc.ok || (ok && len(c.Readable) != tc.n) {
			t.Errorf("%+v, %d descriptors: Pop = %v, %v", tc.opts, tc.n, ok, err)
		}
	}
	// The direct part counts too.
	d := queuetest.New(t, 8, queuetest.Options{Indirect: true, MaxChain: 3})
	a := d.Alloc(1, 1)
	d.SetDesc(0, desc{Addr: a, Len: 1, Flags: next, Next: 1})
	d.SetDesc(1, d.Table(
		desc{Addr: a, Len: 1, Flags: next, Next: 1},
		desc{Addr: a, Len: 1, Flags: next, Next: 2},
		desc{Addr: a, Len: 1}))
	d.MakeAvailable(0)
	if _, err := d.Queue.Pop(new(queue.Chain)); !errors.Is(err, queue.ErrBadChain) {
		t.Errorf("1 direct and 3 indirect descriptors of at most 3: %v", err)
	}
}

// TestWrap takes the 16-bit indexes around more than once, with chains returned out of order.
func TestWrap(t *testing.T) {
	t.Parallel()
	for _, size := range []uint16{1, 2, 8} {
		d := queuetest.New(t, size, queuetest.Options{EventIdx: true})
		var c queue.Chain
		heads := make([]uint16, 0, size)
		b := [][]byte{{1}}
		for n := 0; n < 1<<17; n += int(size) {
			heads = heads[:0]
			for range size {
				d.Add(b, nil)
				pop(t, d.Queue, &c)
				heads = append(heads, c.Head)
			}
			slices.Reverse(heads)
			for _, h := range heads {
				d.Queue.Push(&queue.Chain{Head: h}, 0)
			}
			for _, h := range heads {
				if got, _, ok := d.Used(); got != h || !ok {
					t.Fatalf("chain %d: Used = %d, %v; want %d", n, got, ok, h)
				}
			}
		}
	}
}

// TestPushAll returns chains together, around the end of the ring, while the driver watches the index.
func TestPushAll(t *testing.T) {
	t.Parallel()
	d := queuetest.New(t, 8, queuetest.Options{})
	for range 100 {
		var all []queue.Used
		for i := range uint32(5) {
			d.Add(nil, [][]byte{make([]byte, 8)})
			c := new(queue.Chain)
			pop(t, d.Queue, c)
			all = append(all, queue.Used{Chain: c, Written: i})
		}
		before := d.UsedIdx()
		seen := make(chan uint16)
		go func() {
			for d.UsedIdx() == before {
				runtime.Gosched()
			}
			seen <- d.UsedIdx() - before
		}()
		d.Queue.PushAll(all)
		if n := <-seen; n != 5 {
			t.Fatalf("the driver saw %d of 5 chains", n)
		}
		for _, u := range all {
			if head, n, ok := d.Used(); head != u.Chain.Head || n != u.Written || !ok {
				t.Fatalf("Used = %d, %d, %v; want %+v", head, n, ok, u)
			}
		}
		if !d.Queue.ShouldNotify() {
			t.Fatal("no notification")
		}
	}
	d.Queue.PushAll(nil)
	if d.Queue.ShouldNotify() {
		t.Error("a notification of nothing")
	}
}

func TestUndo(t *testing.T) {
	t.Parallel()
	d := queuetest.New(t, 4, queuetest.Options{})
	var heads []uint16
	for range 4 {
		heads = append(heads, d.Add([][]byte{{1}}, nil))
	}
	var c queue.Chain
	for range 3 {
		for _, h := range heads {
			pop(t, d.Queue, &c)
			if c.Head != h {
				t.Fatalf("popped %d, want %d", c.Head, h)
			}
		}
		none(t, d.Queue)
		for range heads {
			d.Queue.Undo()
		}
	}
	if n := d.Queue.Counters().Pops; n != 0 {
		t.Errorf("%d pops after as many undone", n)
	}
}

func TestStop(t *testing.T) {
	t.Parallel()
	d := queuetest.New(t, 4, queuetest.Options{})
	var c queue.Chain
	d.Add([][]byte{{1}}, nil)
	d.Add([][]byte{{1}}, nil)
	pop(t, d.Queue, &c)
	d.Queue.Stop()
	// A driver that never stops adding cannot keep a stopped worker busy.
	none(t, d.Queue)
	for range 2 {
		if err := d.Queue.Wait(); err != queue.ErrStopped {
			t.Fatalf("Wait after Stop: %v", err)
		}
	}
	d.Queue.Push(&c, 0)
	if d.UsedIdx() != 1 {
		t.Errorf("used index %d after a Push", d.UsedIdx())
	}
}

// TestWake wakes a worker that waits, and one that is about to.
func TestWake(t *testing.T) {
	t.Parallel()
	for _, eventIdx := range []bool{false, true} {
		d := queuetest.New(t, 4, queuetest.Options{EventIdx: eventIdx})
		for range 100 {
			woken := make(chan error, 1)
			go func() { woken <- d.Queue.Wait() }()
			d.Queue.Wake()
			if err := <-woken; err != nil {
				t.Fatal(err)
			}
		}
		d.Queue.Stop()
		d.Queue.Wake()
		if err := d.Queue.Wait(); !errors.Is(err, queue.ErrStopped) {
			t.Errorf("%v", err)
		}
	}
}

func TestStopWakesWait(t *testing.T) {
	t.Parallel()
	stop := map[string]func(d *queuetest.Driver){
		"Stop":  func(d *queuetest.Driver) { d.Queue.Stop() },
		"Close": func(d *queuetest.Driver) { d.Event.Close() },
	}
	for name, f := range stop {
		d := queuetest.New(t, 4, queuetest.Options{EventIdx: true})
		d.SetAvailEvent(77)
		done := make(chan error)
		go func() { done <- d.Queue.Wait() }()
		for d.AvailEvent() == 77 { // until the worker is about to sleep
			runtime.Gosched()
		}
		f(d)
		if err := <-done; err != queue.ErrStopped {
			t.Errorf("%s: Wait: %v", name, err)
		}
	}
}

func TestSetState(t *testing.T) {
	t.Parallel()
	d := queuetest.New(t, 8, queuetest.Options{EventIdx: true})
	for _, s := range []queue.State{{Avail: 9, Used: 0}, {Avail: 0, Used: 1}, {Avail: 4, Used: 65531}} {
		if err := d.Queue.SetState(s); !errors.Is(err, queue.ErrConfig) {
			t.Errorf("SetState(%+v): %v", s, err)
		}
	}
	// Two chains in flight across the wrap of the indexes.
	s := queue.State{Avail: 1, Used: 65535}
	d.SetAvailIdx(1)
	d.SetUsedIdx(65535)
	if err := d.Queue.SetState(s); err != nil {
		t.Fatal(err)
	}
	if got := d.Queue.State(); got != s {
		t.Errorf("State = %+v, want %+v", got, s)
	}
	none(t, d.Queue)
	head := d.Add([][]byte{{1}}, nil)
	var c queue.Chain
	pop(t, d.Queue, &c)
	if c.Head != head {
		t.Errorf("popped %d, want %d", c.Head, head)
	}
	if n := d.Queue.Counters().Pops; n != 1 {
		t.Errorf("%d pops", n)
	}
	if !d.Queue.ShouldNotify() {
		t.Error("no notification after SetState: one that was due before is lost")
	}
	if d.Queue.ShouldNotify() {
		t.Error("a second notification")
	}
	d.Queue.Push(&queue.Chain{Head: 7}, 0)
	d.Queue.Push(&queue.Chain{Head: 6}, 0)
	d.Queue.Push(&c, 0)
	if d.UsedIdx() != 2 {
		t.Errorf("used index %d, want 2", d.UsedIdx())
	}
}

func TestAllocs(t *testing.T) {
	for _, opts := range []queuetest.Options{{}, {EventIdx: true, Indirect: true}} {
		d := queuetest.New(t, 8, opts)
		d.Add([][]byte{{1}, {2}}, [][]byte{{3}})
		var c queue.Chain
		pop(t, d.Queue, &c)
		d.Queue.Undo()
		head := c.Head
		event := d.UsedIdx()
		n := testing.AllocsPerRun(1000, func() {
			d.SetUsedEvent(event)
			event++
			if err := d.Queue.Wait(); err != nil {
				t.Fatal(err)
			}
			pop(t, d.Queue, &c)
			d.Queue.Push(&c, 1)
			if !d.Queue.ShouldNotify() {
				t.Fatal("no notification")
			}
			if err := d.Event.Signal(); err != nil {
				t.Fatal(err)
			}
			if err := d.Event.Wait(); err != nil {
				t.Fatal(err)
			}
			d.MakeAvailable(head)
		})
		if n != 0 {
			t.Errorf("%+v: %v allocations per chain", opts, n)
		}
	}
}

func BenchmarkPopPush(b *testing.B) {
	for _, opts := range []queuetest.Options{{}, {EventIdx: true, Indirect: true}} {
		b.Run(fmt.Sprintf("event=%v,indirect=%v", opts.EventIdx, opts.Indirect), func(b *testing.B) {
			d := queuetest.New(b, 8, opts)
			head := d.Add([][]byte{{1}, {2}}, [][]byte{{3}})
			var c queue.Chain
			b.ReportAllocs()
			for b.Loop() {
				pop(b, d.Queue, &c)
				d.Queue.Push(&c, 1)
				d.Queue.ShouldNotify()
				d.MakeAvailable(head)
			}
		})
	}
}
