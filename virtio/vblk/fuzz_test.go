package vblk

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/kvmlet/kvmlet/iov"
)

// FuzzRequest serves any bytes as a request, cut into any descriptors, and compares status, length, buffers and disk
// with what a plain reading of the specification says.
func FuzzRequest(f *testing.F) {
	const sectors = 8
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for _, seed := range []struct {
		readable []byte
		writable uint16
		cuts     []byte
	}{
		{header(0, 0), 513, nil},                                               // read
		{header(0, 7), 513, []byte{8, 1, 2, 3}},                                // read the last sector, in pieces
		{header(0, 7), 1025, nil},                                              // across the end
		{header(0, 1<<55), 513, nil},                                           // overflow
		{header(0, 0), 512, nil},                                               // no room for the status
		{header(0, 0), 1, nil},                                                 // nothing
		{cat(header(0, 0), pattern(512, 1)), 513, nil},                         // a read with a payload
		{cat(header(1, 3), pattern(1024, 2)), 1, []byte{15, 2, 1}},             // write
		{cat(header(1, 7), pattern(1024, 2)), 1, nil},                          // across the end
		{cat(header(1, 0), pattern(513, 2)), 1, nil},                           // half a sector
		{cat(header(1, 0), pattern(512, 2)), 0, nil},                           // no status
		{header(1, 0), 513, nil},                                               // a write from a writable buffer
		{header(4, 0), 1, nil},                                                 // flush
		{header(8, 0), 21, []byte{20}},                                         // ID
		{header(8, 0), 10, nil},                                                // too little room for it
		{header(2, 0), 513, nil},                                               // SCSI
		{header(11, 0), 1, nil},                                                // a discard of nothing
		{cat(header(11, 0), ranges(0, 1, 0, 7, 1, 0)), 1, nil},                 // discard the first and the last sector
		{cat(header(11, 0), ranges(0, 1, 1)), 1, nil},                          // with unmap
		{cat(header(13, 0), ranges(2, 3, 1)), 1, []byte{16, 3, 9}},             // zeroes, in pieces
		{cat(header(13, 0), ranges(0, 1, 2)), 1, nil},                          // an unknown flag
		{cat(header(13, 0), ranges(7, 1, 0, 7, 2, 0)), 1, nil},                 // the second across the end
		{cat(header(13, 0), ranges(1<<55, 1, 0)), 1, nil},                      // overflow
		{cat(header(13, 0), ranges(0, 1<<32-1, 0)), 1, nil},                    // too many sectors
		{cat(header(13, 0), ranges(8, 0, 0)), 1, nil},                          // nothing at the end
		{cat(header(13, 0), ranges(0, 1, 0)[:15]), 1, nil},                     // cut short
		{cat(header(13, 0), ranges(0, 1, 0)), 17, nil},                         // with room for an answer
		{cat(header(13, 0), make([]byte, 65*16)), 1, nil},                      // too many ranges
		{header(1<<31, 0), 1, nil},                                             // barrier
		{header(0, 0)[:15], 513, nil},                                          // short header
		{nil, 1, nil},                                                          // no header
		{nil, 0, nil},                                                          // nothing at all
		{cat(header(1, 0), pattern(8*512, 3)), 1, bytes.Repeat([]byte{1}, 64)}, // everything, byte by byte at first
	} {
		f.Add(seed.readable, seed.writable, seed.cuts, false, false)
		f.Add(seed.readable, seed.writable, seed.cuts, true, true)
	}

	f.Fuzz(func(t *testing.T, readable []byte, writable uint16, cuts []byte, readOnly, through bool) {
		m := newMemory(sectors)
		copy(m.data, pattern(len(m.data), 11))
		dev, _ := newDevice(t, m, readOnly, Options{ID: "fuzz"})
		dev.writeback.Store(!through)
		before, room := m.snapshot(), space(int(writable))
		if !readOnly { // so that there is something to flush
			if _, err := dev.disk.WriteVecAt(iov.Of(before[:512]), 0); err != nil {
				t.Fatal(err)
			}
		}

		r := new(request)
		r.chain.Readable, cuts = cutVec(bytes.Clone(readable), cuts)
		r.chain.Writable, _ = cutVec(room, cuts)
		written := serve(dev, r)

		want := expect(readable, int(writable), before, readOnly)
		if written != want.written || !bytes.Equal(room, want.room) {
			t.Errorf("%d bytes written, want %d; buffer as wanted: %v", written, want.written, bytes.Equal(room, want.room))
		}
		if !bytes.Equal(m.snapshot(), want.disk) {
			t.Error("the disk holds something else")
		}
		flushes := 0
		if want.flush {
			flushes = 1
		} else if through {
			flushes = want.writes
		}
		if m.flushed() != flushes {
			t.Errorf("%d flushes, want %d", m.flushed(), flushes)
		}
	})
}

