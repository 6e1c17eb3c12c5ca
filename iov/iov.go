// Package iov holds Vec, a scatter-gather list of host byte ranges, and the operations that the block layer, the
// network backends, the virtqueues and the migration stream share.
//
// A Vec describes memory; it never owns it. Whoever builds one guarantees that the bytes stay mapped for as long as the
// Vec is used. Guest pages and Go slices may stand side by side in one Vec, and its elements may overlap.
//
// Offsets and lengths are bytes. One that is negative, that does not fit an int, or that lies outside the Vec gives an
// error that wraps ErrRange; nothing panics on them. Where a function returns a count, a count below the one asked for
// means that a Vec (or the file, or the peer) ended there, which each function's comment spells out.
//
// Nothing on the data path allocates. The elements are handed to the kernel as they stand; only a call whose first or
// last element must be cut borrows a list from a pool.
//
// Readers who know QEMU's util/iov.c will miss a few names. A Vec is a slice, so make with a capacity, [:0] and the
// garbage collector stand in for init, reset and destroy, a conversion for init_external, Append for add, the built-in
// append for the concatenation of whole vectors, and AppendSlice for that of parts and for init_slice. The functions on
// a plain iovec array and those on a counted QEMUIOVector are the same methods here. AppendPadded has no IOV_MAX limit,
// because WriteAt, ReadAt, Send and Recv split what is longer and a backend states its own limit in blk.Limits.
package iov

import (
	"errors"
	"fmt"
	"math"
)

var (
	// ErrRange reports an offset or a length that lies outside a Vec or a file.
	ErrRange = errors.New("iov: offset or length out of range")
	// ErrTooMany reports a Vec of more than MaxElems non-empty elements where a single system call was asked for. Copy
	// it into one buffer, or split it at a message border.
	ErrTooMany = errors.New("iov: too many elements for one system call")
)

// MaxElems is the largest number of elements that one system call accepts (UIO_MAXIOV in linux/uio.h, POSIX IOV_MAX).
const MaxElems = 1024

// Vec is a list of byte ranges that is read or written as if it were one buffer. The zero Vec is empty and ready to
// use. Elements of length zero are allowed and skipped. A Vec is not safe for concurrent change; the bytes it describes
// follow the rules of their owner.
type Vec []Range

// ReaderAt reads at an absolute offset into a scattered buffer.
//
// ReadVecAt fills dst with the bytes at off and returns how many it read. A count below dst.Size() comes with an error
// that says why, unless the source ended there and says in its own comment that it reports its end by a short count.
// It may be called from several goroutines at once, keeps no reference to dst after it returned, and may change all of
// dst even when it reads less.
type ReaderAt interface {
	ReadVecAt(dst Vec, off int64) (int, error)
}

// WriterAt writes a scattered buffer at an absolute offset.
//
// WriteVecAt writes all of src at off and returns how many bytes it wrote; a count below src.Size() comes with an error
// that says why. It may be called from several goroutines at once, does not change src or its bytes, and keeps no
// reference to either after it returned.
type WriterAt interface {
	WriteVecAt(src Vec, off int64) (int, error)
}

// Of returns a Vec over bufs, in order. It keeps references to them.
func Of(bufs ...[]byte) Vec {
	v := make(Vec, 0, len(bufs))
	for _, b := range bufs {
		v = append(v, RangeOf(b))
	}
	return v
}

// Append adds b at the end, as the built-in append would.
func (v Vec) Append(b []byte) Vec { return append(v, RangeOf(b)) }

// Size returns the number of bytes that v describes, counting what overlaps as often as it occurs. A sum that does not
// fit an int is returned as math.MaxInt.
func (v Vec) Size() int {
	n := 0
	for i := range v {
		n += v[i].Len()
		if n < 0 {
			return math.MaxInt
		}
	}
	return n
}

// seek finds the byte at off: the element that holds it and the offset inside. The end of v is len(v), 0.
func (v Vec) seek(off int) (elem, skip int, err error) {
	skip = off
	if off >= 0 {
		for i := range v {
			n := v[i].Len()
			if skip < n {
				return i, skip, nil
			}
			skip -= n
		}
	}
	if skip != 0 {
		return 0, 0, v.outside(off, 0)
	}
	return len(v), 0, nil
}

// outside builds the error for a range that v does not hold.
func (v Vec) outside(off, n int) error {
	return fmt.Errorf("%w: %d bytes at offset %d of a vector of %d", ErrRange, n, off, v.Size())
}
