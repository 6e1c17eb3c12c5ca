package qcow2

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sync"
)

// refcounts are the refcounts of the file's clusters: a table in memory, blocks in a cache.
type refcounts struct {
	im *Image

	// mu guards what follows. It may be held while the file is read or written: finding free clusters is a matter of
	// memory, but for the block that is looked at for the first time.
	mu      sync.Mutex
	table   []uint64 // offsets of refcount blocks
	fresh   []int    // entries of table that the file does not have yet
	tableNo int      // changes when the table moves
	c       *cache
	next    int64 // no cluster below it is free
	high    int64 // clusters from here on were never used: zeroes, where the file can grow
	packed  int64 // where the next compressed data may go, in a cluster that has some; 0: nowhere

	// With a shadow, the file's table and blocks stay what they are; table and the blocks in it that differ from those of
	// old are what they are going to be.
	shadow bool
	old    []uint64 // the file's table
	due    []due    // refcounts of blocks, which moved while the refcount of something else changed
	low    int64    // what next will be
}

// due is a refcount that is to change.
type due struct{ cluster, d int64 }

func (r *refcounts) init(im *Image, bytes int64) {
	r.im, r.c = im, newCache(bytes, im.cluster)
	r.high = im.clusters(im.f.length.Load())
	if !im.f.grows {
		r.high = math.MaxInt64
	}
}

// maxRefcount is the largest number that a refcount can hold.
func (g geometry) maxRefcount() uint64 {
	if g.order == 6 {
		return math.MaxUint64
	}
	return 1<<(1<<g.order) - 1
}

