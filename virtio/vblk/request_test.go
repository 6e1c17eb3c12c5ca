package vblk

import (
	"bytes"
	"math"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

var ringModes = map[string]virtio.Features{ // what the driver leaves out
	"plain":                  virtio.RingIndirectDesc | virtio.RingEventIdx,
	"indirect":               virtio.RingEventIdx,
	"event-idx":              virtio.RingIndirectDesc,
	"indirect and event-idx": 0,
}

// Header, data and status may be cut into descriptors in any way (virtio 1.2, 2.7.4).
func TestAnyFraming(t *testing.T) {
	t.Parallel()
	everyByte := slices.Repeat([]int{1}, 15)
	for mode, without := range ringModes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			r := start(t, setup{without: without})
			for i, f := range []struct {
				name    string
				out, in []int // lengths of the first descriptors of a write's readable and a read's writable part
			}{
				{"three descriptors", []int{16}, []int{1024}},
				{"all in one each", nil, nil},
				{"header in two halves", []int{8, 8}, []int{1024}},
				{"header byte by byte", everyByte, []int{1024}},
				{"header and first byte of data", []int{17}, []int{1024}},
				{"header and all but a byte of data", []int{16 + 1023}, []int{1}},
				{"data in odd pieces", []int{16, 1, 510, 3, 7}, []int{1, 510, 3, 7}},
				{"last byte of data with the status", []int{16}, []int{1023}},
				{"data in sectors", []int{16, 512}, []int{512}},
			} {
				want, sector := pattern(1024, i), uint64(i*2)
				status := space(1)
				written := r.Do(cut(append(header(1, sector), want...), f.out...), [][]byte{status})
				if status[0] != 0 || written != 1 {
					t.Errorf("%s: write: status %d, %d bytes written", f.name, status[0], written)
				}
				if !bytes.Equal(r.memory.snapshot()[sector*512:][:1024], want) {
					t.Errorf("%s: the disk holds something else", f.name)
				}

				room := space(1025)
				head := header(0, sector)
				written = r.Do(cut(head, slices.DeleteFunc(slices.Clone(f.out), func(n int) bool { return n >= 16 })...),
					cut(room, f.in...))
				if room[1024] != 0 || written != 1025 || !bytes.Equal(room[:1024], want) {
					t.Errorf("%s: read: status %d, %d bytes written", f.name, room[1024], written)
				}
			}
			if c := r.dev.Counters(); c != (Counters{}) {
				t.Errorf("counters %+v", c)
			}
		})
	}
}

