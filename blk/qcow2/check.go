package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"github.com/kvmlet/kvmlet/blk"
)

// Repair says what Check may change.
type Repair uint8

// The kinds of repair.
const (
	RepairNone  Repair = iota
	RepairLeaks        // give lost clusters back
	RepairAll          // and correct refcounts, flags and entries
)

// Report is what Check found.
type Report struct {
	Corruptions int64 // contradictions that endanger data
	Leaks       int64 // clusters that are lost, and cost space only
	Errors      int64 // what could not be checked

	FixedCorruptions int64 // how many of them were repaired
	FixedLeaks       int64

	Total      int64 // clusters of the disk
	Allocated  int64 // of those, the ones with data in the image
	Compressed int64 // of those, the compressed ones
	Fragmented int64 // of those, the ones that do not follow the one before
	End        int64 // bytes of the file up to the last cluster in use

	Problems []string // the first of them, in words
}

// maxProblems is how many problems a Report spells out.
const maxProblems = 100

// Clean reports whether nothing is wrong, or nothing any more.
func (r *Report) Clean() bool {
	return r.Corruptions == r.FixedCorruptions && r.Leaks == r.FixedLeaks && r.Errors == 0
}

// maxCountChunks bounds the memory of Check: 4 GiB of it would count 2^30 clusters in use.
const maxCountChunks = 1 << 24

// counts counts how often each cluster is referred to. Files may be sparse, so it is in chunks.
type counts struct {
	chunks map[int64]*[64]uint32
}

func (c *counts) add(i int64, n uint32) bool {
	k := c.chunks[i>>6]
	if k == nil {
		if len(c.chunks) >= maxCountChunks {
			return false
		}
		k = new([64]uint32)
		c.chunks[i>>6] = k
	}
	if k[i&63] += n; k[i&63] < n {
		k[i&63] = 1<<32 - 1
	}
	return true
}

func (c *counts) get(i int64) uint32 {
	if k := c.chunks[i>>6]; k != nil {
		return k[i&63]
	}
	return 0
}

// checker is one run of Check.
type checker struct {
	*Image
	ctx    context.Context
	mode   Repair
	r      Report
	refs   counts
	tables map[int64]*l2use // by offset
	last   int64            // host offset behind the last cluster of data
	redo   bool             // the refcounts can't be corrected where they are
	bad    int64            // corruptions of a kind that nobody can repair
}

// l2use is how an L2 table is used.
type l2use struct {
	refs   uint32
	active bool // by the active L1
}

// Check compares what the image refers to with its refcounts, and repairs what mode allows. Requests under way are waited
// for. The image should have been opened with Options.Repair, or else only what is sound enough to be opened otherwise
// can be checked. A Report comes with an error too where the check got so far.
//
// Errors: blk.ErrReadOnly where repairing is asked for, that of ctx, and what the file reports.
func Check(ctx context.Context, im *Image, mode Repair) (Report, error) {
	r, err := im.checkAlone(ctx, mode)
	if err == nil && mode == RepairAll && r.Corruptions == r.FixedCorruptions {
		// Now that the refcounts are right, the snapshot table can have another place.
		err = im.completeSnapshots()
	}
	if err != nil {
		err = fmt.Errorf("check image: %w", err)
	}
	return r, err
}

// checkAlone is Check with no request under way.
func (im *Image) checkAlone(ctx context.Context, mode Repair) (Report, error) {
	im.ops.Lock()
	defer im.ops.Unlock()
	if mode != RepairNone && im.o.ReadOnly {
		return Report{}, blk.ErrReadOnly
	}
	if im.ready.Load() && !im.broken.Load() {
		if err := im.commit(); err != nil {
			return Report{}, err
		}
		if err := im.sync(); err != nil {
			return Report{}, err
		}
	}
	return im.check(ctx, mode)
}