// entry reads refcount i of data ("Refcount block entry"): widths below a byte count from the least significant bit.
func (g geometry) entry(data []byte, i int) uint64 {
	switch g.order {
	case 0, 1, 2:
		per := 8 >> g.order
		shift := uint(i%per) << g.order
		return uint64(data[i/per]>>shift) & (1<<(1<<g.order) - 1)
	case 3:
		return uint64(data[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(data[i*2:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(data[i*4:]))
	}
	return binary.BigEndian.Uint64(data[i*8:])
}

// setEntry writes refcount i of data and returns which bytes it changed.
func (g geometry) setEntry(data []byte, i int, v uint64) (at, n int) {
	switch g.order {
	case 0, 1, 2:
		per := 8 >> g.order
		shift := uint(i%per) << g.order
		mask := byte(1<<(1<<g.order)-1) << shift
		data[i/per] = data[i/per]&^mask | byte(v)<<shift
		return i / per, 1
	case 3:
		data[i] = byte(v)
		return i, 1
	case 4:
		binary.BigEndian.PutUint16(data[i*2:], uint16(v))
		return i * 2, 2
	case 5:
		binary.BigEndian.PutUint32(data[i*4:], uint32(v))
		return i * 4, 4
	}
	binary.BigEndian.PutUint64(data[i*8:], v)
	return i * 8, 8
}

// perSlice returns how many refcounts a slice holds.
func (r *refcounts) perSlice() int64 { return int64(r.c.size) * 8 >> r.im.order }

// slice returns the slice that holds the refcount of cluster i, and its place in it. It is nil where there is no block.
// mu is held.
func (r *refcounts) slice(i int64) (*slice, int, error) {
	b := i >> r.im.rbBits
	if b >= int64(len(r.table)) || r.table[b] == 0 {
		return nil, 0, nil
	}
	block := int64(r.table[b])
	if r.table[b] > maxOffset || !r.im.aligned(block) || block >= r.im.f.length.Load() {
		return nil, 0, r.im.corrupt("refcount block %d at byte %#x", b, r.table[b])
	}
	in := i & (1<<r.im.rbBits - 1)
	per := r.perSlice()
	s, err := r.load(block + in/per*int64(r.c.size))
	return s, int(in % per), err
}

// load returns the slice that stands at off. mu is held. Refcounts that are dirty may be written at any time: what has
// an order with other metadata enters them only when it may.
func (r *refcounts) load(off int64) (*slice, error) {
	if s := r.c.slices[off]; s != nil {
		s.used = true
		return s, nil
	}
	s := r.c.place(off, false)
	if s == nil {
		if err := r.writeDirty(); err != nil {
			return nil, err
		}
		s = r.c.place(off, true)
	}
	r.im.f.event("qcow2_refblock_load")
	if err := r.im.f.read(s.data, off); err != nil {
		r.c.drop(off, int64(r.c.size))
		return nil, fmt.Errorf("read refcounts: %w", err)
	}
	return s, nil
}

// writeDirty writes the slices that changed. mu is held.
func (r *refcounts) writeDirty() error {
	for _, s := range r.c.ring {
		if s.hi == 0 {
			continue
		}
		lo, hi := s.lo&^511, min((s.hi+511)&^511, len(s.data))
		r.im.f.event("qcow2_refblock_update")
		if err := r.im.f.write(s.data[lo:hi], s.off+int64(lo)); err != nil {
			return fmt.Errorf("write refcounts: %w", err)
		}
		s.lo, s.hi = 0, 0
	}
	return nil
}

// flush writes what changed. Table entries of new blocks follow their blocks, with a flush between.
func (r *refcounts) flush() error {
	r.mu.Lock()
	err := r.writeDirty()
	fresh, no := r.fresh, r.tableNo
	r.fresh = nil
	r.mu.Unlock()
	if err == nil && len(fresh) > 0 {
		r.im.f.event("qcow2_refblock_flush")
		err = r.im.f.Flush()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tableNo != no { // it was written as a whole meanwhile
		return err
	}
	for i := 0; i < len(fresh) && err == nil; {
		k := i + 1
		for k < len(fresh) && fresh[k] == fresh[k-1]+1 {
			k++
		}
		r.im.f.event("qcow2_reftable_update")
		err = r.im.f.write(encodeEntries(r.table[fresh[i]:fresh[i]+k-i]), r.tableOff()+int64(fresh[i])*8)
		i = k
	}
	if err != nil {
		r.fresh = append(fresh, r.fresh...)
	}
	return err
}

func (r *refcounts) tableOff() int64 {
	r.im.mu.Lock()
	defer r.im.mu.Unlock()
	return int64(r.im.h.rtOff)
}

// get returns the refcount of cluster i. mu is held.
func (r *refcounts) get(i int64) (uint64, error) {
	s, k, err := r.slice(i)
	if s == nil || err != nil {
		return 0, err
	}
	return r.im.entry(s.data, k), nil
}

// set changes the refcount of cluster i. mu is held.
func (r *refcounts) set(i int64, v uint64) error {
	if r.shadow {
		if err := r.own(i >> r.im.rbBits); err != nil {
			return err
		}
	}
	s, k, err := r.slice(i)
	if err != nil {
		return err
	}
	if s == nil {
		return r.im.corrupt("the cluster at byte %#x is in use, and has no refcount block", i<<r.im.cb)
	}
	s.dirty(r.im.setEntry(s.data, k, v))
	return nil
}

// add changes the refcount of cluster i by d and returns the new one. mu is held.
func (r *refcounts) add(i int64, d int64) (uint64, error) {
	v, err := r.get(i)
	switch {
	case err != nil:
		return 0, err
	case d < 0 && v < uint64(-d):
		return 0, r.im.corrupt("refcount of the cluster at byte %#x is %d and one of its users goes", i<<r.im.cb, v)
	case d > 0 && r.im.maxRefcount()-v < uint64(d):
		return 0, fmt.Errorf("%w: refcounts of %d bits can't count %d users of one cluster", ErrFeature, 1<<r.im.order, v+uint64(d))
	}
	v += uint64(d)
	return v, r.set(i, v)
}

// newBlock makes the refcount block that covers cluster i, out of that cluster. All clusters that it covers are free by
// definition. mu is held.
func (r *refcounts) newBlock(i int64) error {
	b := i >> r.im.rbBits
	switch {
	case b < int64(len(r.table)):
	case r.shadow:
		if err := r.lengthen(b); err != nil {
			return err
		}
	default:
		return r.growTable(i)
	}
	off := i << r.im.cb
	if err := r.im.meta.claim(r.im, off, 1); err != nil {
		return err
	}
	r.im.f.event("qcow2_refblock_alloc")
	if i < r.high {
		if err := r.im.f.zero(off, r.im.cluster); err != nil {
			r.im.meta.remove(off)
			return fmt.Errorf("new refcount block: %w", err)
		}
	} else if err := r.im.f.grow(off + r.im.cluster); err != nil {
		r.im.meta.remove(off)
		return fmt.Errorf("new refcount block: %w", err)
	}
	r.high = max(r.high, i+1)
	r.c.drop(off, r.im.cluster)
	r.table[b] = uint64(off)
	r.fresh = append(r.fresh, int(b))
	if err := r.set(i, 1); err != nil {
		r.forgetBlocks(b, 1)
		return err
	}
	return nil
}

// forgetBlocks takes back n new blocks from b on, whose refcounts could not be set. mu is held.
func (r *refcounts) forgetBlocks(b, n int64) {
	for k := b; k < b+n; k++ {
		off := int64(r.table[k])
		r.c.drop(off, r.im.cluster)
		r.im.meta.remove(off)
		r.table[k] = 0
	}
	r.fresh = slices.DeleteFunc(r.fresh, func(k int) bool { return int64(k) >= b && int64(k) < b+n })
}

// growTable makes a refcount table that covers cluster i, and switches to it. The new table, and the blocks that cover
// it, stand in the clusters which the old one did not reach.
func (r *refcounts) growTable(i int64) error {
	im := r.im
	entries := int64(1) << im.rbBits
	start := int64(len(r.table)) * entries
	var blocks, tableClusters, total int64
	for {
		need := max((start+blocks+tableClusters)/entries+1, i/entries+1)
		t := im.clusters(need * 8)
		t = max(t, min(t+t/2, maxTableBytes>>im.cb))
		bl := (blocks+tableClusters-1)/entries + 1
		if blocks+tableClusters == 0 {
			bl = 1
		}
		if t == tableClusters && bl == blocks {
			break
		}
		tableClusters, blocks = max(t, tableClusters), max(bl, blocks)
		total = tableClusters << im.cb / 8
		if tableClusters<<im.cb > maxTableBytes {
			return fmt.Errorf("%w: its refcount table can't grow beyond %d bytes", ErrNoSpace, maxTableBytes)
		}
	}
	table := make([]uint64, total)
	copy(table, r.table)
	count := blocks + tableClusters
	off := start << im.cb
	if err := im.meta.claim(im, off, count); err != nil {
		return err
	}
	fail := func(err error) error {
		for k := range count {
			im.meta.remove(off + k<<im.cb)
		}
		return fmt.Errorf("new refcount table: %w", err)
	}
	buf := make([]byte, blocks<<im.cb)
	for k := range count {
		im.setEntry(buf, int(k), 1)
	}
	for k := range blocks {
		table[start/entries+k] = uint64(off + k<<im.cb)
	}
	if err := r.writeDirty(); err != nil { // of blocks which only the new table will point to
		return fail(err)
	}
	im.f.event("qcow2_reftable_grow")
	if err := im.f.write(buf, off); err != nil {
		return fail(err)
	}
	tableOff := off + blocks<<im.cb
	if err := im.f.write(encodeEntries(table), tableOff); err != nil {
		return fail(err)
	}
	im.f.event("qcow2_reftable_grow_flush")
	if err := im.f.Flush(); err != nil {
		return fail(err)
	}
	oldOff, oldLen := r.tableOff(), im.clusters(int64(len(r.table))*8)
	if err := im.switchHeader(func(h *header) { h.rtOff, h.rtClusters = uint64(tableOff), uint32(tableClusters) }); err != nil {
		return fail(err)
	}
	r.table, r.fresh = table, nil
	r.tableNo++
	r.high = max(r.high, start+count)
	r.c.drop(off, blocks<<im.cb)
	for k := range oldLen {
		if err := r.drop(oldOff>>im.cb + k); err != nil {
			return err
		}
	}
	return nil
}

// drop takes one reference from cluster i. mu is held.
func (r *refcounts) drop(i int64) error {
	v, err := r.add(i, -1)
	if err == nil && v == 0 {
		r.freed(i)
	}
	return err
}

// freed notes that nobody uses cluster i any more. mu is held.
func (r *refcounts) freed(i int64) {
	if r.shadow {
		r.low = min(r.low, i)
	} else {
		r.next = min(r.next, i)
	}
	if r.packed != 0 && r.packed>>r.im.cb == i {
		r.packed = 0
	}
	r.im.meta.remove(i << r.im.cb)
}

// release takes one reference from each cluster of f.
func (r *refcounts) release(f freed) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	from, to := int64(-1), int64(-1) // clusters that are free now, side by side
	for i := f.off >> r.im.cb; i <= (f.off+f.n-1)>>r.im.cb; i++ {
		v, err := r.add(i, -1)
		if err != nil {
			return err
		}
		if v > 0 {
			continue
		}
		r.freed(i)
		if !f.discard {
			continue
		}
		if i != to {
			r.im.f.discard(from<<r.im.cb, (to-from)<<r.im.cb)
			from = i
		}
		to = i + 1
	}
	r.im.f.discard(from<<r.im.cb, (to-from)<<r.im.cb)
	return nil
}

// end returns the length that the file needs for the clusters in use, looking no further down than the length it had
// when it was opened.
func (r *refcounts) end() (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := r.im.clusters(r.im.f.length.Load())
	for floor := r.im.floor >> r.im.cb; i > floor; i-- {
		v, err := r.get(i - 1)
		if err != nil {
			return 0, err
		}
		if v > 0 {
			break
		}
	}
	return i << r.im.cb, nil
}

// beginShadow keeps all that is in the file from changes, until takeShadow or dropShadow. What is in memory must have been
// flushed.
//
// Clusters are found from next on only, which does not go back meanwhile: those of blocks that moved are free until their
// refcounts, which are due, have changed.
func (r *refcounts) beginShadow() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.shadow, r.old, r.table, r.due, r.low = true, r.table, slices.Clone(r.table), nil, r.next
}

// dropShadow forgets what changed since beginShadow.
func (r *refcounts) dropShadow() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.shadow {
		return
	}
	r.table, r.fresh = r.old, nil
	r.c.filter(func(*slice) bool { return false })
	r.next = min(r.next, r.low)
	r.endShadow()
}

// takeShadow makes the shadow what is in the file.
func (r *refcounts) takeShadow() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for b, off := range r.old {
		if off != r.table[b] {
			r.c.drop(int64(off), r.im.cluster)
		}
	}
	r.fresh = nil
	r.tableNo++
	r.next = min(r.next, r.low)
	r.endShadow()
}

