package qcow2

import (
	"context"
	"fmt"
	"maps"
	"slices"
)

// compare compares the refcounts in the file with what was counted, and corrects them where that is allowed.
func (c *checker) compare() error {
	entries := int64(1) << c.rbBits

	b := make([]byte, c.cluster)
	limit := c.maxRefcount()
	lacking := false
	// Structures that are something else besides can't be changed.
	for k := range c.clusters(int64(len(c.Image.refs.table)) * 8) {
		c.redo = c.redo || c.refs.get(int64(c.h.rtOff)>>c.cb+k) > 1
	}
	for _, e := range c.Image.refs.table {
		c.redo = c.redo || e != 0 && c.refs.get(int64(e)>>c.cb) > 1
	}
	used := c.blocksInUse()
	for i, e := range c.Image.refs.table {
		first := int64(i) * entries
		inUse := used[int64(i)]
		delete(used, int64(i))
		if e == 0 {
			lacking = lacking || inUse
			continue
		}
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if err := c.f.read(b, int64(e)); err != nil {
			return err
		}
		changed := false
		for k := range entries {
			have, want := c.entry(b, int(k)), uint64(c.refs.get(first+k))
			if want > 0 || have > 0 {
				c.r.End = max(c.r.End, (first+k+1)<<c.cb)
			}
			switch {
			case have == want:
				continue
			case have > want:
				c.r.Leaks++
				if c.mode != RepairNone {
					c.r.FixedLeaks++
				}
				c.say("cluster at byte %#x is lost: refcount %d, %d references", (first+k)<<c.cb, have, want)
			default:
				c.problem(c.mode == RepairAll && want <= limit, "cluster at byte %#x: refcount %d, %d references",
					(first+k)<<c.cb, have, want)
				if want > limit {
					c.bad++
					continue
				}
			}
			if c.mode == RepairAll || c.mode == RepairLeaks && have > want {
				c.setEntry(b, int(k), want)
				changed = true
			}
		}
		if changed && !c.redo {
			if err := c.f.write(b, int64(e)); err != nil {
				return err
			}
		}
	}
	if lacking || len(used) > 0 { // what is left lies behind the table
		c.redo = true
		c.problem(c.mode == RepairAll, "clusters in use without a refcount block")
	}
	return nil
}

// blocksInUse returns the numbers of the refcount blocks that count what was counted here. A block has 64 refcounts at
// least, so a chunk belongs to one.
func (c *checker) blocksInUse() map[int64]bool {
	used := make(map[int64]bool)
	for k, chunk := range c.refs.chunks {
		if *chunk != ([64]uint32{}) {
			used[k<<6>>c.rbBits] = true
		}
	}
	return used
}

// finishRepair rebuilds the refcounts if they could not be corrected, clears the bits that said that something was
// wrong, and reads the tables again.
func (c *checker) finishRepair() error {
	if c.mode == RepairAll && c.redo {
		if err := c.rebuild(); err != nil {
			return err
		}
		// Clusters that the old structures lay over have one user less.
		if err := c.checkL1(); err != nil {
			return err
		}
	}
	if err := c.f.Flush(); err != nil {
		return err
	}
	clean := c.r.Corruptions == c.r.FixedCorruptions && c.r.Errors == 0
	if clean && c.h.incompat&(incompatDirty|incompatCorrupt) != 0 {
		c.broken.Store(false)
		if err := c.updateHeader(func(h *header) { h.incompat &^= incompatDirty | incompatCorrupt }); err != nil {
			return err
		}
		c.ready.Store(false)
	}
	return c.readTables()
}

// rebuild makes new refcount structures behind the end of the file, and switches to them. The old ones become free.
func (c *checker) rebuild() error {
	entries := int64(1) << c.rbBits
	// The old structures are not referred to any more.
	forget := func(i int64) {
		if k := c.refs.chunks[i>>6]; k != nil && k[i&63] > 0 {
			k[i&63]--
		}
	}
	for k := range c.clusters(int64(len(c.Image.refs.table)) * 8) {
		forget(int64(c.h.rtOff)>>c.cb + k)
	}
	used := make(map[int64]bool) // blocks that are needed
	for _, e := range c.Image.refs.table {
		if e != 0 {
			forget(int64(e) >> c.cb)
		}
	}
	start := c.clusters(c.f.length.Load())
	for k, chunk := range c.refs.chunks {
		for i, n := range chunk {
			if n > 0 {
				used[(k<<6+int64(i))/entries] = true
				start = max(start, k<<6+int64(i)+1) // the last one in use may lie behind the end of the file
			}
		}
	}
	var blocks, table int64
	for {
		count := int64(len(used))
		last := (start + blocks + table) / entries
		for b := start / entries; b <= last; b++ {
			if !used[b] {
				count++
			}
		}
		t := c.clusters((last + 1) * 8)
		if t<<c.cb > maxTableBytes {
			return fmt.Errorf("%w: its refcount table would be larger than %d bytes", ErrNoSpace, maxTableBytes)
		}
		if count == blocks && t == table {
			break
		}
		blocks, table = max(count, blocks), max(t, table)
	}
	for i := start; i < start+blocks+table; i++ {
		if !c.refs.add(i, 1) {
			return fmt.Errorf("%w: more clusters than can be checked", ErrFeature)
		}
		used[i/entries] = true
	}
	t := make([]uint64, table<<c.cb/8)
	at := start
	b := make([]byte, c.cluster)
	for _, block := range slices.Sorted(maps.Keys(used)) {
		clear(b)
		for k := range entries {
			n := uint64(c.refs.get(block*entries + k))
			if n > c.maxRefcount() {
				c.bad++
				c.problem(false, "cluster at byte %#x has %d references, more than its refcount can be", (block*entries+k)<<c.cb, n)
				n = c.maxRefcount()
			}
			if n > 0 {
				c.setEntry(b, int(k), n)
			}
		}
		if err := c.f.write(b, at<<c.cb); err != nil {
			return err
		}
		t[block] = uint64(at << c.cb)
		at++
	}
	if err := c.f.write(encodeEntries(t), (start+blocks)<<c.cb); err != nil {
		return err
	}
	if err := c.f.Flush(); err != nil {
		return err
	}
	return c.updateHeader(func(h *header) { h.rtOff, h.rtClusters = uint64((start+blocks)<<c.cb), uint32(table) })
}

// repairDirty repairs an image that was not closed and whose refcounts may be too low for that reason.
func (im *Image) repairDirty() error {
	r, err := im.check(context.Background(), RepairAll)
	if err == nil && r.Corruptions > r.FixedCorruptions {
		err = fmt.Errorf("%w: %s", ErrCorrupt, r.Problems[0])
	}
	if err != nil {
		return fmt.Errorf("repair the image, which was not closed: %w", err)
	}
	return nil
}
