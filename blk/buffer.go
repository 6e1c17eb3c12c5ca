package blk

import (
	"sync"

	"github.com/kvmlet/kvmlet/iov"
)

// Sizes of the buffers that requests borrow, in bytes.
const (
	smallBounce = 64 << 10 // what most requests need that are copied
	bounceSize  = 1 << 20  // most that is copied, or written as zeroes, at once
	zeroSize    = 64 << 10
)

// zeroes is what zeroes are written from: one buffer, named in a vector as often as it takes. Nobody writes to it.
var zeroes = alignedBytes(zeroSize, maxAlign)

// work is what a request needs beyond itself while it is under way: an entry in the tracker, and room for what it does
// to vectors. It is borrowed, so that a request allocates nothing.
type work struct {
	tracked tracked
	padded  iov.Vec // the request widened to the backend's alignment
	rest    iov.Vec // what transfer has not sent yet
	piece   iov.Vec // what it sends next
	one     iov.Vec // a vector of one element
	zero    iov.Vec // zeroes, written as data
	pad     buffer
	bounce  buffer
}

var works = sync.Pool{New: func() any { return new(work) }}

// keepElems is how long the vectors of a work may have grown to be kept for the next request.
const keepElems = 4096

func getWork() *work { return works.Get().(*work) }

func putWork(w *work) {
	// One large request must not make the room large for ever.
	for _, v := range []*iov.Vec{&w.padded, &w.rest, &w.piece, &w.one, &w.zero} {
		if cap(*v) > keepElems {
			*v = nil
		}
	}
	works.Put(w)
}

// buffer is aligned memory that is made when it is needed.
type buffer struct {
	bytes []byte
	align int
}

// get returns at least n bytes at a multiple of align.
func (b *buffer) get(n, align int) []byte {
	if len(b.bytes) < n || b.align < align {
		b.bytes, b.align = alignedBytes(n, align), align
	}
	return b.bytes
}

// padBuffer returns room for the first and the last block of a padded request.
func (w *work) padBuffer(l *Limits) (first, last []byte) {
	b := w.pad.get(2*l.RequestAlign, l.RequestAlign)
	return b, b[l.RequestAlign:]
}

// bounceBuffer returns n bytes, at most bounceSize, that the backend can use.
func (w *work) bounceBuffer(l *Limits, n int) []byte {
	size := bounceSize
	if n <= smallBounce {
		size = smallBounce
	}
	return w.bounce.get(size, l.MemoryAlign)[:n]
}
