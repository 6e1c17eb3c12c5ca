package qcow2

import (
	"context"
	"fmt"
	"math"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// How far a file grows beyond what is asked for. Growing waits for every request to the file, so it must be rare; what
// is left over is cut off by Close, and harmless where that does not happen.
const (
	minGrowth = 1 << 20
	maxGrowth = 64 << 20
)

// file is the Device that the image is stored on, with its length known and growing as needed.
type file struct {
	*blk.Device
	grows  bool         // the length can be changed
	events bool         // somebody wants to be told
	length atomic.Int64 // bytes; what lies beyond reads as zeroes

	mu sync.Mutex // held while the length changes
}

func newFile(d *blk.Device) *file {
	f := &file{Device: d, events: d.Observing()}
	_, f.grows = d.Backend().(blk.Truncater)
	f.grows = f.grows && !d.ReadOnly()
	f.length.Store(d.Size())
	return f
}

// event tells tests where the driver is.
func (f *file) event(e blk.Event) {
	if f.events {
		f.Event(e)
	}
}

// read fills b from off. What lies beyond the end of the file reads as zeroes.
func (f *file) read(b []byte, off int64) error { return f.readVec(iov.Of(b), off) }

// readVec is read for a vector.
func (f *file) readVec(v iov.Vec, off int64) error {
	n := v.Size()
	length := f.length.Load()
	have := int(min(max(length-off, 0), int64(n)))
	if have < n {
		if err := v.Fill(have, n-have, 0); err != nil {
			return err
		}
		if have == 0 {
			return nil
		}
		var err error
		if v, err = v.Slice(0, have); err != nil {
			return err
		}
	}
	_, err := f.ReadVecAt(v, off)
	return err
}

// write stores b at off, where the file grows if it is too short.
func (f *file) write(b []byte, off int64) error {
	if err := f.grow(off + int64(len(b))); err != nil {
		return err
	}
	_, err := f.WriteVecAt(iov.Of(b), off)
	return err
}

// zero writes n zero bytes at off.
func (f *file) zero(off, n int64) error {
	buf := make([]byte, min(n, 1<<20))
	for n > 0 {
		c := min(n, int64(len(buf)))
		if err := f.write(buf[:c], off); err != nil {
			return err
		}
		off, n = off+c, n-c
	}
	return nil
}

// grow makes the file at least end bytes long. New bytes are zero. ErrNoSpace reports a file of fixed length.
func (f *file) grow(end int64) error {
	if end <= f.length.Load() {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	length := f.length.Load()
	if end <= length {
		return nil
	}
	if !f.grows {
		return fmt.Errorf("%w: it needs %d bytes and has %d", ErrNoSpace, end, length)
	}
	step := min(max(length/8, minGrowth), maxGrowth)
	if end > math.MaxInt64-step-blk.SectorSize {
		return fmt.Errorf("%w: it would need %d bytes", ErrNoSpace, end)
	}
	size := max(length+step, end+minGrowth/4)
	size = (size + blk.SectorSize - 1) &^ (blk.SectorSize - 1)
	f.event("qcow2_file_grow")
	if err := f.Truncate(context.Background(), size); err != nil {
		return fmt.Errorf("grow the image file: %w", err)
	}
	f.length.Store(f.Size())
	if end > f.length.Load() {
		return fmt.Errorf("%w: it grew to %d bytes and needs %d", ErrNoSpace, f.length.Load(), end)
	}
	return nil
}

// cut shortens the file to size bytes, rounded up to sectors. Failing is harmless.
func (f *file) cut(size int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	size = (size + blk.SectorSize - 1) &^ (blk.SectorSize - 1)
	if !f.grows || size >= f.length.Load() {
		return
	}
	if f.Truncate(context.Background(), size) == nil {
		f.length.Store(f.Size())
	}
}

// discard gives the space of a range back where the file can.
func (f *file) discard(off, n int64) {
	if n = min(n, f.length.Load()-off); n > 0 {
		_ = f.Discard(context.Background(), off, n) // a hint
	}
}
