package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/kvmlet/kvmlet/blk"
)

// Compat is the version of the format, by the names that QEMU gives them.
type Compat string

// The versions.
const (
	Compat010 Compat = "0.10" // version 2: no zero clusters, no lazy refcounts, refcounts of 16 bits
	Compat11  Compat = "1.1"  // version 3
)

// Preallocation says what a new image has from the beginning.
type Preallocation uint8

// The kinds of preallocation.
const (
	PreallocateOff      Preallocation = iota
	PreallocateMetadata               // every cluster has its place, but none is written
)

// CreateOptions describes a new image. Only Size must be given.
type CreateOptions struct {
	Size          int64  // of the disk in bytes, a multiple of blk.SectorSize
	ClusterSize   int64  // 512 bytes to 2 MiB, a power of two; 0 means 64 KiB
	RefcountBits  int    // 1 to 64, a power of two; 0 means 16
	Compat        Compat // "" means Compat11
	BackingFile   string // as it will stand in the image; it is not opened
	BackingFormat string // "" leaves it open, which whoever opens the backing file must then know
	LazyRefcounts bool   // faster writes, and a repair after a crash
	Compression   Compression
	Preallocation Preallocation

	ExtendedL2 bool   // refused: not supported
	DataFile   string // refused: not supported
}

// Create makes file, whatever it held, an image. file stays the caller's. What is stable at the end is a valid image; what
// a crash leaves before is none.
func Create(ctx context.Context, file *blk.Device, o CreateOptions) error {
	h, err := newHeader(&o)
	if err != nil {
		return fmt.Errorf("create image: %w", err)
	}
	f := newFile(file)
	if err := writeEmpty(f, h); err != nil {
		return fmt.Errorf("create image: %w", err)
	}
	if o.Preallocation != PreallocateMetadata {
		return nil
	}
	im, err := Open(file, Options{NoBacking: true})
	if err == nil {
		if err = im.preallocate(ctx); err == nil {
			err = im.settle()
		}
	}
	if err != nil {
		return fmt.Errorf("create image: preallocate: %w", err)
	}
	return nil
}

// newHeader checks o, fills in what it leaves open, and lays the image out: header, refcount table, refcount blocks, L1.
func newHeader(o *CreateOptions) (*header, error) {
	if o.ClusterSize == 0 {
		o.ClusterSize = 64 << 10
	}
	if o.RefcountBits == 0 {
		o.RefcountBits = 16
	}
	if o.Compat == "" {
		o.Compat = Compat11
	}
	pow2 := func(n int64) bool { return n > 0 && n&(n-1) == 0 }
	switch {
	case o.Size < 0 || o.Size%blk.SectorSize != 0:
		return nil, fmt.Errorf("a disk of %d bytes: want a multiple of %d", o.Size, blk.SectorSize)
	case !pow2(o.ClusterSize) || o.ClusterSize < 1<<minClusterBits || o.ClusterSize > 1<<maxClusterBits:
		return nil, fmt.Errorf("clusters of %d bytes: want a power of two from 512 to 2 MiB", o.ClusterSize)
	case !pow2(int64(o.RefcountBits)) || o.RefcountBits > 64:
		return nil, fmt.Errorf("refcounts of %d bits: want a power of two up to 64", o.RefcountBits)
	case o.Compat != Compat010 && o.Compat != Compat11:
		return nil, fmt.Errorf("compat %q: want %q or %q", o.Compat, Compat010, Compat11)
	case o.Compat == Compat010 && (o.RefcountBits != 16 || o.LazyRefcounts || o.Compression != Zlib):
		return nil, fmt.Errorf("compat 0.10 has refcounts of 16 bits, not lazy, and zlib only (use compat 1.1)")
	case o.Compression > Zstd:
		return nil, fmt.Errorf("compression type %d: want zlib or zstd", o.Compression)
	case o.ExtendedL2:
		return nil, fmt.Errorf("%w: extended L2 entries", ErrFeature)
	case o.DataFile != "":
		return nil, fmt.Errorf("%w: external data file", ErrFeature)
	case len(o.BackingFile) > maxBackingName:
		return nil, fmt.Errorf("name of the backing file: %d bytes, %d are possible", len(o.BackingFile), maxBackingName)
	case o.BackingFormat != "" && o.BackingFile == "":
		return nil, fmt.Errorf("a backing format without a backing file")
	case o.BackingFile != "" && o.Preallocation != PreallocateOff:
		return nil, fmt.Errorf("an image with a backing file can't be preallocated: it would hide it")
	}
	h := &header{
		version: 3, clusterBits: uint32(log2(o.ClusterSize)), size: uint64(o.Size), length: headerLen3 + 8,
		refOrder: uint32(bits.Len(uint(o.RefcountBits)) - 1), compression: uint8(o.Compression),
		backing: o.BackingFile, backingFormat: o.BackingFormat,
	}
	if o.Compat == Compat010 {
		h.version, h.length = 2, headerLen2
	}
	if o.LazyRefcounts {
		h.compat |= compatLazy
	}
	if o.Compression != Zlib {
		h.incompat |= incompatCompress
	}
	return h, h.layOut()
}

