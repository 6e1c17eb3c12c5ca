package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/blk"
)

var (
	// ErrFormat reports a file that is not a qcow2 image, or whose header makes no sense.
	ErrFormat = errors.New("not a qcow2 image")

	// ErrFeature reports an image that needs something that this driver does not do.
	ErrFeature = errors.New("qcow2 feature not supported")

	// ErrCorrupt reports metadata that contradicts itself. The image is not written any more; Check repairs it.
	ErrCorrupt = errors.New("qcow2 image is corrupt")

	// ErrBacking reports an image with a backing file that was not opened.
	ErrBacking = errors.New("backing file not allowed")

	// ErrBackingLoop is for the opener of backing files: a chain that comes back to a file it has already.
	ErrBackingLoop = errors.New("backing files form a loop")

	// ErrNoSpace reports that the file of the image can't grow.
	ErrNoSpace = errors.New("no room for the image in its file")

	// ErrExist reports that the name of a snapshot is taken.
	ErrExist = errors.New("snapshot exists already")

	// ErrNotExist reports that there is no snapshot of that name.
	ErrNotExist = errors.New("no such snapshot")
)

// Override says what is done instead of what the image says.
type Override uint8

// The settings of an Override.
const (
	AsImage Override = iota
	On
	Off
)

// Cache sizes in bytes, unless Options say otherwise. 32 MiB of L2 tables map 256 GiB at clusters of 64 KiB.
const (
	defaultL2Cache       = 32 << 20
	defaultRefcountCache = 8 << 20
	maxCache             = 1 << 30
)

// Options says how an image is opened.
type Options struct {
	// ReadOnly opens the image for reading. Its file is not written at all.
	ReadOnly bool

	// Backing opens the backing file that the image names, with the format that the image says it has, "" where it does
	// not say. The image owns the Device. What the file contains must not decide its format: a guest could have written
	// it. Without Backing an image that has a backing file is refused with ErrBacking.
	Backing func(name, format string) (*blk.Device, error)

	// NoBacking opens the image alone, for Info, Check and the like. A read of what lies in the backing file is refused
	// with ErrBacking, and so is a write that would need it.
	NoBacking bool

	// Repair opens an image for Check as it is, without repairing it first where it was not closed, and with the corrupt
	// bit set. It must not be read or written before Check has repaired it.
	Repair bool

	LazyRefcounts Override

	L2Cache, RefcountCache int64 // most bytes of tables in memory; 0 is a good default
}

// Image is an open image. It implements blk.Backend and most of what is optional there.
type Image struct {
	f       *file
	o       Options
	backing *blk.Device

	geometry
	size atomic.Int64 // of the disk, in bytes

	// ops is held for reading by every request for as long as it runs, and for writing by what changes the shape of the
	// image: snapshots, the size of the disk, repair.
	ops sync.RWMutex
	gen generations

	// mu guards the mapping. It is not held during I/O.
	mu      sync.Mutex
	h       *header
	l1      []uint64
	l1Lo    int // entries of L1 that the file does not have yet: [l1Lo, l1Hi)
	l1Hi    int
	l2      *cache
	allocs  []*alloc // allocating writes under way
	pending []freed  // unlinked, but the file may still say otherwise
	weight  int64    // clusters in pending

	tables sync.Mutex // held while an L2 table is made

	// refs.mu guards the refcounts. It may be held during I/O.
	refs refcounts

	meta metaSet // clusters that hold metadata

	snaps []*Snapshot // guarded by ops and mu

	queue  flushQueue
	batch  freeBatch // guarded by queue.running
	dec    decompressors
	cow    sync.Pool // *[]byte, one cluster
	vecs   sync.Pool // *iov.Vec
	ready  atomic.Bool
	readyM sync.Mutex
	broken atomic.Bool // corrupt: not written any more
	lazy   bool
	floor  int64 // length of the file when it was opened
	closed atomic.Bool
}

// geometry is what follows from the sizes in the header.
type geometry struct {
	cb      uint  // log2 of the cluster size
	cluster int64 // bytes
	l2Bits  uint  // log2 of the entries of an L2 table
	reach   int64 // bytes of the disk that one L2 table maps
	order   uint  // log2 of the bits of a refcount
	rbBits  uint  // log2 of the entries of a refcount block
}

func newGeometry(h *header) geometry {
	g := geometry{cb: uint(h.clusterBits), order: uint(h.refOrder)}
	g.cluster = 1 << g.cb
	g.l2Bits = g.cb - 3
	g.reach = g.cluster << g.l2Bits
	g.rbBits = g.cb + 3 - g.order
	return g
}

