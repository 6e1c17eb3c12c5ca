package blk

import (
	"context"
	"io"
	"math"

	"github.com/kvmlet/kvmlet/iov"
)

// maxPiece is the most that goes to a backend at once which names no maximum, in bytes: a request of several GiB, which a
// guest can make, is looked after in between.
const maxPiece = 4 << 20

// normal returns l with every 0 that stands for "any" replaced by what it means.
func (l Limits) normal() Limits {
	orDefault := func(n, value int64) int64 {
		if n == 0 {
			return value
		}
		return n
	}
	l.RequestAlign = max(l.RequestAlign, 1)
	l.MemoryAlign = max(l.MemoryAlign, 1)
	align := int64(l.RequestAlign)
	most := math.MaxInt64 &^ (align - 1)
	l.MaxTransfer = orDefault(l.MaxTransfer, maxPiece)
	l.MaxVec = int(orDefault(int64(l.MaxVec), math.MaxInt))
	l.DiscardAlign = orDefault(l.DiscardAlign, align)
	l.ZeroAlign = orDefault(l.ZeroAlign, align)
	l.MaxDiscard = orDefault(l.MaxDiscard, most)
	l.MaxZero = orDefault(l.MaxZero, most)
	return l
}

// down and up round an offset to the request alignment. No offset within a disk overflows: up stays below 2^63 because
// sizes are checked by New to leave room for it.
func (l *Limits) down(off int64) int64 { return off &^ (int64(l.RequestAlign) - 1) }
func (l *Limits) up(off int64) int64   { return l.down(off + int64(l.RequestAlign) - 1) }

// aligned reports whether a range needs no padding.
func (l *Limits) aligned(off, n int64) bool { return (off|n)&(int64(l.RequestAlign)-1) == 0 }

// fits reports whether the backend takes a transfer of all of v, which is size bytes, at off as it stands.
func (l *Limits) fits(v iov.Vec, off int64, size int) bool {
	return l.aligned(off, int64(size)) && int64(size) <= l.MaxTransfer && len(v) <= l.MaxVec &&
		(l.MemoryAlign == 1 || memoryAligned(v, l.MemoryAlign))
}

// readBytes fills dst, which is size bytes, with those at off, whatever alignment the backend wants.
func (d *Device) readBytes(ctx context.Context, dst iov.Vec, off int64, size int) error {
	l := d.limits.Load()
	if l.fits(dst, off, size) {
		return d.readBackend(ctx, dst, off, size)
	}
	w := getWork()
	defer putWork(w)
	start, end := l.down(off), l.up(off+int64(size))
	head, tail := int(off-start), int(end-off)-size
	if head == 0 && tail == 0 {
		return d.transfer(ctx, w, l, transferRead, dst, off, size)
	}
	first, last := w.padBuffer(l)
	v, err := dst.AppendPadded(w.padded[:0], first[:head], 0, size, last[:tail])
	if err != nil {
		return err
	}
	w.padded = v
	d.Event(EventReadPadded)
	return d.transfer(ctx, w, l, padded(transferRead, head), v, start, int(end-start))
}

// writeBytes writes src, which is size bytes, at off, whatever alignment the backend wants. Where the range does not
// begin and end at the alignment, the caller has it for itself: its first and last block are read and written back.
func (d *Device) writeBytes(ctx context.Context, src iov.Vec, off int64, size int, fua bool) error {
	l := d.limits.Load()
	how := transferWrite
	if fua {
		how = transferFUA
	}
	if l.fits(src, off, size) {
		return d.writeBackend(ctx, src, off, size, how)
	}
	w := getWork()
	defer putWork(w)
	if l.aligned(off, int64(size)) {
		return d.transfer(ctx, w, l, how, src, off, size)
	}
	return d.modify(ctx, w, l, how, src, off, size)
}

