package qcow2

import (
	"context"
	"fmt"

	"github.com/kvmlet/kvmlet/blk"
)

// Discard implements blk.Discarder. Clusters that are partly inside the range stay as they are.
func (im *Image) Discard(off, n int64) error {
	slot := im.begin()
	defer im.end(slot)
	end := off + n
	from := (off + im.cluster - 1) &^ (im.cluster - 1)
	to := end &^ (im.cluster - 1)
	if end == im.size.Load() {
		to = (end + im.cluster - 1) &^ (im.cluster - 1)
	}
	if from >= to {
		return nil
	}
	if err := im.writable(); err != nil {
		return fmt.Errorf("discard in image: %w", err)
	}
	if err := im.eachEntry(from, to, im.discardEntry); err != nil {
		return fmt.Errorf("discard in image: %w", err)
	}
	return nil
}

// WriteZeroes implements blk.ZeroWriter. A cluster that is partly inside the range becomes zero as a whole where the
// rest of it reads as zeroes already; otherwise the answer is blk.ErrUnsupported, and some of the range may be zero.
func (im *Image) WriteZeroes(off, n int64, unmap bool) error {
	slot := im.begin()
	defer im.end(slot)
	if n <= 0 {
		return nil
	}
	if err := im.writable(); err != nil {
		return fmt.Errorf("write zeroes to image: %w", err)
	}
	end := off + n
	from := off &^ (im.cluster - 1)
	to := (end + im.cluster - 1) &^ (im.cluster - 1)
	if end == im.size.Load() {
		end = to
	}
	for _, rest := range [][2]int64{{from, off}, {end, to}} {
		if zero, err := im.readsZero(rest[0], rest[1]); err != nil {
			return fmt.Errorf("write zeroes to image: %w", err)
		} else if !zero {
			return blk.ErrUnsupported
		}
	}
	err := im.eachEntry(from, to, func(s *slice, i int, e uint64, at int64) error {
		if k := kindOf(e); (at < off || at+im.cluster > end) && (k == normal || k == compressed) {
			return blk.ErrUnsupported // the rest has been written meanwhile
		}
		return im.zeroEntry(s, i, e, at, unmap)
	})
	if err != nil && err != blk.ErrUnsupported {
		err = fmt.Errorf("write zeroes to image: %w", err)
	}
	return err
}

// readsZero reports whether the disk is known to read as zeroes from off to end, within a cluster.
func (im *Image) readsZero(off, end int64) (bool, error) {
	if off >= end {
		return true, nil
	}
	im.mu.Lock()
	x, err := im.lookup(off, end-off)
	im.mu.Unlock()
	if err != nil || x.kind == normal || x.kind == compressed {
		return false, err
	}
	if x.kind != unallocated || off >= im.size.Load() {
		return true, nil
	}
	return im.backingZero(off, end)
}

// backingZero reports whether the backing file, or the lack of one, gives zeroes from off to end.
func (im *Image) backingZero(off, end int64) (bool, error) {
	switch {
	case im.h.backing == "":
		return true, nil
	case im.backing == nil:
		return false, nil
	}
	end = min(end, im.backing.Size())
	for off < end {
		s, _, run, err := im.backing.StatusAbove(context.Background(), nil, off, end-off)
		if err != nil || run <= 0 || s.Flags&blk.StatusZero == 0 {
			return false, nil //nolint:nilerr // not knowing costs no more than writing zeroes
		}
		off += run
	}
	return true, nil
}

// eachEntry calls change for the entry of every cluster from byte from to byte to of the disk. mu is held during change,
// which has the L2 table for itself; where there is no L2 table, e is 0 and s is nil: change may ask for one by answering
// errNeedTable.
func (im *Image) eachEntry(from, to int64, change func(s *slice, i int, e uint64, off int64) error) error {
	for off := from; off < to; {
		if err := im.crowded(); err != nil {
			return err
		}
		next, err := im.someEntries(off, to, change)
		if err == errNeedTable {
			err = im.makeL2(int(off / im.reach))
		}
		if err != nil {
			return err
		}
		off = max(off, next)
	}
	return nil
}

var errNeedTable = fmt.Errorf("an L2 table is needed")

// someEntries is eachEntry for as many clusters as one slice has. It returns how far it got.
func (im *Image) someEntries(off, to int64, change func(s *slice, i int, e uint64, off int64) error) (int64, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	i1 := off / im.reach
	if i1 >= int64(len(im.l1)) {
		return to, nil
	}
	if im.l1[i1]&entryOffset == 0 {
		if err := change(nil, 0, 0, off); err != nil {
			return off, err
		}
		return min((i1+1)*im.reach, to), nil
	}
	if im.l1[i1]&entryCopied == 0 {
		return off, errNeedTable
	}
	s, i, err := im.l2slice(int(i1), off)
	if s == nil || err != nil {
		return off, err
	}
	first := off >> im.cb
	a, end := im.conflict(first, im.clusters(to))
	if a != nil {
		im.wait(a)
		return off, nil
	}
	for ; off < to && off>>im.cb < end && i < len(s.data)/8; i, off = i+1, off+im.cluster {
		e := s.get64(i)
		if err := im.checkEntry(kindOf(e), e, off); err != nil {
			return off, err
		}
		if err := change(s, i, e, off); err != nil {
			return off, err
		}
	}
	return off, nil
}

// discardEntry lets go of a cluster: it reads as zeroes afterwards, not as the backing file, whose bytes the disk may
// never have shown.
func (im *Image) discardEntry(s *slice, i int, e uint64, _ int64) error {
	switch k := kindOf(e); {
	case k == unallocated, k == zeroPlain:
		return nil
	case im.h.version >= 3:
		s.put64(i, entryZero)
	case im.h.backing == "":
		s.put64(i, 0)
	default:
		return nil // stays: a discard is a hint
	}
	im.unlinkEntry(e, true)
	return nil
}

// zeroEntry makes a cluster read as zeroes.
func (im *Image) zeroEntry(s *slice, i int, e uint64, off int64, unmap bool) error {
	k := kindOf(e)
	if k == unallocated {
		switch {
		case im.h.backing == "" || off >= im.size.Load():
			return nil
		case im.h.version < 3:
			return blk.ErrUnsupported
		case s == nil:
			return errNeedTable
		}
		s.put64(i, entryZero)
		return nil
	}
	keep := !unmap && e&entryCopied != 0
	switch {
	case k == zeroPlain, k == zeroPlaced && keep:
		return nil
	case im.h.version < 3:
		if im.h.backing != "" || !unmap {
			return blk.ErrUnsupported
		}
		s.put64(i, 0)
	case (k == normal || k == zeroPlaced) && keep:
		s.put64(i, e|entryZero)
		return nil
	case !unmap && k != zeroPlaced:
		return blk.ErrUnsupported // it has no place of its own that could be kept
	default:
		s.put64(i, entryZero)
	}
	im.unlinkEntry(e, true)
	return nil
}
