package vblk

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"

	"github.com/kvmlet/kvmlet/blk"
)

// defaultBlock is the unit that a guest reads and writes in, in bytes, unless Options say otherwise. A Device takes any
// unit; this one suits every file system and every driver.
const defaultBlock = blk.SectorSize

// maxBlock is the largest logical block that Options may ask for, in bytes. Linux takes none larger than a page.
const maxBlock = 4096

// idSize is the length of the device ID, padded with zeroes (VIRTIO_BLK_ID_BYTES; virtio 1.2, 5.2.6).
const idSize = 20

// Bounds of one request to discard or to write zeroes.
const (
	maxRangeSectors = 1 << 22 // sectors in one range: 2 GiB
	maxRanges       = 64      // ranges in one request
)

// config is struct virtio_blk_config (virtio 1.2, 5.2.4), little-endian and without padding. Fields whose feature is
// not offered stay 0.
type config struct {
	Capacity           uint64 // 0: in sectors of 512 bytes
	SizeMax            uint32 // 8: VIRTIO_BLK_F_SIZE_MAX: bytes in one data descriptor
	SegMax             uint32 // 12: VIRTIO_BLK_F_SEG_MAX: data descriptors in one request
	Cylinders          uint16 // 16: VIRTIO_BLK_F_GEOMETRY
	Heads              uint8  // 18
	Sectors            uint8  // 19
	BlockSize          uint32 // 20: VIRTIO_BLK_F_BLK_SIZE: in bytes
	PhysicalBlockExp   uint8  // 24: VIRTIO_BLK_F_TOPOLOGY: log2 of the blocks in a physical block
	AlignmentOffset    uint8  // 25: first block that starts a physical block
	MinIOSize          uint16 // 26: in blocks
	OptIOSize          uint32 // 28: in blocks
	Writeback          uint8  // 32: VIRTIO_BLK_F_CONFIG_WCE
	Unused0            uint8  // 33
	NumQueues          uint16 // 34: VIRTIO_BLK_F_MQ
	MaxDiscardSectors  uint32 // 36: VIRTIO_BLK_F_DISCARD
	MaxDiscardSeg      uint32 // 40
	DiscardSectorAlign uint32 // 44: in sectors
	MaxZeroesSectors   uint32 // 48: VIRTIO_BLK_F_WRITE_ZEROES
	MaxZeroesSeg       uint32 // 52
	ZeroesMayUnmap     uint8  // 56
	Unused1            [3]uint8
	MaxEraseSectors    uint32 // 60: VIRTIO_BLK_F_SECURE_ERASE
	MaxEraseSeg        uint32 // 64
	EraseSectorAlign   uint32 // 68
}

const (
	configSize  = 72
	atWriteback = 32 // the only field that a driver may write
)

// maxSegment is the longest descriptor that a driver is told to use, in bytes.
const maxSegment = 4 << 20

// newConfig describes disk. Capacity and Writeback are filled in as they are when the driver reads.
func newConfig(disk *blk.Device, o Options) config {
	limits := disk.Limits()
	block := o.LogicalBlock
	physical := max(limits.PhysicalBlock, block) / block
	c := config{
		// Hints only: a Device takes vectors of any shape. No request gains from longer descriptors.
		SizeMax: maxSegment,
		// With one descriptor each for header and status, a request fills a queue that has no indirect descriptors; an
		// indirect table must not be longer than the queue either (virtio 1.2, 2.7.5.3.1).
		SegMax:           uint32(o.QueueSize - 2),
		BlockSize:        uint32(block),
		PhysicalBlockExp: uint8(bits.Len(uint(physical)) - 1),
		MinIOSize:        uint16(min(physical, math.MaxUint16)),
		OptIOSize:        uint32(min(limits.OptimalTransfer/block, math.MaxUint32)),
		NumQueues:        uint16(o.NumQueues),
	}
	if t := limits.MaxTransfer; t > 0 {
		c.SizeMax = uint32(max(min(t, maxSegment)&^(maxBlock-1), maxBlock))
	}
	if discards(disk) {
		c.MaxDiscardSectors, c.MaxDiscardSeg = maxRangeSectors, maxRanges
		unit := max(limits.DiscardAlign, int64(block))
		c.DiscardSectorAlign = uint32(min((unit+blk.SectorSize-1)/blk.SectorSize, maxRangeSectors))
	}
	if !disk.ReadOnly() {
		c.MaxZeroesSectors, c.MaxZeroesSeg = maxRangeSectors, maxRanges
		if _, ok := disk.Backend().(blk.ZeroWriter); ok {
			c.ZeroesMayUnmap = 1
		}
	}
	return c
}

