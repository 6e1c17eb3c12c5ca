package qcow2

import (
	"fmt"
)

// Entries of L1 and L2 tables ("Cluster mapping").
const (
	entryOffset     = 0x00fffffffffffe00 // bits 9 to 55
	entryCopied     = 1 << 63            // refcount is exactly one
	entryCompressed = 1 << 62            // L2
	entryZero       = 1                  // L2: reads as zeroes
	entryReserved   = 0x3f000000000001fe // L2: zero in the entries of standard clusters
)

// kind is what an L2 entry says of a cluster.
type kind uint8

const (
	unallocated kind = iota // the backing file's, or zero
	zeroPlain               // zero, without a place
	zeroPlaced              // zero, with a place for data
	normal
	compressed
)

func (k kind) String() string {
	return [...]string{"unallocated", "zero", "zero with a place", "normal", "compressed"}[k]
}

func kindOf(e uint64) kind {
	switch {
	case e&entryCompressed != 0:
		return compressed
	case e&entryZero != 0 && e&entryOffset != 0:
		return zeroPlaced
	case e&entryZero != 0:
		return zeroPlain
	case e&entryOffset != 0:
		return normal
	}
	return unallocated
}

// extent is a part of the disk that is stored in one way, and in one place.
type extent struct {
	kind   kind
	copied bool   // normal, zeroPlaced: nobody else uses the place
	n      int64  // bytes
	host   int64  // normal, zeroPlaced: where in the file
	entry  uint64 // compressed: the L2 entry; the extent is one cluster or a part of it
}

// compressedRange returns where in the file the data of a compressed cluster is ("Compressed Clusters Descriptor"). The
// last sector may hold less.
func (g geometry) compressedRange(e uint64) (off, n int64) {
	x := 62 - (g.cb - 8)
	off = int64(e & (1<<x - 1))
	sectors := int64(e>>x)&(1<<(g.cb-8)-1) + 1
	return off, sectors*512 - off&511
}

// compressedEntry is the opposite. ErrNoSpace reports an offset that does not fit.
func (g geometry) compressedEntry(off, n int64) (uint64, error) {
	x := 62 - (g.cb - 8)
	if off >= min(int64(1)<<x, maxOffset) {
		return 0, fmt.Errorf("%w: compressed data at byte %#x", ErrNoSpace, off)
	}
	sectors := (off+n-1)>>9 - off>>9
	return entryCompressed | uint64(sectors)<<x | uint64(off), nil
}

// lookup tells how the disk is stored from off on: an extent of at most n bytes. mu is held, but may be let go of and
// taken again.
func (im *Image) lookup(off, n int64) (extent, error) {
	for {
		x, ok, err := im.lookupCached(off, n)
		if ok || err != nil {
			return x, err
		}
	}
}

// lookupCached is one try of lookup: ok is false where mu was let go of.
func (im *Image) lookupCached(off, n int64) (x extent, ok bool, err error) {
	i1 := off / im.reach
	end := i1
	for end < int64(len(im.l1)) && im.l1[end]&entryOffset == 0 && end*im.reach < off+n {
		end++
	}
	switch {
	case i1 >= int64(len(im.l1)):
		return extent{n: n}, true, nil
	case end > i1:
		return extent{n: min(n, end*im.reach-off)}, true, nil
	}
	s, i, err := im.l2slice(int(i1), off)
	if s == nil || err != nil {
		return extent{}, false, err
	}
	x, err = im.extentAt(s, i, off, n)
	return x, err == nil, err
}

// peek is lookup for what is in memory. mu is held throughout.
func (im *Image) peek(off, n int64) (x extent, ok bool) {
	i1 := off / im.reach
	if i1 >= int64(len(im.l1)) {
		return extent{}, false
	}
	i := int(off>>im.cb) & (1<<im.l2Bits - 1)
	per := im.l2.size / 8
	s := im.l2.slices[int64(im.l1[i1]&entryOffset)+int64(i/per)*int64(im.l2.size)]
	if im.l1[i1]&entryOffset == 0 || s == nil || s.loading != nil {
		return extent{}, false
	}
	s.used = true
	x, err := im.extentAt(s, i%per, off, n)
	return x, err == nil
}

