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
	snapHeader      = 40
	snapExtra       = 24      // extra data that is known: VM state size, disk size, icount
	snapExtraNeeded = 16      // of it in version 3 ("Snapshots")
	maxSnapExtra    = 1 << 10 // QEMU's limits
	maxSnapBytes    = 64 << 20
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

// whole reports whether s has the extra data that its version of the format demands.
func (s *Snapshot) whole(version uint32) bool { return version < 3 || len(s.extra) >= snapExtraNeeded }

// completeSnapshots writes the snapshot table anew if entries lack extra data.
func (im *Image) completeSnapshots() error {
	if !slices.ContainsFunc(im.snaps, func(s *Snapshot) bool { return !s.whole(im.h.version) }) {
		return nil
	}
	return im.transact(func(s *shadow) error {
		s.snaps = slices.Clone(s.snaps)
		for i, snap := range s.snaps {
			s.snaps[i] = snap.complete()
		}
		return nil
	})
}

// complete returns a copy of s with all extra data that is known.
func (s *Snapshot) complete() *Snapshot {
	be := binary.BigEndian
	c := *s
	c.extra = slices.Clone(s.extra)
	if len(c.extra) < snapExtra {
		c.extra = make([]byte, snapExtra)
		be.PutUint64(c.extra[16:], math.MaxUint64) // no instruction count
	}
	be.PutUint64(c.extra, uint64(s.VMState))
	be.PutUint64(c.extra[8:], uint64(s.DiskSize))
	return &c
}

// encodeSnapshots returns a table of complete snapshots.
func encodeSnapshots(snaps []*Snapshot) []byte {
	var b []byte
	be := binary.BigEndian
	for _, s := range snaps {
		b = be.AppendUint64(b, uint64(s.l1Off))
		b = be.AppendUint32(b, s.l1Size)
		b = be.AppendUint16(b, uint16(len(s.ID)))
		b = be.AppendUint16(b, uint16(len(s.Name)))
		b = be.AppendUint32(b, uint32(s.Date.Unix()))
		b = be.AppendUint32(b, uint32(s.Date.Nanosecond()))
		b = be.AppendUint64(b, uint64(s.VMClock))
		b = be.AppendUint32(b, uint32(min(s.VMState, math.MaxUint32)))
		b = be.AppendUint32(b, uint32(len(s.extra)))
		b = append(b, s.extra...)
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

// CreateSnapshot keeps the disk as it is under a name, which no other snapshot has, with the first state bytes that
// WriteStateAt has stored. That state is the snapshot's afterwards: the active disk has none. clock is how long the guest
// has been running. Requests under way are waited for. After an error there is no such snapshot.
func (im *Image) CreateSnapshot(name string, state int64, clock time.Duration) error {
	err := im.transact(func(s *shadow) error { return s.createSnapshot(name, state, clock) })
	if err != nil {
		return fmt.Errorf("snapshot %q: %w", name, err)
	}
	return nil
}

func (s *shadow) createSnapshot(name string, state int64, clock time.Duration) error {
	last := uint64(0)
	for _, old := range s.snaps {
		if old.Name == name {
			return ErrExist
		}
		if n, err := strconv.ParseUint(old.ID, 10, 64); err == nil {
			last = max(last, n)
		}
	}
	switch {
	case len(s.snaps) >= maxSnapshots:
		return fmt.Errorf("%w: %d snapshots", ErrFeature, len(s.snaps)+1)
	case len(name) > math.MaxUint16 || name == "":
		return fmt.Errorf("%w: a name of %d bytes", ErrFeature, len(name))
	}
	var err error
	if s.l1, err = s.share(s.l1, true); err != nil {
		return err
	}
	off, err := s.store(encodeEntries(s.l1))
	if err != nil {
		return err
	}
	s.snaps = append(slices.Clone(s.snaps), &Snapshot{
		ID: strconv.FormatUint(last+1, 10), Name: name, Date: time.Now().UTC(), VMClock: clock, VMState: state,
		DiskSize: s.size, l1Off: off, l1Size: uint32(len(s.l1)),
	})
	return s.dropState()
}

// ApplySnapshot makes the disk what it was when the snapshot with this ID or name was taken, size included; its VM state
// is what ReadStateAt returns then. The snapshot stays. Requests under way are waited for. After an error the disk is what
// it was.
func (im *Image) ApplySnapshot(name string) error {
	if err := im.transact(func(s *shadow) error { return s.applySnapshot(name) }); err != nil {
		return fmt.Errorf("apply snapshot %q: %w", name, err)
	}
	return nil
}

func (s *shadow) applySnapshot(name string) error {
	im := s.im
	k, err := im.findSnapshot(name)
	if err != nil {
		return err
	}
	snap := s.snaps[k]
	if snap.DiskSize < 0 || snap.DiskSize%512 != 0 || im.l1Entries(snap.DiskSize)*8 > maxL1Bytes {
		return im.corrupt("snapshot %q has a disk of %d bytes", name, snap.DiskSize)
	}
	l1, err := im.readEntries(snap.l1Off, int(snap.l1Size))
	if err != nil {
		return err
	}
	if l1, err = s.share(l1, false); err != nil {
		return err
	}
	if n := int(max(im.l1Entries(snap.DiskSize), 1)); n > len(l1) {
		l1 = append(l1, make([]uint64, n-len(l1))...)
	}
	if err := s.unshare(s.l1); err != nil {
		return err
	}
	s.l1, s.size = l1, snap.DiskSize
	return nil
}

// DeleteSnapshot forgets the snapshot with this ID or name. Requests under way are waited for. After an error the snapshot
// is still there.
func (im *Image) DeleteSnapshot(name string) error {
	if err := im.transact(func(s *shadow) error { return s.deleteSnapshot(name) }); err != nil {
		return fmt.Errorf("delete snapshot %q: %w", name, err)
	}
	return nil
}

func (s *shadow) deleteSnapshot(name string) error {
	k, err := s.im.findSnapshot(name)
	if err != nil {
		return err
	}
	snap := s.snaps[k]
	l1, err := s.im.readEntries(snap.l1Off, int(snap.l1Size))
	if err != nil {
		return err
	}
	s.snaps = slices.Delete(slices.Clone(s.snaps), k, k+1)
	if err := s.unshare(l1); err != nil {
		return err
	}
	if err := s.ref(snap.l1Off, int64(snap.l1Size)*8, -1); err != nil {
		return err
	}
	return s.restoreFlags()
}