func (im *Image) check(ctx context.Context, mode Repair) (Report, error) {
	c := &checker{Image: im, ctx: ctx, mode: mode, tables: make(map[int64]*l2use)}
	c.refs.chunks = make(map[int64]*[64]uint32)
	c.r.Total = im.clusters(im.size.Load())
	for i, s := range c.snaps {
		if !s.whole(c.h.version) {
			c.problem(mode == RepairAll, "entry %d of the snapshot table has %d bytes of extra data, too few", i+1, len(s.extra))
		}
	}
	for _, step := range []func() error{c.countMetadata, c.countTables, c.checkL1, c.compare} {
		if err := step(); err != nil {
			return c.r, err
		}
	}
	if mode == RepairNone {
		return c.r, nil
	}
	return c.r, c.finishRepair()
}

// problem counts one corruption and says what it is. fix is whether it was, or will be, repaired.
func (c *checker) problem(fix bool, format string, args ...any) {
	c.r.Corruptions++
	if fix {
		c.r.FixedCorruptions++
	}
	c.say(format, args...)
}

func (c *checker) say(format string, args ...any) {
	if len(c.r.Problems) < maxProblems {
		c.r.Problems = append(c.r.Problems, fmt.Sprintf(format, args...))
	}
}

// count notes n references to the bytes from off to off+size of the file.
func (c *checker) count(what string, off, size int64, n uint32) error {
	if off+size-c.f.length.Load() >= c.cluster {
		c.bad++
		c.problem(false, "%s at byte %#x lies beyond the end of the file", what, off)
		return nil
	}
	for i := off >> c.cb; i <= (off+size-1)>>c.cb && size > 0; i++ {
		if !c.refs.add(i, n) {
			return fmt.Errorf("%w: more clusters than can be checked", ErrFeature)
		}
	}
	return nil
}

// countMetadata counts everything but L2 tables and data.
func (c *checker) countMetadata() error {
	h := c.h
	count := func(what string, off, size int64) error { return c.count(what, off, size, 1) }
	if err := count("header", 0, c.cluster); err != nil {
		return err
	}
	if err := count("L1 table", int64(h.l1Off), int64(len(c.l1))*8); err != nil {
		return err
	}
	if err := count("snapshot table", int64(h.snapOff), c.snapBytes()); err != nil {
		return err
	}
	for _, s := range c.snaps {
		if err := count("L1 table of a snapshot", s.l1Off, int64(s.l1Size)*8); err != nil {
			return err
		}
	}
	if h.autoclear&autoclearBitmaps != 0 {
		if err := c.countBitmaps(); err != nil {
			return err
		}
	}
	if err := count("refcount table", int64(h.rtOff), int64(len(c.Image.refs.table))*8); err != nil {
		return err
	}
	for i, e := range c.Image.refs.table {
		switch {
		case e == 0:
		case e > maxOffset || !c.aligned(int64(e)) || int64(e) >= c.f.length.Load():
			c.redo = true
			c.problem(c.mode == RepairAll, "refcount block %d at byte %#x", i, e)
			c.Image.refs.table[i] = 0
		default:
			if err := count("refcount block", int64(e), c.cluster); err != nil {
				return err
			}
		}
	}
	return nil
}

// countTables finds all L2 tables and counts what they refer to.
func (c *checker) countTables() error {
	if err := c.findTables(c.l1, true); err != nil {
		return err
	}
	type l1ref struct {
		off  int64
		size uint32
	}
	uses := make(map[l1ref]uint32)
	for _, s := range c.snaps {
		uses[l1ref{s.l1Off, s.l1Size}]++
	}
	for u, n := range uses {
		l1, err := c.readEntries(u.off, int(u.size))
		if err != nil {
			return err
		}
		if c.cleanL1(l1) {
			if err := c.f.write(encodeEntries(l1), u.off); err != nil {
				return err
			}
		}
		for range n {
			if err := c.findTables(l1, false); err != nil {
				return err
			}
		}
	}
	// In the order of the file, and the active ones in the order of the disk, for the fragmentation.
	b := make([]byte, c.cluster)
	for i1, e := range c.l1 {
		if u := c.tables[int64(e&entryOffset)]; u != nil && u.active {
			u.active = false // once
			if err := c.countTable(b, int64(e&entryOffset), u, int64(i1)*c.reach); err != nil {
				return err
			}
			delete(c.tables, int64(e&entryOffset))
		}
	}
	for _, off := range slices.Sorted(maps.Keys(c.tables)) {
		if err := c.countTable(b, off, c.tables[off], -1); err != nil {
			return err
		}
	}
	return nil
}