// clusters returns how many clusters n bytes take.
func (g geometry) clusters(n int64) int64 { return n>>g.cb + int64(b2i(n&(g.cluster-1) != 0)) }

// aligned reports whether off may be where a cluster stands.
func (g geometry) aligned(off int64) bool { return off&(g.cluster-1) == 0 }

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Open opens the image that is in file. The Image owns file from then on; on an error it stays the caller's.
//
// Errors: ErrFormat, ErrFeature, ErrCorrupt, ErrBacking, and what file and Options.Backing report.
func Open(file *blk.Device, o Options) (*Image, error) {
	o.ReadOnly = o.ReadOnly || file.ReadOnly()
	im := &Image{f: newFile(file), o: o}
	im.floor = im.f.length.Load()
	if err := im.readHeader(); err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	if err := im.readTables(); err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	if err := im.openBacking(); err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	if err := im.prepare(); err != nil {
		if im.backing != nil {
			_ = im.backing.Close()
		}
		return nil, fmt.Errorf("open image: %w", err)
	}
	return im, nil
}

// readHeader reads and checks the first cluster.
func (im *Image) readHeader() error {
	start := make([]byte, min(512, im.f.length.Load()))
	if err := im.f.read(start, 0); err != nil {
		return err
	}
	h, err := parseHeader(start)
	if err != nil && (h == nil || !errors.Is(err, ErrFormat)) && len(start) < 512 {
		return err
	}
	// A longer header is parsed again with the whole cluster.
	if len(start) >= 24 && binary.BigEndian.Uint32(start) == magic {
		if n := binary.BigEndian.Uint32(start[20:]); n >= minClusterBits && n <= maxClusterBits {
			start = make([]byte, min(1<<n, im.f.length.Load()))
			if err := im.f.read(start, 0); err != nil {
				return err
			}
			h, err = parseHeader(start)
		}
	}
	if err != nil {
		return err
	}
	if err := h.parseExtensions(start); err != nil {
		return err
	}
	if err := h.checkFeatures(); err != nil {
		return err
	}
	im.h, im.geometry = h, newGeometry(h)
	return im.checkHeader()
}

// checkHeader checks what must hold between the numbers of the header.
func (im *Image) checkHeader() error {
	h := im.h
	const sector = blk.SectorSize
	if h.size > 1<<63-1-maxL1Bytes {
		return fmt.Errorf("%w: a disk of %d bytes", ErrFormat, h.size)
	}
	size := (int64(h.size) + sector - 1) &^ (sector - 1)
	im.size.Store(size)
	length := im.f.length.Load()
	inFile := func(what string, off uint64, n int64) error {
		if off > maxOffset || !im.aligned(int64(off)) || int64(off) > length || off == 0 && n > 0 {
			return fmt.Errorf("%w: %s at byte %#x", ErrFormat, what, off)
		}
		return nil
	}
	switch {
	case uint64(h.l1Size)*8 > maxL1Bytes:
		return fmt.Errorf("%w: L1 table of %d entries", ErrFormat, h.l1Size)
	case int64(h.l1Size) < im.l1Entries(size):
		return fmt.Errorf("%w: L1 table of %d entries for a disk of %d bytes", ErrFormat, h.l1Size, size)
	case uint64(h.rtClusters)<<im.cb > maxTableBytes || h.rtClusters == 0 && !im.o.Repair:
		return fmt.Errorf("%w: refcount table of %d clusters", ErrFormat, h.rtClusters)
	case h.snapshots > maxSnapshots:
		return fmt.Errorf("%w: %d snapshots", ErrFormat, h.snapshots)
	}
	if err := inFile("L1 table", h.l1Off, int64(h.l1Size)); err != nil {
		return err
	}
	if err := inFile("refcount table", h.rtOff, int64(h.rtClusters)); err != nil && !im.o.Repair {
		return err
	}
	return inFile("snapshot table", h.snapOff, int64(h.snapshots))
}

// l1Entries returns how many L1 entries a disk of n bytes needs.
func (im *Image) l1Entries(n int64) int64 { return n/im.reach + int64(b2i(n%im.reach != 0)) }

