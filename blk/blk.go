// Package blk is the block layer: everything between a disk device that a guest sees and the driver that holds the
// bytes.
//
// A driver implements Backend and nothing more than its own storage needs. Device stands in front of it and gives every
// user the same contract, whatever the driver: requests are checked against the size and the mode of the disk, bytes
// that the storage lacks read as zeroes, Close waits for what is under way, and every request is counted.
//
//	guest -> vblk -> Device (checks, counts) -> Backend (raw, ...)
//
// Buffers are iov.Vecs over the guest's own pages all the way down; nothing on this path copies or allocates.
package blk

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/kvmlet/kvmlet/iov"
)

// SectorSize is the unit in which disks are sized and, on virtio, addressed, in bytes (virtio 1.2, 5.2.4). It does not
// depend on the block size of the medium.
const SectorSize = 512

var (
	// ErrReadOnly refuses a write to a disk that was opened for reading only.
	ErrReadOnly = errors.New("blk: disk is read-only")

	// ErrRange refuses a request that begins before or ends beyond the disk.
	ErrRange = errors.New("blk: request outside the disk")

	// ErrClosed refuses a request to a Device after Close; it also matches os.ErrClosed.
	ErrClosed = fmt.Errorf("blk: disk is closed: %w", os.ErrClosed)

	// ErrLimits refuses a Backend whose Limits are malformed or ask for more than Device does.
	ErrLimits = errors.New("blk: limits not supported")
)

// Backend stores the bytes of one disk. Device is its only caller in a running VM: it sends no request that lies
// outside [0, Size) or that breaks Limits, none after Close, and Close only when no request is under way. All other
// methods are called from any number of goroutines at once and may block for as long as the storage takes.
type Backend interface {
	// ReadVecAt fills dst from byte offset off. Fewer bytes than dst holds, with a nil error, mean that the storage
	// ends there; Device gives the rest as zeroes. With an error the contents of dst are undefined.
	iov.ReaderAt

	// WriteVecAt writes all of src at byte offset off. Fewer bytes come with an error; then any part of the range may
	// hold old or new bytes. The bytes may stay in a volatile cache until Flush.
	iov.WriterAt

	// Flush returns when every write that completed before the call is on stable storage.
	Flush() error

	// Size returns the size of the disk in bytes, a multiple of SectorSize.
	Size() int64

	// Limits returns what the driver asks of requests. The answer does not change while the Backend is open.
	Limits() Limits

	// Close releases the storage. Unflushed writes are not lost, but not made stable either.
	io.Closer
}

// Limits says what a Backend asks of the requests that it is sent, and what it knows about its medium. The zero value
// asks for nothing and knows nothing.
type Limits struct {
	RequestAlign int   // offset and length of every transfer are multiples of it; a power of two in bytes, 0 means 1
	MemoryAlign  int   // address and length of every vector element are multiples of it; likewise
	MaxTransfer  int64 // most bytes in one transfer; 0 means any number
	MaxVec       int   // most elements in one vector; 0 means any number

	PhysicalBlock   int // bytes that the medium writes at once, a power of two; 0 means unknown. A hint for guests.
	OptimalTransfer int // bytes of the transfers that the medium likes best; 0 means unknown. A hint for guests.
}

// check reports the first field that Device cannot serve. Device passes requests on as they come, so it takes drivers
// that accept any alignment, length and number of elements.
func (l Limits) check() error {
	pow2 := func(n int) bool { return n >= 0 && n&(n-1) == 0 }
	switch {
	case l.RequestAlign > 1, l.RequestAlign < 0:
		return fmt.Errorf("%w: request alignment %d (1 is)", ErrLimits, l.RequestAlign)
	case l.MemoryAlign > 1, l.MemoryAlign < 0:
		return fmt.Errorf("%w: memory alignment %d (1 is)", ErrLimits, l.MemoryAlign)
	case l.MaxTransfer != 0:
		return fmt.Errorf("%w: largest transfer %d (0 for none is)", ErrLimits, l.MaxTransfer)
	case l.MaxVec != 0:
		return fmt.Errorf("%w: longest vector %d (0 for none is)", ErrLimits, l.MaxVec)
	case !pow2(l.PhysicalBlock):
		return fmt.Errorf("%w: physical block of %d bytes (powers of two are)", ErrLimits, l.PhysicalBlock)
	case l.OptimalTransfer < 0:
		return fmt.Errorf("%w: optimal transfer of %d bytes (0 for none is)", ErrLimits, l.OptimalTransfer)
	}
	return nil
}
