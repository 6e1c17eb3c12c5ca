package qcow2

import (
	"fmt"

	"github.com/kvmlet/kvmlet/iov"
)

// alloc is a write under way to clusters that get a new place. Others that want to change the same clusters wait for it.
type alloc struct {
	first, end int64 // clusters of the disk: [first, end)
	done       chan struct{}
}

// conflict returns the allocation under way that touches cluster first of [first, end), and otherwise where the next one
// begins, or end. mu is held.
func (im *Image) conflict(first, end int64) (*alloc, int64) {
	for _, a := range im.allocs {
		if a.first < end && first < a.end {
			if a.first <= first {
				return a, first
			}
			end = a.first
		}
	}
	return nil, end
}

// wait waits for a to end. mu is held, and let go of.
func (im *Image) wait(a *alloc) {
	im.mu.Unlock()
	<-a.done
	im.mu.Lock()
}

// enlist makes an allocation known. mu is held.
func (im *Image) enlist(first, end int64) *alloc {
	a := &alloc{first: first, end: end, done: make(chan struct{})}
	im.allocs = append(im.allocs, a)
	return a
}

// delist ends an allocation. mu is held.
func (im *Image) delist(a *alloc) {
	for i := range im.allocs {
		if im.allocs[i] == a {
			last := len(im.allocs) - 1
			im.allocs[i] = im.allocs[last]
			im.allocs[last] = nil
			im.allocs = im.allocs[:last]
			break
		}
	}
	close(a.done)
}

// WriteVecAt implements blk.Backend.
func (im *Image) WriteVecAt(src iov.Vec, off int64) (int, error) {
	n := src.Size()
	if n == 0 {
		return 0, nil
	}
	slot := im.begin()
	defer im.end(slot)
	at, err := im.write(src, off, int64(n))
	if err != nil {
		return int(at), fmt.Errorf("write image: %w", err)
	}
	return n, nil
}

// write stores src, extent by extent, and returns how many bytes of it.
func (im *Image) write(src iov.Vec, off, n int64) (int64, error) {
	if err := im.writable(); err != nil {
		return 0, err
	}
	var v *iov.Vec
	for at := int64(0); at < n; {
		im.mu.Lock()
		x, err := im.lookup(off+at, n-at)
		im.mu.Unlock()
		if err != nil {
			return at, err
		}
		if x.kind == normal && x.copied {
			part := src
			if x.n < n {
				if v == nil {
					v = im.vec()
					defer im.putVec(v)
				}
				if *v, err = src.AppendSlice((*v)[:0], int(at), int(x.n)); err != nil {
					return at, err
				}
				part = *v
			}
			if err := im.writeInPlace(part, x); err != nil {
				return at, err
			}
			at += x.n
			continue
		}
		done, err := im.writeAlloc(src, at, off+at, n-at)
		if err != nil {
			return at, err
		}
		at += done
	}
	return n, nil
}

// writeInPlace overwrites data that nobody else uses.
func (im *Image) writeInPlace(v iov.Vec, x extent) error {
	first := x.host &^ (im.cluster - 1)
	if im.meta.has(first, im.clusters(x.host+x.n-first)) {
		return im.corrupt("data at byte %#x of the file lies over metadata", x.host)
	}
	if length := im.f.length.Load(); x.host+x.n > length {
		if first > length {
			return im.corrupt("data at byte %#x lies beyond the end of the file", x.host)
		}
		if err := im.f.grow(x.host + x.n); err != nil {
			return err
		}
	}
	_, err := im.f.WriteVecAt(v, x.host)
	return err
}

// place is where a run of clusters goes.
type place struct {
	host  int64
	n     int64 // clusters
	fresh bool  // it reads as zeroes
	keep  bool  // it is the clusters' own already
}

// writeAlloc writes some of the n bytes of src from at on to clusters that must get a place first, or get their own
// back, and returns how many. It returns 0 where another write got there first.
func (im *Image) writeAlloc(src iov.Vec, at, off, n int64) (int64, error) {
	if err := im.crowded(); err != nil {
		return 0, err
	}
	i1 := int(off / im.reach)
	im.mu.Lock()
	if i1 >= len(im.l1) {
		im.mu.Unlock()
		return 0, fmt.Errorf("%w: byte %d is beyond what its L1 table maps", ErrNoSpace, off)
	}
	if im.l1[i1]&entryCopied == 0 || im.l1[i1]&entryOffset == 0 {
		im.mu.Unlock()
		return 0, im.makeL2(i1)
	}
	s, i, err := im.l2slice(i1, off)
	if s == nil || err != nil {
		im.mu.Unlock()
		return 0, err
	}
	first := off >> im.cb
	a, end := im.conflict(first, im.clusters(off+n))
	if a != nil {
		im.wait(a)
		im.mu.Unlock()
		return 0, nil
	}
	count, p, err := im.needsPlace(s, i, int(end-first), off)
	if count == 0 || err != nil {
		im.mu.Unlock()
		return 0, err
	}
	s.pins++
	a = im.enlist(first, first+count)
	im.mu.Unlock()

	p, done, err := im.store(src, at, off, n, p, count)

	im.mu.Lock()
	defer im.mu.Unlock()
	s.pins--
	im.delist(a)
	if err == nil {
		im.link(s, i, p)
	}
	return done, err
}

