// Package strict checks that a driver is sent only requests that keep its blk.Limits. Drivers for tests use it, so that
// a Device which breaks a limit shows at once and not only on the hardware that has it.
package strict

import (
	"errors"
	"fmt"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// Err reports a request that breaks a rule of blk.Backend.
var Err = errors.New("request breaks the driver's limits")

// Transfer checks a read or write of v at off on a disk of size bytes.
func Transfer(l blk.Limits, size, off int64, v iov.Vec) error {
	n := int64(v.Size())
	if err := aligned(l, size, off, n); err != nil {
		return err
	}
	switch {
	case l.MaxTransfer > 0 && n > l.MaxTransfer:
		return fmt.Errorf("%w: %d bytes at once, %d allowed", Err, n, l.MaxTransfer)
	case l.MaxVec > 0 && len(v) > l.MaxVec:
		return fmt.Errorf("%w: vector of %d elements, %d allowed", Err, len(v), l.MaxVec)
	}
	if l.MemoryAlign <= 1 {
		return nil
	}
	for i, r := range v {
		if r.Len() > 0 && (address(r)|uintptr(r.Len()))&uintptr(l.MemoryAlign-1) != 0 {
			return fmt.Errorf("%w: element %d of %d is %d bytes at address %#x, not aligned to %d",
				Err, i, len(v), r.Len(), address(r), l.MemoryAlign)
		}
	}
	return nil
}

// Discard checks a discard.
func Discard(l blk.Limits, size, off, n int64) error {
	return units(l, size, off, n, l.DiscardAlign, l.MaxDiscard)
}

// Zero checks a write of zeroes.
func Zero(l blk.Limits, size, off, n int64) error {
	return units(l, size, off, n, l.ZeroAlign, l.MaxZero)
}

// Range checks a request that has no limits of its own but the alignment, such as a question for the status.
func Range(l blk.Limits, size, off, n int64) error { return aligned(l, size, off, n) }

// aligned checks what holds for all requests.
func aligned(l blk.Limits, size, off, n int64) error {
	align := max(int64(l.RequestAlign), 1)
	end := (size + align - 1) / align * align
	switch {
	case off < 0 || n <= 0 || off > end || n > end-off:
		return fmt.Errorf("%w: %d bytes at %d of a disk of %d", Err, n, off, size)
	case off%align != 0 || n%align != 0:
		return fmt.Errorf("%w: %d bytes at %d, not aligned to %d", Err, n, off, align)
	}
	return nil
}

// units checks a range that consists of whole units, or of a part of one. The last unit ends with the disk.
func units(l blk.Limits, size, off, n, unit, most int64) error {
	if err := aligned(l, size, off, n); err != nil {
		return err
	}
	if most > 0 && n > most {
		return fmt.Errorf("%w: %d bytes at once, %d allowed", Err, n, most)
	}
	if unit <= 1 {
		return nil
	}
	end := off + n
	whole := off%unit == 0 && (end%unit == 0 || end >= size)
	if !whole && off/unit != (end-1)/unit {
		return fmt.Errorf("%w: %d bytes at %d are neither whole units of %d nor a part of one", Err, n, off, unit)
	}
	return nil
}

// Aligned reports whether b begins at a multiple of align, a power of two.
func Aligned(b []byte, align int) bool { return address(iov.RangeOf(b))&uintptr(align-1) == 0 }
