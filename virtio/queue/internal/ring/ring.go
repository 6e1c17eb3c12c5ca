// Package ring holds the memory layout of a split virtqueue (virtio 1.2, 2.7): sizes, offsets, flags, descriptors, and
// access to its 16-bit fields that is atomic towards the other side.
package ring

import "encoding/binary"

// MaxSize is the largest queue size (virtio 1.2, 2.7).
const MaxSize = 32768

// Alignments of the three parts in bytes (virtio 1.2, 2.7).
const (
	DescAlign  = 16
	AvailAlign = 2
	UsedAlign  = 4
)

// Sizes and offsets in bytes (virtio 1.2, 2.7.5, 2.7.6, 2.7.8).
const (
	DescSize = 16 // one descriptor

	FlagsOffset = 0 // flags, in the available and in the used ring
	IndexOffset = 2 // idx, in both
	RingOffset  = 4 // ring[0], in both

	AvailElemSize = 2
	UsedElemSize  = 8
	EventSize     = 2 // used_event ends the available ring, avail_event the used ring
)

// Descriptor flags (virtio 1.2, 2.7.5).
const (
	FlagNext     = 1
	FlagWrite    = 2
	FlagIndirect = 4
)

// Ring flags (virtio 1.2, 2.7.6, 2.7.8).
const (
	AvailNoInterrupt = 1
	UsedNoNotify     = 1
)

// AvailEvents returns the offset of used_event in the available ring of a queue, which is the ring's size without it.
func AvailEvents(size uint16) int { return RingOffset + AvailElemSize*int(size) }

// UsedEvents returns the offset of avail_event in the used ring of a queue, which is the ring's size without it.
func UsedEvents(size uint16) int { return RingOffset + UsedElemSize*int(size) }

// Desc is a descriptor, struct virtq_desc (virtio 1.2, 2.7.5).
type Desc struct {
	Addr  uint64 // 0: guest-physical
	Len   uint32 // 8: bytes
	Flags uint16 // 12
	Next  uint16 // 14
}

// LoadDesc reads entry i of a descriptor table, each field once, so that the guest cannot change it between a check
// and its use. The entry must lie within table.
func LoadDesc(table []byte, i uint16) Desc {
	b := table[DescSize*int(i):][:DescSize]
	addr, rest := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	return Desc{Addr: addr, Len: uint32(rest), Flags: uint16(rest >> 32), Next: uint16(rest >> 48)}
}

// Store writes d as entry i of a descriptor table.
func (d Desc) Store(table []byte, i uint16) {
	b := table[DescSize*int(i):][:DescSize]
	binary.LittleEndian.PutUint64(b, d.Addr)
	binary.LittleEndian.PutUint64(b[8:], uint64(d.Len)|uint64(d.Flags)<<32|uint64(d.Next)<<48)
}
