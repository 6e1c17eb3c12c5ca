package blk

import (
	"fmt"
	"io"

	"github.com/kvmlet/kvmlet/iov"
)

// Backend stores the bytes of one disk. Device is its only caller in a running VM: it sends no request that lies outside
// [0, Size), rounded up to RequestAlign, or that breaks Limits; none after Close; and Close only when no request is under
// way. All other methods are called from any number of goroutines at once and may block for as long as the storage
// takes. Requests that overlap may be under way at once; what a read then sees, or which of two writes stays, is open
// byte by byte, but nothing outside of them changes.
type Backend interface {
	// ReadVecAt fills dst from byte offset off. Fewer bytes than dst holds, with a nil error, mean that the storage
	// ends there; Device gives the rest as zeroes. With an error the contents of dst are undefined.
	iov.ReaderAt

	// WriteVecAt writes all of src at byte offset off. Fewer bytes come with an error; then any part of the range may
	// hold old or new bytes. The bytes may stay in a volatile cache until Flush.
	iov.WriterAt

	// Flush returns when every write that completed before the call is on stable storage.
	Flush() error

	// Size returns the size of the disk in bytes, a multiple of SectorSize. It changes by Truncate only, or between two
	// calls of Device.Refresh where the storage itself grew.
	Size() int64

	// Limits returns what the driver asks of requests. Device asks at New and Refresh and goes by that answer.
	Limits() Limits

	// Close releases the storage. Unflushed writes are not lost, but not made stable either.
	io.Closer
}

// The interfaces below are optional. All their methods follow the rules of Backend: offsets and lengths are bytes,
// multiples of RequestAlign, within the disk; any method may answer ErrUnsupported, for always or for this range only.
type (
	// Discarder forgets bytes that nobody needs any more. What they read as afterwards is the driver's choice between
	// the old bytes and zeroes. The range is one of at most MaxDiscard bytes which either begins and ends at multiples
	// of DiscardAlign (or the end of the disk) or lies between two of them.
	Discarder interface {
		Discard(off, n int64) error
	}

	// ZeroWriter makes a range read as zeroes faster than by writing zeroes. With unmap the driver may give the space
	// back; without it, it must keep the space allocated or answer ErrUnsupported. The range is one of at most MaxZero
	// bytes which either begins and ends at multiples of ZeroAlign (or the end of the disk) or lies between two of them.
	ZeroWriter interface {
		WriteZeroes(off, n int64, unmap bool) error
	}

	// StatusReporter tells what is known of the bytes from off on without reading them. The length is that of the run of
	// equal status which begins at off: from 1 byte to n, where runs need not end at multiples of RequestAlign.
	StatusReporter interface {
		BlockStatus(off, n int64) (Status, int64, error)
	}

	// FUAWriter writes like WriteVecAt and returns when these bytes are on stable storage (force unit access).
	FUAWriter interface {
		WriteVecFUA(src iov.Vec, off int64) (int, error)
	}

	// CompressedWriter stores one cluster (Limits.Cluster) compressed, at its first time of being written. src is as
	// long as the cluster, or ends with the disk. Data that does not get smaller is stored as it is.
	CompressedWriter interface {
		WriteCompressed(src iov.Vec, off int64) error
	}

	// Truncater changes the size of the disk, to a multiple of SectorSize. New bytes read as zeroes. No other request is
	// under way meanwhile.
	Truncater interface {
		Truncate(size int64) error
	}

	// Backed is a driver with a backing file: where BlockStatus says that bytes are not Allocated here, ReadVecAt returns
	// those of the backing Device, and zeroes beyond its end. Backing returns nil where there is none. The driver owns
	// that Device: it closes it.
	Backed interface {
		Backing() *Device
	}

	// StateStore keeps the state of a VM beside the disk, in a range of its own that begins at offset 0 and has no fixed
	// end; offsets need no alignment. A read beyond what was written gives a short count. Making the state last is the
	// driver's matter (see its own methods).
	StateStore interface {
		ReadStateAt(dst iov.Vec, off int64) (int, error)
		WriteStateAt(src iov.Vec, off int64) (int, error)
	}

	// Removable is a drive whose medium may be missing. Requests are refused with ErrNoMedium while it is.
	Removable interface {
		Inserted() bool
	}

	// Starter carries out transfers without a goroutine for each.
	//
	// Start begins all of batch and returns without waiting for them. Done of each IO is called exactly once, from any
	// goroutine and possibly before Start returns; the IO is its owner's again from then on. Done does not block for
	// long and may call Start. Start does not keep batch, and keeps an IO until Done.
	Starter interface {
		Start(batch []*IO)
	}

	// Threadless is a Starter that may need no thread for what it has started: an io_uring does not, workers that make
	// blocking calls do. It is asked once, by New.
	Threadless interface {
		Threadless() bool
	}

	// Observer is told what Device is about to do, by the names of the Event constants. It is how tests stop a request
	// at a certain place: Event returns when the request may go on. Drivers pass on what they get, and add their own.
	Observer interface {
		Observing() bool // whether anybody wants to know; asked once, by New
		Event(e Event)
	}

	// Resetter drops what the driver knows and did not check lately: Device.Refresh calls it, with no request under way,
	// before it asks for Limits and Size again.
	Resetter interface {
		Refresh() error
	}
)

