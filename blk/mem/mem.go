// Package mem is the block driver for disks in memory: scratch disks, and the driver that tests of the block layer run
// on. Nothing is kept after Close.
//
// A disk takes memory only where it was written. It keeps to the limits that it was given, and refuses what breaks them,
// so that tests show what a blk.Device sends. With a backing disk it is an overlay: what was not written reads as there.
package mem

import (
	"fmt"
	"math"
	"math/bits"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/internal/strict"
	"github.com/kvmlet/kvmlet/iov"
)

// ErrLimits reports a request that breaks the disk's limits, or another rule of blk.Backend.
var ErrLimits = strict.Err

// Options says what a disk is like. The zero value is a disk without any limits.
type Options struct {
	// Limits is what the disk asks of requests. Its Cluster is the unit in which memory is allocated, and in which an
	// overlay copies from its backing disk; 0 means 64 KiB. It is no less than RequestAlign.
	Limits blk.Limits

	// MaxSize is the size in bytes up to which Truncate lets the disk grow; 0 means the size that it begins with. Address
	// space for it is reserved, memory is not.
	MaxSize int64

	// Backing is what bytes are read from that were not written. The disk owns it: Close closes it.
	Backing *blk.Device
}

// defaultCluster is the unit of allocation in bytes if nothing is said.
const defaultCluster = 64 << 10

// numLocks is how many clusters can be worked on at once. Neighbouring clusters have different locks.
const numLocks = 64

// chunkState says what a cluster is. The memory of one that is not data is zero.
type chunkState uint8

const (
	chunkAbsent chunkState = iota // never written: reads as the backing disk, or as zeroes
	chunkZero                     // reads as zeroes
	chunkData
	chunkCompressed // data that was written as such
)

// Disk is a disk in memory. It implements blk.Backend and every optional interface but blk.Starter, which Async adds.
type Disk struct {
	limits  blk.Limits
	backing *blk.Device
	shift   uint  // log2 of the cluster
	maxSize int64 // in bytes

	open  sync.RWMutex // held for reading by every request, for writing by Close
	data  []byte       // the address space of MaxSize bytes; nil after Close
	size  atomic.Int64
	locks [numLocks]sync.RWMutex // of the clusters: i has locks[i%numLocks]
	state []chunkState           // by cluster

	vm vmState
}

// New returns a disk of size bytes, a multiple of 512, that is all zeroes, or all as its backing disk. On an error that
// one stays the caller's.
func New(size int64, o Options) (*Disk, error) {
	if o.Limits.Cluster == 0 {
		o.Limits.Cluster = defaultCluster
	}
	o.Limits.Cluster = max(o.Limits.Cluster, int64(o.Limits.RequestAlign)) // so that no status ends within a block
	maxSize := max(size, o.MaxSize)
	cluster := o.Limits.Cluster
	switch {
	case size < 0 || size%blk.SectorSize != 0:
		return nil, fmt.Errorf("disk of %d bytes in memory: want a multiple of %d", size, blk.SectorSize)
	case cluster < blk.SectorSize || cluster&(cluster-1) != 0:
		return nil, fmt.Errorf("disk in memory with clusters of %d bytes: want a power of two from %d on", cluster, blk.SectorSize)
	case maxSize > math.MaxInt64-cluster:
		return nil, fmt.Errorf("disk in memory of up to %d bytes: too large", maxSize)
	}
	d := &Disk{limits: o.Limits, backing: o.Backing, maxSize: maxSize}
	d.shift = uint(bits.TrailingZeros64(uint64(cluster)))
	reserve := (max(maxSize, 1) + cluster - 1) &^ (cluster - 1)
	var err error
	d.data, err = unix.Mmap(-1, 0, int(reserve), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("disk in memory: reserve %d bytes of address space: %w", reserve, err)
	}
	d.state = make([]chunkState, reserve>>d.shift)
	d.size.Store(size)
	return d, nil
}

// Size implements blk.Backend.
func (d *Disk) Size() int64 { return d.size.Load() }

// Limits implements blk.Backend.
func (d *Disk) Limits() blk.Limits { return d.limits }

// Backing implements blk.Backed.
func (d *Disk) Backing() *blk.Device { return d.backing }

// Close gives the memory back. A second Close, and requests that come later, get os.ErrClosed.
func (d *Disk) Close() error {
	d.open.Lock()
	defer d.open.Unlock()
	if d.data == nil {
		return d.closed()
	}
	err := unix.Munmap(d.data)
	d.data = nil
	if d.backing != nil {
		if e := d.backing.Close(); err == nil {
			err = e
		}
	}
	return err
}

func (d *Disk) closed() error { return fmt.Errorf("disk in memory: %w", os.ErrClosed) }

// begin admits a request. It returns with open held for reading, unless it returns an error.
func (d *Disk) begin() error {
	d.open.RLock()
	if d.data == nil {
		d.open.RUnlock()
		return d.closed()
	}
	return nil
}

// ReadVecAt implements blk.Backend. Beyond the size of the disk there is nothing, even within the last block.
func (d *Disk) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	return d.transfer(dst, off, d.readChunk)
}