func TestRequests(t *testing.T) {
	t.Parallel()
	const (
		in, out, flush, getID = 0, 1, 4, 8
		ok, ioerr, unsupp     = 0, 1, 2
		last                  = 63 // sector
	)
	for _, tc := range []struct {
		name      string
		typ       uint32
		sector    uint64
		data      int // bytes after the header
		room      int // bytes before the status
		status    byte
		written   uint32
		malformed bool
	}{
		{name: "read", typ: in, room: 512, status: ok, written: 513},
		{name: "read everything", typ: in, room: 64 * 512, status: ok, written: 64*512 + 1},
		{name: "read the last sector", typ: in, sector: last, room: 512, status: ok, written: 513},
		{name: "read nothing", typ: in, status: ok, written: 1},
		{name: "read nothing at the end", typ: in, sector: 64, status: ok, written: 1},
		{name: "read nothing beyond the end", typ: in, sector: 65, status: ioerr, written: 1},
		{name: "read beyond the end", typ: in, sector: 64, room: 512, status: ioerr, written: 1},
		{name: "read across the end", typ: in, sector: last, room: 1024, status: ioerr, written: 1},
		{name: "read more than everything", typ: in, room: 65 * 512, status: ioerr, written: 1},
		{name: "read where the byte offset overflows", typ: in, sector: 1 << 55, room: 512, status: ioerr, written: 1},
		{name: "read where the byte offset is negative", typ: in, sector: 1 << 54, room: 512, status: ioerr, written: 1},
		{name: "read at the last sector of all", typ: in, sector: math.MaxUint64, room: 512, status: ioerr, written: 1},
		{name: "read one byte", typ: in, room: 1, status: ioerr, written: 1, malformed: true},
		{name: "read 511 bytes", typ: in, room: 511, status: ioerr, written: 1, malformed: true},
		{name: "read 513 bytes", typ: in, room: 513, status: ioerr, written: 1, malformed: true},
		{name: "read into a readable buffer", typ: in, data: 512, status: ioerr, written: 1, malformed: true},
		{name: "read with a payload", typ: in, data: 512, room: 512, status: ioerr, written: 1, malformed: true},

		{name: "write", typ: out, data: 512, status: ok, written: 1},
		{name: "write everything", typ: out, data: 64 * 512, status: ok, written: 1},
		{name: "write the last sector", typ: out, sector: last, data: 512, status: ok, written: 1},
		{name: "write nothing", typ: out, status: ok, written: 1},
		{name: "write beyond the end", typ: out, sector: 64, data: 512, status: ioerr, written: 1},
		{name: "write across the end", typ: out, sector: last, data: 1024, status: ioerr, written: 1},
		{name: "write where the byte offset overflows", typ: out, sector: 1 << 55, data: 512, status: ioerr, written: 1},
		{name: "write one byte", typ: out, data: 1, status: ioerr, written: 1, malformed: true},
		{name: "write 513 bytes", typ: out, data: 513, status: ioerr, written: 1, malformed: true},
		{name: "write from a writable buffer", typ: out, room: 512, status: ioerr, written: 1, malformed: true},
		{name: "write with room for an answer", typ: out, data: 512, room: 512, status: ioerr, written: 1, malformed: true},

		{name: "flush", typ: flush, status: ok, written: 1},
		{name: "flush with a sector", typ: flush, sector: 12345, status: ok, written: 1},
		{name: "flush with data", typ: flush, data: 512, status: ok, written: 1},

		{name: "get the ID", typ: getID, room: 20, status: ok, written: 21},
		{name: "get the ID into more room", typ: getID, room: 64, status: ok, written: 21},
		{name: "get the ID into too little room", typ: getID, room: 19, status: ioerr, written: 1, malformed: true},
		{name: "get the ID into no room", typ: getID, status: ioerr, written: 1, malformed: true},

		{name: "SCSI command", typ: 2, room: 512, status: unsupp, written: 1},
		{name: "barrier bit", typ: 1 << 31, room: 512, status: unsupp, written: 1},
		{name: "secure erase, which is not offered", typ: 14, data: 16, status: unsupp, written: 1},
		{name: "type with a high bit", typ: 1 << 8, room: 512, status: unsupp, written: 1},
		{name: "last type of all", typ: math.MaxUint32, room: 512, status: unsupp, written: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := newMemory(64)
			copy(m.data, pattern(len(m.data), 7))
			before := m.snapshot()
			r := start(t, setup{memory: m, Options: Options{ID: "disk-0"}})

			if tc.typ == flush { // there is something to flush
				if _, err := r.disk.WriteVecAt(iov.Of(before[:512]), 0); err != nil {
					t.Fatal(err)
				}
			}
			data, room := pattern(tc.data, 99), space(tc.room)
			status, written := r.request(tc.typ, tc.sector, data, room)
			if status != tc.status || written != tc.written {
				t.Errorf("status %d, %d bytes written; want %d and %d", status, written, tc.status, tc.written)
			}

			// What should be in the buffer and on the disk.
			wantRoom, wantDisk := space(tc.room), before
			if status == ok {
				switch tc.typ {
				case in:
					copy(wantRoom, before[tc.sector*512:])
				case out:
					copy(wantDisk[tc.sector*512:], data)
				case getID:
					copy(wantRoom, "disk-0\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
				}
			}
			if !bytes.Equal(room, wantRoom) {
				t.Error("the buffer holds something else")
			}
			if !bytes.Equal(m.snapshot(), wantDisk) {
				t.Error("the disk holds something else")
			}
			flushed := 0
			if tc.typ == flush {
				flushed = 1
			}
			if m.flushed() != flushed {
				t.Errorf("%d flushes", m.flushed())
			}

			want := Counters{}
			if tc.malformed {
				want.Malformed = 1
			}
			if tc.status == unsupp {
				want.Unsupported = 1
			}
			if c := r.dev.Counters(); c != want {
				t.Errorf("counters %+v, want %+v", c, want)
			}
			r.alive()
		})
	}
}

