package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// How the image changes as a whole: its snapshots, its size, its L1 table.
//
// Such a change touches refcounts, copied flags and tables all over the file, and no order of writes keeps them in step:
// a refcount and the flag that says that it is one stand in different clusters. So nothing that the file refers to is
// overwritten. What changes is written to clusters that are free, a shadow of what is there: L2 tables, refcount blocks,
// snapshot table, L1 table, refcount table. The header has the offsets of all that in its first sector, so one write of it
// leads from the old state to the new one, with a flush before and after. Whatever fails before that is forgotten, the
// clusters are still free; a crash leaves the one state or the other.

// shadow is the image as it is going to be. It is used by one goroutine, which holds Image.ops.
type shadow struct {
	im    *Image
	l1    []uint64 // of the active disk
	snaps []*Snapshot
	size  int64 // of the disk in bytes

	gone []clusterRun // clusters of guest data, or tables, which nobody uses any more
}

// maxGone bounds the runs that a shadow remembers in order to discard them. What is more stays allocated in the file's own
// storage until it is used again.
const maxGone = 1 << 16

// transact lets f change a shadow of the image, and then the image, with no request under way and nothing left to be
// written. After an error the image is what it was. Only if the file has failed so that nobody knows which state it is in
// is the image not written any more: whoever opens it again finds the one or the other.
func (im *Image) transact(f func(*shadow) error) error {
	im.ops.Lock()
	defer im.ops.Unlock()
	if err := im.writable(); err != nil {
		return err
	}
	if err := im.commit(); err != nil {
		return err
	}
	if err := im.refs.flush(); err != nil {
		return err
	}
	im.mu.Lock()
	im.l2.filter(func(*slice) bool { return false }) // tables move
	im.mu.Unlock()
	im.dec.forget()
	s := &shadow{im: im, l1: slices.Clone(im.l1), snaps: im.snaps, size: im.size.Load()}
	im.refs.beginShadow()
	err := f(s)
	if err == nil {
		err = s.commit()
	}
	if err != nil {
		im.refs.dropShadow()
	}
	im.meta.init(im)
	if err != nil {
		return err
	}
	for _, r := range s.gone {
		im.f.discard(r.from<<im.cb, (r.to-r.from)<<im.cb)
	}
	return nil
}

// commit writes the tables that changed and switches to them.
func (s *shadow) commit() error {
	im := s.im
	l1Off, snapOff := int64(im.h.l1Off), int64(im.h.snapOff)
	newL1 := !slices.Equal(s.l1, im.l1)
	newSnaps := !slices.Equal(s.snaps, im.snaps)
	var err error
	if newL1 {
		if l1Off, err = s.replace(l1Off, int64(len(im.l1))*8, encodeEntries(s.l1)); err != nil {
			return err
		}
	}
	if newSnaps {
		for i, snap := range s.snaps {
			s.snaps[i] = snap.complete()
		}
		b := encodeSnapshots(s.snaps)
		if len(b) > maxSnapBytes {
			return fmt.Errorf("%w: snapshot table of %d bytes", ErrFeature, len(b))
		}
		if snapOff, err = s.replace(snapOff, im.snapBytes(), b); err != nil {
			return err
		}
	}
	rtOff, rtClusters, err := im.refs.storeShadow()
	if err != nil {
		return err
	}
	if rtOff == int64(im.h.rtOff) && !newL1 && !newSnaps && s.size == im.size.Load() {
		im.refs.dropShadow() // nothing has changed
		return nil
	}
	if err := im.f.Flush(); err != nil {
		return err
	}
	if newL1 {
		im.f.event("qcow2_l1_switch")
	}
	if newSnaps {
		im.f.event("qcow2_snapshot_table")
	}
	err = im.switchHeader(func(h *header) {
		h.l1Off, h.l1Size = uint64(l1Off), uint32(len(s.l1))
		h.snapOff, h.snapshots = uint64(snapOff), uint32(len(s.snaps))
		h.rtOff, h.rtClusters = uint64(rtOff), rtClusters
		if s.size != im.size.Load() { // what the header has may be no multiple of a sector
			h.size = uint64(s.size)
		}
	})
	if err != nil {
		return err
	}
	im.refs.takeShadow()
	im.mu.Lock()
	im.l1, im.l1Lo, im.l1Hi = s.l1, 0, 0
	im.snaps = s.snaps
	im.mu.Unlock()
	im.size.Store(s.size)
	return nil
}

