package qcow2

import (
	"encoding/binary"
	"slices"
	"sync"

	"github.com/kvmlet/kvmlet/iov"
)

// How metadata reaches the file.
//
// A crash at any moment must leave an image in which every cluster that is referred to has at least that refcount and
// holds what it should. Clusters that nobody refers to may be lost (leaks). So a commit goes in steps, with a flush of
// the file between them:
//
//  1. refcounts that grew, new refcount blocks first, then the refcount table that points to them; guest data and new,
//     still empty L2 tables have been written before, by the requests that needed them
//  2. L2 and L1 entries, as they were when the commit began: whatever they refer to was written before step 1 ended
//  3. clusters which those entries ceased to refer to are freed: their refcounts go down in memory, and reach the file
//     with some later commit
//
// Between commits nothing but step 1's kind of write happens, so that no order within a step matters.

// maxPending is how many clusters' worth of freed space may wait for a commit before one is made for its sake.
const maxPending = 64 << 20

// freed is a run of bytes in the file that one reference less points to. Runs of compressed data are not whole clusters.
type freed struct {
	off, n  int64
	discard bool // give the space back to the file's own storage
}

// freeBatch is what step 2 of a commit unlinked. It is freed when the requests that may still use it are over.
type freeBatch struct {
	runs []freed
	slot uint32 // of the generation of those requests
	open bool   // there is a batch
	done bool   // the file does not refer to the runs any more
}

// unlink notes that an entry ceases to refer to n bytes at off. mu is held.
func (im *Image) unlink(off, n int64, discard bool) {
	im.weight += im.clusters(n)
	if k := len(im.pending); k > 0 && im.aligned(off) && im.aligned(n) {
		if l := &im.pending[k-1]; l.off+l.n == off && l.discard == discard && im.aligned(l.n) && im.aligned(l.off) {
			l.n += n
			return
		}
	}
	im.pending = append(im.pending, freed{off, n, discard})
}

// flushQueue lets several callers of commit share one.
type flushQueue struct {
	mu      sync.Mutex
	next    *flushRun  // has not begun yet
	running sync.Mutex // held by the commit that runs
}

type flushRun struct {
	done chan struct{}
	err  error
}

// Flush implements blk.Backend.
func (im *Image) Flush() error {
	if im.o.ReadOnly {
		return nil
	}
	slot := im.begin()
	defer im.end(slot)
	if im.broken.Load() {
		return ErrCorrupt
	}
	return im.commit()
}

// commit makes everything stable that was changed before the call. It joins a commit that has not begun yet.
func (im *Image) commit() error {
	q := &im.queue
	q.mu.Lock()
	if r := q.next; r != nil {
		q.mu.Unlock()
		<-r.done
		return r.err
	}
	r := &flushRun{done: make(chan struct{})}
	q.next = r
	q.mu.Unlock()

	q.running.Lock()
	q.mu.Lock()
	q.next = nil
	q.mu.Unlock()
	r.err = im.commitOnce()
	q.running.Unlock()
	close(r.done)
	return r.err
}

// sync makes refcounts and whatever was written to the file stable.
func (im *Image) sync() error {
	if err := im.refs.flush(); err != nil {
		return err
	}
	return im.f.Flush()
}

// piece is a part of the file as a commit will write it.
type piece struct {
	off  int64
	data []byte
	s    *slice // whose bytes they are; nil for L1
	lo   int    // where in s, or which entry of L1
}

func (im *Image) commitOnce() (err error) {
	im.free() // what the last commit unlinked

	im.mu.Lock()
	pieces := im.snapshotDirty()
	if b := &im.batch; !b.open && len(im.pending) > 0 {
		*b = freeBatch{runs: im.pending, slot: im.gen.turn(), open: true}
		im.pending, im.weight = nil, 0
	}
	im.mu.Unlock()
	defer func() {
		im.mu.Lock()
		im.finish(pieces, err)
		im.mu.Unlock()
	}()

	if !im.lazy {
		im.f.event("qcow2_refcount_update")
		if err := im.refs.flush(); err != nil {
			return err
		}
	}
	im.f.event("qcow2_flush_data")
	if err := im.f.Flush(); err != nil {
		return err
	}
	if len(pieces) > 0 {
		im.f.event("qcow2_l2_update")
		if err := im.writePieces(pieces); err != nil {
			return err
		}
		im.f.event("qcow2_l2_update_done")
		if err := im.f.Flush(); err != nil {
			return err
		}
		im.f.event("qcow2_l2_flushed")
	}
	if im.batch.open {
		im.batch.done = true
		im.free()
	}
	return nil
}

