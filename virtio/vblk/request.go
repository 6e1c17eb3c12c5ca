package vblk

import (
	"encoding/binary"
	"errors"
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

// pieceSize is the most that a request moves, in bytes, before it looks whether the device is being reset. One chain can
// ask for 4 GiB, since its descriptors may all name the same memory, and for as long as that takes a guest would decide
// how long a reset lasts. Linux's requests, of up to 4 MiB by default, are one piece.
const pieceSize = 4 << 20

// errStopped ends a request between two pieces.
var errStopped = errors.New("vblk: the device is being reset")

// request is one request and the room to parse it in. A worker has one and uses it again and again.
type request struct {
	chain queue.Chain
	out   iov.Vec // the chain's readable part, without what has been parsed
	in    iov.Vec // its writable part, without the status byte
	room  int     // bytes of its writable part
	piece iov.Vec // the part of out or in that is under way, where that is not all of it
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
		return d.read(r, sector)
	case typeOut:
		return 0, d.write(r, sector)
	case typeFlush:
		return 0, statusOf(d.disk.Flush())
	case typeGetID:
		return d.identify(r.in)
	default:
		d.unsupported.Add(1)
		return 0, statusUnsupp
	}
}

func (d *Device) read(r *request, sector uint64) (int, byte) {
	off, ok := d.offset(sector, r.in, r.out)
	if !ok {
		return 0, statusIOErr
	}
	if err := d.transfer(r, d.disk.ReadVecAt, r.in, off); err != nil {
		return 0, statusIOErr
	}
	return r.in.Size(), statusOK
}

func (d *Device) write(r *request, sector uint64) byte {
	off, ok := d.offset(sector, r.out, r.in)
	if !ok {
		return statusIOErr
	}
	err := d.transfer(r, d.disk.WriteVecAt, r.out, off)
	if err == nil && d.writethrough {
		err = d.disk.Flush()
	}
	return statusOf(err)
}

// transfer moves data by calls of move, which is a method of the disk, for one piece each. Once the device is being reset
// it returns errStopped at the end of a piece; what has been moved until then stays.
func (d *Device) transfer(r *request, move func(iov.Vec, int64) (int, error), data iov.Vec, off int64) error {
	size := data.Size()
	// A request that does not lie on the disk goes there as a whole, to be refused before any of it is carried out.
	if size <= pieceSize || off > d.disk.Size()-int64(size) {
		_, err := move(data, off)
		return err
	}
	for at := 0; ; {
		n := min(size-at, pieceSize)
		var err error
		if r.piece, err = data.AppendSlice(r.piece[:0], at, n); err != nil {
			return err
		}
		if _, err := move(r.piece, off+int64(at)); err != nil {
			return err
		}
		if at += n; at == size {
			return nil
		}
		if d.stopping.Load() {
			return errStopped
		}
	}
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
