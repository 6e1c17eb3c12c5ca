package queue_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

const (
	next     = queuetest.FlagNext
	write    = queuetest.FlagWrite
	indirect = queuetest.FlagIndirect
)

type desc = queuetest.Desc

// smallLen is the guest memory of the malformed queues: small enough to be a fuzzing seed.
const smallLen = 16 << 10

// buf is the address of a buffer in it that no ring overlaps.
const buf = 0x2000

// malformed lists what a driver must not do, on a queue of 8 entries with indirect descriptors unless plain is set.
var malformed = []struct {
	name  string
	plain bool
	build func(d *queuetest.Driver)
	want  string // part of the error
}{
	{name: "head outside the table", build: func(d *queuetest.Driver) {
		d.MakeAvailable(8)
	}, want: "outside its table of 8"},
	{name: "next outside the table", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: buf, Len: 1, Flags: next, Next: 8})
		d.MakeAvailable(0)
	}, want: "outside its table of 8"},
	{name: "descriptor that follows itself", build: func(d *queuetest.Driver) {
		d.SetDesc(3, desc{Addr: buf, Len: 1, Flags: next, Next: 3})
		d.MakeAvailable(3)
	}, want: "looped"},
	{name: "looped chain", build: func(d *queuetest.Driver) {
		for i := range uint16(8) {
			d.SetDesc(i, desc{Addr: buf, Len: 1, Flags: next, Next: (i + 1) % 8})
		}
		d.MakeAvailable(0)
	}, want: "looped"},
	{name: "looped indirect table", build: func(d *queuetest.Driver) {
		d.SetDesc(0, d.Table(
			desc{Addr: buf, Len: 1, Flags: next, Next: 1},
			desc{Addr: buf, Len: 1, Flags: next, Next: 0}))
		d.MakeAvailable(0)
	}, want: "looped"},
	{name: "readable after writable", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: buf, Len: 1, Flags: next | write, Next: 1})
		d.SetDesc(1, desc{Addr: buf, Len: 1})
		d.MakeAvailable(0)
	}, want: "readable after a writable one"},
	{name: "readable after writable in a table", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: buf, Len: 1, Flags: next | write, Next: 1})
		d.SetDesc(1, d.Table(desc{Addr: buf, Len: 1}))
		d.MakeAvailable(0)
	}, want: "readable after a writable one"},
	{name: "address beyond RAM", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: 1 << 40, Len: 1})
		d.MakeAvailable(0)
	}},
	{name: "buffer across the end of RAM", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: smallLen - 1, Len: 2, Flags: write})
		d.MakeAvailable(0)
	}},
	{name: "address and length overflow", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: 1<<64 - 1, Len: 2})
		d.MakeAvailable(0)
	}},
	{name: "address in the hole below 4 GiB", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: 0xFEE0_0000, Len: 4, Flags: write})
		d.MakeAvailable(0)
	}},
	{name: "length with the sign bit", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: buf, Len: 1 << 31})
		d.MakeAvailable(0)
	}},
	{name: "zero length", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: buf, Len: 0})
		d.MakeAvailable(0)
	}, want: "length zero"},
	{name: "zero length at the end", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: buf, Len: 8, Flags: next, Next: 1})
		d.SetDesc(1, desc{Addr: buf, Len: 0, Flags: write})
		d.MakeAvailable(0)
	}, want: "length zero"},
	{name: "indirect not negotiated", plain: true, build: func(d *queuetest.Driver) {
		d.SetDesc(0, d.Table(desc{Addr: buf, Len: 1}))
		d.MakeAvailable(0)
	}, want: "not negotiated"},
	{name: "indirect and next", build: func(d *queuetest.Driver) {
		t := d.Table(desc{Addr: buf, Len: 1})
		t.Flags |= next
		t.Next = 1
		d.SetDesc(0, t)
		d.SetDesc(1, desc{Addr: buf, Len: 1})
		d.MakeAvailable(0)
	}, want: "both indirect and followed"},
	{name: "nested indirect", build: func(d *queuetest.Driver) {
		inner := d.Table(desc{Addr: buf, Len: 1})
		d.SetDesc(0, d.Table(desc{Addr: buf, Len: 1, Flags: next, Next: 1}, inner))
		d.MakeAvailable(0)
	}, want: "within an indirect table"},
	{name: "table that refers to itself", build: func(d *queuetest.Driver) {
		t := d.Table(desc{})
		t.Store(d.Bytes(t.Addr, queuetest.DescSize), 0)
		d.SetDesc(0, t)
		d.MakeAvailable(0)
	}, want: "within an indirect table"},
	{name: "empty table", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: buf, Len: 0, Flags: indirect})
		d.MakeAvailable(0)
	}, want: "indirect table of 0 bytes"},
	{name: "table length not a multiple of 16", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: buf, Len: 24, Flags: indirect})
		d.MakeAvailable(0)
	}, want: "indirect table of 24 bytes"},
	{name: "table too long", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: buf, Len: 16 * 1025, Flags: indirect})
		d.MakeAvailable(0)
	}, want: "1025 descriptors"},
	{name: "table of 4 GiB", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: 0, Len: 0xFFFF_FFF0, Flags: indirect})
		d.MakeAvailable(0)
	}, want: "descriptors, at most"},
	{name: "table beyond RAM", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: 1 << 40, Len: 16, Flags: indirect})
		d.MakeAvailable(0)
	}, want: "indirect table"},
	{name: "table across the end of RAM", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: smallLen - 16, Len: 32, Flags: indirect})
		d.MakeAvailable(0)
	}, want: "indirect table"},
	{name: "next outside the indirect table", build: func(d *queuetest.Driver) {
		d.SetDesc(0, d.Table(desc{Addr: buf, Len: 1, Flags: next, Next: 1}))
		d.MakeAvailable(0)
	}, want: "outside its table of 1"},
	{name: "available index ahead by more than the size", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: buf, Len: 1})
		d.SetAvailIdx(9)
	}, want: "9 ahead"},
	{name: "available index going backwards", build: func(d *queuetest.Driver) {
		d.SetDesc(0, desc{Addr: buf, Len: 1})
		d.SetAvailIdx(0xFFFF)
	}, want: "65535 ahead"},
}