// readTables reads what is kept in memory: L1, the refcount table, the list of snapshots.
func (im *Image) readTables() error {
	h := im.h
	var err error
	if im.l1, err = im.readEntries(int64(h.l1Off), int(h.l1Size)); err != nil {
		return fmt.Errorf("L1 table: %w", err)
	}
	rtOff := int64(h.rtOff)
	if rtOff > maxOffset || !im.aligned(rtOff) { // only with Options.Repair
		h.rtOff, h.rtClusters, rtOff = 0, 0, 0
	}
	im.refs.table, err = im.readEntries(rtOff, int(int64(h.rtClusters)<<im.cb/8))
	if err != nil {
		return fmt.Errorf("refcount table: %w", err)
	}
	if err := im.readSnapshots(); err != nil {
		return err
	}
	limit := func(n, standard int64) int64 {
		if n <= 0 {
			n = standard
		}
		return min(n, maxCache)
	}
	im.l2 = newCache(limit(im.o.L2Cache, defaultL2Cache), im.cluster)
	im.refs.init(im, limit(im.o.RefcountCache, defaultRefcountCache))
	im.meta.init(im)
	return nil
}

// readEntries reads n big-endian 64-bit numbers.
func (im *Image) readEntries(off int64, n int) ([]uint64, error) {
	b := make([]byte, n*8)
	if err := im.f.read(b, off); err != nil {
		return nil, err
	}
	t := make([]uint64, n)
	for i := range t {
		t[i] = binary.BigEndian.Uint64(b[i*8:])
	}
	return t, nil
}

func encodeEntries(t []uint64) []byte {
	b := make([]byte, len(t)*8)
	for i, e := range t {
		binary.BigEndian.PutUint64(b[i*8:], e)
	}
	return b
}

func (im *Image) openBacking() error {
	h := im.h
	if h.backing == "" || im.o.NoBacking {
		return nil
	}
	if im.o.Backing == nil {
		return fmt.Errorf("%w: the image names %q with format %q (allow it by opening the image with backing files enabled)",
			ErrBacking, h.backing, h.backingFormat)
	}
	d, err := im.o.Backing(h.backing, h.backingFormat)
	if err == nil && d == nil {
		err = ErrBacking
	}
	if err != nil {
		return fmt.Errorf("backing file %q: %w", h.backing, err)
	}
	im.backing = d
	return nil
}

// prepare gets a checked image ready for requests.
func (im *Image) prepare() error {
	im.cow.New = func() any { b := make([]byte, im.cluster); return &b }
	im.dec.init(im)
	h := im.h
	im.lazy = h.version >= 3 && (h.compat&compatLazy != 0 && im.o.LazyRefcounts == AsImage || im.o.LazyRefcounts == On)
	if im.o.ReadOnly || im.o.Repair {
		return nil
	}
	if h.incompat&incompatCorrupt != 0 {
		return fmt.Errorf("%w: its corrupt bit is set (repair it with: kvmlet disk check --repair=all, or use it read-only)",
			ErrCorrupt)
	}
	if h.incompat&incompatDirty != 0 {
		return im.repairDirty()
	}
	return nil
}

// Size implements blk.Backend.
func (im *Image) Size() int64 { return im.size.Load() }

// Limits implements blk.Backend. Requests of any offset and length are accepted.
func (im *Image) Limits() blk.Limits {
	return blk.Limits{Cluster: im.cluster, DiscardAlign: im.cluster, ZeroAlign: im.cluster}.Over(im.f.Limits())
}

// Backing implements blk.Backed.
func (im *Image) Backing() *blk.Device { return im.backing }

// Observing implements blk.Observer.
func (im *Image) Observing() bool { return im.f.events }

// Event implements blk.Observer: the file is told.
func (im *Image) Event(e blk.Event) { im.f.event(e) }

// writable is called before anything is changed. The first time it marks the image as one that is written: features that
// this driver would make stale are cleared, and with lazy refcounts the dirty bit is set.
func (im *Image) writable() error {
	if im.ready.Load() && !im.broken.Load() {
		return nil
	}
	switch {
	case im.o.ReadOnly:
		return blk.ErrReadOnly
	case im.broken.Load():
		return ErrCorrupt
	}
	im.readyM.Lock()
	defer im.readyM.Unlock()
	if im.ready.Load() {
		return nil
	}
	im.mu.Lock()
	incompat, autoclear := im.h.incompat, uint64(0)
	if im.lazy {
		incompat |= incompatDirty
	}
	changed := incompat != im.h.incompat || autoclear != im.h.autoclear
	im.mu.Unlock()
	if changed {
		err := im.updateHeader(func(h *header) { h.incompat, h.autoclear = incompat, autoclear })
		if err != nil {
			return err
		}
	}
	im.ready.Store(true)
	return nil
}