// discards reports whether a guest gains anything from discarding.
func discards(disk *blk.Device) bool {
	_, ok := disk.Backend().(blk.Discarder)
	return ok && !disk.ReadOnly()
}

func (c config) encode() (p [configSize]byte) {
	if _, err := binary.Encode(p[:], binary.LittleEndian, c); err != nil {
		panic(err) // config has fields of fixed size only
	}
	return p
}

// ReadConfig copies the configuration space (virtio 1.2, 5.2.4) from off on to p; beyond its end it reads as zeroes.
func (d *Device) ReadConfig(p []byte, off int) {
	c := d.fixed
	d.mu.Lock()
	binary.LittleEndian.PutUint64(c[0:], d.capacity)
	d.mu.Unlock()
	if d.writeback.Load() && !d.disk.Writethrough() { // which the driver can't switch off
		c[atWriteback] = 1
	}
	clear(p)
	if off >= 0 && off < len(c) {
		copy(p, c[off:])
	}
}

// WriteConfig switches the cache between writeback and writethrough, if the driver negotiated that; everything else is
// read-only. A switch holds for requests that come later (virtio 1.2, 5.2.6.2).
func (d *Device) WriteConfig(p []byte, off int) {
	i := atWriteback - off
	if off < 0 || i < 0 || i >= len(p) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.negotiated.Has(FeatureConfigWCE) {
		d.writeback.Store(p[i] != 0)
	}
}

// ConfigGeneration implements virtio.ConfigGenerator.
func (d *Device) ConfigGeneration() uint8 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.generation
}

// sectors returns the capacity of disk in sectors: whole blocks only.
func sectors(disk *blk.Device, block int) uint64 {
	size := disk.Size()
	return uint64(size-size%int64(block)) / blk.SectorSize
}

// resized takes over the size of the disk and tells the driver if there is one.
func (d *Device) resized(int64) {
	if a := d.remeasure(); a != nil {
		_ = a.transport.NotifyConfig() // a driver that misses it still reads the right size
		a.notifying.Done()
	}
}

// remeasure takes over the size of the disk. It returns the activation whose driver is to be told, if any, which its
// reset waits for until that is done.
func (d *Device) remeasure() *activation {
	d.mu.Lock()
	defer d.mu.Unlock()
	// As it is now, not as it was told: of two changes, the news may come in any order.
	n := sectors(d.disk, d.block)
	if n == d.capacity {
		return nil
	}
	d.capacity = n
	d.generation++
	if d.active == nil || d.active.ctx.Err() != nil {
		return nil
	}
	d.active.notifying.Add(1)
	return d.active
}

// makeID returns s as the guest sees it. Guests make device names of it, so it holds nothing that can't be printed.
func makeID(s string) (id [idSize]byte, err error) {
	if len(s) > idSize {
		return id, fmt.Errorf("vblk: disk ID %q: want %d bytes at most, not %d", s, idSize, len(s))
	}
	for _, b := range []byte(s) {
		if b < ' ' || b > '~' {
			return id, fmt.Errorf("vblk: disk ID %q: want printable ASCII", s)
		}
	}
	copy(id[:], s)
	return id, nil
}
