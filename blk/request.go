package blk

import (
	"context"
	"fmt"
	"time"

	"github.com/kvmlet/kvmlet/iov"
)

// Op is what a Request asks for.
type Op uint8

// The operations. A write, of data or zeroes, that fails leaves each byte of its range old or new.
const (
	OpRead        Op = iota // Off, Vec
	OpWrite                 // Off, Vec
	OpFlush                 // every write that completed before is stable afterwards
	OpDiscard               // Off, Len: a hint that nobody needs the bytes
	OpWriteZeroes           // Off, Len: the bytes read as zeroes afterwards
	numOps
)

// Flags change what a Request does.
type Flags uint8

// The flags, and the operations that they belong to; others ignore them.
const (
	FUA        Flags = 1 << iota // OpWrite, OpWriteZeroes: stable on return, without a Flush
	MayUnmap                     // OpWriteZeroes: the space may be given back
	NoFallback                   // OpWriteZeroes: ErrUnsupported where whole blocks of zeroes would have to be written out
	Compressed                   // OpWrite of whole clusters: stored compressed, as by CompressedWriter
	CopyOnRead                   // OpRead: what comes from the backing file is stored in this layer on the way
)

// Request is one request to a Device. Its owner fills in the first part, leaves it and the bytes of Vec alone until the
// request is done, and may use it again then.
type Request struct {
	Op    Op
	Flags Flags
	Off   int64
	Len   int64   // OpDiscard, OpWriteZeroes
	Vec   iov.Vec // OpRead, OpWrite

	// Done is called once when a request that was given to Submit is done, from any goroutine and possibly before Submit
	// returns. It may submit again, this request too, but not wait for another request, nor drain or close the disk:
	// Drain returns when the Done of all requests has. Do does not call it.
	Done func(*Request)

	Err error // set before Done is called

	submitted submitted
}

// bytes returns how many bytes r moves.
func (r *Request) bytes() int64 {
	switch r.Op {
	case OpRead, OpWrite:
		return int64(r.Vec.Size())
	case OpFlush:
		return 0
	}
	return r.Len
}

// Do carries out r on the caller's goroutine and returns when it is done. After a failed read the contents of its Vec are
// undefined. Where ctx ends while r still waits, or between two parts of it, Do returns ctx's error; what the backend
// has begun it completes first.
//
// Errors: ErrRange, ErrReadOnly, ErrNoMedium, ErrClosed, ErrUnsupported for a flag that the backend can't serve, those of
// ctx, and what the Backend reports.
func (d *Device) Do(ctx context.Context, r *Request) error {
	began := time.Now()
	n, err := int64(0), d.gate.enter(ctx)
	if err == nil {
		n, err = d.do(ctx, r)
		d.gate.leave()
	}
	d.stats.ended(r.Op, n, began, err)
	return err
}

// ReadVecAt fills dst with the bytes of the disk from offset off on and returns dst.Size(), or 0 and an error: Do with
// OpRead.
func (d *Device) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	return counted(d.Do(context.Background(), &Request{Op: OpRead, Vec: dst, Off: off}), dst)
}

// WriteVecAt writes src at offset off and returns src.Size(), or 0 and an error: Do with OpWrite. The bytes are stable
// after the next Flush.
func (d *Device) WriteVecAt(src iov.Vec, off int64) (int, error) {
	return counted(d.Do(context.Background(), &Request{Op: OpWrite, Vec: src, Off: off}), src)
}

func counted(err error, v iov.Vec) (int, error) {
	if err != nil {
		return 0, err
	}
	return v.Size(), nil
}

// Flush returns when every write that completed before the call is on stable storage: Do with OpFlush.
func (d *Device) Flush() error { return d.FlushContext(context.Background()) }

// FlushContext is Flush, with an error where ctx ends before the backend has been asked.
func (d *Device) FlushContext(ctx context.Context) error { return d.Do(ctx, &Request{Op: OpFlush}) }

// Discard tells the disk that nobody needs n bytes at off any more: Do with OpDiscard.
func (d *Device) Discard(ctx context.Context, off, n int64) error {
	return d.Do(ctx, &Request{Op: OpDiscard, Off: off, Len: n})
}

// WriteZeroes makes n bytes at off read as zeroes: Do with OpWriteZeroes.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64, flags Flags) error {
	return d.Do(ctx, &Request{Op: OpWriteZeroes, Off: off, Len: n, Flags: flags})
}

// do takes r, which has passed the gate, through all other stages and returns how many bytes it moved.
func (d *Device) do(ctx context.Context, r *Request) (int64, error) {
	n := r.bytes()
	if err := d.check(r, n); err != nil {
		return 0, err
	}
	if r.Op == OpFlush {
		return 0, d.flush(ctx)
	}
	if n == 0 {
		return 0, nil
	}
	if m := d.throttle.Load(); m != nil && r.Op != OpDiscard { // which moves nothing; QEMU lets them through as well
		if err := m.wait(ctx, r.Op != OpRead, n); err != nil {
			return 0, err
		}
	}
	err := ctx.Err()
	switch {
	case err != nil:
	case r.Op != OpRead:
		err = d.change(ctx, r, n)
	case d.copiesOnRead(r.Flags):
		err = d.readTracked(ctx, r, n)
	default:
		// A read needs no turn of its own: a write that it overlaps was not done when it came.
		if err = d.takeSlot(ctx); err == nil {
			err = d.readBytes(ctx, r.Vec, r.Off, int(n))
			d.leaveSlot(ctx)
		}
	}
	if err != nil {
		return 0, err
	}
	return n, nil
}

