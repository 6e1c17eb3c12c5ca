package queuetest

import (
	"encoding/binary"

	"github.com/kvmlet/kvmlet/virtio/queue/internal/ring"
)

// Desc is a descriptor (virtio 1.2, 2.7.5).
type Desc = ring.Desc

// Flags of a descriptor (virtio 1.2, 2.7.5).
const (
	FlagNext     = ring.FlagNext
	FlagWrite    = ring.FlagWrite
	FlagIndirect = ring.FlagIndirect
)

// DescSize is the size of a descriptor in bytes.
const DescSize = ring.DescSize

// Alloc sets n bytes of guest memory aside for as long as the driver lives and returns their address. They are zero.
func (d *Driver) Alloc(n int, align uint64) uint64 {
	d.tb.Helper()
	if d.high < d.low+uint64(n)+align {
		d.tb.Fatalf("queuetest: out of guest memory: %d bytes wanted, %d left", n, d.high-d.low)
	}
	d.high = (d.high - uint64(n)) &^ (align - 1)
	return d.high
}

// Bytes returns n bytes of guest memory.
func (d *Driver) Bytes(addr uint64, n int) []byte {
	d.tb.Helper()
	b, err := d.Mem.Bytes(addr, uint64(n))
	if err != nil {
		d.tb.Fatalf("queuetest: %d bytes at %#x: %v", n, addr, err)
	}
	return b
}

// SetDesc writes entry i of the descriptor table.
func (d *Driver) SetDesc(i uint16, desc Desc) { desc.Store(d.desc, i) }

// Table writes an indirect table as it stands and returns a descriptor that refers to it.
func (d *Driver) Table(descs ...Desc) Desc {
	d.tb.Helper()
	n := DescSize * len(descs)
	addr := d.Alloc(n, DescSize)
	b := d.Bytes(addr, n)
	for i, desc := range descs {
		desc.Store(b, uint16(i))
	}
	return Desc{Addr: addr, Len: uint32(n), Flags: FlagIndirect}
}

// MakeAvailable puts heads into the available ring as they are and publishes them.
func (d *Driver) MakeAvailable(heads ...uint16) {
	for i, head := range heads {
		d.putElem(d.next+uint16(i), head)
	}
	d.SetAvailIdx(d.next + uint16(len(heads)))
}

// AvailIdx returns avail.idx.
func (d *Driver) AvailIdx() uint16 { return d.availIdx.Load() }

// SetAvailIdx publishes any available index.
func (d *Driver) SetAvailIdx(idx uint16) {
	d.next = idx
	d.availIdx.Store(idx)
}

// SetUsedIdx is SetAvailIdx for a driver that took a queue over with its used ring at idx.
func (d *Driver) SetUsedIdx(idx uint16) {
	d.last = idx
	d.usedIdxField.Store(idx)
}

// SetUsedEvent asks for a notification when the device uses index idx.
func (d *Driver) SetUsedEvent(idx uint16) { d.usedEvent.Store(idx) }

// AvailEvent returns the index at which the device asks for a kick.
func (d *Driver) AvailEvent() uint16 { return d.availEventField.Load() }

// SetAvailEvent overwrites what the device asked for.
func (d *Driver) SetAvailEvent(idx uint16) { d.availEventField.Store(idx) }

// UsedFlags returns used.flags.
func (d *Driver) UsedFlags() uint16 { return d.usedFlags.Load() }

// UsedIdx returns used.idx.
func (d *Driver) UsedIdx() uint16 { return d.usedIdxField.Load() }

// UsedElem returns the entry of the used ring for index i.
func (d *Driver) UsedElem(i uint16) (id, written uint32) {
	b := d.used[ring.UsedElemSize*int(i&(d.Config.Size-1)):]
	return binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
}