// switchHeader is updateHeader for a change that must be made or not made: if it fails, the header that was there is
// written again. If that fails, too, the image is not written any more.
func (im *Image) switchHeader(change func(*header)) error {
	err := im.updateHeader(change)
	if err == nil {
		return nil
	}
	if again := im.updateHeader(func(*header) {}); again != nil {
		im.broken.Store(true)
		return fmt.Errorf("%w (and writing the header as it was failed, too: %w; nothing is written to the image any more, "+
			"open it again to see which state its file is in)", err, again)
	}
	return err
}

// replace writes a table of new length to a place of its own and frees the n bytes that the old one at off has.
func (s *shadow) replace(off, n int64, b []byte) (int64, error) {
	at, err := s.store(b)
	if err != nil {
		return 0, err
	}
	return at, s.ref(off, n, -1)
}

// store writes b to new clusters, side by side, whose rest is zero, and returns where. It is 0 for an empty table.
func (s *shadow) store(b []byte) (int64, error) {
	im := s.im
	n := im.clusters(int64(len(b)))
	if n == 0 {
		return 0, nil
	}
	off, err := im.refs.allocRun(n)
	if err != nil {
		return 0, err
	}
	if err := im.meta.claim(im, off, n); err != nil {
		return 0, err
	}
	if rest := n<<im.cb - int64(len(b)); rest > 0 {
		b = append(b, make([]byte, rest)...)
	}
	return off, im.f.write(b, off)
}

// ref adds d, which is 1 or -1, to the refcounts of the clusters that the n bytes at off touch.
func (s *shadow) ref(off, n, d int64) error {
	if n == 0 {
		return nil
	}
	r := &s.im.refs
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := off >> s.im.cb; i <= (off+n-1)>>s.im.cb; i++ {
		v, err := r.add(i, d)
		if err != nil {
			return err
		}
		if v == 0 {
			r.freed(i)
			s.discard(i)
		}
	}
	return nil
}

// discard notes that nobody uses cluster i any more.
func (s *shadow) discard(i int64) {
	if k := len(s.gone) - 1; k >= 0 && s.gone[k].to == i {
		s.gone[k].to++
		return
	}
	if len(s.gone) < maxGone {
		s.gone = append(s.gone, clusterRun{i, i + 1})
	}
}

// single returns the copied flag of what refers to the cluster at off.
func (s *shadow) single(off int64) (uint64, error) {
	r := &s.im.refs
	r.mu.Lock()
	defer r.mu.Unlock()
	v, err := r.get(off >> s.im.cb)
	if v == 1 {
		return entryCopied, err
	}
	return 0, err
}

// table reads the L2 table that an L1 entry refers to into b, a cluster, and returns where it is, 0 for none.
func (s *shadow) table(b []byte, i1 int, e uint64) (int64, error) {
	im := s.im
	off := int64(e & entryOffset)
	switch {
	case off == 0:
		return 0, nil
	case !im.aligned(off) || off >= im.f.length.Load():
		return 0, im.corrupt("L1 entry %d, %#x, is not the offset of an L2 table", i1, e)
	}
	if err := im.f.read(b, off); err != nil {
		return 0, fmt.Errorf("read L2 table: %w", err)
	}
	return off, nil
}

// refEntries adds d to the refcounts of what an L2 table refers to.
func (s *shadow) refEntries(b []byte, d int64) error {
	im := s.im
	for i := 0; i < len(b); i += 8 {
		e := binary.BigEndian.Uint64(b[i:])
		if e == 0 {
			continue
		}
		off, n := int64(e&entryOffset), im.cluster
		switch k := kindOf(e); {
		case k == compressed:
			off, n = im.compressedRange(e)
		case k != normal && k != zeroPlaced:
			continue
		case !im.aligned(off):
			return im.corrupt("L2 entry %#x is not a cluster's offset", e)
		}
		if err := s.ref(off, n, d); err != nil {
			return err
		}
	}
	return nil
}

