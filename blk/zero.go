package blk

import (
	"context"
	"errors"

	"github.com/kvmlet/kvmlet/iov"
)

// DetectZeroes says what becomes of writes whose bytes are all zero.
type DetectZeroes uint8

// The values have the names of QEMU's detect-zeroes option.
const (
	DetectOff   DetectZeroes = iota // they are written as any others
	DetectOn                        // they are written as OpWriteZeroes
	DetectUnmap                     // likewise, and the space may be given back
)

func (z DetectZeroes) flags() Flags {
	if z == DetectUnmap {
		return MayUnmap
	}
	return 0
}

func unsupported(err error) bool { return errors.Is(err, errors.ErrUnsupported) }

// zeroBytes makes n bytes at off read as zeroes. Blocks that it covers in part are read and written back, so where the
// range is not aligned the caller has it for itself.
func (d *Device) zeroBytes(ctx context.Context, off, n int64, flags Flags) error {
	l := d.limits.Load()
	w := getWork()
	defer putWork(w)
	end := off + n
	first, last := min(l.up(off), end), max(l.down(end), off)
	if last <= first { // not one whole block
		return d.writeZeroData(ctx, w, l, off, end)
	}
	if err := d.writeZeroData(ctx, w, l, off, first); err != nil {
		return err
	}
	if err := d.zeroBlocks(ctx, w, l, first, last, flags); err != nil {
		return err
	}
	return d.writeZeroData(ctx, w, l, last, end)
}

// zeroBlocks does the aligned part of zeroBytes: by the backend's own means where it has some, else by writing zeroes.
func (d *Device) zeroBlocks(ctx context.Context, w *work, l *Limits, off, end int64, flags Flags) error {
	for off < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := splitUnit(off, end, l.ZeroAlign, l.MaxZero)
		err := d.zeroBackend(off, n, flags)
		if unsupported(err) && flags&NoFallback == 0 {
			err = d.writeZeroData(ctx, w, l, off, off+n)
		}
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

func (d *Device) zeroBackend(off, n int64, flags Flags) error {
	if d.can.zero == nil {
		return ErrUnsupported
	}
	d.Event(EventWriteZeroes)
	unmap := flags&MayUnmap != 0
	err := d.can.zero.WriteZeroes(off, n, unmap)
	if unmap && unsupported(err) {
		err = d.can.zero.WriteZeroes(off, n, false)
	}
	if err != nil && !unsupported(err) {
		return d.stats.failed(err)
	}
	return err
}

// splitUnit returns how many bytes of [off, end) go into the next call of an operation that wants whole units, and no
// more than most bytes: up to the next unit where off lies within one, otherwise all whole units, otherwise the rest.
func splitUnit(off, end, unit, most int64) int64 {
	n := end - off
	if most >= unit {
		most -= most % unit
	}
	if head := off % unit; head != 0 {
		n = min(n, unit-head)
	} else if n > unit {
		n -= n % unit
	}
	return min(n, most)
}

// writeZeroData writes zeroes as data over [off, end), a bounded part at a time.
func (d *Device) writeZeroData(ctx context.Context, w *work, l *Limits, off, end int64) error {
	for off < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(end-off, bounceSize)
		if stop := off + n; stop < end { // so that only the last part is not aligned
			n = l.down(stop) - off
		}
		w.zero = appendZeroes(w.zero[:0], int(n))
		if err := d.writeBytes(ctx, w.zero, off, int(n), false); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// appendZeroes appends n zero bytes to v.
func appendZeroes(v iov.Vec, n int) iov.Vec {
	for n > 0 {
		part := min(n, len(zeroes))
		v = v.Append(zeroes[:part])
		n -= part
	}
	return v
}

// discardBytes tells the backend that nobody needs n bytes at off. It is a hint: blocks that the range covers in part
// stay, and so does what the backend can't discard.
func (d *Device) discardBytes(ctx context.Context, off, n int64) error {
	l := d.limits.Load()
	end := l.down(off + n)
	if off+n == d.size.Load() {
		end = l.up(off + n) // the last block ends with the disk
	}
	if d.can.discard == nil {
		return nil
	}
	for off = l.up(off); off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := splitUnit(off, end, l.DiscardAlign, l.MaxDiscard)
		d.Event(EventDiscard)
		if err := d.can.discard.Discard(off, n); err != nil && !unsupported(err) {
			return d.stats.failed(err)
		}
		off += n
	}
	return nil
}