// needsPlace returns how many of count clusters, from entry i of s on, can be given a place at once: those which lack
// one, or those which have theirs side by side but don't show it. mu is held.
func (im *Image) needsPlace(s *slice, i, count int, off int64) (int64, place, error) {
	var p place
	n := int64(0)
	for ; n < int64(count) && i < len(s.data)/8; i, n = i+1, n+1 {
		e := s.get64(i)
		k := kindOf(e)
		if err := im.checkEntry(k, e, off); err != nil {
			return 0, p, err
		}
		copied := e&entryCopied != 0
		if k == normal && copied {
			break
		}
		own := k == zeroPlaced && copied
		host := int64(e & entryOffset)
		switch {
		case n == 0 && own:
			p = place{host: host, keep: true}
		case own != p.keep, own && host != p.host+n<<im.cb:
			p.n = n
			return n, p, nil
		}
	}
	p.n = n
	return n, p, nil
}

// store finds a place for up to count clusters and writes what belongs there: the n bytes of src from at on, as far as
// they go, and around them what the first and the last cluster hold besides. It returns how many bytes of src.
func (im *Image) store(src iov.Vec, at, off, n int64, p place, count int64) (place, int64, error) {
	if p.keep {
		if err := im.meta.check(im, p.host, p.n); err != nil {
			return p, 0, err
		}
	} else {
		var err error
		if p.host, p.n, p.fresh, err = im.refs.alloc(count); err != nil {
			return p, 0, err
		}
	}
	n = min(n, p.n<<im.cb-off&(im.cluster-1))
	err := im.storeData(src, at, off, n, p)
	if err != nil && !p.keep {
		im.refs.undo(p.host, p.n<<im.cb)
	}
	return p, n, err
}

// storeData writes the n bytes of src from at on, which are the disk's from off on, to p, in one request together with
// what must be copied.
func (im *Image) storeData(src iov.Vec, at, off, n int64, p place) error {
	head := off & (im.cluster - 1)
	tail := -(off + n) & (im.cluster - 1)
	if head == 0 && tail == 0 && at == 0 && int64(src.Size()) == n {
		if err := im.f.grow(p.host + n); err != nil {
			return err
		}
		im.f.event("qcow2_write_data")
		_, err := im.f.WriteVecAt(src, p.host)
		return err
	}
	v := im.vec()
	defer im.putVec(v)
	var headBuf, tailBuf *[]byte
	defer func() { im.putCluster(headBuf); im.putCluster(tailBuf) }()
	var err error
	skip := int64(0) // bytes at the front that need not be written
	if head > 0 {
		if headBuf, err = im.old(off-head, head, p.fresh); err != nil {
			return err
		}
		if headBuf == nil {
			skip = head
		} else {
			*v = v.Append((*headBuf)[:head])
		}
	}
	if *v, err = src.AppendSlice(*v, int(at), int(n)); err != nil {
		return err
	}
	if tail > 0 {
		if tailBuf, err = im.old(off+n, tail, p.fresh); err != nil {
			return err
		}
		if tailBuf != nil {
			*v = v.Append((*tailBuf)[:tail])
		}
	}
	if err := im.f.grow(p.host + p.n<<im.cb); err != nil {
		return err
	}
	im.f.event("qcow2_write_data")
	_, err = im.f.WriteVecAt(*v, p.host+skip)
	return err
}

// old returns the n bytes of the disk at off, all in one cluster which is about to move. nil says that they are zero and
// need not be written, since the place is fresh.
func (im *Image) old(off, n int64, fresh bool) (*[]byte, error) {
	im.mu.Lock()
	x, err := im.lookup(off, n)
	im.mu.Unlock()
	if err != nil {
		return nil, err
	}
	zero := x.kind == zeroPlain || x.kind == zeroPlaced ||
		x.kind == unallocated && (im.h.backing == "" || im.backing != nil && off >= im.backing.Size() || off >= im.size.Load())
	if zero && fresh {
		return nil, nil
	}
	b := im.cow.Get().(*[]byte)
	if zero {
		clear((*b)[:n])
		return b, nil
	}
	im.f.event("qcow2_cow_read")
	if err := im.readExtent(iov.Of((*b)[:n]), off, x); err != nil {
		im.cow.Put(b)
		return nil, fmt.Errorf("copy on write: %w", err)
	}
	return b, nil
}

func (im *Image) putCluster(b *[]byte) {
	if b != nil {
		im.cow.Put(b)
	}
}

// link makes the entries from i on point to p, and lets go of what they pointed to. mu is held.
func (im *Image) link(s *slice, i int, p place) {
	for k := range int(p.n) {
		if !p.keep {
			im.unlinkEntry(s.get64(i+k), false)
		}
		s.put64(i+k, uint64(p.host+int64(k)<<im.cb)|entryCopied)
	}
}

// unlinkEntry notes that an L2 entry is gone. mu is held.
func (im *Image) unlinkEntry(e uint64, discard bool) {
	switch kindOf(e) {
	case compressed:
		off, n := im.compressedRange(e)
		im.unlink(off, n, discard)
	case normal, zeroPlaced:
		im.unlink(int64(e&entryOffset), im.cluster, discard)
	}
}