// A chain that no status fits into comes back with length 0, one with a short header gets an error; neither is lost,
// and the queue goes on.
func TestIncompleteRequests(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name               string
		readable, writable int
		written            uint32
	}{
		{"header only", 16, 0, 0},
		{"header and readable status", 17, 0, 0},
		{"write without a status", 16 + 512, 0, 0},
		{"short header without a status", 4, 0, 0},
		{"status only", 0, 1, 1},
		{"writable header", 0, 16 + 512 + 1, 1},
		{"header of one byte", 1, 513, 1},
		{"header of fifteen bytes", 15, 513, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := start(t, setup{Options: Options{QueueSize: 4}})
			for range 20 { // more than the queue holds
				var readable, writable [][]byte
				if tc.readable > 0 {
					readable = [][]byte{make([]byte, tc.readable)}
				}
				room := space(tc.writable)
				if tc.writable > 0 {
					writable = [][]byte{room}
				}
				if written := r.Do(readable, writable); written != tc.written {
					t.Fatalf("%d bytes written, want %d", written, tc.written)
				}
				want := space(tc.writable)
				if tc.writable > 0 {
					want[tc.writable-1] = 1
				}
				if !bytes.Equal(room, want) {
					t.Fatal("the device wrote more than a status of 1")
				}
			}
			if c := r.dev.Counters(); c != (Counters{Malformed: 20}) {
				t.Errorf("counters %+v", c)
			}
			if n := r.memory.reads.Load(); n != 0 {
				t.Errorf("%d reads reached the disk", n)
			}
			r.alive()
		})
	}
}

func TestReadOnlyDisk(t *testing.T) {
	t.Parallel()
	m := newMemory(64)
	copy(m.data, pattern(len(m.data), 3))
	before := m.snapshot()
	// The bit need not be negotiated to be in force (virtio 1.2, 5.2.6.2).
	for _, without := range []virtio.Features{0, FeatureReadOnly} {
		r := start(t, setup{memory: m, readOnly: true, without: without})
		if status, written := r.request(1, 0, pattern(512, 9), nil); status != 1 || written != 1 {
			t.Errorf("write: status %d, %d bytes written", status, written)
		}
		if status, _ := r.request(4, 0, nil, nil); status != 0 {
			t.Errorf("flush: status %d", status)
		}
		r.alive()
	}
	if !bytes.Equal(m.snapshot(), before) || m.flushed() != 0 {
		t.Error("the disk was written")
	}
}

func TestMediumErrors(t *testing.T) {
	t.Parallel()
	r := start(t, setup{})
	r.memory.fail.Store(true)
	if status, written := r.request(0, 0, nil, space(512)); status != 1 || written != 1 {
		t.Errorf("read: status %d, %d bytes written", status, written)
	}
	if status, written := r.request(1, 0, pattern(512, 0), nil); status != 1 || written != 1 {
		t.Errorf("write: status %d, %d bytes written", status, written)
	}
	if status, written := r.request(4, 0, nil, nil); status != 1 || written != 1 {
		t.Errorf("flush: status %d, %d bytes written", status, written)
	}
	s := r.disk.Stats()
	if s.Read.Errors != 1 || s.Write.Errors != 1 || s.Flush.Errors != 1 || s.LastError != errMedium {
		t.Errorf("stats %+v", s)
	}
	r.memory.fail.Store(false)
	r.alive()
}

