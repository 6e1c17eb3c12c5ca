package qcow2

import (
	"fmt"
)

// find returns the first run of free clusters, up to n of them, all with a refcount block. mu is held.
func (r *refcounts) find(n int64) (first, got int64, err error) {
	per := r.perSlice()
	for i := r.next; ; {
		if i > maxOffset>>r.im.cb {
			return 0, 0, fmt.Errorf("%w: offsets in it have 56 bits", ErrNoSpace)
		}
		s, k, err := r.slice(i)
		if err != nil {
			return 0, 0, err
		}
		if s == nil {
			if got > 0 {
				break
			}
			if err := r.newBlock(i); err != nil {
				return 0, 0, err
			}
			continue
		}
		wasFree, err := r.wasFree(s, i)
		if err != nil {
			return 0, 0, err
		}
		for ; int64(k) < per && got < n; k, i = k+1, i+1 {
			if r.im.entry(s.data, k) == 0 && wasFree(k) {
				if got == 0 {
					first = i
				}
				got++
			} else if got > 0 {
				break
			}
		}
		if got == 0 {
			r.next = i
			continue
		}
		if got == n || int64(k) < per {
			break
		}
	}
	return first, got, nil
}

// alloc takes a run of up to n free clusters. fresh says that they read as zeroes.
func (r *refcounts) alloc(n int64) (off, got int64, fresh bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.allocLocked(n)
}

func (r *refcounts) allocLocked(n int64) (off, got int64, fresh bool, err error) {
	first, got, err := r.find(n)
	if err != nil {
		return 0, 0, false, err
	}
	off = first << r.im.cb
	// Refcounts that are too low would make us overwrite what is in use.
	if err := r.im.meta.check(r.im, off, got); err != nil {
		return 0, 0, false, err
	}
	if err := r.im.f.grow((first + got) << r.im.cb); err != nil {
		return 0, 0, false, err
	}
	r.im.f.event("qcow2_cluster_alloc")
	fresh = first >= r.high
	r.high = max(r.high, first+got)
	r.next = first + got // a shadow may need clusters for the refcounts, and these are not theirs
	for i := range got {
		if err := r.set(first+i, 1); err != nil {
			r.next = min(r.next, first)
			return 0, 0, false, err
		}
	}
	return off, got, fresh, nil
}

// allocRun takes exactly n clusters side by side, for a shadow: next passes the holes that are too short, and goes back to
// them when the shadow ends.
func (r *refcounts) allocRun(n int64) (off int64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.allocRunLocked(n)
}

func (r *refcounts) allocRunLocked(n int64) (off int64, err error) {
	for {
		first, got, err := r.find(n)
		if err != nil {
			return 0, err
		}
		if got == n {
			off, _, _, err := r.allocLocked(n)
			return off, err
		}
		r.next = first + got
		if s, _, err := r.slice(first + got); s != nil || err != nil {
			if err != nil {
				return 0, err
			}
			continue
		}
		// The run ended where a block is missing.
		if n >= 1<<r.im.rbBits {
			return r.allocLong(n)
		}
		if err := r.newBlock(first + got); err != nil {
			return 0, err
		}
	}
}

// allocLong is allocRun for more clusters than one block covers: behind everything that has blocks, with the new blocks in
// front of the run instead of in its midst.
func (r *refcounts) allocLong(n int64) (int64, error) {
	im := r.im
	entries := int64(1) << im.rbBits
	var start, blocks int64
	for {
		b := int64(len(r.table))
		for b > 0 && r.table[b-1] == 0 {
			b--
		}
		start = b * entries
		blocks = (n + entries - 2) / (entries - 1) // each covers itself and entries-1 more
		end := start + blocks + n - 1
		if end/entries < int64(len(r.table)) {
			break
		}
		if err := r.lengthen(end / entries); err != nil {
			return 0, err
		}
	}
	off := start << im.cb
	if err := im.meta.claim(im, off, blocks); err != nil {
		return 0, err
	}
	if err := im.meta.check(im, off+blocks<<im.cb, n); err != nil {
		return 0, err
	}
	if err := im.f.grow((start + blocks + n) << im.cb); err != nil {
		return 0, err
	}
	if start < r.high {
		if err := im.f.zero(off, blocks<<im.cb); err != nil {
			return 0, err
		}
	}
	r.high = max(r.high, start+blocks+n)
	r.c.drop(off, blocks<<im.cb)
	for k := range blocks {
		r.table[start/entries+k] = uint64(off + k<<im.cb)
	}
	for i := start; i < start+blocks+n; i++ {
		if err := r.set(i, 1); err != nil {
			r.forgetBlocks(start/entries, blocks)
			return 0, err
		}
	}
	return off + blocks<<im.cb, nil
}

// allocBytes takes room for n bytes, at most a cluster, of compressed data. Several such share a cluster.
func (r *refcounts) allocBytes(n int64) (off int64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	im := r.im
	if r.packed != 0 {
		if in := r.packed & (im.cluster - 1); in+n <= im.cluster {
			if v, err := r.get(r.packed >> im.cb); err != nil {
				return 0, err
			} else if v > 0 && v < im.maxRefcount() {
				off = r.packed
				if _, err := r.add(off>>im.cb, 1); err != nil {
					return 0, err
				}
				r.pack(off + n)
				return off, nil
			}
			r.packed = 0
		}
	}
	last := r.packed
	off, _, _, err = r.allocLocked(1)
	if err != nil {
		return 0, err
	}
	if last != 0 && (last|(im.cluster-1))+1 == off {
		if v, err := r.get(last >> im.cb); err == nil && v > 0 && v < im.maxRefcount() {
			if _, err := r.add(last>>im.cb, 1); err != nil {
				return 0, err
			}
			off = last
		}
	}
	r.pack(off + n)
	return off, nil
}

// pack notes where compressed data goes next.
func (r *refcounts) pack(off int64) {
	r.packed = off
	if r.im.aligned(off) {
		r.packed = 0 // the cluster is full
	}
}

// undo gives back what was allocated and never linked.
func (r *refcounts) undo(off, n int64) { _ = r.release(freed{off: off, n: n}) }
