package qcow2

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"
)

// Snapshot is an internal snapshot: the disk as it was, inside the image.
type Snapshot struct {
	ID       string
	Name     string
	Date     time.Time
	VMClock  time.Duration // how long the guest had been running
	VMState  int64         // bytes of state that belong to it, 0 without
	DiskSize int64         // bytes

	l1Off  int64
	l1Size uint32
	extra  []byte // as in the file: VM state size, disk size, and what else there is
}

// The snapshot table ("Snapshots").
const (
	snapHeader   = 40
	snapExtra    = 24      // extra data that is known: VM state size, disk size, icount
	maxSnapExtra = 1 << 10 // QEMU's limits
	maxSnapBytes = 64 << 20
)

// readSnapshots reads the list of snapshots.
func (im *Image) readSnapshots() error {
	off := int64(im.h.snapOff)
	im.snaps = nil
	for i := range im.h.snapshots {
		var b [snapHeader]byte
		if off-int64(im.h.snapOff) > maxSnapBytes || off >= im.f.length.Load() {
			return fmt.Errorf("%w: snapshot %d of %d lies outside of the table", ErrFormat, i+1, im.h.snapshots)
		}
		if err := im.f.read(b[:], off); err != nil {
			return fmt.Errorf("snapshot table: %w", err)
		}
		be := binary.BigEndian
		s := &Snapshot{
			l1Off: int64(be.Uint64(b[0:])), l1Size: be.Uint32(b[8:]),
			Date:     time.Unix(int64(be.Uint32(b[16:])), int64(be.Uint32(b[20:]))).UTC(),
			VMClock:  time.Duration(min(be.Uint64(b[24:]), math.MaxInt64)),
			VMState:  int64(be.Uint32(b[32:])),
			DiskSize: im.size.Load(),
		}
		idLen, nameLen, extraLen := int64(be.Uint16(b[12:])), int64(be.Uint16(b[14:])), int64(be.Uint32(b[36:]))
		switch {
		case extraLen > maxSnapExtra:
			return fmt.Errorf("%w: snapshot %d has %d bytes of extra data", ErrFormat, i+1, extraLen)
		case uint64(s.l1Off) > maxOffset || !im.aligned(s.l1Off) || int64(s.l1Size)*8 > maxL1Bytes:
			return fmt.Errorf("%w: snapshot %d has %d L1 entries at byte %#x", ErrFormat, i+1, s.l1Size, s.l1Off)
		}
		rest := make([]byte, extraLen+idLen+nameLen)
		if err := im.f.read(rest, off+snapHeader); err != nil {
			return fmt.Errorf("snapshot table: %w", err)
		}
		s.extra = rest[:extraLen]
		s.ID, s.Name = string(rest[extraLen:extraLen+idLen]), string(rest[extraLen+idLen:])
		if extraLen >= 8 {
			s.VMState = int64(min(be.Uint64(s.extra), math.MaxInt64))
		}
		if extraLen >= 16 {
			s.DiskSize = int64(min(be.Uint64(s.extra[8:]), math.MaxInt64))
		}
		im.snaps = append(im.snaps, s)
		off += (snapHeader + int64(len(rest)) + 7) &^ 7
	}
	return nil
}

// encodeSnapshots returns a snapshot table.
func encodeSnapshots(snaps []*Snapshot) []byte {
	var b []byte
	be := binary.BigEndian
	for _, s := range snaps {
		extra := slices.Clone(s.extra)
		if len(extra) < snapExtra {
			extra = make([]byte, snapExtra)
			be.PutUint64(extra[16:], math.MaxUint64) // no instruction count
		}
		be.PutUint64(extra, uint64(s.VMState))
		be.PutUint64(extra[8:], uint64(s.DiskSize))
		b = be.AppendUint64(b, uint64(s.l1Off))
		b = be.AppendUint32(b, s.l1Size)
		b = be.AppendUint16(b, uint16(len(s.ID)))
		b = be.AppendUint16(b, uint16(len(s.Name)))
		b = be.AppendUint32(b, uint32(s.Date.Unix()))
		b = be.AppendUint32(b, uint32(s.Date.Nanosecond()))
		b = be.AppendUint64(b, uint64(s.VMClock))
		b = be.AppendUint32(b, uint32(min(s.VMState, math.MaxUint32)))
		b = be.AppendUint32(b, uint32(len(extra)))
		b = append(b, extra...)
		b = append(b, s.ID...)
		b = append(b, s.Name...)
		b = append(b, make([]byte, -len(b)&7)...)
	}
	return b
}

