package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/qcow2"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/iov"
)

// CreateSpec describes a disk to be made. The fields from ClusterSize to LazyRefcounts are for qcow2 only.
type CreateSpec struct {
	Path   string // a file; a block device or an NBD URI for an image, which is written there over what it holds
	Format Format // "" means Raw
	Size   int64  // bytes, rounded up to whole sectors; 0 with a backing file means as large as that

	ClusterSize   int64        // 0 means 64 KiB
	RefcountBits  int          // 0 means 16
	Compat        qcow2.Compat // "" means qcow2.Compat11
	Compression   qcow2.Compression
	BackingFile   string // as it will stand in the image; a relative name is relative to the image
	BackingFormat Format // needed with BackingFile
	LazyRefcounts bool

	Preallocation Preallocation
	Overwrite     bool // replace what is there; else it is an error that matches fs.ErrExist

	// Use, unless it is nil, is how the image will be opened: what Open would refuse then of its backing files is refused
	// before anything is made. Path and Format do not count.
	Use *Spec

	// Progress is told now and then how many bytes of how many are written by PreallocateFull; may be nil.
	Progress func(done, total int64)
}

// Create makes a disk. When it fails, or ctx ends, a file that it made is removed again, and one that was there before
// may hold anything.
//
// A backing file is opened, without its own, to see that it is there and has the format that is said of it.
func Create(ctx context.Context, c CreateSpec) (err error) {
	if err := c.check(); err != nil {
		return err
	}
	if c.BackingFile != "" {
		if err := c.checkBacking(ctx); err != nil {
			return err
		}
	}
	if c.Size > math.MaxInt64-blk.SectorSize || c.Size <= 0 && c.Format == Raw {
		return fmt.Errorf("create disk %s: size of %d bytes", c.Path, c.Size)
	}
	c.Size = (c.Size + blk.SectorSize - 1) &^ (blk.SectorSize - 1)
	file, there := !IsURI(c.Path), true
	if file {
		info, err := os.Stat(c.Path)
		if there = err == nil; there {
			if err := raw.CheckMode(info.Mode()); err != nil {
				return fmt.Errorf("create disk %s: %w", c.Path, err)
			}
			file = info.Mode().IsRegular()
		}
	}
	switch {
	case c.Format == Raw && !file:
		return fmt.Errorf("create disk %s: it is there, and a raw disk needs no preparation (use it as it is)", c.Path)
	case c.Format == Raw:
		return c.createFile(ctx, c.Size)
	}
	if err := c.tryImage(ctx); err != nil {
		return err
	}
	switch {
	case file:
		if err := c.createFile(ctx, c.fileSize()); err != nil {
			return err
		}
		if !there { // so it is ours
			defer func() {
				if err != nil {
					_ = os.Remove(c.Path)
				}
			}()
		}
	case !c.Overwrite:
		return fmt.Errorf("create disk %s: %w (have it overwritten)", c.Path, fs.ErrExist)
	}
	return c.createImage(ctx)
}

func (c *CreateSpec) check() error {
	if c.Format == "" {
		c.Format = Raw
	}
	bad := func(format string, args ...any) error {
		return fmt.Errorf("create disk %s: %w", c.Path, fmt.Errorf(format, args...))
	}
	image := c.ClusterSize != 0 || c.RefcountBits != 0 || c.Compat != "" || c.Compression != qcow2.Zlib ||
		c.BackingFile != "" || c.BackingFormat != "" || c.LazyRefcounts
	switch {
	case c.Path == "":
		return errors.New("create disk: its path is empty")
	case c.Format != Raw && c.Format != QCOW2:
		_, err := ParseFormat(string(c.Format))
		return bad("%w", err)
	case c.Format == Raw && image:
		return bad("a raw disk has no clusters, versions, compression or backing file (make it with format qcow2)")
	case c.Format == Raw && c.Preallocation == PreallocateMetadata:
		return bad("a raw disk has no metadata to preallocate (use preallocation off, falloc or full)")
	case c.BackingFile != "" && c.BackingFormat == "":
		return bad("say what format the backing file has: raw or qcow2; it is never guessed")
	case c.BackingFile != "" && c.Preallocation != PreallocateOff:
		return bad("an image with a backing file can't be preallocated: it would hide it")
	case c.Size < 0:
		return bad("size of %d bytes", c.Size)
	}
	return nil
}

// checkBacking looks at the backing file, and takes its size if there is none.
func (c *CreateSpec) checkBacking(ctx context.Context) error {
	name, err := resolve(c.Path, c.BackingFile)
	if err != nil {
		return fmt.Errorf("create disk %s: backing file %q: %w", c.Path, c.BackingFile, err)
	}
	a, okA := identify(c.Path)
	b, okB := identify(name)
	if okA && okB && a == b {
		return fmt.Errorf("create disk %s: %w: it would be its own backing file", c.Path, qcow2.ErrBackingLoop)
	}
	if c.Overwrite && okA {
		if err := c.notBelow(ctx, name, a); err != nil {
			return err
		}
	}
	d, err := Open(ctx, Spec{Path: name, Format: c.BackingFormat, ReadOnly: true, ForceShare: true, Alone: true})
	if err != nil {
		return fmt.Errorf("create disk %s: backing file: %w", c.Path, err)
	}
	if c.Size == 0 {
		c.Size = d.Size()
	}
	if err := d.Close(); err != nil || c.Use == nil {
		return err
	}
	o := &opener{ctx: ctx, s: *c.Use}
	d, err = o.imageOptions(place{name: c.Path, path: c.Path}, false).Backing(c.BackingFile, string(c.BackingFormat))
	if err != nil {
		return fmt.Errorf("create disk %s: %w", c.Path, o.below)
	}
	return d.Close()
}

