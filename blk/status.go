package blk

import (
	"context"
	"fmt"
)

// Backing returns the Device under this one in the chain, or nil.
func (d *Device) Backing() *Device {
	if d.can.backed == nil {
		return nil
	}
	return d.can.backed.Backing()
}

// BlockStatus tells what this layer knows of the bytes from off on, and for how many of the n bytes asked for that holds:
// at least 1. A disk whose driver knows nothing is all data. Errors: as for a read.
func (d *Device) BlockStatus(ctx context.Context, off, n int64) (Status, int64, error) {
	if err := d.gate.enter(ctx); err != nil {
		return Status{}, 0, err
	}
	defer d.gate.leave()
	if err := d.checkRange(off, n); err != nil || n == 0 {
		return Status{}, 0, err
	}
	return d.status(off, n)
}

// status is BlockStatus within the gate, on a range within the disk.
func (d *Device) status(off, n int64) (Status, int64, error) {
	if d.can.status == nil {
		return Status{Flags: StatusData | StatusAllocated}, n, nil
	}
	// In the backend's own alignment, which may be finer than that of requests: what is within one block may differ.
	unit := Limits{RequestAlign: int(d.own.Load())}
	start, end := unit.down(off), unit.up(off+n)
	for {
		s, run, err := d.can.status.BlockStatus(start, end-start)
		switch {
		case unsupported(err):
			return Status{Flags: StatusData | StatusAllocated}, n, nil
		case err != nil:
			return Status{}, 0, d.stats.failed(err)
		case run <= 0:
			return Status{}, 0, d.stats.failed(fmt.Errorf("blk: status of %d bytes at %d: a run of %d", end-start, start, run))
		}
		if start+run <= off { // all of it lies before what was asked for
			start += run
			continue
		}
		if s.Flags&StatusOffset != 0 {
			s.Offset += off - start
		}
		return s, min(start+run-off, n), nil
	}
}

// StatusAbove is BlockStatus for a chain: it tells what the first layer says to which the bytes belong, and how far below
// d that layer is, 0 for d itself. Layers from base on are left out; a nil base leaves out none. Bytes that belong to no
// layer read as zeroes where the chain ends, or as base does; their Status has no StatusAllocated, and their depth is -1.
// Bytes beyond the end of a layer that is shorter than those above it are zeroes that belong to it.
func (d *Device) StatusAbove(ctx context.Context, base *Device, off, n int64) (s Status, depth int, run int64, err error) {
	if err := d.checkRange(off, n); err != nil || n == 0 {
		return Status{}, 0, 0, err
	}
	run = n
	for layer := d; layer != nil && layer != base; layer = layer.Backing() {
		if off >= layer.Size() {
			return Status{Flags: StatusZero | StatusAllocated}, depth, run, nil
		}
		s, run, err = layer.BlockStatus(ctx, off, min(run, layer.Size()-off))
		if err != nil || s.Flags&StatusAllocated != 0 {
			return s, depth, run, err
		}
		depth++
	}
	s = Status{}
	if base == nil {
		s.Flags = StatusZero
	}
	return s, -1, run, nil
}

// AllocatedAbove reports whether the bytes from off on belong to a layer above base, d included, and for how many of the n
// bytes asked for that holds.
func (d *Device) AllocatedAbove(ctx context.Context, base *Device, off, n int64) (bool, int64, error) {
	s, _, run, err := d.StatusAbove(ctx, base, off, n)
	return s.Flags&StatusAllocated != 0, run, err
}

// MakeZero makes the whole disk read as zeroes. It leaves alone what does already, so on a sparse disk it takes little
// time. flags may hold MayUnmap and NoFallback. Writes that come meanwhile may be lost or not, each as a whole.
func (d *Device) MakeZero(ctx context.Context, flags Flags) error {
	for off, size := int64(0), d.Size(); off < size; {
		s, _, run, err := d.StatusAbove(ctx, nil, off, size-off)
		if err != nil {
			return err
		}
		if s.Flags&StatusZero == 0 {
			if err := d.WriteZeroes(ctx, off, run, flags); err != nil {
				return err
			}
		}
		off += run
	}
	return d.FlushContext(ctx)
}