// snapBytes returns how long the snapshot table in the file is.
func (im *Image) snapBytes() int64 {
	n := int64(0)
	for _, s := range im.snaps {
		n += (snapHeader + int64(len(s.extra)+len(s.ID)+len(s.Name)) + 7) &^ 7
	}
	return n
}

// Snapshots returns the internal snapshots, oldest first.
func (im *Image) Snapshots() []Snapshot {
	im.mu.Lock()
	defer im.mu.Unlock()
	list := make([]Snapshot, len(im.snaps))
	for i, s := range im.snaps {
		list[i] = *s
	}
	return list
}

// findSnapshot returns the snapshot with this name or, where none has it, this ID.
func (im *Image) findSnapshot(name string) (int, error) {
	for i, s := range im.snaps {
		if s.Name == name {
			return i, nil
		}
	}
	for i, s := range im.snaps {
		if s.ID == name {
			return i, nil
		}
	}
	return 0, ErrNotExist // the caller names it
}

// exclusive runs f with no request under way and nothing left to be written. On images of version 3 the dirty bit is set
// meanwhile: refcounts and copied flags agree again only at the end, and who opens the image before that repairs them.
// After an error of f which changed something, the image is not written any more.
func (im *Image) exclusive(f func() (changed bool, err error)) error {
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
	mark := im.h.version >= 3 && im.h.incompat&incompatDirty == 0
	if mark {
		if err := im.updateHeader(func(h *header) { h.incompat |= incompatDirty }); err != nil {
			return err
		}
	}
	im.mu.Lock()
	im.l2.filter(func(*slice) bool { return false }) // f changes tables in the file
	im.mu.Unlock()
	im.dec.forget()
	changed, err := f()
	if err != nil && changed {
		im.broken.Store(true)
		return fmt.Errorf("%w (nothing is written to the image any more; open it again to repair it)", err)
	}
	if e := im.sync(); err == nil {
		err = e
	}
	if mark {
		if e := im.updateHeader(func(h *header) { h.incompat &^= incompatDirty }); err == nil {
			err = e
		}
	}
	return err
}

// sync makes refcounts and whatever was written to the file stable.
func (im *Image) sync() error {
	if err := im.refs.flush(); err != nil {
		return err
	}
	return im.f.Flush()
}

// CreateSnapshot keeps the disk as it is under a name, which no other snapshot has, with the first state bytes that
// WriteStateAt has stored. That state is the snapshot's afterwards: the active disk has none. clock is how long the guest
// has been running. Requests under way are waited for.
func (im *Image) CreateSnapshot(name string, state int64, clock time.Duration) error {
	err := im.exclusive(func() (bool, error) { return im.createSnapshot(name, state, clock) })
	if err != nil {
		return fmt.Errorf("snapshot %q: %w", name, err)
	}
	return nil
}

func (im *Image) createSnapshot(name string, state int64, clock time.Duration) (changed bool, err error) {
	last := uint64(0)
	for _, s := range im.snaps {
		if s.Name == name {
			return false, ErrExist
		}
		if n, err := strconv.ParseUint(s.ID, 10, 64); err == nil {
			last = max(last, n)
		}
	}
	switch {
	case len(im.snaps) >= maxSnapshots:
		return false, fmt.Errorf("%w: %d snapshots", ErrFeature, len(im.snaps)+1)
	case len(name) > math.MaxUint16 || name == "":
		return false, fmt.Errorf("%w: a name of %d bytes", ErrFeature, len(name))
	}
	if err := im.share(im.l1); err != nil {
		return false, err
	}
	l1 := im.withoutFlags(im.l1)
	off, err := im.newTable(encodeEntries(l1))
	if err != nil {
		return true, err
	}
	im.l1 = l1
	if err := im.f.write(encodeEntries(l1), int64(im.h.l1Off)); err != nil {
		return true, err
	}
	s := &Snapshot{
		ID: strconv.FormatUint(last+1, 10), Name: name, Date: time.Now().UTC(), VMClock: clock, VMState: state,
		DiskSize: im.size.Load(), l1Off: off, l1Size: uint32(len(l1)), extra: nil,
	}
	if err := im.setSnapshots(append(slices.Clone(im.snaps), s)); err != nil {
		return true, err
	}
	return true, im.dropState()
}