// IO is one transfer of a Starter. The caller sets Op (OpRead or OpWrite), Vec, Off and Done; the driver sets N and Err,
// to what ReadVecAt or WriteVecAt would have returned, before it calls Done.
type IO struct {
	Op   Op
	Vec  iov.Vec
	Off  int64
	N    int
	Err  error
	Done func(*IO)

	Owner  any    // the caller's own; the driver leaves it alone
	Driver uint64 // the driver's own while it has the IO
}

// Transfer carries io out by ReadVecAt or WriteVecAt of b and sets N and Err. To call Done is left to the caller.
func (io *IO) Transfer(b Backend) {
	if io.Op == OpRead {
		io.N, io.Err = b.ReadVecAt(io.Vec, io.Off)
	} else {
		io.N, io.Err = b.WriteVecAt(io.Vec, io.Off)
	}
}

// Status tells what is known of a run of bytes.
type Status struct {
	Flags  StatusFlags
	Offset int64 // with StatusOffset: where in File the bytes lie
}

// StatusFlags are the parts of a Status that are true or not.
type StatusFlags uint8

// A run without Allocated is not this driver's own: it reads as the backing file does, or as zeroes where there is none.
const (
	StatusData       StatusFlags = 1 << iota // bytes are stored, and a read fetches them
	StatusZero                               // reads as zeroes
	StatusAllocated                          // this layer says what the bytes are, not a backing file
	StatusOffset                             // Offset is valid: the bytes lie there in the driver's file, one to one
	StatusCompressed                         // the bytes are stored compressed
)

// Event names a place on the way of a request, after QEMU's blkdebug.
type Event string

// Events of Device. A driver's own have the driver's name in front, such as "qcow2_l2_update".
const (
	EventReadPadded      Event = "readv_padded"     // a read was widened and goes to the backend
	EventPaddedHead      Event = "pwritev_rmw_head" // a padded write is about to read its first block
	EventPaddedAfterHead Event = "pwritev_rmw_after_head"
	EventPaddedTail      Event = "pwritev_rmw_tail" // about to read its last block
	EventPaddedAfterTail Event = "pwritev_rmw_after_tail"
	EventRead            Event = "preadv" // about to call ReadVecAt for a read
	EventReadDone        Event = "preadv_done"
	EventWrite           Event = "pwritev" // about to call WriteVecAt
	EventWriteDone       Event = "pwritev_done"
	EventWriteZeroes     Event = "pwritev_zero" // about to call WriteZeroes
	EventCopyOnRead      Event = "cor_write"    // about to store what was read from the backing file
	EventFlush           Event = "flush_to_disk"
	EventDiscard         Event = "pdiscard"
)