// layOut says where the tables of a new image go.
func (h *header) layOut() error {
	g := newGeometry(h)
	l1 := max(int64(h.size)/g.reach+int64(b2i(int64(h.size)%g.reach != 0)), 1)
	if l1*8 > maxL1Bytes {
		return fmt.Errorf("%w: a disk of %d bytes with clusters of %d (larger clusters make larger disks)", ErrFeature, h.size,
			g.cluster)
	}
	blocks, table := int64(1), int64(1)
	for {
		total := 1 + table + blocks + g.clusters(l1*8)
		b := (total + 1<<g.rbBits - 1) >> g.rbBits
		t := g.clusters(b * 8)
		if b == blocks && t == table {
			break
		}
		blocks, table = max(b, blocks), max(t, table)
	}
	h.rtOff, h.rtClusters = uint64(g.cluster), uint32(table)
	h.l1Off, h.l1Size = uint64((1+table+blocks)<<g.cb), uint32(l1)
	return nil
}

// writeEmpty writes the image that h describes. The header comes last.
func writeEmpty(f *file, h *header) error {
	g := newGeometry(h)
	first := make([]byte, g.cluster)
	at := copy(first, h.encode())
	if h.version >= 3 {
		first[offCompress] = h.compression
		at = int(h.length)
	}
	extension := func(kind uint32, data []byte) error {
		n := 8 + (len(data)+7)&^7
		if at+n > len(first) {
			return fmt.Errorf("the header does not fit a cluster of %d bytes (use larger clusters)", g.cluster)
		}
		binary.BigEndian.PutUint32(first[at:], kind)
		binary.BigEndian.PutUint32(first[at+4:], uint32(len(data)))
		copy(first[at+8:], data)
		at += n
		return nil
	}
	if h.backingFormat != "" {
		if err := extension(extBacking, []byte(h.backingFormat)); err != nil {
			return err
		}
	}
	if h.version >= 3 && g.cluster >= 4096 { // a help for error messages, left out where it takes the whole cluster
		if err := extension(extFeatures, featureTable()); err != nil {
			return err
		}
	}
	if err := extension(extEnd, nil); err != nil {
		return err
	}
	if h.backing != "" {
		if at+len(h.backing) > len(first) {
			return fmt.Errorf("the name of the backing file does not fit a cluster of %d bytes (use larger clusters)", g.cluster)
		}
		h.backingOff, h.backingLen = uint64(at), uint32(len(h.backing))
		copy(first[at:], h.backing)
		copy(first, h.encode())
	}
	l1Clusters := g.clusters(int64(h.l1Size) * 8)
	blocks := int64(h.l1Off)>>g.cb - 1 - int64(h.rtClusters)
	table := make([]uint64, int64(h.rtClusters)<<g.cb/8)
	refs := make([]byte, blocks<<g.cb)
	for i := range blocks {
		table[i] = uint64((1 + int64(h.rtClusters) + i) << g.cb)
	}
	total := 1 + int64(h.rtClusters) + blocks + l1Clusters
	for i := range total {
		g.setEntry(refs, int(i), 1)
	}
	before := f.length.Load()
	if err := f.zero(0, g.cluster); err != nil { // nothing that an older image left
		return err
	}
	if err := f.write(encodeEntries(table), int64(h.rtOff)); err != nil {
		return err
	}
	if err := f.write(refs, int64(h.rtOff)+int64(h.rtClusters)<<g.cb); err != nil {
		return err
	}
	if err := f.zero(int64(h.l1Off), l1Clusters<<g.cb); err != nil {
		return err
	}
	if err := f.Flush(); err != nil {
		return err
	}
	if err := f.write(first, 0); err != nil {
		return err
	}
	f.cut(max(before, total<<g.cb))
	return f.Flush()
}

// preallocate gives every cluster of the disk a place. Nothing else uses the image.
func (im *Image) preallocate(ctx context.Context) error {
	if err := im.writable(); err != nil {
		return err
	}
	end := int64(0)
	total := im.clusters(im.size.Load())
	for c := int64(0); c < total; {
		if err := ctx.Err(); err != nil {
			return err
		}
		off := c << im.cb
		i1 := int(off / im.reach)
		if err := im.makeL2(i1); err != nil {
			return err
		}
		host, n, _, err := im.refs.alloc(min(total-c, (off/im.reach+1)*im.reach>>im.cb-c))
		if err != nil {
			return err
		}
		end = max(end, host+n<<im.cb)
		for k := int64(0); k < n; {
			im.mu.Lock()
			s, i, err := im.l2slice(i1, (c+k)<<im.cb)
			if err != nil {
				im.mu.Unlock()
				return err
			}
			for ; s != nil && k < n && i < len(s.data)/8; i, k = i+1, k+1 {
				s.put64(i, uint64(host+k<<im.cb)|entryCopied)
			}
			im.mu.Unlock()
		}
		c += n
	}
	return im.f.grow(end)
}