func (r *refcounts) endShadow() { r.shadow, r.old, r.due = false, nil, nil }

// own moves block b if it is still the file's. mu is held.
func (r *refcounts) own(b int64) error {
	if b >= int64(len(r.old)) || r.old[b] == 0 || r.table[b] != r.old[b] {
		return nil
	}
	first, _, err := r.find(1)
	if err != nil {
		return err
	}
	im, off := r.im, first<<r.im.cb
	if err := im.meta.claim(im, off, 1); err != nil {
		return err
	}
	r.next = first + 1
	r.high = max(r.high, first+1)
	buf := im.cow.Get().(*[]byte)
	defer im.cow.Put(buf)
	if err := im.f.read(*buf, int64(r.old[b])); err != nil {
		return fmt.Errorf("read refcounts: %w", err)
	}
	im.f.event("qcow2_refblock_alloc")
	if err := im.f.write(*buf, off); err != nil {
		return fmt.Errorf("new refcount block: %w", err)
	}
	r.c.drop(off, im.cluster)
	r.table[b] = uint64(off)
	// Not at once: their blocks may have to move, too, and so on.
	r.due = append(r.due, due{first, 1}, due{int64(r.old[b]) >> im.cb, -1})
	return nil
}

// wasFree returns a function that tells whether the file has no use for the cluster whose refcount is number k of s, the
// slice with that of cluster i. mu is held, and the function is good until it is let go of or a slice is loaded.
func (r *refcounts) wasFree(s *slice, i int64) (func(k int) bool, error) {
	b := i >> r.im.rbBits
	if !r.shadow || b >= int64(len(r.old)) || r.old[b] == 0 || r.old[b] == r.table[b] {
		return func(int) bool { return true }, nil
	}
	s.pins++
	o, err := r.load(s.off - int64(r.table[b]) + int64(r.old[b]))
	s.pins--
	if err != nil {
		return nil, err
	}
	return func(k int) bool { return r.im.entry(o.data, k) == 0 }, nil
}