// cleanL1 looks for bits in the L1 table of a snapshot that mean nothing. It reports whether it has corrected them.
func (c *checker) cleanL1(l1 []uint64) (changed bool) {
	for i, e := range l1 {
		want := e & (entryOffset | entryCopied)
		if e&entryOffset == 0 {
			want = 0
		}
		if e != want {
			c.problem(c.mode == RepairAll, "L1 entry %d of a snapshot is %#x, should be %#x", i, e, want)
			l1[i] = want
			changed = c.mode == RepairAll
		}
	}
	return changed
}

func (c *checker) findTables(l1 []uint64, active bool) error {
	for i, e := range l1 {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		off := int64(e & entryOffset)
		switch {
		case off == 0:
			continue
		case !c.aligned(off) || off >= c.f.length.Load():
			c.bad++
			c.problem(false, "L1 entry %d is %#x, not the offset of an L2 table", i, e)
			continue
		}
		u := c.tables[off]
		if u == nil {
			u = &l2use{}
			c.tables[off] = u
		}
		u.refs++
		u.active = u.active || active
		if err := c.count("L2 table", off, c.cluster, 1); err != nil {
			return err
		}
	}
	return nil
}

// countTable counts what one L2 table refers to. at is where on the active disk it belongs, or negative.
func (c *checker) countTable(b []byte, table int64, u *l2use, at int64) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	if err := c.f.read(b, table); err != nil {
		return err
	}
	changed := false
	for i := 0; i < len(b); i += 8 {
		e := binary.BigEndian.Uint64(b[i:])
		if e == 0 {
			continue
		}
		fixed, err := c.countEntry(e, u, at >= 0 && at+int64(i/8)<<c.cb < c.size.Load())
		if err != nil {
			return err
		}
		if fixed != e && c.mode == RepairAll {
			binary.BigEndian.PutUint64(b[i:], fixed)
			changed = true
		}
	}
	if changed {
		return c.f.write(b, table)
	}
	return nil
}

// countEntry counts what an L2 entry refers to, and returns the entry as it should be.
func (c *checker) countEntry(e uint64, u *l2use, onDisk bool) (uint64, error) {
	k := kindOf(e)
	fix := c.mode == RepairAll
	if k == compressed {
		if e&entryCopied != 0 {
			c.problem(fix, "compressed cluster %#x with the copied flag", e)
			e &^= entryCopied
		}
		off, n := c.compressedRange(e)
		if onDisk {
			c.r.Allocated++
			c.r.Compressed++
			c.r.Fragmented++ // as qemu-img counts them
		}
		// The last sector counts up to the end of the file.
		return e, c.count("compressed data", off, n, u.refs)
	}
	if (k == zeroPlain || k == zeroPlaced) && c.h.version < 3 {
		c.bad++
		c.problem(false, "zero cluster %#x in an image of version 2", e)
	}
	if e&entryReserved != 0 {
		c.problem(fix, "L2 entry %#x with reserved bits", e)
		e &^= entryReserved
	}
	off := int64(e & entryOffset)
	if off == 0 {
		return e, nil
	}
	if !c.aligned(off) {
		if k == zeroPlaced {
			c.problem(fix, "zero cluster %#x, whose offset is not a cluster's", e)
			return entryZero, nil
		}
		c.bad++
		c.problem(false, "L2 entry %#x is not the offset of a cluster", e)
		return e, nil
	}
	if onDisk && k == normal {
		c.r.Allocated++
		if c.last != 0 && c.last != off {
			c.r.Fragmented++
		}
		c.last = off + c.cluster
	}
	return e, c.count("data", off, c.cluster, u.refs)
}