// check refuses what no backend is asked.
func (d *Device) check(r *Request, n int64) error {
	switch {
	case r.Op >= numOps:
		return fmt.Errorf("blk: operation %d: %w", r.Op, ErrUnsupported)
	case d.can.removable != nil && !d.can.removable.Inserted():
		return ErrNoMedium
	case r.Op == OpFlush:
		return nil
	case r.Op != OpRead && d.readOnly:
		return ErrReadOnly
	}
	return d.checkRange(r.Off, n)
}

// checkRange compares without adding: off and n come from the guest, and their sum may not fit.
func (d *Device) checkRange(off, n int64) error {
	size := d.size.Load()
	if off < 0 || off > size || n < 0 || n > size-off {
		return ErrRange
	}
	return nil
}

// readTracked copies on read, with the clusters that it touches for itself.
func (d *Device) readTracked(ctx context.Context, r *Request, n int64) error {
	w := getWork()
	defer putWork(w)
	start, end := d.clusters(d.limits.Load(), r.Off, n)
	if err := d.tracker.begin(ctx, &w.tracked, start, end, true); err != nil {
		return err
	}
	defer d.tracker.end(&w.tracked)
	if err := d.takeSlot(ctx); err != nil {
		return err
	}
	defer d.leaveSlot(ctx)
	return d.readThrough(ctx, r.Vec, r.Off, int(n))
}

// tracks reports whether writes have to be known to those that serialise, because some may.
func (d *Device) tracks(l *Limits) bool { return l.RequestAlign > 1 || d.can.backed != nil }

// change carries out a request that changes n bytes.
func (d *Device) change(ctx context.Context, r *Request, n int64) error {
	l := d.limits.Load()
	if d.tracks(l) {
		w := getWork()
		defer putWork(w)
		start, end, serialise := r.Off, r.Off+n, false
		if r.Op != OpDiscard && !l.aligned(r.Off, n) {
			start, end, serialise = l.down(start), l.up(end), true
		}
		if err := d.tracker.begin(ctx, &w.tracked, start, end, serialise); err != nil {
			return err
		}
		defer d.tracker.end(&w.tracked)
	}
	if err := d.notifyBeforeWrite(ctx, r.Off, n); err != nil {
		return err
	}
	if err := d.takeSlot(ctx); err != nil {
		return err
	}
	defer d.leaveSlot(ctx)
	stable := (r.Flags&FUA != 0 || d.through) && !d.noFlush && r.Op != OpDiscard
	forced, err := d.apply(ctx, r, n, stable)
	d.changed(r.Off, n) // whatever came of it: some of the bytes may be new
	if err == nil && stable && !forced {
		err = d.flush(ctx)
	}
	return err
}

// apply does what r asks for. If stable is set and it returns true, what it wrote is stable.
func (d *Device) apply(ctx context.Context, r *Request, n int64, stable bool) (forced bool, err error) {
	switch {
	case r.Op == OpDiscard:
		return false, d.discardBytes(ctx, r.Off, n)
	case r.Op == OpWriteZeroes:
		return false, d.zeroBytes(ctx, r.Off, n, r.Flags)
	case r.Flags&Compressed != 0:
		return false, d.writeCompressed(ctx, r.Vec, r.Off, n)
	case d.detect != DetectOff && d.can.zero != nil && r.Vec.IsZero():
		return false, d.zeroBytes(ctx, r.Off, n, d.detect.flags())
	}
	// One at a time is forced: several come sooner to an end if they share a flush.
	forced = stable && d.can.fua != nil && d.forcing.CompareAndSwap(false, true)
	if forced {
		defer d.forcing.Store(false)
	}
	return forced, d.writeBytes(ctx, r.Vec, r.Off, int(n), forced)
}

// changed tells that bytes may be new.
func (d *Device) changed(off, n int64) {
	d.bitmaps.mark(off, n)
	d.written.Add(1)
}

// writeCompressed hands the backend one cluster at a time.
func (d *Device) writeCompressed(ctx context.Context, src iov.Vec, off, n int64) error {
	l := d.limits.Load()
	if d.can.compressed == nil || l.Cluster == 0 {
		return fmt.Errorf("compressed write: %w", ErrUnsupported)
	}
	if off%l.Cluster != 0 || n%l.Cluster != 0 && off+n != d.size.Load() {
		return fmt.Errorf("%w: compressed write of %d bytes at %d: want clusters of %d", ErrRange, n, off, l.Cluster)
	}
	w := getWork()
	defer putWork(w)
	for at := int64(0); at < n; at += l.Cluster {
		if err := ctx.Err(); err != nil {
			return err
		}
		part, err := src.AppendSlice(w.piece[:0], int(at), int(min(l.Cluster, n-at)))
		if err != nil {
			return err
		}
		w.piece = part
		if err := d.can.compressed.WriteCompressed(part, off+at); err != nil {
			return d.stats.failed(err)
		}
	}
	return nil
}

// flush asks the backend unless nothing changed since it was asked last. Flushes that come while one is under way share
// the next.
func (d *Device) flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil || d.readOnly || d.noFlush {
		return err
	}
	want := d.written.Load()
	select {
	case d.flushing <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-d.flushing }()
	if d.flushed >= want {
		return nil
	}
	covers := d.written.Load()
	d.Event(EventFlush)
	if err := d.backend.Flush(); err != nil {
		return d.stats.failed(err)
	}
	d.flushed = covers
	return nil
}