// updateHeader changes the header in the file, and then in memory. It returns when the change is stable.
func (im *Image) updateHeader(change func(*header)) error {
	im.mu.Lock()
	h := *im.h
	im.mu.Unlock()
	change(&h)
	if im.broken.Load() && h.version >= 3 {
		h.incompat |= incompatCorrupt
	}
	im.f.event("qcow2_header_update")
	if err := im.f.write(h.encode(), 0); err != nil {
		return err
	}
	im.f.event("qcow2_header_flush")
	if err := im.f.Flush(); err != nil {
		return err
	}
	im.mu.Lock()
	change(im.h)
	im.mu.Unlock()
	return nil
}

// corrupt reports a contradiction in the metadata. A writable image is marked and not written any more.
func (im *Image) corrupt(format string, args ...any) error {
	err := fmt.Errorf("%w: %s (see what is wrong with: kvmlet disk check)", ErrCorrupt, fmt.Sprintf(format, args...))
	if im.o.ReadOnly || im.o.Repair || im.broken.Swap(true) {
		return err
	}
	if im.h.version >= 3 {
		// mu may be held by the caller, so the bit is set in the file only. The sector is read back because the header
		// in memory may be changing.
		b := make([]byte, headerLen3)
		if im.f.read(b, 0) == nil && binary.BigEndian.Uint32(b) == magic {
			bitsOff := offFeatures
			binary.BigEndian.PutUint64(b[bitsOff:], binary.BigEndian.Uint64(b[bitsOff:])|incompatCorrupt)
			_ = im.f.write(b[bitsOff:bitsOff+8], int64(bitsOff))
		}
	}
	return err
}

// unsettled reports that a broken image loses entries that are only in memory.
func (im *Image) unsettled() error {
	im.mu.Lock()
	dirty := im.l2.dirty()
	im.mu.Unlock()
	im.refs.mu.Lock()
	dirty = dirty || im.refs.c.dirty()
	im.refs.mu.Unlock()
	if dirty {
		return fmt.Errorf("close image: %w: what was written since the last flush is lost", ErrCorrupt)
	}
	return nil
}

// Close stores what is only in memory and closes the file and the backing file. Closing twice is an error, and so is
// closing an image that was marked corrupt with entries in memory.
func (im *Image) Close() error {
	if im.closed.Swap(true) {
		return fmt.Errorf("close image: %w", blk.ErrClosed)
	}
	im.ops.Lock()
	defer im.ops.Unlock()
	var errs []error
	switch {
	case im.o.ReadOnly:
	case im.broken.Load():
		errs = append(errs, im.unsettled())
	default:
		errs = append(errs, im.settle())
	}
	errs = append(errs, im.f.Close())
	if im.backing != nil {
		errs = append(errs, im.backing.Close())
	}
	return errors.Join(errs...)
}

// settle brings the file up to date: every refcount exact, the dirty bit clear, no slack at the end.
func (im *Image) settle() error {
	if !im.ready.Load() {
		return nil
	}
	if err := im.commit(); err != nil {
		return err
	}
	if err := im.refs.flush(); err != nil { // what the commit freed
		return err
	}
	im.mu.Lock()
	dirty := im.h.incompat&incompatDirty != 0
	im.mu.Unlock()
	if dirty && im.lazy {
		if err := im.f.Flush(); err != nil {
			return err
		}
		if err := im.updateHeader(func(h *header) { h.incompat &^= incompatDirty }); err != nil {
			return err
		}
		im.ready.Store(false)
	}
	if end, err := im.refs.end(); err == nil {
		im.f.cut(max(end, im.floor))
	}
	return nil
}

// generations tells when the requests that began before a certain moment have ended. There are two counters; requests
// enter under the current one, and the other is waited for.
type generations struct {
	now   atomic.Uint32
	count [2]struct {
		n atomic.Int64
		_ [56]byte
	}
}

// enter is called at the beginning of a request, before it looks anything up. leave takes what it returns.
func (g *generations) enter() uint32 {
	for {
		now := g.now.Load()
		g.count[now&1].n.Add(1)
		if g.now.Load() == now {
			return now & 1
		}
		g.count[now&1].n.Add(-1)
	}
}

func (g *generations) leave(slot uint32) { g.count[slot].n.Add(-1) }

// turn begins a new generation and returns the slot of the old one. The slot before must be empty.
func (g *generations) turn() uint32 { return (g.now.Add(1) - 1) & 1 }

func (g *generations) empty(slot uint32) bool { return g.count[slot].n.Load() == 0 }

// begin admits a request; end takes what it returns.
func (im *Image) begin() uint32 {
	im.ops.RLock()
	return im.gen.enter()
}

func (im *Image) end(slot uint32) {
	im.gen.leave(slot)
	im.ops.RUnlock()
}

func log2(n int64) uint { return uint(bits.Len64(uint64(n)) - 1) }