// checkL1 compares the copied flags of the active tables with what was counted. Refcounts that are wrong will be
// corrected to that.
func (c *checker) checkL1() error {
	b := make([]byte, c.cluster)
	flag := func(off int64) uint64 {
		if c.refs.get(off>>c.cb) == 1 {
			return entryCopied
		}
		return 0
	}
	l1Changed := false
	for i1, e := range c.l1 {
		table := int64(e & entryOffset)
		if e == 0 || table != 0 && (!c.aligned(table) || table >= c.f.length.Load()) {
			continue
		}
		if err := c.ctx.Err(); err != nil {
			return err
		}
		want := uint64(0)
		if table != 0 {
			want = e&entryOffset | flag(table) // the other bits are reserved
		}
		if want != e {
			c.problem(c.mode == RepairAll, "L1 entry %d is %#x, should be %#x", i1, e, want)
			if c.mode == RepairAll {
				c.l1[i1] = want
				l1Changed = true
			}
		}
		if table == 0 {
			continue
		}
		if err := c.f.read(b, table); err != nil {
			return err
		}
		changed := false
		for i := 0; i < len(b); i += 8 {
			e := binary.BigEndian.Uint64(b[i:])
			k := kindOf(e)
			off := int64(e & entryOffset)
			if k != normal && k != zeroPlaced || !c.aligned(off) {
				continue
			}
			if want := e&^entryCopied | flag(off); want != e {
				c.problem(c.mode == RepairAll, "L2 entry %#x should be %#x", e, want)
				binary.BigEndian.PutUint64(b[i:], want)
				changed = true
			}
		}
		if changed && c.mode == RepairAll {
			if err := c.f.write(b, table); err != nil {
				return err
			}
		}
	}
	if l1Changed {
		return c.f.write(encodeEntries(c.l1), int64(c.h.l1Off))
	}
	return nil
}

// countBitmaps counts the clusters of the persistent bitmaps ("Bitmaps"). They are consistent: their autoclear bit is set.
func (c *checker) countBitmaps() error {
	be := binary.BigEndian
	for _, e := range c.h.extensions {
		if e.kind != extBitmaps || len(e.data) < 24 {
			continue
		}
		n, size, off := be.Uint32(e.data), be.Uint64(e.data[8:]), int64(be.Uint64(e.data[16:]))
		if size > maxSnapBytes || off < 0 || off > maxOffset || !c.aligned(off) || off >= c.f.length.Load() {
			c.bad++
			c.problem(false, "bitmap directory of %d bytes at byte %#x", size, off)
			return nil
		}
		if err := c.count("bitmap directory", off, int64(size), 1); err != nil {
			return err
		}
		dir := make([]byte, size)
		if err := c.f.read(dir, off); err != nil {
			return err
		}
		for range n {
			if len(dir) < 24 {
				break
			}
			table, entries := int64(be.Uint64(dir)), be.Uint32(dir[8:])
			if err := c.countBitmap(table, entries); err != nil {
				return err
			}
			skip := (24 + int64(be.Uint16(dir[18:])) + int64(be.Uint32(dir[20:])) + 7) &^ 7
			dir = dir[min(skip, int64(len(dir))):]
		}
	}
	return nil
}

func (c *checker) countBitmap(table int64, entries uint32) error {
	if table < 0 || table > maxOffset || !c.aligned(table) || int64(entries)*8 > maxL1Bytes || table >= c.f.length.Load() {
		c.bad++
		c.problem(false, "bitmap table of %d entries at byte %#x", entries, table)
		return nil
	}
	if err := c.count("bitmap table", table, int64(entries)*8, 1); err != nil {
		return err
	}
	t, err := c.readEntries(table, int(entries))
	if err != nil {
		return err
	}
	for _, e := range t {
		if off := int64(e & entryOffset); off != 0 {
			if err := c.count("bitmap", off, c.cluster, 1); err != nil {
				return err
			}
		}
	}
	return nil
}