// WriteVecAt implements blk.Backend. What lies beyond the size of the disk, in its last block, is dropped.
func (d *Disk) WriteVecAt(src iov.Vec, off int64) (int, error) {
	if n, err := d.transfer(src, off, d.writeChunk); err != nil {
		return n, err
	}
	return src.Size(), nil
}

// WriteVecFUA implements blk.FUAWriter: memory is as stable as it gets.
func (d *Disk) WriteVecFUA(src iov.Vec, off int64) (int, error) { return d.WriteVecAt(src, off) }

// Flush implements blk.Backend.
func (d *Disk) Flush() error {
	if err := d.begin(); err != nil {
		return err
	}
	d.open.RUnlock()
	return nil
}

// part is what a request has to do with one cluster.
type part struct {
	chunk int64
	off   int64 // on the disk
	n     int64
	whole bool // all of the cluster that lies within the disk
	mem   []byte
}

// each calls f for every cluster that a range touches, cut to the disk.
func (d *Disk) each(off, n int64, f func(p part) error) error {
	size := d.size.Load()
	cluster := int64(1) << d.shift
	for end := min(off+n, size); off < end; {
		chunk := off >> d.shift
		start := chunk << d.shift
		stop := min(start+cluster, end)
		p := part{chunk: chunk, off: off, n: stop - off, mem: d.data[off:stop]}
		p.whole = off == start && (stop == start+cluster || stop == size)
		if err := f(p); err != nil {
			return err
		}
		off = stop
	}
	return nil
}

// transfer calls f for each part of v and returns how many bytes f was called for with success.
func (d *Disk) transfer(v iov.Vec, off int64, f func(v iov.Vec, at int, p part) error) (int, error) {
	if err := d.begin(); err != nil {
		return 0, err
	}
	defer d.open.RUnlock()
	if err := strict.Transfer(d.limits, d.size.Load(), off, v); err != nil {
		return 0, err
	}
	done := 0
	err := d.each(off, int64(v.Size()), func(p part) error {
		err := f(v, done, p)
		if err == nil {
			done += int(p.n)
		}
		return err
	})
	return done, err
}

func (d *Disk) readChunk(dst iov.Vec, at int, p part) error {
	l := d.lock(p.chunk)
	l.RLock()
	defer l.RUnlock()
	if d.state[p.chunk] == chunkAbsent && d.backing != nil {
		sub, err := dst.Slice(at, int(p.n))
		if err != nil {
			return err
		}
		return d.readBacking(sub, p.off)
	}
	_, err := dst.CopyFrom(at, p.mem)
	return err
}

func (d *Disk) writeChunk(src iov.Vec, at int, p part) error {
	l := d.lock(p.chunk)
	l.Lock()
	defer l.Unlock()
	if err := d.allocate(p); err != nil {
		return err
	}
	_, err := src.CopyTo(p.mem, at)
	return err
}

func (d *Disk) lock(chunk int64) *sync.RWMutex { return &d.locks[chunk%numLocks] }

// allocate makes the cluster of p data. What p leaves of it gets the bytes that it had. Its lock is held.
func (d *Disk) allocate(p part) error {
	if d.state[p.chunk] == chunkAbsent && d.backing != nil && !p.whole {
		if err := d.fill(p.chunk, d.size.Load()); err != nil {
			return err
		}
	}
	d.state[p.chunk] = chunkData
	return nil
}

// fill copies a cluster from the backing disk, as far as the disk reaches when it is size bytes long. Its lock is held.
func (d *Disk) fill(chunk, size int64) error {
	start := chunk << d.shift
	mem := d.data[start:min(start+1<<d.shift, size)]
	if err := d.readBacking(iov.Of(mem), start); err != nil {
		clear(mem)
		return err
	}
	return nil
}

// readBacking reads from the backing disk, and zeroes beyond its end.
func (d *Disk) readBacking(dst iov.Vec, off int64) error {
	n := int64(dst.Size())
	there := min(max(d.backing.Size()-off, 0), n)
	if there < n {
		if err := dst.Fill(int(there), int(n-there), 0); err != nil {
			return err
		}
		var err error
		if dst, err = dst.Slice(0, int(there)); err != nil {
			return err
		}
	}
	if there == 0 {
		return nil
	}
	if _, err := d.backing.ReadVecAt(dst, off); err != nil {
		return fmt.Errorf("backing disk: %w", err)
	}
	return nil
}

// release gives the memory of a whole cluster back, which also makes it zeroes. Its lock is held.
func (d *Disk) release(chunk int64) {
	start := chunk << d.shift
	mem := d.data[start : start+1<<d.shift]
	// Only whole pages can be given back: where a cluster is less, the kernel would take its neighbours along.
	if len(mem)%os.Getpagesize() != 0 || unix.Madvise(mem, unix.MADV_DONTNEED) != nil {
		clear(mem)
	}
}

// released returns the state of a cluster that was never written, or whose bytes are given back.
func (d *Disk) released() chunkState {
	if d.backing != nil {
		return chunkZero
	}
	return chunkAbsent
}

