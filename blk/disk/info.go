package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/qcow2"
)

// Info describes a disk. In JSON it has the shape of `qemu-img info --output=json`.
type Info struct {
	Filename    string `json:"filename"`
	Format      Format `json:"format"`
	VirtualSize int64  `json:"virtual-size"`          // bytes
	ActualSize  *int64 `json:"actual-size,omitempty"` // bytes of space that the file takes; nil for what is not a file
	ClusterSize int64  `json:"cluster-size,omitempty"`
	Dirty       bool   `json:"dirty-flag"` // an image that was not closed; it is repaired when it is opened for writing

	Backing       string `json:"backing-filename,omitempty"` // as it stands in the image
	FullBacking   string `json:"full-backing-filename,omitempty"`
	BackingFormat string `json:"backing-filename-format,omitempty"`

	Snapshots []Snapshot `json:"snapshots,omitempty"`
	Specific  *Specific  `json:"format-specific,omitempty"`
}

// Snapshot is an internal snapshot of an image.
type Snapshot struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	StateSize int64  `json:"vm-state-size"` // bytes
	DateSec   int64  `json:"date-sec"`      // Unix time at which it was made
	DateNsec  int64  `json:"date-nsec"`
	ClockSec  int64  `json:"vm-clock-sec"` // how long the guest had been running
	ClockNsec int64  `json:"vm-clock-nsec"`
}

// Specific is what only one format has.
type Specific struct {
	Type Format     `json:"type"`
	Data QCOW2Facts `json:"data"`
}

// QCOW2Facts are the settings of a qcow2 image.
type QCOW2Facts struct {
	Compat        string `json:"compat"`
	Compression   string `json:"compression-type"`
	RefcountBits  int    `json:"refcount-bits"`
	LazyRefcounts *bool  `json:"lazy-refcounts,omitempty"` // nil, as those below, in version 0.10, which has none
	Corrupt       *bool  `json:"corrupt,omitempty"`
	ExtendedL2    *bool  `json:"extended-l2,omitempty"`
}

// Inspect opens a disk for reading, without its backing file, and describes it. Of s count Path, Format, ForceShare and
// what concerns the connection.
func Inspect(ctx context.Context, s Spec) (info Info, err error) {
	s.ReadOnly, s.Alone, s.Throttle, s.Group, s.CopyOnRead = true, true, blk.Throttle{}, nil, false
	d, err := Open(ctx, s)
	if err != nil {
		return Info{}, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	info = Info{Filename: s.Path, Format: Raw, VirtualSize: d.Size()}
	if !IsURI(s.Path) {
		if fi, err := os.Stat(s.Path); err == nil {
			if st, ok := fi.Sys().(*syscall.Stat_t); ok {
				n := st.Blocks * 512
				info.ActualSize = &n
			}
		}
	}
	if image, ok := d.Backend().(*qcow2.Image); ok {
		info.addImage(image.Info())
		if info.Backing != "" {
			if info.FullBacking, err = resolve(s.Path, info.Backing); err != nil {
				info.FullBacking, err = info.Backing, nil
			}
			if !IsURI(info.FullBacking) {
				info.FullBacking = filepath.Clean(info.FullBacking)
			}
		}
	}
	return info, nil
}

func (i *Info) addImage(q qcow2.Info) {
	i.Format, i.ClusterSize, i.Dirty = QCOW2, q.ClusterSize, q.Dirty
	i.Backing, i.BackingFormat = q.BackingFile, q.BackingFormat
	for _, s := range q.Snapshots {
		i.Snapshots = append(i.Snapshots, Snapshot{
			ID: s.ID, Name: s.Name, StateSize: s.VMState,
			DateSec: s.Date.Unix(), DateNsec: int64(s.Date.Nanosecond()),
			ClockSec: int64(s.VMClock / 1e9), ClockNsec: int64(s.VMClock % 1e9),
		})
	}
	i.Specific = &Specific{Type: QCOW2, Data: QCOW2Facts{
		Compat: string(q.Compat), Compression: q.Compression, RefcountBits: q.RefcountBits,
	}}
	if q.Compat != qcow2.Compat010 {
		i.Specific.Data.LazyRefcounts, i.Specific.Data.Corrupt, i.Specific.Data.ExtendedL2 = &q.LazyRefcounts, &q.Corrupt, new(bool)
	}
}

// InspectChain describes a disk and all backing files below it, from the top, as far as s.Backing allows. With an error
// come those that it got to; the last may be one that can't be opened, of which Filename and Format are all that is known.
func InspectChain(ctx context.Context, s Spec) ([]Info, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	o := &opener{ctx: ctx, s: s}
	var chain []Info
	for p := (place{name: s.Path, path: s.Path, format: s.Format}); ; {
		if err := o.notSeen(p.path); err != nil {
			return chain, err
		}
		chain = append(chain, Info{Filename: p.name, Format: p.format})
		layer := s
		layer.Path, layer.Format = p.path, p.format
		info, err := Inspect(ctx, layer)
		if err != nil {
			return chain, err
		}
		info.Filename = p.name
		chain[len(chain)-1] = info
		if info.Backing == "" {
			return chain, nil
		}
		if p, err = o.allowed(p, info.Backing, info.BackingFormat); err != nil {
			return chain, fmt.Errorf("disk %s: backing file %q: %w", info.Filename, info.Backing, err)
		}
	}
}

// Check checks an image and repairs what mode allows; s.ReadOnly is set where nothing is to be repaired. blk.ErrUnsupported
// says that the format has nothing to check. A report comes with an error too where the check got so far.
func Check(ctx context.Context, s Spec, mode qcow2.Repair) (r qcow2.Report, err error) {
	if s.Format != QCOW2 {
		return r, fmt.Errorf("check disk %s: a raw disk has nothing to check: %w", s.Path, blk.ErrUnsupported)
	}
	s.ReadOnly = mode == qcow2.RepairNone
	if err := s.check(); err != nil {
		return r, err
	}
	b, err := s.openFile(ctx, s.Path, s.ReadOnly)
	if err != nil {
		return r, err
	}
	file, err := blk.New(b, blk.Options{ReadOnly: s.ReadOnly})
	if err != nil {
		return r, errors.Join(fmt.Errorf("check disk %s: %w", s.Path, err), b.Close())
	}
	image, err := qcow2.Open(file, qcow2.Options{ReadOnly: s.ReadOnly, NoBacking: true, Repair: true})
	if err != nil {
		return r, errors.Join(fmt.Errorf("check disk %s: %w", s.Path, err), file.Close())
	}
	defer func() { err = errors.Join(err, image.Close()) }()
	if r, err = qcow2.Check(ctx, image, mode); err != nil {
		err = fmt.Errorf("disk %s: %w", s.Path, err)
	}
	return r, err
}
