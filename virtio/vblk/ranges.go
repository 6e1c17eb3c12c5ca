package vblk

import (
	"encoding/binary"

	"github.com/kvmlet/kvmlet/blk"
)

// rangeSize is the length of struct virtio_blk_discard_write_zeroes (virtio 1.2, 5.2.6), little-endian:
// sector uint64 at 0, num_sectors uint32 at 8, flags uint32 at 12.
const rangeSize = 16

// flagUnmap allows the device to give the space of zeroes back (virtio 1.2, 5.2.6). No other flag is known.
const flagUnmap = 1 << 0

// byteRange is a part of the disk, in bytes.
type byteRange struct {
	off, n int64
	flags  blk.Flags
}

// parseRanges prepares to discard ranges of the disk, or to write zeroes over them. They are copied before they are
// checked, since the guest can change them at any time, and all are checked before any is carried out.
func (d *Device) parseRanges(r *request, typ uint32) bool {
	size := r.out.Size()
	if size == 0 || size%rangeSize != 0 || size/rangeSize > maxRanges || r.in.Size() != 0 {
		return d.refuse(r)
	}
	unsupported, outside := false, false
	total := d.disk.Size()
	r.part.Op = blk.OpDiscard
	if typ == typeWriteZeroes {
		r.part.Op = blk.OpWriteZeroes
	}
	var p [maxRanges * rangeSize]byte
	if _, err := r.out.CopyTo(p[:size], 0); err != nil {
		return d.refuse(r)
	}
	for p := p[:size]; len(p) > 0; p = p[rangeSize:] {
		sectors, flags := binary.LittleEndian.Uint32(p[8:]), binary.LittleEndian.Uint32(p[12:])
		b := byteRange{
			off: offset(binary.LittleEndian.Uint64(p)), n: int64(sectors) * blk.SectorSize,
			flags: d.stable(), // of a write; a discard, which is a hint, has no use for it
		}
		if flags&flagUnmap != 0 {
			b.flags |= blk.MayUnmap
		}
		// virtio 1.2, 5.2.6.2: unsupported are flags that nobody knows, and on a discard the one that says nothing there.
		unsupported = unsupported || flags&^flagUnmap != 0 || typ == typeDiscard && flags != 0
		outside = outside || sectors > maxRangeSectors || b.off > total || b.n > total-b.off
		r.ranges = append(r.ranges, b)
	}
	switch {
	case unsupported:
		d.unsupported.Add(1)
		return r.end(statusUnsupp, 0)
	case outside:
		return d.refuse(r)
	}
	r.next = 0
	r.nextRange()
	return true
}

// nextRange prepares the next range.
func (r *request) nextRange() {
	b := r.ranges[r.next]
	r.next++
	r.part.Off, r.part.Len, r.part.Flags = b.off, b.n, b.flags
}