// share adds a reference to everything that l1 refers to, and clears the copied flags in its L2 tables: it is about to
// be used by two. An error leaves the refcounts as they were.
func (im *Image) share(l1 []uint64) error {
	done := 0
	err := im.walk(l1, func(off, n int64) error {
		for i := off >> im.cb; i <= (off+n-1)>>im.cb; i++ {
			if _, err := im.addRef(i, 1); err != nil {
				return err
			}
			done++
		}
		return nil
	}, nil)
	if err == nil {
		if err = im.sync(); err == nil {
			return im.walk(l1, nil, func(int, uint64) uint64 { return 0 })
		}
	}
	_ = im.walk(l1, func(off, n int64) error {
		for i := off >> im.cb; i <= (off+n-1)>>im.cb && done > 0; i++ {
			_, _ = im.addRef(i, -1)
			done--
		}
		return nil
	}, nil)
	return err
}

// unshare takes a reference from everything that l1 refers to.
func (im *Image) unshare(l1 []uint64) error {
	return im.walk(l1, func(off, n int64) error { return im.refs.release(freed{off: off, n: n, discard: true}) }, nil)
}

func (im *Image) addRef(i, d int64) (uint64, error) {
	im.refs.mu.Lock()
	defer im.refs.mu.Unlock()
	return im.refs.add(i, d)
}

func (im *Image) withoutFlags(l1 []uint64) []uint64 {
	l1 = slices.Clone(l1)
	for i := range l1 {
		l1[i] &^= entryCopied
	}
	return l1
}

// walk goes through what l1 refers to. ref is called for the clusters of guest data and then for the L2 table that
// refers to them; flag returns for an entry with a place of its own which copied flag it shall have, given the L1 index.
// The L2 cache must be empty.
func (im *Image) walk(l1 []uint64, ref func(off, n int64) error, flag func(i1 int, e uint64) uint64) error {
	b := make([]byte, im.cluster)
	for i1, t := range l1 {
		table := int64(t & entryOffset)
		if table == 0 {
			continue
		}
		if !im.aligned(table) || table >= im.f.length.Load() {
			return im.corrupt("L1 entry %d, %#x, is not the offset of an L2 table", i1, t)
		}
		if err := im.f.read(b, table); err != nil {
			return fmt.Errorf("read L2 table: %w", err)
		}
		changed := false
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
			case flag != nil:
				if want := e&^entryCopied | flag(i1, e); want != e {
					binary.BigEndian.PutUint64(b[i:], want)
					changed = true
				}
			}
			if ref == nil {
				continue
			}
			if err := ref(off, n); err != nil {
				return err
			}
		}
		if changed {
			if err := im.f.write(b, table); err != nil {
				return fmt.Errorf("write L2 table: %w", err)
			}
		}
		if ref != nil {
			if err := ref(table, im.cluster); err != nil {
				return err
			}
		}
	}
	return nil
}

// newTable writes b to new clusters, side by side, and returns where, once it is stable. It is 0 for an empty table.
func (im *Image) newTable(b []byte) (int64, error) {
	n := im.clusters(int64(len(b)))
	if n == 0 {
		return 0, im.sync()
	}
	off, err := im.refs.allocRun(n)
	if err != nil {
		return 0, err
	}
	err = im.meta.claim(im, off, n)
	if err == nil {
		b = append(b, make([]byte, n<<im.cb-int64(len(b)))...)
		if err = im.f.write(b, off); err == nil {
			err = im.sync()
		}
	}
	if err != nil {
		im.refs.undo(off, n<<im.cb)
	}
	return off, err
}

// setSnapshots writes a new list of snapshots and switches to it.
func (im *Image) setSnapshots(snaps []*Snapshot) error {
	b := encodeSnapshots(snaps)
	if len(b) > maxSnapBytes {
		return fmt.Errorf("%w: snapshot table of %d bytes", ErrFeature, len(b))
	}
	off, err := im.newTable(b)
	if err != nil {
		return err
	}
	oldOff, oldLen := int64(im.h.snapOff), im.snapBytes()
	im.f.event("qcow2_snapshot_table")
	err = im.updateHeader(func(h *header) { h.snapOff, h.snapshots = uint64(off), uint32(len(snaps)) })
	if err != nil {
		return err
	}
	for _, s := range snaps {
		if len(s.extra) < snapExtra {
			s.extra = make([]byte, snapExtra) // as encodeSnapshots wrote it
			binary.BigEndian.PutUint64(s.extra[16:], math.MaxUint64)
		}
	}
	im.mu.Lock()
	im.snaps = snaps
	im.mu.Unlock()
	if oldLen > 0 {
		return im.refs.release(freed{off: oldOff, n: im.clusters(oldLen) << im.cb})
	}
	return nil
}

