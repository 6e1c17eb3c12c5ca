package qcow2

import (
	"fmt"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// ReadVecAt implements blk.Backend.
func (im *Image) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	n := dst.Size()
	if n == 0 {
		return 0, nil
	}
	slot := im.begin()
	defer im.end(slot)
	im.mu.Lock()
	x, err := im.lookup(off, int64(n))
	im.mu.Unlock()
	if err != nil {
		return 0, fmt.Errorf("read image: %w", err)
	}
	if x.kind == normal && x.n == int64(n) && x.host+x.n <= im.f.length.Load() {
		return im.f.ReadVecAt(dst, x.host) // what it is nearly always
	}
	if err := im.read(dst, off, x); err != nil {
		return 0, fmt.Errorf("read image: %w", err)
	}
	return n, nil
}

// read fills dst, extent by extent; x is the first.
func (im *Image) read(dst iov.Vec, off int64, x extent) error {
	v := im.vec()
	defer im.putVec(v)
	n := int64(dst.Size())
	for at := int64(0); ; {
		var err error
		if *v, err = dst.AppendSlice((*v)[:0], int(at), int(x.n)); err != nil {
			return err
		}
		if err := im.readExtent(*v, off+at, x); err != nil {
			return err
		}
		if at += x.n; at >= n {
			return nil
		}
		im.mu.Lock()
		x, err = im.lookup(off+at, n-at)
		im.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// readExtent fills v, which is as long as x, with the disk from off on. v's elements may be changed.
func (im *Image) readExtent(v iov.Vec, off int64, x extent) error {
	switch x.kind {
	case normal:
		return im.f.readVec(v, x.host)
	case compressed:
		return im.readCompressed(v, off, x.entry)
	case unallocated:
		return im.readBacking(v, off)
	}
	return v.Fill(0, int(x.n), 0)
}

// readBacking fills v with what the backing file has at off; zeroes where it has nothing.
func (im *Image) readBacking(v iov.Vec, off int64) error {
	n := v.Size()
	have := 0
	switch {
	case im.backing != nil:
		have = int(min(max(min(im.backing.Size(), im.size.Load())-off, 0), int64(n)))
	case im.h.backing != "" && off < im.size.Load():
		return fmt.Errorf("%w: %q is needed for what is at byte %d", ErrBacking, im.h.backing, off)
	}
	if err := v.Fill(have, n-have, 0); err != nil || have == 0 {
		return err
	}
	v.DiscardBack(n - have)
	im.f.event("qcow2_read_backing")
	_, err := im.backing.ReadVecAt(v, off)
	return err
}

// BlockStatus implements blk.StatusReporter.
func (im *Image) BlockStatus(off, n int64) (blk.Status, int64, error) {
	slot := im.begin()
	defer im.end(slot)
	return im.status(off, n)
}

func (im *Image) status(off, n int64) (blk.Status, int64, error) {
	var first blk.Status
	run := int64(0)
	for run < n {
		im.mu.Lock()
		x, err := im.lookup(off+run, n-run)
		im.mu.Unlock()
		if err != nil {
			if run > 0 {
				break
			}
			return blk.Status{}, 0, fmt.Errorf("status of image: %w", err)
		}
		s := im.statusOf(x)
		switch {
		case run == 0:
			first = s
		case s.Flags != first.Flags, s.Flags&blk.StatusOffset != 0 && s.Offset != first.Offset+run:
			return first, run, nil
		}
		run += x.n
	}
	return first, run, nil
}

func (im *Image) statusOf(x extent) blk.Status {
	switch x.kind {
	case normal:
		return blk.Status{Flags: blk.StatusData | blk.StatusAllocated | blk.StatusOffset, Offset: x.host}
	case compressed:
		return blk.Status{Flags: blk.StatusData | blk.StatusAllocated | blk.StatusCompressed}
	case zeroPlain, zeroPlaced:
		return blk.Status{Flags: blk.StatusZero | blk.StatusAllocated}
	}
	if im.h.backing == "" {
		return blk.Status{Flags: blk.StatusZero}
	}
	return blk.Status{}
}

// vec borrows a vector, so that cutting one up does not allocate.
func (im *Image) vec() *iov.Vec {
	if v, ok := im.vecs.Get().(*iov.Vec); ok {
		return v
	}
	v := make(iov.Vec, 0, 64)
	return &v
}

func (im *Image) putVec(v *iov.Vec) {
	clear((*v)[:cap(*v)]) // it must not keep the caller's memory alive
	*v = (*v)[:0]
	im.vecs.Put(v)
}