// malformedQueue builds one of them.
func malformedQueue(tb testing.TB, i int) *queuetest.Driver {
	d := queuetest.New(tb, 8, queuetest.Options{Indirect: !malformed[i].plain, Len: smallLen})
	malformed[i].build(d)
	return d
}

func TestMalformed(t *testing.T) {
	t.Parallel()
	for i, tc := range malformed {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			d := malformedQueue(t, i)
			q := d.Queue
			if err := q.Wait(); err != nil {
				t.Fatalf("Wait: %v", err)
			}
			var c queue.Chain
			ok, err := q.Pop(&c)
			if ok || !errors.Is(err, queue.ErrBadChain) || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("Pop = %v, %v; want ErrBadChain with %q", ok, err, tc.want)
			}
			if len(c.Readable) != 0 || len(c.Writable) != 0 {
				t.Errorf("the chain of a failed Pop has %d and %d ranges", len(c.Readable), len(c.Writable))
			}
			// The queue stays broken, so that a worker cannot spin on it.
			if _, again := q.Pop(&c); again != err {
				t.Errorf("second Pop: %v", again)
			}
			if again := q.Wait(); again != err {
				t.Errorf("Wait: %v", again)
			}
			if d.UsedIdx() != 0 || q.Counters().Pops != 0 {
				t.Errorf("used index %d, %+v", d.UsedIdx(), q.Counters())
			}
		})
	}
}

// TestChainOf4GiB repeats a buffer until the chain is longer than a used element can say.
func TestChainOf4GiB(t *testing.T) {
	t.Parallel()
	const n, length = 257, 16 << 20
	d := queuetest.New(t, 512, queuetest.Options{Len: 2 * length})
	addr := d.Alloc(length, 4096)
	for i := range uint16(n) {
		d.SetDesc(i, desc{Addr: addr, Len: length, Flags: next | write, Next: i + 1})
	}
	d.SetDesc(n-1, desc{Addr: addr, Len: 1, Flags: write})
	d.MakeAvailable(0)
	var c queue.Chain
	if _, err := d.Queue.Pop(&c); !errors.Is(err, queue.ErrBadChain) || !strings.Contains(err.Error(), "4 GiB") {
		t.Fatalf("Pop: %v", err)
	}
}

// TestTooManyInFlight makes one chain available again and again before it comes back: what is in flight stays bounded
// by the size of the queue.
func TestTooManyInFlight(t *testing.T) {
	t.Parallel()
	d := queuetest.New(t, 4, queuetest.Options{})
	d.SetDesc(0, desc{Addr: buf, Len: 1})
	var c queue.Chain
	for i := range 4 {
		d.MakeAvailable(0)
		if ok, err := d.Queue.Pop(&c); !ok || err != nil {
			t.Fatalf("Pop %d = %v, %v", i, ok, err)
		}
	}
	d.MakeAvailable(0)
	if _, err := d.Queue.Pop(&c); !errors.Is(err, queue.ErrBadChain) {
		t.Fatalf("Pop beyond the size: %v", err)
	}
}