// notBelow refuses to write over a file that the chain of the new disk needs. Where what lies below the backing file can't
// be looked at, the chain ends.
func (c *CreateSpec) notBelow(ctx context.Context, backing string, target identity) error {
	chain, _ := InspectChain(ctx, Spec{
		Path: backing, Format: c.BackingFormat, ReadOnly: true, ForceShare: true, Backing: BackingOn, BackingFormat: Raw,
	})
	for _, layer := range chain {
		if id, ok := identify(layer.Filename); ok && id == target {
			return fmt.Errorf("create disk %s: %w: it is below its backing file, and would be overwritten",
				c.Path, qcow2.ErrBackingLoop)
		}
	}
	return nil
}

// createFile makes the file, of size bytes.
func (c *CreateSpec) createFile(ctx context.Context, size int64) error {
	o := raw.CreateOptions{Overwrite: c.Overwrite}
	switch c.Preallocation {
	case PreallocateFalloc:
		o.Preallocation = raw.PreallocFalloc
	case PreallocateFull:
		o.Preallocation = raw.PreallocFull
	}
	if c.Progress != nil {
		o.Progress = func(done int64) { c.Progress(done, size) }
	}
	return raw.Create(ctx, c.Path, size, o)
}

// fileSize returns how many bytes the file of an image needs from the start: all that the full image takes if that is
// reserved or written, which is the disk, its L2 and L1 tables and the refcounts of all of them.
func (c *CreateSpec) fileSize() int64 {
	if c.Preallocation != PreallocateFalloc && c.Preallocation != PreallocateFull {
		return blk.SectorSize
	}
	cluster, bits := c.ClusterSize, int64(c.RefcountBits)
	if cluster <= 0 {
		cluster = 64 << 10
	}
	if bits <= 0 {
		bits = 16
	}
	up := func(n, unit int64) int64 { return (n + unit - 1) / unit }
	data := up(c.Size, cluster)
	l2 := up(data, max(cluster/8, 1))
	clusters := 1 + data + l2 + max(up(l2*8, cluster), 1)
	blocks := int64(0)
	for { // refcount blocks count themselves and their table
		total := clusters + blocks + up(blocks*8, cluster)
		if b := up(total, max(cluster*8/bits, 1)); b > blocks {
			blocks = b
			continue
		}
		if total > math.MaxInt64/cluster {
			return math.MaxInt64 &^ (blk.SectorSize - 1) // more than any file system has
		}
		return total * cluster
	}
}

// createImage makes an image of the file, which is there.
func (c *CreateSpec) createImage(ctx context.Context) (err error) {
	d, err := Open(ctx, Spec{Path: c.Path})
	if err != nil {
		return err
	}
	defer func() {
		if cerr := d.Close(); err == nil {
			err = cerr
		}
	}()
	o := c.imageOptions()
	if c.Preallocation != PreallocateOff {
		o.Preallocation = qcow2.PreallocateMetadata
	}
	return c.makeImage(ctx, d, o)
}

func (c *CreateSpec) imageOptions() qcow2.CreateOptions {
	return qcow2.CreateOptions{
		Size: c.Size, ClusterSize: c.ClusterSize, RefcountBits: c.RefcountBits, Compat: c.Compat,
		BackingFile: c.BackingFile, BackingFormat: string(c.BackingFormat),
		LazyRefcounts: c.LazyRefcounts, Compression: c.Compression,
	}
}

func (c *CreateSpec) makeImage(ctx context.Context, d *blk.Device, o qcow2.CreateOptions) error {
	if err := qcow2.Create(ctx, d, o); err != nil {
		return fmt.Errorf("create disk %s: %w", c.Path, err)
	}
	return nil
}

// tryImage makes the image nowhere, so that what can't be is refused before anything is overwritten.
func (c *CreateSpec) tryImage(ctx context.Context) error {
	d, err := blk.New(&nowhere{size: blk.SectorSize}, blk.Options{})
	if err != nil {
		return err
	}
	return errors.Join(c.makeImage(ctx, d, c.imageOptions()), d.Close())
}

// nowhere is a file that forgets what is written to it.
type nowhere struct{ size int64 }

func (n *nowhere) ReadVecAt(dst iov.Vec, _ int64) (int, error) {
	return dst.Size(), dst.Fill(0, dst.Size(), 0)
}
func (n *nowhere) WriteVecAt(src iov.Vec, _ int64) (int, error) { return src.Size(), nil }
func (n *nowhere) Flush() error                                 { return nil }
func (n *nowhere) Size() int64                                  { return n.size }
func (n *nowhere) Limits() blk.Limits                           { return blk.Limits{} }
func (n *nowhere) Close() error                                 { return nil }
func (n *nowhere) Truncate(size int64) error                    { n.size = size; return nil }
