package vblk

import (
	"encoding/binary"
	"math"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// headerSize is the length of what begins every request (virtio 1.2, 5.2.6), little-endian:
// type uint32 at 0, reserved uint32 at 4, sector uint64 at 8.
const headerSize = 16

// Request types (virtio 1.2, 5.2.6).
const (
	typeIn          = 0 // read
	typeOut         = 1 // write
	typeFlush       = 4
	typeGetID       = 8
	typeDiscard     = 11
	typeWriteZeroes = 13
)

// Status bytes (virtio 1.2, 5.2.6).
const (
	statusOK     = 0
	statusIOErr  = 1
	statusUnsupp = 2
)

// request is one request and the room to parse it in. A server uses it again and again.
type request struct {
	chain  queue.Chain
	out    iov.Vec // the chain's readable part, without what has been parsed
	in     iov.Vec // its writable part, without the status byte
	room   int     // bytes of its writable part
	answer []byte  // where the status goes; nil if nowhere

	// What there is for the disk to do. One part of it is under way at a time: all the data, or a range.
	part   blk.Request
	size   int // of the data
	ranges []byteRange
	next   int // in ranges, after that of part

	// What came of it.
	status  byte
	written uint32 // bytes for the used ring: data written into the chain, and the status

	batch [1]*blk.Request // &part
}

// begin parses the request in r.chain. It returns true if r.part is to be carried out by the disk, and false if the
// request is over.
func (d *Device) begin(r *request) bool {
	r.out, r.in = r.chain.Readable, r.chain.Writable
	r.room = r.in.Size()
	r.answer = lastByte(r.in)
	r.ranges = r.ranges[:0]
	if r.answer == nil {
		d.malformed.Add(1)
		r.written = 0
		return false
	}
	r.in.DiscardBack(1)

	// How header, data and status are cut into descriptors is the driver's business (virtio 1.2, 2.7.4).
	var h [headerSize]byte
	if n, _ := r.out.CopyTo(h[:], 0); n < headerSize {
		return d.refuse(r)
	}
	r.out.DiscardFront(headerSize)
	sector := binary.LittleEndian.Uint64(h[8:])

	switch typ := binary.LittleEndian.Uint32(h[0:]); typ {
	case typeIn:
		return d.transfer(r, blk.OpRead, sector, r.in, r.out)
	case typeOut:
		return d.transfer(r, blk.OpWrite, sector, r.out, r.in)
	case typeFlush:
		r.part.Op, r.part.Flags = blk.OpFlush, 0
		return true
	case typeGetID:
		return d.identify(r)
	case typeDiscard, typeWriteZeroes:
		return d.parseRanges(r, typ)
	default:
		d.unsupported.Add(1)
		return r.end(statusUnsupp, 0)
	}
}

// end sets the outcome of a request: its status, and how many bytes of data were written into the chain. It returns false,
// as the request is over.
func (r *request) end(status byte, written int) bool {
	r.status, r.written = status, uint32(written)+1
	return false
}

// refuse ends a request that the specification does not allow.
func (d *Device) refuse(r *request) bool {
	d.malformed.Add(1)
	return r.end(statusIOErr, 0)
}

// transfer prepares to move data. rest is the part of the chain in the other direction, which must be empty. Whether the
// range lies on the disk is for the disk to say.
func (d *Device) transfer(r *request, op blk.Op, sector uint64, data, rest iov.Vec) bool {
	size := data.Size()
	// The length in the used ring has 32 bits and counts the status byte too (virtio 1.2, 2.7.8).
	if size%blk.SectorSize != 0 || size >= math.MaxUint32 || rest.Size() != 0 {
		return d.refuse(r)
	}
	r.size = size
	r.part.Op, r.part.Flags, r.part.Vec, r.part.Off = op, 0, data, offset(sector)
	if op == blk.OpWrite {
		r.part.Flags = d.stable()
	}
	return true
}

// stable returns the flags of a write: without a cache, a completed one is a stable one (virtio 1.2, 5.2.6.2).
func (d *Device) stable() blk.Flags {
	if d.writeback.Load() {
		return 0
	}
	return blk.FUA
}

// advance takes note that the disk is done with r.part. It returns true if r.part is the next to be carried out, and false
// if the request is over.
func (d *Device) advance(r *request, err error) bool {
	switch {
	case err != nil:
		return r.end(statusIOErr, 0)
	case r.next < len(r.ranges):
		r.nextRange()
		return true
	case r.part.Op == blk.OpRead:
		return r.end(statusOK, r.size)
	}
	return r.end(statusOK, 0)
}

// identify writes the ID. Room for less than all of it is an error, room for more is left as it is.
func (d *Device) identify(r *request) bool {
	if r.in.Size() < idSize {
		return d.refuse(r)
	}
	n, err := r.in.CopyFrom(0, d.id[:])
	if err != nil {
		return r.end(statusIOErr, 0)
	}
	return r.end(statusOK, n)
}

// offset returns where a sector begins, in bytes.
func offset(sector uint64) int64 {
	// Beyond the largest there is one that lies beyond every disk as well.
	return int64(min(sector, math.MaxInt64/blk.SectorSize)) * blk.SectorSize
}

// lastByte returns the last byte of v as a slice of length 1, or nil where v has none.
func lastByte(v iov.Vec) []byte {
	for i := len(v) - 1; i >= 0; i-- {
		if n := v[i].Len(); n > 0 {
			return v[i].Bytes()[n-1:]
		}
	}
	return nil
}