// Without flushes a completed write is a stable one (virtio 1.2, 5.2.6.2).
func TestWritethrough(t *testing.T) {
	t.Parallel()
	back := start(t, setup{})
	through := start(t, setup{without: FeatureFlush})
	for _, r := range []*rig{back, through} {
		for i := range 3 {
			if status, _ := r.request(1, uint64(i), pattern(512, i), nil); status != 0 {
				t.Errorf("write: status %d", status)
			}
		}
		r.alive()
	}
	if n := back.memory.flushed(); n != 0 {
		t.Errorf("with flushes negotiated: %d flushes after writes", n)
	}
	if n := through.memory.flushed(); n != 3 {
		t.Errorf("without: %d flushes after 3 writes", n)
	}
}

func TestFullID(t *testing.T) {
	t.Parallel()
	const id = "0123456789abcdefghij"
	r := start(t, setup{Options: Options{ID: id}})
	room := space(20)
	r.Do(cut(header(8, 0), 3), append(cut(room, 1, 18), space(1)))
	if string(room) != id {
		t.Errorf("ID %q", room)
	}
}

// A driver may exceed seg_max through an indirect table; what the queue carries, the device serves.
func TestMoreSegmentsThanSegMax(t *testing.T) {
	t.Parallel()
	m := newMemory(2048)
	copy(m.data, pattern(len(m.data), 5))
	r := start(t, setup{memory: m, Options: Options{QueueSize: 128}})
	const segments = 900
	room := space(segments * 512)
	pieces := make([]int, segments)
	for i := range pieces {
		pieces[i] = 512
	}
	status := space(1)
	written := r.Do([][]byte{header(0, 3)}, append(cut(room, pieces...), status))
	if status[0] != 0 || written != segments*512+1 || !bytes.Equal(room, m.data[3*512:][:len(room)]) {
		t.Errorf("status %d, %d bytes written", status[0], written)
	}
}

// A transfer whose length the used ring can't express is refused before anything is read.
func TestLengthBeyondUsedRing(t *testing.T) {
	t.Parallel()
	m := newMemory(1)
	dev, _ := newDevice(t, m, false, Options{})
	page := make([]byte, 64<<20)
	r := new(request)
	c := &r.chain
	c.Readable = iov.Of(header(0, 0))
	for range 64 {
		c.Writable = c.Writable.Append(page)
	}
	status := space(1)
	c.Writable = c.Writable.Append(status)
	if n := serve(dev, r); n != 1 || status[0] != 1 || m.reads.Load() != 0 {
		t.Errorf("%d bytes written, status %d, %d reads", n, status[0], m.reads.Load())
	}
}

// A guest that aims all parts of a request at the same bytes harms itself only.
func TestOverlappingBuffers(t *testing.T) {
	t.Parallel()
	m := newMemory(64)
	copy(m.data[512:], pattern(1024, 1))
	r := start(t, setup{memory: m})
	addr := r.Alloc(1024, 16)
	copy(r.Bytes(addr, 1024), header(0, 1))
	r.SetDesc(0, queuetest.Desc{Addr: addr, Len: 16, Flags: queuetest.FlagNext, Next: 1})
	r.SetDesc(1, queuetest.Desc{Addr: addr, Len: 1024, Flags: queuetest.FlagNext | queuetest.FlagWrite, Next: 2})
	r.SetDesc(2, queuetest.Desc{Addr: addr + 512, Len: 1, Flags: queuetest.FlagWrite})
	want := pattern(1024, 1)
	want[512] = 0 // the status is written last

	r.MakeAvailable(0)
	r.Kick()
	r.awaitUsed(1)
	if id, written := r.UsedElem(0); id != 0 || written != 1025 {
		t.Errorf("chain %d, %d bytes written", id, written)
	}
	if !bytes.Equal(r.Bytes(addr, 1024), want) {
		t.Error("the buffer holds something else")
	}
}