// snapshotDirty copies what the file does not have yet of L1 and L2, and takes it for written. mu is held.
func (im *Image) snapshotDirty() []piece {
	var pieces []piece
	for _, s := range im.l2.ring {
		if s.hi == 0 {
			continue
		}
		// Whole sectors: the file is read and written back otherwise.
		lo, hi := s.lo&^511, min((s.hi+511)&^511, len(s.data))
		pieces = append(pieces, piece{s.off + int64(lo), slices.Clone(s.data[lo:hi]), s, lo})
		s.lo, s.hi = 0, 0
		s.pins++ // reading it from the file again would bring back what stood there before
	}
	slices.SortFunc(pieces, func(a, b piece) int { return int(min(max(a.off-b.off, -1), 1)) })
	if im.l1Hi > 0 {
		lo, hi := im.l1Lo&^63, min((im.l1Hi+63)&^63, len(im.l1))
		pieces = append(pieces, piece{int64(im.h.l1Off) + int64(lo)*8, encodeEntries(im.l1[lo:hi]), nil, lo})
		im.l1Lo, im.l1Hi = 0, 0
	}
	return pieces
}

// finish ends what snapshotDirty began. mu is held.
func (im *Image) finish(pieces []piece, err error) {
	for _, p := range pieces {
		switch {
		case p.s == nil && err != nil:
			im.dirtyL1(p.lo, len(p.data)/8)
		case p.s != nil:
			p.s.pins--
			if err != nil && !p.s.dead {
				p.s.dirty(p.lo, len(p.data))
			}
		}
	}
	if b := &im.batch; err != nil && b.open && !b.done {
		im.pending = append(b.runs, im.pending...)
		for _, r := range b.runs {
			im.weight += im.clusters(r.n)
		}
		// The batch's slot is in use until the requests that hold it are over.
		*b = freeBatch{slot: b.slot, open: true, done: true}
	}
}

// dirtyL1 notes that n entries of L1 from i on changed. mu is held.
func (im *Image) dirtyL1(i, n int) {
	if im.l1Hi == 0 {
		im.l1Lo = i
	}
	im.l1Lo, im.l1Hi = min(im.l1Lo, i), max(im.l1Hi, i+n)
}

// writePieces writes what lies side by side in the file with one request.
func (im *Image) writePieces(pieces []piece) error {
	var v iov.Vec
	for i := 0; i < len(pieces); {
		off := pieces[i].off
		end := off
		v = v[:0]
		l1 := pieces[i].s == nil
		for i < len(pieces) && pieces[i].off == end && (pieces[i].s == nil) == l1 && len(v) < iov.MaxElems {
			v = v.Append(pieces[i].data)
			end += int64(len(pieces[i].data))
			i++
		}
		if l1 {
			im.f.event("qcow2_l1_update")
		}
		if err := im.f.grow(end); err != nil {
			return err
		}
		if _, err := im.f.WriteVecAt(v, off); err != nil {
			return err
		}
	}
	return nil
}

// free frees the batch if it is out of use. queue.running is held.
func (im *Image) free() {
	b := &im.batch
	if !b.open || !b.done || !im.gen.empty(b.slot) {
		return
	}
	runs := b.runs
	*b = freeBatch{}
	if len(runs) == 0 {
		return
	}
	im.dec.forget()
	for _, r := range runs {
		// An error is a refcount that is wrong already, and reported by then; the rest leaks.
		if err := im.refs.release(r); err != nil {
			return
		}
	}
}

// crowded commits when so much freed space waits that it is worth it. No lock is held.
func (im *Image) crowded() error {
	im.mu.Lock()
	full := im.weight<<im.cb > maxPending
	im.mu.Unlock()
	if !full {
		return nil
	}
	return im.commit()
}

// put64 changes an entry of an L2 slice. mu is held.
func (s *slice) put64(i int, e uint64) {
	binary.BigEndian.PutUint64(s.data[i*8:], e)
	s.dirty(i*8, 8)
}

func (s *slice) get64(i int) uint64 { return binary.BigEndian.Uint64(s.data[i*8:]) }