// Discard implements blk.Discarder: whole clusters become zeroes, parts of clusters stay as they are.
func (d *Disk) Discard(off, n int64) error {
	return d.ranged(off, n, strict.Discard, func(p part) error {
		if p.whole {
			d.state[p.chunk] = d.released()
			d.release(p.chunk)
		}
		return nil
	})
}

// WriteZeroes implements blk.ZeroWriter.
func (d *Disk) WriteZeroes(off, n int64, unmap bool) error {
	return d.ranged(off, n, strict.Zero, func(p part) error {
		switch {
		case p.whole && unmap:
			d.state[p.chunk] = d.released()
			d.release(p.chunk)
			return nil
		case unmap && d.zero(p.chunk):
			return nil
		}
		if err := d.allocate(p); err != nil {
			return err
		}
		clear(p.mem)
		return nil
	})
}

// zero reports whether a cluster reads as zeroes without being data.
func (d *Disk) zero(chunk int64) bool {
	s := d.state[chunk]
	return s == chunkZero || s == chunkAbsent && d.backing == nil
}

// ranged calls f, with the lock held for writing, for each cluster of a range that keeps the rule.
func (d *Disk) ranged(off, n int64, rule func(l blk.Limits, size, off, n int64) error, f func(p part) error) error {
	if err := d.begin(); err != nil {
		return err
	}
	defer d.open.RUnlock()
	if err := rule(d.limits, d.size.Load(), off, n); err != nil {
		return err
	}
	return d.each(off, n, func(p part) error {
		l := d.lock(p.chunk)
		l.Lock()
		defer l.Unlock()
		return f(p)
	})
}

// WriteCompressed implements blk.CompressedWriter: the cluster is stored as it is, and remembered as compressed.
func (d *Disk) WriteCompressed(src iov.Vec, off int64) error {
	n := int64(src.Size())
	if cluster := int64(1) << d.shift; off%cluster != 0 || n != cluster && off+n != d.size.Load() || n > cluster {
		return fmt.Errorf("%w: compressed write of %d bytes at %d, want one cluster of %d", ErrLimits, n, off, cluster)
	}
	if err := d.begin(); err != nil {
		return err
	}
	defer d.open.RUnlock()
	return d.each(off, n, func(p part) error {
		if err := d.writeChunk(src, 0, p); err != nil {
			return err
		}
		l := d.lock(p.chunk)
		l.Lock()
		defer l.Unlock()
		d.state[p.chunk] = chunkCompressed
		return nil
	})
}

// BlockStatus implements blk.StatusReporter.
func (d *Disk) BlockStatus(off, n int64) (blk.Status, int64, error) {
	if err := d.begin(); err != nil {
		return blk.Status{}, 0, err
	}
	defer d.open.RUnlock()
	if err := strict.Range(d.limits, d.size.Load(), off, n); err != nil {
		return blk.Status{}, 0, err
	}
	flags := d.status(off >> d.shift)
	run := int64(0)
	for end := off + n; off+run < end; {
		chunk := (off + run) >> d.shift
		if chunk >= int64(len(d.state)) || d.status(chunk) != flags {
			break
		}
		run = min((chunk+1)<<d.shift, end) - off
	}
	return blk.Status{Flags: flags}, run, nil
}

func (d *Disk) status(chunk int64) blk.StatusFlags {
	l := d.lock(chunk)
	l.RLock()
	defer l.RUnlock()
	switch d.state[chunk] {
	case chunkData:
		return blk.StatusData | blk.StatusAllocated
	case chunkCompressed:
		return blk.StatusData | blk.StatusAllocated | blk.StatusCompressed
	case chunkAbsent:
		if d.backing != nil {
			return 0
		}
	}
	return blk.StatusZero | blk.StatusAllocated
}

// Truncate implements blk.Truncater, up to Options.MaxSize.
func (d *Disk) Truncate(size int64) error {
	if err := d.begin(); err != nil {
		return err
	}
	defer d.open.RUnlock()
	if size < 0 || size%blk.SectorSize != 0 || size > d.maxSize {
		return fmt.Errorf("resize disk in memory to %d bytes: want a multiple of %d up to %d", size, blk.SectorSize, d.maxSize)
	}
	old := d.size.Load()
	if size > old && d.backing != nil {
		// The backing disk may be longer than this one was; what it has there must not show.
		if last := old >> d.shift; old&(1<<d.shift-1) != 0 && d.state[last] == chunkAbsent {
			if err := d.fill(last, old); err != nil {
				return err
			}
			d.state[last] = chunkData
		}
		for chunk := (old + 1<<d.shift - 1) >> d.shift; chunk<<d.shift < min(size, d.backing.Size()); chunk++ {
			d.state[chunk] = chunkZero
		}
	}
	if size < old {
		for chunk := (size + 1<<d.shift - 1) >> d.shift; chunk<<d.shift < old; chunk++ {
			d.state[chunk] = d.released()
			d.release(chunk)
		}
		if rest := size & (1<<d.shift - 1); rest != 0 {
			clear(d.data[size : (size>>d.shift+1)<<d.shift])
		}
	}
	d.size.Store(size)
	return nil
}