// cutVec describes b in pieces of the given lengths, zero included, and the rest in one. It returns the lengths that it
// did not need.
func cutVec(b, lengths []byte) (iov.Vec, []byte) {
	var v iov.Vec
	for len(lengths) > 0 && len(b) > 0 {
		n := min(int(lengths[0]), len(b))
		v, b, lengths = v.Append(b[:n]), b[n:], lengths[1:]
	}
	return v.Append(b), lengths
}

type outcome struct {
	written    uint32
	room, disk []byte
	flush      bool
	writes     int // to the disk
}

// expect is a second implementation of requests, on flat buffers.
func expect(readable []byte, writable int, disk []byte, readOnly bool) outcome {
	o := outcome{room: space(writable), disk: bytes.Clone(disk)}
	if writable == 0 {
		return o
	}
	status, room := &o.room[writable-1], o.room[:writable-1]
	*status, o.written = 1, 1
	if len(readable) < 16 {
		return o
	}
	typ, sector := binary.LittleEndian.Uint32(readable), binary.LittleEndian.Uint64(readable[8:])
	data := readable[16:]
	sectors := uint64(len(disk)) / 512
	fits := func(n int) bool {
		return n%512 == 0 && sector <= sectors && uint64(n)/512 <= sectors-sector
	}
	switch typ {
	case 0:
		if len(data) == 0 && fits(len(room)) {
			copy(room, disk[sector*512:])
			*status, o.written = 0, uint32(len(room)+1)
		}
	case 1:
		if len(room) == 0 && fits(len(data)) && !readOnly {
			copy(o.disk[sector*512:], data)
			*status = 0
			if len(data) > 0 {
				o.writes = 1
			}
		}
	case 4:
		*status, o.flush = 0, !readOnly
	case 8:
		if len(room) >= 20 {
			copy(room, append([]byte("fuzz"), make([]byte, 16)...))
			*status, o.written = 0, 21
		}
	case 11, 13:
		if len(data) == 0 || len(data)%16 != 0 || len(data) > 64*16 || len(room) != 0 {
			return o
		}
		bad := false
		for p := data; len(p) > 0; p = p[16:] {
			at, n, flags := binary.LittleEndian.Uint64(p), uint64(binary.LittleEndian.Uint32(p[8:])), p[12:16]
			if flags[0]&^1|flags[1]|flags[2]|flags[3] != 0 || typ == 11 && flags[0] != 0 {
				*status = 2
				return o
			}
			bad = bad || at > sectors || n > sectors-at
		}
		if bad || readOnly {
			return o
		}
		for p := data; len(p) > 0; p = p[16:] {
			at, n := binary.LittleEndian.Uint64(p), uint64(binary.LittleEndian.Uint32(p[8:]))
			for i := at * 512; i < (at+n)*512; i++ {
				o.disk[i] = 0
				if typ == 11 {
					o.disk[i] = 0xdd
				}
			}
			if typ == 13 && n > 0 {
				o.writes++
			}
		}
		*status = 0
	default:
		*status = 2
	}
	return o
}