// extentAt is lookup in s, whose entry i is that for off. mu is held.
func (im *Image) extentAt(s *slice, i int, off, n int64) (extent, error) {
	in := off & (im.cluster - 1)
	e := s.get64(i)
	x := extent{kind: kindOf(e), copied: e&entryCopied != 0, n: min(im.cluster-in, n)}
	if err := im.checkEntry(x.kind, e, off); err != nil {
		return extent{}, err
	}
	if x.kind == compressed {
		x.entry, x.copied = e, false
		return x, nil
	}
	host := int64(e & entryOffset)
	x.host = host + in
	for i++; x.n < n && i < len(s.data)/8; i++ {
		host += im.cluster
		e := s.get64(i)
		if kindOf(e) != x.kind || (e&entryCopied != 0) != x.copied ||
			(x.kind == normal || x.kind == zeroPlaced) && int64(e&entryOffset) != host {
			break
		}
		x.n = min(x.n+im.cluster, n)
	}
	return x, nil
}

// checkEntry refuses an entry that can't be. mu is held.
func (im *Image) checkEntry(k kind, e uint64, off int64) error {
	switch {
	case (k == normal || k == zeroPlaced) && !im.aligned(int64(e&entryOffset)):
		return im.corrupt("L2 entry %#x for byte %#x of the disk is not a cluster's offset", e, off)
	case (k == zeroPlain || k == zeroPlaced) && im.h.version < 3:
		return im.corrupt("L2 entry %#x for byte %#x of the disk is a zero cluster, which version 2 does not know", e, off)
	}
	return nil
}

// l2slice returns the slice with the L2 entry for off, and its place there. The table must exist. A nil slice without
// an error means that mu was let go of, and all that is known must be looked at again. mu is held.
func (im *Image) l2slice(i1 int, off int64) (*slice, int, error) {
	table := int64(im.l1[i1] & entryOffset)
	if !im.aligned(table) || table >= im.f.length.Load() {
		return nil, 0, im.corrupt("L1 entry %d, %#x, is not the offset of an L2 table", i1, im.l1[i1])
	}
	i := int(off>>im.cb) & (1<<im.l2Bits - 1)
	per := im.l2.size / 8
	key := table + int64(i/per)*int64(im.l2.size)
	if s := im.l2.slices[key]; s != nil && s.loading == nil {
		s.used = true
		return s, i % per, nil
	}
	return nil, 0, im.load(key)
}

// load brings a slice into the cache. mu is held, and let go of.
func (im *Image) load(key int64) error {
	if s := im.l2.slices[key]; s != nil {
		done := s.loading
		im.mu.Unlock()
		<-done
		im.mu.Lock()
		return nil
	}
	s := im.l2.place(key, false)
	if s == nil {
		im.mu.Unlock()
		err := im.commit() // makes dirty slices clean
		im.mu.Lock()
		if err != nil || im.l2.slices[key] != nil {
			return err
		}
		s = im.l2.place(key, true)
	}
	done := make(chan struct{})
	s.loading = done
	im.mu.Unlock()
	im.f.event("qcow2_l2_load")
	err := im.f.read(s.data, key)
	im.mu.Lock()
	s.loading = nil
	if err != nil {
		im.l2.drop(key, int64(im.l2.size))
		err = fmt.Errorf("read L2 table: %w", err)
	}
	close(done)
	return err
}

// makeL2 sees to it that L1 entry i1 has an L2 table which is the active disk's alone: a new one, or a copy of one that
// is shared with a snapshot. No lock is held.
func (im *Image) makeL2(i1 int) error {
	im.tables.Lock()
	defer im.tables.Unlock()
	im.mu.Lock()
	e := im.l1[i1]
	im.mu.Unlock()
	if e&entryCopied != 0 && e&entryOffset != 0 {
		return nil
	}
	old := int64(e & entryOffset)
	if old != 0 && (!im.aligned(old) || old >= im.f.length.Load()) {
		return im.corrupt("L1 entry %d, %#x, is not the offset of an L2 table", i1, e)
	}
	im.f.event("qcow2_l2_alloc")
	off, _, fresh, err := im.refs.alloc(1)
	if err != nil {
		return err
	}
	err = im.meta.claim(im, off, 1)
	switch {
	case err != nil:
	case old != 0:
		// Tables that are shared are never changed, so that the file has all of it.
		im.f.event("qcow2_l2_cow")
		b := make([]byte, im.cluster)
		if err = im.f.read(b, old); err == nil {
			err = im.f.write(b, off)
		}
	case !fresh:
		err = im.f.zero(off, im.cluster)
	}
	if err != nil {
		im.refs.undo(off, im.cluster)
		return fmt.Errorf("new L2 table: %w", err)
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	im.l2.drop(off, im.cluster)
	im.l1[i1] = uint64(off) | entryCopied
	im.dirtyL1(i1, 1)
	if old != 0 {
		im.unlink(old, im.cluster, false)
	}
	return nil
}
