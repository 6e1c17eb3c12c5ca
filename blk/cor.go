package blk

import (
	"context"

	"github.com/kvmlet/kvmlet/iov"
)

// copiesOnRead reports whether a read stores what it gets from the backing file.
func (d *Device) copiesOnRead(flags Flags) bool {
	return (d.copyOnRead || flags&CopyOnRead != 0) && !d.readOnly && d.can.status != nil && d.Backing() != nil
}

// clusters widens a range to the unit in which the backend allocates, within the disk.
func (d *Device) clusters(l *Limits, off, n int64) (start, end int64) {
	unit := max(l.Cluster, int64(l.RequestAlign))
	start = off &^ (unit - 1)
	// Clusters larger than what is left of the address space don't overflow: the end is cut to the disk's.
	end = l.up(d.size.Load())
	if off+n < end-unit {
		end = (off + n + unit - 1) &^ (unit - 1)
	}
	return start, end
}

// readThrough reads like readBytes, and stores in this layer what came from the backing file: whole clusters, so that it
// need not ask again. The caller has the clusters for itself.
func (d *Device) readThrough(ctx context.Context, dst iov.Vec, off int64, size int) error {
	l := d.limits.Load()
	w := getWork()
	defer putWork(w)
	stop := off + int64(size)
	start, end := d.clusters(l, off, int64(size))
	for start < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		s, run, err := d.status(start, min(end, d.size.Load())-start)
		if err != nil {
			return err
		}
		run = min(l.up(run), end-start)
		// The part of the run that the caller wants. It may be empty, at both ends of the clusters.
		from, to := max(start, off), min(start+run, stop)
		if s.Flags&StatusAllocated != 0 {
			if from < to {
				w.one, err = dst.AppendSlice(w.one[:0], int(from-off), int(to-from))
				if err == nil {
					err = d.readBytes(ctx, w.one, from, int(to-from))
				}
			}
		} else {
			run = min(run, bounceSize)
			to = min(start+run, stop)
			buf := w.bounceBuffer(l, int(run))
			if err = d.copyUp(ctx, w, buf, start); err == nil && from < to {
				_, err = dst.CopyFrom(int(from-off), buf[from-start:to-start])
			}
		}
		if err != nil {
			return err
		}
		start += run
	}
	return nil
}

// copyUp fills buf with the bytes at off and writes them to this layer.
func (d *Device) copyUp(ctx context.Context, w *work, buf []byte, off int64) error {
	w.one = w.one[:0].Append(buf)
	if err := d.readBytes(ctx, w.one, off, len(buf)); err != nil {
		return err
	}
	d.Event(EventCopyOnRead)
	defer d.written.Add(1)
	if w.one.IsZero() {
		return d.zeroBytes(ctx, off, int64(len(buf)), 0)
	}
	return d.writeBytes(ctx, w.one, off, len(buf), false)
}