func TestServeDoesNotAllocate(t *testing.T) {
	m := newMemory(64)
	dev, _ := newDevice(t, m, false, Options{})
	room, data, status, hdr := space(4096), pattern(4096, 0), space(1), [][]byte{
		header(0, 8), header(1, 8), header(4, 0), header(8, 0), header(77, 0), header(0, 64),
	}
	r := &request{chain: queue.Chain{Readable: make(iov.Vec, 0, 4), Writable: make(iov.Vec, 0, 4)}}
	c := &r.chain
	for i, h := range hdr {
		n := testing.AllocsPerRun(100, func() {
			c.Readable = c.Readable[:0].Append(h)
			c.Writable = c.Writable[:0]
			switch i {
			case 1:
				c.Readable = c.Readable.Append(data)
			case 0, 3, 5:
				c.Writable = c.Writable.Append(room[:2048]).Append(room[2048:])
			}
			c.Writable = c.Writable.Append(status)
			serve(dev, r)
		})
		if n != 0 {
			t.Errorf("request %d: %v allocations, status %d", i, n, status[0])
		}
	}
	if s := dev.disk.Stats(); s == (blk.Stats{}) {
		t.Error("nothing was served")
	}
}

// TestDirty has a dirty log see what a request changed in guest memory: for one that fails too.
func TestDirty(t *testing.T) {
	t.Parallel()
	r := start(t, setup{})
	log := r.Mem.EnableDirty()
	defer log.Close()
	const page = 4096
	head, buf := r.Alloc(16, 16), r.Alloc(8*page, page)
	used := r.Config.Device
	event := used + 4 + 8*uint64(r.Config.Size)
	for _, tc := range []struct {
		name   string
		typ    uint32
		fail   bool
		status byte
		want   []uint64
	}{
		{"read", typeIn, false, statusOK, []uint64{0, 1, 2, 3, 7}},
		{"failed read", typeIn, true, statusIOErr, []uint64{0, 1, 2, 3, 7}},
		{"identify", typeGetID, false, statusOK, []uint64{0, 1, 2, 3, 7}}, // more room than there is ID
		{"unknown", 99, false, statusUnsupp, []uint64{0, 1, 2, 3, 7}},
	} {
		r.memory.fail.Store(tc.fail)
		copy(r.Bytes(head, 16), header(tc.typ, 0))
		r.SetDesc(0, queuetest.Desc{Addr: head, Len: 16, Flags: queuetest.FlagNext, Next: 1})
		r.SetDesc(1, queuetest.Desc{Addr: buf, Len: 4 * page, Flags: queuetest.FlagWrite | queuetest.FlagNext, Next: 2})
		r.SetDesc(2, queuetest.Desc{Addr: buf + 8*page - 1, Len: 1, Flags: queuetest.FlagWrite})
		before := r.UsedIdx()
		r.MakeAvailable(0)
		r.Kick()
		r.awaitUsed(before + 1)
		if s := r.Bytes(buf+8*page-1, 1)[0]; s != tc.status {
			t.Errorf("%s: status %d, want %d", tc.name, s, tc.status)
		}
		want := []uint64{used}
		for _, p := range tc.want {
			want = append(want, buf+p*page)
		}
		// The worker marks after it has published; and one that goes to sleep again writes avail_event when it likes.
		want = queuetest.Pages(append(want, event)...)
		var got []uint64
		for deadline := time.Now().Add(queuetest.Timeout); !slices.Equal(got, want); runtime.Gosched() {
			got = queuetest.Pages(append(got, queuetest.Dirty(t, r.Mem, log)...)...)
			if time.Now().After(deadline) {
				t.Fatalf("%s: pages %#x, want %#x", tc.name, got, want)
			}
		}
	}
}