// Limits says what a Backend asks of the requests that it is sent, and what it knows about its medium. The zero value
// asks for nothing and knows nothing.
type Limits struct {
	RequestAlign int   // offset and length of every request are multiples of it; a power of two up to 64 KiB, 0 means 1
	MemoryAlign  int   // address and length of every vector element are, and so the lengths of requests; likewise
	MaxTransfer  int64 // most bytes in one transfer, a multiple of both alignments; 0 means any number
	MaxVec       int   // most elements in one vector; 0 means any number

	DiscardAlign int64 // unit of Discard, a multiple of both alignments and not always a power of two; 0 means the larger
	MaxDiscard   int64 // most bytes in one Discard, a multiple of both alignments; 0 means any number
	ZeroAlign    int64 // unit of WriteZeroes, as DiscardAlign
	MaxZero      int64 // most bytes in one WriteZeroes, as MaxDiscard

	Cluster int64 // unit in which the driver allocates, a power of two; 0 means that it does not say

	PhysicalBlock   int // bytes that the medium writes at once, a power of two; 0 means unknown. A hint for guests.
	OptimalTransfer int // bytes of the transfers that the medium likes best; 0 means unknown. A hint for guests.
}

// maxAlign is the largest alignment that a Backend may ask for, in bytes.
const maxAlign = 64 << 10

// check reports the first field that is malformed.
func (l Limits) check() error {
	pow2 := func(n int64) bool { return n >= 0 && n&(n-1) == 0 }
	unit := max(int64(l.RequestAlign), int64(l.MemoryAlign), 1)
	multiple := func(n int64) bool { return n >= 0 && n%unit == 0 }
	switch {
	case !pow2(int64(l.RequestAlign)) || l.RequestAlign > maxAlign:
		return fmt.Errorf("%w: request alignment %d: want a power of two up to %d", ErrLimits, l.RequestAlign, maxAlign)
	case !pow2(int64(l.MemoryAlign)) || l.MemoryAlign > maxAlign:
		return fmt.Errorf("%w: memory alignment %d: want a power of two up to %d", ErrLimits, l.MemoryAlign, maxAlign)
	case !multiple(l.MaxTransfer), !multiple(l.MaxDiscard), !multiple(l.MaxZero), !multiple(l.DiscardAlign), !multiple(l.ZeroAlign):
		return fmt.Errorf("%w: transfer %d, discard %d by %d, zeroes %d by %d: want multiples of the alignment %d",
			ErrLimits, l.MaxTransfer, l.MaxDiscard, l.DiscardAlign, l.MaxZero, l.ZeroAlign, unit)
	case l.MaxVec < 0:
		return fmt.Errorf("%w: longest vector %d", ErrLimits, l.MaxVec)
	case !pow2(l.Cluster):
		return fmt.Errorf("%w: clusters of %d bytes: want a power of two", ErrLimits, l.Cluster)
	case !pow2(int64(l.PhysicalBlock)):
		return fmt.Errorf("%w: physical block of %d bytes: want a power of two", ErrLimits, l.PhysicalBlock)
	case l.OptimalTransfer < 0:
		return fmt.Errorf("%w: optimal transfer of %d bytes", ErrLimits, l.OptimalTransfer)
	}
	return nil
}

// coarser returns l with a request alignment of at least align. What must be a multiple of it is made one: a unit by
// rounding up, a maximum by rounding down.
func (l Limits) coarser(align int) Limits {
	if align <= 0 || align <= l.RequestAlign {
		return l
	}
	l.RequestAlign = align
	unit := max(int64(align), 1)
	for _, n := range []*int64{&l.DiscardAlign, &l.ZeroAlign} {
		*n = (*n + unit - 1) / unit * unit
	}
	for _, n := range []*int64{&l.MaxTransfer, &l.MaxDiscard, &l.MaxZero} {
		if *n > 0 {
			*n = max(*n/unit, 1) * unit
		}
	}
	return l
}

// Over returns the limits of a driver that stores its bytes in a file with the limits file: its own demands, and the
// medium's preferences where it has none. Alignments of the file are left out: the Device in front of it sees to them.
func (l Limits) Over(file Limits) Limits {
	l.PhysicalBlock = max(l.PhysicalBlock, file.PhysicalBlock)
	l.OptimalTransfer = max(l.OptimalTransfer, file.OptimalTransfer)
	return l
}
