package vblk

import (
	"bytes"
	"slices"
	"testing"

	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// pieceSize is what a blk.Device sends to its backend at once, so that it can look whether a request has been given up: one
// chain can ask for 4 GiB, since its descriptors may all name the same memory.
const pieceSize = 4 << 20

// A request is carried out in pieces of at most pieceSize, wherever its elements end; a small one is one piece.
func TestPieces(t *testing.T) {
	t.Parallel()
	const sectors = (3*pieceSize + 512) / 512
	m := newMemory(sectors)
	dev, _ := newDevice(t, m, false, Options{})
	r := &request{}
	c := &r.chain
	for _, tc := range []struct {
		name  string
		size  int
		cuts  []int
		calls []int
	}{
		{"a piece", pieceSize, nil, []int{pieceSize}},
		{"a piece in parts", pieceSize, []int{1, 0, pieceSize - 2}, []int{pieceSize}},
		{"a sector more", pieceSize + 512, nil, []int{pieceSize, 512}},
		{"elements that end with a piece", 3 * pieceSize, []int{pieceSize, pieceSize}, []int{pieceSize, pieceSize, pieceSize}},
		{"elements that don't", 2*pieceSize + 1024, []int{3, pieceSize, 511, 0, pieceSize - 1}, []int{pieceSize, pieceSize, 1024}},
	} {
		want, status := pattern(tc.size, 7), space(1)
		clear(m.data)
		c.Readable = iov.Of(append([][]byte{header(typeOut, 1)}, cut(want, tc.cuts...)...)...)
		c.Writable = iov.Of(status)
		n := serve(dev, r)
		if calls := m.taken(); n != 1 || status[0] != statusOK || !slices.Equal(calls, tc.calls) {
			t.Errorf("%s: write: length %d, status %d, %d calls %v", tc.name, n, status[0], len(calls), calls)
		}
		if !bytes.Equal(m.data[512:][:tc.size], want) {
			t.Errorf("%s: the disk holds something else", tc.name)
		}

		room, status := space(tc.size), space(1)
		c.Readable = iov.Of(header(typeIn, 1))
		c.Writable = iov.Of(append(cut(room, tc.cuts...), status)...)
		n = serve(dev, r)
		if calls := m.taken(); int(n) != tc.size+1 || status[0] != statusOK || !slices.Equal(calls, tc.calls) {
			t.Errorf("%s: read: length %d, status %d, %d calls %v", tc.name, n, status[0], len(calls), calls)
		}
		if !bytes.Equal(room, want) {
			t.Errorf("%s: the buffer holds something else", tc.name)
		}
	}
}

// A request of several pieces that ends beyond the disk is refused as a whole.
func TestPiecesBeyondDisk(t *testing.T) {
	t.Parallel()
	m := newMemory(2 * pieceSize / 512)
	dev, disk := newDevice(t, m, false, Options{})
	r := &request{}
	data := pattern(2*pieceSize, 1)
	for i, sector := range []uint64{1, 2*pieceSize/512 - 1, 2 * pieceSize / 512, 1 << 40, 1<<64 - 1} {
		status := space(1)
		r.chain.Readable, r.chain.Writable = iov.Of(header(typeOut, sector), data), iov.Of(status)
		if serve(dev, r); status[0] != statusIOErr {
			t.Errorf("write at sector %d: status %d", sector, status[0])
		}
		r.chain.Readable, r.chain.Writable = iov.Of(header(typeIn, sector)), iov.Of(bytes.Clone(data), status)
		if serve(dev, r); status[0] != statusIOErr {
			t.Errorf("read at sector %d: status %d", sector, status[0])
		}
		if calls := m.taken(); len(calls) != 0 {
			t.Errorf("sector %d: transfers of %v bytes", sector, calls)
		}
		if s := disk.Stats(); s.Read.Errors != uint64(i+1) || s.Write.Errors != uint64(i+1) {
			t.Errorf("stats %+v after %d of each", s, i+1)
		}
	}
}

// What a guest asks for in one request does not decide how long Reset takes: of each request, only the piece under way
// ends. It asks for 508 MiB by naming the same 4 MiB again and again.
func TestResetStopsBetweenPieces(t *testing.T) {
	t.Parallel()
	const requests, elems = 4, 127
	for _, tc := range []struct {
		name string
		typ  uint32
		flag uint16
	}{
		{"read", typeIn, queuetest.FlagWrite},
		{"write", typeOut, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := &memory{void: elems * pieceSize}
			entered, release := make(chan struct{}, 2*requests*elems), make(chan struct{})
			m.hold = func(int64) {
				entered <- struct{}{}
				<-release
			}
			r := start(t, setup{memory: m})
			buf, h := r.Alloc(pieceSize, 4096), r.Alloc(16, 16)
			copy(r.Bytes(h, 16), header(tc.typ, 0))
			var status [requests][]byte
			for i := range status {
				table := []queuetest.Desc{{Addr: h, Len: 16, Flags: queuetest.FlagNext, Next: 1}}
				for j := range uint16(elems) {
					table = append(table, queuetest.Desc{
						Addr: buf, Len: pieceSize, Flags: tc.flag | queuetest.FlagNext, Next: j + 2,
					})
				}
				s := r.Alloc(1, 1)
				status[i] = r.Bytes(s, 1)
				status[i][0] = unset
				r.SetDesc(uint16(i), r.Table(append(table, queuetest.Desc{Addr: s, Len: 1, Flags: queuetest.FlagWrite})...))
				r.MakeAvailable(uint16(i))
			}
			r.Kick()
			for range requests {
				<-entered
			}
			r.resetHeld(release)
			if calls := m.taken(); !slices.Equal(calls, []int{pieceSize, pieceSize, pieceSize, pieceSize}) {
				t.Errorf("%d transfers: %v", len(calls), calls)
			}
			if n := r.UsedIdx(); n != requests {
				t.Errorf("%d requests returned", n)
			}
			for i := range status {
				if _, written := r.UsedElem(uint16(i)); written != 1 || status[i][0] != statusIOErr {
					t.Errorf("request %d: %d bytes written, status %d", i, written, status[i][0])
				}
			}

			// The reset is forgotten with the next activation.
			tr := queuetest.Start(t, r.dev, ^virtio.Features(0), queuetest.Options{Len: 32 << 20})
			room, s := space(2*pieceSize), space(1)
			written := tr.Drivers[0].Do([][]byte{header(typeIn, 0)}, [][]byte{room, s})
			if written != 2*pieceSize+1 || s[0] != statusOK {
				t.Errorf("after the reset: %d bytes written, status %d", written, s[0])
			}
		})
	}
}

