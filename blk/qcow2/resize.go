package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// stateBase returns where the VM state begins, in bytes from the beginning of the disk: at the first cluster of the first
// L1 entry that is not the disk's ("Snapshots", VM state size).
func (im *Image) stateBase() int64 { return im.l1Entries(im.size.Load()) * im.reach }

// ReadStateAt implements blk.StateStore: it reads the VM state of the snapshot that was applied, or what WriteStateAt
// stored since.
func (im *Image) ReadStateAt(dst iov.Vec, off int64) (int, error) {
	slot := im.begin()
	defer im.end(slot)
	n := int64(dst.Size())
	base := im.stateBase()
	if off < 0 || off > maxOffset-base {
		return 0, blk.ErrRange
	}
	v := im.vec()
	defer im.putVec(v)
	end := int64(0) // of what was stored
	for at := int64(0); at < n; {
		im.mu.Lock()
		x, err := im.lookup(base+off+at, n-at)
		im.mu.Unlock()
		if err != nil {
			return 0, fmt.Errorf("read VM state: %w", err)
		}
		if *v, err = dst.AppendSlice((*v)[:0], int(at), int(x.n)); err != nil {
			return 0, err
		}
		if err := im.readExtent(*v, base+off+at, x); err != nil {
			return 0, fmt.Errorf("read VM state: %w", err)
		}
		at += x.n
		if x.kind != unallocated {
			end = at
		}
	}
	return int(end), nil
}

// WriteStateAt implements blk.StateStore. What it stores belongs to nobody until CreateSnapshot makes it the state of a
// snapshot.
func (im *Image) WriteStateAt(src iov.Vec, off int64) (int, error) {
	n := int64(src.Size())
	for {
		slot := im.begin()
		base := im.stateBase()
		if off < 0 || off > maxOffset-base-n {
			im.end(slot)
			return 0, blk.ErrRange
		}
		need := im.l1Entries(base + off + n)
		im.mu.Lock()
		have := int64(len(im.l1))
		im.mu.Unlock()
		if need <= have {
			at, err := im.write(src, base+off, n)
			im.end(slot)
			if err != nil {
				return int(at), fmt.Errorf("write VM state: %w", err)
			}
			return int(n), nil
		}
		im.end(slot)
		err := im.transact(func(s *shadow) error { return s.growL1(need) })
		if err != nil {
			return 0, fmt.Errorf("write VM state: %w", err)
		}
	}
}

// Truncate implements blk.Truncater.
func (im *Image) Truncate(size int64) error {
	err := im.truncate(size)
	if err != nil {
		err = fmt.Errorf("resize image to %d bytes: %w", size, err)
	}
	return err
}

func (im *Image) truncate(size int64) error {
	if size < 0 || size%blk.SectorSize != 0 || size > maxOffset {
		return blk.ErrRange
	}
	old := im.size.Load()
	if size == old {
		return nil
	}
	if im.h.version < 3 && len(im.snaps) > 0 {
		return fmt.Errorf("%w: a version 2 image with snapshots can't change its size", ErrFeature)
	}
	if size > old {
		return im.extend(old, size)
	}
	slot := im.begin()
	err := im.writable()
	if err == nil {
		from := (size + im.cluster - 1) &^ (im.cluster - 1)
		err = im.eachEntry(from, im.clusters(old)<<im.cb, im.cutEntry)
	}
	im.end(slot)
	if err != nil {
		return err
	}
	return im.transact(func(s *shadow) error {
		s.size = size
		return s.dropState()
	})
}

// cutEntry forgets a cluster behind the end of the disk. Until the disk has its new size, and for good if that fails, the
// cluster reads as zeroes, and not as the backing file: in version 2 there is no way to say that.
func (im *Image) cutEntry(s *slice, i int, e uint64, _ int64) error {
	if e == 0 || e == entryZero {
		return nil
	}
	im.unlinkEntry(e, true)
	if im.h.backing != "" && im.h.version >= 3 {
		s.put64(i, entryZero)
	} else {
		s.put64(i, 0)
	}
	return nil
}

// extend makes the disk larger. The new bytes are made zero before it is: the last cluster may hold more than the disk
// had, and the backing file may be longer.
func (im *Image) extend(old, size int64) error {
	err := im.transact(func(s *shadow) error {
		// Where VM state of the active disk would become part of the disk, it goes.
		if err := s.dropState(); err != nil {
			return err
		}
		return s.growL1(im.l1Entries(size))
	})
	if err != nil {
		return err
	}
	slot := im.begin()
	err = im.zeroBehind(old, size)
	if err == nil {
		err = im.commit()
	}
	im.end(slot)
	if err != nil {
		return err
	}
	return im.transact(func(s *shadow) error {
		s.size = size
		return nil
	})
}

// zeroBehind makes everything zero from byte old, the end of the disk, to byte size.
func (im *Image) zeroBehind(old, size int64) error {
	if end := min(im.clusters(old)<<im.cb, size); end > old {
		im.mu.Lock()
		x, err := im.lookup(old, end-old)
		im.mu.Unlock()
		if err != nil {
			return err
		}
		if x.kind == normal || x.kind == compressed || x.kind == unallocated && im.h.backing != "" {
			if err := im.writeZeros(old, end-old); err != nil {
				return err
			}
		}
		old = end
	}
	if im.h.backing == "" {
		return nil
	}
	if im.backing != nil {
		size = min(size, im.backing.Size())
	}
	size = im.clusters(size) << im.cb
	if im.h.version >= 3 {
		return im.eachEntry(old, max(old, size), func(s *slice, i int, e uint64, _ int64) error {
			switch {
			case s == nil:
				return errNeedTable
			case kindOf(e) == unallocated:
				s.put64(i, entryZero)
			}
			return nil
		})
	}
	for ; old < size; old += im.cluster {
		if err := im.writeZeros(old, im.cluster); err != nil {
			return err
		}
	}
	return nil
}

// writeZeros writes n zero bytes, at most a cluster of them.
func (im *Image) writeZeros(off, n int64) error {
	_, err := im.write(iov.Of(make([]byte, n)), off, n)
	return err
}

// Refresh implements blk.Resetter: what the file said of itself is read again where nothing of it was changed here.
func (im *Image) Refresh() error {
	im.ops.Lock()
	defer im.ops.Unlock()
	if im.ready.Load() || im.o.Repair {
		return nil // it is ours: nobody else may have written it
	}
	var b [8]byte
	if err := im.f.read(b[:], 24); err != nil {
		return fmt.Errorf("refresh image: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) == im.h.size {
		return nil
	}
	im.f.length.Store(im.f.Size())
	if err := im.readHeader(); err != nil {
		return fmt.Errorf("refresh image: %w", err)
	}
	if err := im.readTables(); err != nil {
		return fmt.Errorf("refresh image: %w", err)
	}
	return nil
}