// modify carries out a write that is not aligned: it reads the blocks that src covers in part, in one read where they
// lie together, and writes them with src in between.
func (d *Device) modify(ctx context.Context, w *work, l *Limits, how transferKind, src iov.Vec, off int64, size int) error {
	align := int64(l.RequestAlign)
	start, end := l.down(off), l.up(off+int64(size))
	head, tail := int(off-start), int(end-off)-size
	pad, last := w.padBuffer(l)
	first, last := pad[:align], last[:align]
	together := end-start == align || end-start == 2*align && head > 0 && tail > 0
	if together {
		first = pad[:end-start]
		last = first[len(first)-int(align):]
	}
	if head > 0 || together {
		if head > 0 {
			d.Event(EventPaddedHead)
		}
		if together && tail > 0 {
			d.Event(EventPaddedTail)
		}
		if err := d.readBlock(ctx, l, first, start); err != nil {
			return err
		}
		if head > 0 {
			d.Event(EventPaddedAfterHead)
		}
		if together && tail > 0 {
			d.Event(EventPaddedAfterTail)
		}
	}
	if tail > 0 && !together {
		d.Event(EventPaddedTail)
		if err := d.readBlock(ctx, l, last, end-align); err != nil {
			return err
		}
		d.Event(EventPaddedAfterTail)
	}
	v, err := src.AppendPadded(w.padded[:0], first[:head], 0, size, last[len(last)-tail:])
	if err != nil {
		return err
	}
	w.padded = v
	return d.transfer(ctx, w, l, padded(how, head), v, start, int(end-start))
}

// readBlock reads whole blocks into p, in a work of its own where they take more than one read.
func (d *Device) readBlock(ctx context.Context, l *Limits, p []byte, off int64) error {
	w := getWork()
	defer putWork(w)
	w.one = w.one[:0].Append(p)
	if l.fits(w.one, off, len(p)) {
		return d.readBackend(ctx, w.one, off, len(p))
	}
	return d.transfer(ctx, w, l, transferRead, w.one, off, len(p))
}

// transferKind says what transfer does with its vector.
type transferKind uint8

const (
	transferRead transferKind = iota
	transferWrite
	transferFUA                          // a write that is stable on return
	transferHeaded transferKind = 1 << 7 // the first element is padding
)

func padded(k transferKind, head int) transferKind {
	if head > 0 {
		return k | transferHeaded
	}
	return k
}

// transfer moves v, which is size bytes and aligned as a whole, in as few calls of the backend as its limits allow.
//
// A vector that is longer than the backend takes goes in pieces that end at the alignment. If it is longer by one or two
// elements only, which is what padding adds, it goes as one: as many elements as are too many, and one more, are copied
// into one buffer behind the head. Memory that the backend can't use is copied as well, a bounded part at a time.
func (d *Device) transfer(ctx context.Context, w *work, l *Limits, how transferKind, v iov.Vec, off int64, size int) error {
	keep := 0
	if how&transferHeaded != 0 {
		keep = 1
		how &^= transferHeaded
	}
	w.rest = append(w.rest[:0], v...)
	rest := w.rest
	for done := 0; done < size; keep = 0 {
		if done > 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		n := int(min(int64(size-done), l.MaxTransfer))
		whole, elems, aligned := l.measure(rest, n)
		var err error
		switch {
		case whole == n:
			err = d.movePiece(ctx, w, rest, how, n, off)
		case aligned && l.collapsible(rest, elems, keep):
			err = d.moveCollapsed(ctx, w, l, rest, how, n, off, elems-l.MaxVec+1, keep)
		case aligned && whole > 0:
			n = whole
			err = d.movePiece(ctx, w, rest, how, n, off)
		default:
			n = min(n, bounceSize)
			err = d.moveBounced(ctx, w, l, rest, how, n, off)
		}
		if err != nil {
			return err
		}
		rest.DiscardFront(n)
		done += n
		off += int64(n)
	}
	return nil
}

// measure looks at the first n bytes of v: how many of them the backend takes in one call as they stand, how many
// elements they are, and whether each of these is aligned in memory.
func (l *Limits) measure(v iov.Vec, n int) (whole, elems int, aligned bool) {
	aligned = true
	sum, fits := 0, 0
	for i := range v {
		if v[i].Len() == 0 {
			continue
		}
		if sum >= n {
			break
		}
		elems++
		sum += v[i].Len()
		if l.MemoryAlign > 1 && !memoryAligned(v[i:i+1], l.MemoryAlign) {
			aligned = false
		}
		if elems <= l.MaxVec && aligned {
			fits = sum
		}
	}
	return int(l.down(int64(min(fits, n)))), elems, aligned
}