// ApplySnapshot makes the disk what it was when the snapshot with this ID or name was taken, size included; its VM state
// is what ReadStateAt returns then. The snapshot stays. Requests under way are waited for.
func (im *Image) ApplySnapshot(name string) error {
	if err := im.exclusive(func() (bool, error) { return im.applySnapshot(name) }); err != nil {
		return fmt.Errorf("apply snapshot %q: %w", name, err)
	}
	return nil
}

func (im *Image) applySnapshot(name string) (changed bool, err error) {
	k, err := im.findSnapshot(name)
	if err != nil {
		return false, err
	}
	s := im.snaps[k]
	if s.DiskSize < 0 || s.DiskSize%512 != 0 || im.l1Entries(s.DiskSize)*8 > maxL1Bytes {
		return false, im.corrupt("snapshot %q has a disk of %d bytes", name, s.DiskSize)
	}
	l1, err := im.readEntries(s.l1Off, int(s.l1Size))
	if err != nil {
		return false, err
	}
	if err := im.share(l1); err != nil {
		return false, err
	}
	l1 = im.withoutFlags(l1)
	if n := int(max(im.l1Entries(s.DiskSize), 1)); n > len(l1) {
		l1 = append(l1, make([]uint64, n-len(l1))...)
	}
	old, oldOff := im.l1, int64(im.h.l1Off)
	if err := im.switchL1(l1, s.DiskSize); err != nil {
		return true, err
	}
	if err := im.unshare(old); err != nil {
		return true, err
	}
	if n := im.clusters(int64(len(old)) * 8); n > 0 {
		if err := im.refs.release(freed{off: oldOff, n: n << im.cb}); err != nil {
			return true, err
		}
	}
	im.meta.init(im)
	return true, nil
}

// switchL1 writes a new active L1 table and switches to it, and to a size of the disk.
func (im *Image) switchL1(l1 []uint64, size int64) error {
	off, err := im.newTable(encodeEntries(l1))
	if err != nil {
		return err
	}
	im.f.event("qcow2_l1_switch")
	err = im.updateHeader(func(h *header) { h.l1Off, h.l1Size, h.size = uint64(off), uint32(len(l1)), uint64(size) })
	if err != nil {
		return err
	}
	im.mu.Lock()
	im.l1, im.l1Lo, im.l1Hi = l1, 0, 0
	im.mu.Unlock()
	im.size.Store(size)
	return nil
}

// DeleteSnapshot forgets the snapshot with this ID or name. Requests under way are waited for.
func (im *Image) DeleteSnapshot(name string) error {
	if err := im.exclusive(func() (bool, error) { return im.deleteSnapshot(name) }); err != nil {
		return fmt.Errorf("delete snapshot %q: %w", name, err)
	}
	return nil
}

func (im *Image) deleteSnapshot(name string) (changed bool, err error) {
	k, err := im.findSnapshot(name)
	if err != nil {
		return false, err
	}
	s := im.snaps[k]
	l1, err := im.readEntries(s.l1Off, int(s.l1Size))
	if err != nil {
		return false, err
	}
	if err := im.setSnapshots(slices.Delete(slices.Clone(im.snaps), k, k+1)); err != nil {
		return true, err
	}
	if err := im.unshare(l1); err != nil {
		return true, err
	}
	if n := im.clusters(int64(s.l1Size) * 8); n > 0 {
		if err := im.refs.release(freed{off: s.l1Off, n: n << im.cb}); err != nil {
			return true, err
		}
	}
	return true, im.restoreFlags()
}

// restoreFlags gives the active tables the copied flags that their refcounts tell.
func (im *Image) restoreFlags() error {
	if err := im.sync(); err != nil {
		return err
	}
	var failed error
	single := func(off int64) uint64 {
		v, err := im.addRef(off>>im.cb, 0)
		if err != nil {
			failed = err
		}
		if v == 1 {
			return entryCopied
		}
		return 0
	}
	l1 := slices.Clone(im.l1)
	for i, e := range l1 {
		if e&entryOffset != 0 {
			l1[i] = e&^entryCopied | single(int64(e&entryOffset))
		}
	}
	if failed != nil {
		return failed
	}
	err := im.walk(l1, nil, func(i1 int, e uint64) uint64 {
		if l1[i1]&entryCopied == 0 {
			return e & entryCopied // somebody else's too
		}
		return single(int64(e & entryOffset))
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		return err
	}
	im.mu.Lock()
	im.l1 = l1
	im.mu.Unlock()
	return im.f.write(encodeEntries(l1), int64(im.h.l1Off))
}
