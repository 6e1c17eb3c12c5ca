package vblk

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"

	"github.com/kvmlet/kvmlet/blk"
)

// blockSize is the unit that a guest should read and write in, in bytes. Behind the page cache any unit works; this one
// suits every file system and every driver.
const blockSize = blk.SectorSize

// idSize is the length of the device ID, padded with zeroes (VIRTIO_BLK_ID_BYTES; virtio 1.2, 5.2.6).
const idSize = 20

// config is struct virtio_blk_config (virtio 1.2, 5.2.4), little-endian and without padding. Fields whose feature is
// not offered stay 0.
type config struct {
	Capacity           uint64 // 0: in sectors of 512 bytes
	SizeMax            uint32 // 8: VIRTIO_BLK_F_SIZE_MAX
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
	DiscardSectorAlign uint32 // 44
	MaxZeroesSectors   uint32 // 48: VIRTIO_BLK_F_WRITE_ZEROES
	MaxZeroesSeg       uint32 // 52
	ZeroesMayUnmap     uint8  // 56
	Unused1            [3]uint8
	MaxEraseSectors    uint32 // 60: VIRTIO_BLK_F_SECURE_ERASE
	MaxEraseSeg        uint32 // 64
	EraseSectorAlign   uint32 // 68
}

func newConfig(disk *blk.Device, o Options) config {
	limits := disk.Limits()
	physical := max(limits.PhysicalBlock, blockSize) / blockSize
	return config{
		Capacity: uint64(disk.Size()) / blk.SectorSize,
		// With one descriptor each for header and status, a request fills a queue that has no indirect descriptors.
		SegMax:           uint32(o.QueueSize - 2),
		BlockSize:        blockSize,
		PhysicalBlockExp: uint8(bits.Len(uint(physical)) - 1),
		MinIOSize:        uint16(min(physical, math.MaxUint16)),
		OptIOSize:        uint32(min(limits.OptimalTransfer/blockSize, math.MaxUint32)),
		NumQueues:        uint16(o.NumQueues),
	}
}

func (c config) encode() []byte {
	p, err := binary.Append(nil, binary.LittleEndian, c)
	if err != nil {
		panic(err) // config has fields of fixed size only
	}
	return p
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
