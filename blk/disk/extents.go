package disk

import (
	"context"

	"github.com/kvmlet/kvmlet/blk"
)

// Extent is a run of a disk of which all is known to be alike. In JSON it has the shape of `qemu-img map --output=json`.
type Extent struct {
	Start      int64  `json:"start"`
	Length     int64  `json:"length"`
	Depth      int    `json:"depth"`   // the layer that says what the bytes are, 0 for the disk itself
	Present    bool   `json:"present"` // that layer has them; else they are zeroes because nobody has
	Zero       bool   `json:"zero"`    // they read as zeroes
	Data       bool   `json:"data"`    // they are stored, and reading fetches them
	Compressed bool   `json:"compressed"`
	Offset     *int64 `json:"offset,omitempty"` // where in the file of that layer they are, one to one
}

// Extents calls f with all extents of d in their order, each as long as it can be. An error of f ends it.
func Extents(ctx context.Context, d *blk.Device, f func(Extent) error) error {
	var last Extent
	for off, size := int64(0), d.Size(); off < size; {
		e, err := extentAt(ctx, d, off, size-off)
		if err != nil {
			return err
		}
		off += e.Length
		switch {
		case last.Length == 0:
			last = e
		case last.goesOn(e):
			last.Length += e.Length
		default:
			if err := f(last); err != nil {
				return err
			}
			last = e
		}
	}
	if last.Length == 0 {
		return nil
	}
	return f(last)
}

// goesOn reports whether next, which follows e, is of the same kind.
func (e Extent) goesOn(next Extent) bool {
	if (e.Offset == nil) != (next.Offset == nil) || e.Offset != nil && *e.Offset+e.Length != *next.Offset {
		return false
	}
	return e.Depth == next.Depth && e.Present == next.Present && e.Zero == next.Zero && e.Data == next.Data &&
		e.Compressed == next.Compressed
}

// extentAt goes down the chain to the layer that decides.
func extentAt(ctx context.Context, d *blk.Device, off, n int64) (Extent, error) {
	e := Extent{Start: off, Length: n}
	for {
		s, run, err := d.BlockStatus(ctx, off, min(e.Length, d.Size()-off))
		if err != nil {
			return e, err
		}
		e.Length = run
		has := func(f blk.StatusFlags) bool { return s.Flags&f != 0 }
		below := d.Backing()
		switch {
		case has(blk.StatusAllocated):
			e.Present, e.Zero, e.Data, e.Compressed = true, has(blk.StatusZero), has(blk.StatusData), has(blk.StatusCompressed)
			if has(blk.StatusOffset) {
				at := s.Offset
				e.Offset = &at
			}
			return e, nil
		case below == nil || off >= below.Size():
			e.Zero = true
			return e, nil
		}
		e.Length = min(run, below.Size()-off)
		d = below
		e.Depth++
	}
}
