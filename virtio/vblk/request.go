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
	typeIn    = 0 // read
	typeOut   = 1 // write
	typeFlush = 4
	typeGetID = 8
)

// Status bytes (virtio 1.2, 5.2.6).
const (
	statusOK     = 0
	statusIOErr  = 1
	statusUnsupp = 2
)

// request is one request and the room to parse it in. A worker has one and uses it again and again.
type request struct {
	chain queue.Chain
	out   iov.Vec // the chain's readable part, without what has been parsed
	in    iov.Vec // its writable part, without the status byte
	room  int     // bytes of its writable part
}

// serve carries out the request in r.chain and returns the length for the used ring: the bytes of data written to the
// chain and the status byte.
func (d *Device) serve(r *request) uint32 {
	r.out, r.in = r.chain.Readable, r.chain.Writable
	r.room = r.in.Size()
	status := lastByte(r.in)
	if status == nil {
		d.malformed.Add(1)
		return 0
	}
	r.in.DiscardBack(1)
	n, s := d.execute(r)
	status[0] = s
	return uint32(n) + 1
}

// execute does what the header asks for. How header, data and status are cut into descriptors is the driver's business
// (virtio 1.2, 2.7.4).
func (d *Device) execute(r *request) (written int, status byte) {
	var h [headerSize]byte
	if n, _ := r.out.CopyTo(h[:], 0); n < headerSize {
		d.malformed.Add(1)
		return 0, statusIOErr
	}
	r.out.DiscardFront(headerSize)
	sector := binary.LittleEndian.Uint64(h[8:])

	switch binary.LittleEndian.Uint32(h[0:]) {
	case typeIn:
		return d.read(sector, r.in, r.out)
	case typeOut:
		return 0, d.write(sector, r.out, r.in)
	case typeFlush:
		return 0, statusOf(d.disk.Flush())
	case typeGetID:
		return d.identify(r.in)
	default:
		d.unsupported.Add(1)
		return 0, statusUnsupp
	}
}

func (d *Device) read(sector uint64, data, rest iov.Vec) (int, byte) {
	off, ok := d.offset(sector, data, rest)
	if !ok {
		return 0, statusIOErr
	}
	n, err := d.disk.ReadVecAt(data, off)
	if err != nil {
		return 0, statusIOErr
	}
	return n, statusOK
}

func (d *Device) write(sector uint64, data, rest iov.Vec) byte {
	off, ok := d.offset(sector, data, rest)
	if !ok {
		return statusIOErr
	}
	_, err := d.disk.WriteVecAt(data, off)
	if err == nil && d.writethrough {
		err = d.disk.Flush()
	}
	return statusOf(err)
}

// identify writes the ID. Room for less than all of it is an error, room for more is left as it is.
func (d *Device) identify(in iov.Vec) (int, byte) {
	if in.Size() < idSize {
		d.malformed.Add(1)
		return 0, statusIOErr
	}
	n, err := in.CopyFrom(0, d.id[:])
	return n, statusOf(err)
}

// offset checks the form of a transfer and returns where on the disk it begins, in bytes. rest is the part of the chain
// in the other direction, which must be empty. Whether the range lies on the disk is for the disk to say.
func (d *Device) offset(sector uint64, data, rest iov.Vec) (int64, bool) {
	size := data.Size()
	// The length in the used ring has 32 bits and counts the status byte too (virtio 1.2, 2.7.8).
	if size%blk.SectorSize != 0 || size >= math.MaxUint32 || rest.Size() != 0 {
		d.malformed.Add(1)
		return 0, false
	}
	if sector > math.MaxInt64/blk.SectorSize {
		sector = math.MaxInt64 / blk.SectorSize // beyond every disk as well, and counted there
	}
	return int64(sector) * blk.SectorSize, true
}

func statusOf(err error) byte {
	if err != nil {
		return statusIOErr
	}
	return statusOK
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