// collapsible reports whether a vector of elems elements, of which the first keep are padding, is too long by so little
// that a few elements at its front are copied into one.
func (l *Limits) collapsible(v iov.Vec, elems, keep int) bool {
	surplus := elems - l.MaxVec
	if surplus < 1 || surplus > 2 || keep+surplus >= elems {
		return false
	}
	sum, seen := 0, 0
	for i := range v {
		if v[i].Len() == 0 {
			continue
		}
		if seen++; seen > keep+surplus+1 {
			break
		}
		if seen > keep {
			sum += v[i].Len()
		}
	}
	return sum <= bounceSize
}

// movePiece moves the first n bytes of rest.
func (d *Device) movePiece(ctx context.Context, w *work, rest iov.Vec, how transferKind, n int, off int64) error {
	piece, err := rest.AppendSlice(w.piece[:0], 0, n)
	if err != nil {
		return err
	}
	w.piece = piece
	return d.move(ctx, how, piece, off, n)
}

// moveCollapsed moves the first n bytes of rest, with merge elements behind the first keep ones copied into one.
func (d *Device) moveCollapsed(
	ctx context.Context, w *work, l *Limits, rest iov.Vec, how transferKind, n int, off int64, merge, keep int,
) error {
	piece, err := rest.AppendSlice(w.piece[:0], 0, n)
	if err != nil {
		return err
	}
	w.piece = piece // without empty elements, and ending at n
	kept, merged := piece[:keep].Size(), piece[keep:keep+merge].Size()
	buf := w.bounceBuffer(l, merged)
	if how != transferRead {
		if _, err := rest.CopyTo(buf, kept); err != nil {
			return err
		}
	}
	piece[keep] = iov.RangeOf(buf)
	w.piece = append(piece[:keep+1], piece[keep+merge:]...)
	if err := d.move(ctx, how, w.piece, off, n); err != nil || how != transferRead {
		return err
	}
	_, err = rest.CopyFrom(kept, buf)
	return err
}

// moveBounced moves the first n bytes of rest by way of a buffer.
func (d *Device) moveBounced(ctx context.Context, w *work, l *Limits, rest iov.Vec, how transferKind, n int, off int64) error {
	buf := w.bounceBuffer(l, n)
	w.piece = w.piece[:0].Append(buf)
	if how != transferRead {
		if _, err := rest.CopyTo(buf, 0); err != nil {
			return err
		}
		return d.move(ctx, how, w.piece, off, n)
	}
	if err := d.move(ctx, how, w.piece, off, n); err != nil {
		return err
	}
	_, err := rest.CopyFrom(0, buf)
	return err
}

func (d *Device) move(ctx context.Context, how transferKind, v iov.Vec, off int64, n int) error {
	if how == transferRead {
		return d.readBackend(ctx, v, off, n)
	}
	return d.writeBackend(ctx, v, off, n, how)
}

// readBackend reads n bytes, which dst holds, and gives those that the storage lacks as zeroes.
func (d *Device) readBackend(ctx context.Context, dst iov.Vec, off int64, n int) error {
	d.Event(EventRead)
	got, err := d.call(ctx, OpRead, dst, off)
	d.Event(EventReadDone)
	return d.readEnded(dst, n, got, err)
}

func (d *Device) readEnded(dst iov.Vec, n, got int, err error) error {
	switch {
	case err != nil:
		return d.stats.failed(err)
	case got < n:
		return dst.Fill(got, n-got, 0)
	}
	return nil
}

// writeBackend writes n bytes, which src holds.
func (d *Device) writeBackend(ctx context.Context, src iov.Vec, off int64, n int, how transferKind) error {
	d.Event(EventWrite)
	put, err := 0, ErrUnsupported
	if how == transferFUA && d.can.fua != nil {
		put, err = d.can.fua.WriteVecFUA(src, off)
	}
	if how != transferFUA || unsupported(err) {
		put, err = d.call(ctx, OpWrite, src, off)
		if how == transferFUA && err == nil && put == n {
			err = d.backend.Flush()
		}
	}
	d.Event(EventWriteDone)
	return d.writeEnded(n, put, err)
}

func (d *Device) writeEnded(n, put int, err error) error {
	if err == nil && put < n {
		err = io.ErrShortWrite
	}
	if err != nil {
		return d.stats.failed(err)
	}
	return nil
}
