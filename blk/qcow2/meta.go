package qcow2

import (
	"slices"
	"sync"
)

// metaSet is the set of clusters that hold metadata, so that writing over them is noticed before it happens.
type metaSet struct {
	mu   sync.RWMutex
	cb   uint
	runs []clusterRun       // tables of several clusters, as they were at first; in order, none touching the next
	set  map[int64]struct{} // single clusters, and what came later
}

// clusterRun is the clusters [from, to).
type clusterRun struct{ from, to int64 }

// init enters what the tables in memory point to. Its memory is bounded by theirs.
func (m *metaSet) init(im *Image) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cb, m.runs, m.set = im.cb, nil, make(map[int64]struct{})
	run := func(off, bytes int64) {
		if bytes > 0 {
			m.runs = append(m.runs, clusterRun{off >> m.cb, off>>m.cb + im.clusters(bytes)})
		}
	}
	run(0, 1)
	run(int64(im.h.l1Off), int64(len(im.l1))*8)
	run(int64(im.h.rtOff), int64(len(im.refs.table))*8)
	run(int64(im.h.snapOff), im.snapBytes())
	for _, s := range im.snaps {
		run(s.l1Off, int64(s.l1Size)*8)
	}
	slices.SortFunc(m.runs, func(a, b clusterRun) int { return int(min(max(a.from-b.from, -1), 1)) })
	merged := m.runs[:1]
	for _, r := range m.runs[1:] {
		if last := &merged[len(merged)-1]; r.from <= last.to {
			last.to = max(last.to, r.to)
		} else {
			merged = append(merged, r)
		}
	}
	m.runs = merged
	for _, e := range im.l1 {
		if off := int64(e & entryOffset); off != 0 {
			m.set[off>>m.cb] = struct{}{}
		}
	}
	for _, e := range im.refs.table {
		if e != 0 && e <= maxOffset {
			m.set[int64(e)>>m.cb] = struct{}{}
		}
	}
}

// find returns the number of the first run that ends behind cluster i. mu is held.
func (m *metaSet) find(i int64) int {
	k, _ := slices.BinarySearchFunc(m.runs, i, func(r clusterRun, i int64) int {
		if r.to <= i {
			return -1
		}
		return 1
	})
	return k
}

// has reports whether one of n clusters from off on holds metadata.
func (m *metaSet) has(off, n int64) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	from := off >> m.cb
	if k := m.find(from); k < len(m.runs) && m.runs[k].from < from+n {
		return true
	}
	for i := from; i < from+n; i++ {
		if _, ok := m.set[i]; ok {
			return true
		}
	}
	return false
}

// check refuses to put data, or anything new, over metadata.
func (m *metaSet) check(im *Image, off, n int64) error {
	if m.has(off, n) {
		return im.corrupt("a write to byte %#x of the file would overwrite metadata", off)
	}
	return nil
}

// claim is check for n clusters that become metadata.
func (m *metaSet) claim(im *Image, off, n int64) error {
	if err := m.check(im, off, n); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range n {
		m.set[off>>m.cb+i] = struct{}{}
	}
	return nil
}

// remove takes a cluster out that ceases to hold metadata.
func (m *metaSet) remove(off int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := off >> m.cb
	delete(m.set, i)
	k := m.find(i)
	if k == len(m.runs) || m.runs[k].from > i {
		return
	}
	r := m.runs[k]
	var parts []clusterRun
	if r.from < i {
		parts = append(parts, clusterRun{r.from, i})
	}
	if i+1 < r.to {
		parts = append(parts, clusterRun{i + 1, r.to})
	}
	m.runs = slices.Replace(m.runs, k, k+1, parts...)
}