func TestPiecesDoNotAllocate(t *testing.T) {
	m := newMemory((2*pieceSize + 512) / 512)
	m.sizes = make([]int, 0, 1000)
	dev, _ := newDevice(t, m, false, Options{})
	data, status, in, out := space(2*pieceSize+512), space(1), header(typeIn, 0), header(typeOut, 0)
	r := &request{chain: queue.Chain{Readable: make(iov.Vec, 0, 4), Writable: make(iov.Vec, 0, 4)}}
	c := &r.chain
	for _, write := range []bool{false, true} {
		n := testing.AllocsPerRun(20, func() {
			c.Readable, c.Writable = c.Readable[:0], c.Writable[:0]
			if write {
				c.Readable = c.Readable.Append(out).Append(data[:777]).Append(data[777:])
			} else {
				c.Readable = c.Readable.Append(in)
				c.Writable = c.Writable.Append(data[:777]).Append(data[777:])
			}
			c.Writable = c.Writable.Append(status)
			serve(dev, r)
		})
		if n != 0 && !hosttest.Race || status[0] != statusOK {
			t.Errorf("write %v: %v allocations, status %d", write, n, status[0])
		}
	}
	if n := len(m.taken()); n != 2*21*3 {
		t.Errorf("%d transfers", n)
	}
}