// setFlags gives the entries of an L2 table the copied flags that flag tells for an offset, and reports whether it changed.
func setFlags(b []byte, flag func(off int64) (uint64, error)) (changed bool, err error) {
	for i := 0; i < len(b); i += 8 {
		e := binary.BigEndian.Uint64(b[i:])
		if k := kindOf(e); k != normal && k != zeroPlaced {
			continue
		}
		f, err := flag(int64(e & entryOffset))
		if err != nil {
			return false, err
		}
		if want := e&^entryCopied | f; want != e {
			binary.BigEndian.PutUint64(b[i:], want)
			changed = true
		}
	}
	return changed, nil
}

// share adds a reference to all that l1 refers to, which is about to be used by two, and returns it with L2 tables whose
// copied flags are clear. Where those are copies, they are both users' if both is set, and otherwise the new one's alone.
func (s *shadow) share(l1 []uint64, both bool) ([]uint64, error) {
	l1 = slices.Clone(l1)
	b := make([]byte, s.im.cluster)
	for i, e := range l1 {
		old, err := s.table(b, i, e)
		if err != nil {
			return nil, err
		}
		if old == 0 {
			continue
		}
		if err := s.refEntries(b, 1); err != nil {
			return nil, err
		}
		changed, err := setFlags(b, func(int64) (uint64, error) { return 0, nil })
		if err != nil {
			return nil, err
		}
		off := old
		if changed {
			if off, err = s.store(b); err != nil {
				return nil, err
			}
		}
		l1[i] = uint64(off)
		switch {
		case !changed:
			err = s.ref(old, s.im.cluster, 1)
		case both:
			err = errors.Join(s.ref(off, s.im.cluster, 1), s.ref(old, s.im.cluster, -1))
		default:
			l1[i] |= entryCopied
		}
		if err != nil {
			return nil, err
		}
	}
	return l1, nil
}

// unshare takes a reference from all that l1 refers to.
func (s *shadow) unshare(l1 []uint64) error {
	b := make([]byte, s.im.cluster)
	for i, e := range l1 {
		off, err := s.table(b, i, e)
		if err != nil {
			return err
		}
		if off == 0 {
			continue
		}
		if err := s.refEntries(b, -1); err != nil {
			return err
		}
		if err := s.ref(off, s.im.cluster, -1); err != nil {
			return err
		}
	}
	return nil
}

// restoreFlags gives the active tables the copied flags that their refcounts tell. Those of tables that somebody else
// uses, too, are clear.
func (s *shadow) restoreFlags() error {
	b := make([]byte, s.im.cluster)
	for i, e := range s.l1 {
		off, err := s.table(b, i, e)
		if err != nil {
			return err
		}
		if off == 0 {
			continue
		}
		flag, err := s.single(off)
		if err != nil {
			return err
		}
		s.l1[i] = e&^entryCopied | flag
		if flag == 0 {
			continue
		}
		changed, err := setFlags(b, s.single)
		if err != nil {
			return err
		}
		if !changed {
			continue
		}
		at, err := s.replace(off, s.im.cluster, b)
		if err != nil {
			return err
		}
		s.l1[i] = uint64(at) | entryCopied
	}
	return nil
}

// dropTables forgets the L1 entries from number from on and what they refer to.
func (s *shadow) dropTables(from int64) error {
	if from >= int64(len(s.l1)) {
		return nil
	}
	old := slices.Clone(s.l1)
	clear(old[:from])
	clear(s.l1[from:])
	return s.unshare(old)
}

// dropState forgets the VM state of the active disk.
func (s *shadow) dropState() error { return s.dropTables(s.im.l1Entries(s.size)) }

// growL1 makes room for n L1 entries.
func (s *shadow) growL1(n int64) error {
	if n <= int64(len(s.l1)) {
		return nil
	}
	if n*8 > maxL1Bytes {
		return fmt.Errorf("%w: an L1 table of %d entries (larger clusters need fewer)", ErrFeature, n)
	}
	l1 := make([]uint64, min(n+n/2, maxL1Bytes/8))
	copy(l1, s.l1)
	s.l1 = l1
	return nil
}