// lengthen makes room in the shadow's table for block b. mu is held.
func (r *refcounts) lengthen(b int64) error {
	im := r.im
	n := im.clusters((b + 1) * 8)
	n = max(n, min(n+n/2, maxTableBytes>>im.cb))
	if n<<im.cb > maxTableBytes {
		return fmt.Errorf("%w: its refcount table can't grow beyond %d bytes", ErrNoSpace, maxTableBytes)
	}
	table := make([]uint64, n<<im.cb/8)
	copy(table, r.table)
	r.table = table
	return nil
}

// settle changes the refcounts that are due. mu is held.
func (r *refcounts) settle() error {
	for len(r.due) > 0 {
		d := r.due[0]
		r.due = r.due[1:]
		v, err := r.add(d.cluster, d.d)
		if err != nil {
			return err
		}
		if v == 0 {
			r.freed(d.cluster)
		}
	}
	return nil
}

// storeShadow writes the shadow's blocks and its table, and returns where that is, in bytes, and its clusters.
func (r *refcounts) storeShadow() (off int64, clusters uint32, err error) {
	im := r.im
	oldOff := r.tableOff()
	r.mu.Lock()
	defer r.mu.Unlock()
	n := im.clusters(int64(len(r.old)) * 8)
	if len(r.due) == 0 && slices.Equal(r.table, r.old) {
		return oldOff, uint32(n), nil
	}
	for i := range n {
		r.due = append(r.due, due{oldOff>>im.cb + i, -1})
	}
	for {
		n = im.clusters(int64(len(r.table)) * 8)
		if off, err = r.allocRunLocked(n); err != nil {
			return 0, 0, err
		}
		if err := im.meta.claim(im, off, n); err != nil {
			return 0, 0, err
		}
		if err := r.settle(); err != nil {
			return 0, 0, err
		}
		if n == im.clusters(int64(len(r.table))*8) {
			break
		}
		for i := range n { // it became longer meanwhile
			r.due = append(r.due, due{off>>im.cb + i, -1})
		}
	}
	if err := r.writeDirty(); err != nil {
		return 0, 0, err
	}
	if err := im.f.write(encodeEntries(r.table), off); err != nil {
		return 0, 0, fmt.Errorf("new refcount table: %w", err)
	}
	return off, uint32(n), nil
}
