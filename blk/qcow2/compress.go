package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/kvmlet/kvmlet/iov"
)

// Compression is how compressed clusters are compressed; one way for all of an image.
type Compression uint8

// The compression types, by their numbers in the header ("Additional fields", compression_type).
const (
	Zlib Compression = iota // deflate without a zlib header, in a window of 4 KiB
	Zstd
)

func (c Compression) String() string {
	if c == Zstd {
		return "zstd"
	}
	return "zlib"
}

// deflateWindow is how far back a match may lie: QEMU unpacks with a window of 12 bits.
const deflateWindow = 1 << 12

// errNotSmaller says that compressing is of no use.
var errNotSmaller = errors.New("does not get smaller")

// keptClusters is how many unpacked clusters are kept: readers ask for less than a cluster, one part after the other.
const keptClusters = 8

// Compressors and decompressors are large, and serve any image.
var deflateReaders, deflateWriters, zstdReaders, zstdWriters sync.Pool

// decompressors unpacks clusters, and keeps the last ones.
type decompressors struct {
	cluster int64
	kind    Compression

	mu   sync.Mutex
	kept [keptClusters]unpacked
	next int
	no   uint64 // changes when clusters are freed: what is read then may be from before
}

type unpacked struct {
	entry uint64 // 0: none
	data  []byte
}

func (d *decompressors) init(im *Image) {
	d.cluster, d.kind = im.cluster, Compression(im.h.compression)
}

// forget drops all clusters: the place of one may become another's.
func (d *decompressors) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kept = [keptClusters]unpacked{}
	d.no++
}

// find copies a part of the cluster of entry to v if it is kept.
func (d *decompressors) find(v iov.Vec, in int64, entry uint64) (found bool, no uint64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, k := range d.kept {
		if k.entry == entry {
			_, err := v.CopyFrom(0, k.data[in:])
			return true, 0, err
		}
	}
	return false, d.no, nil
}

func (d *decompressors) keep(entry uint64, data []byte, no uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.no != no {
		return
	}
	d.kept[d.next] = unpacked{entry, data}
	d.next = (d.next + 1) % keptClusters
}

// readCompressed fills v with the disk from off on, which lies in the compressed cluster of entry.
func (im *Image) readCompressed(v iov.Vec, off int64, entry uint64) error {
	in := off & (im.cluster - 1)
	found, no, err := im.dec.find(v, in, entry)
	if found || err != nil {
		return err
	}
	at, n := im.compressedRange(entry)
	if at >= im.f.length.Load() {
		return im.corrupt("compressed data at byte %#x lies beyond the end of the file", at)
	}
	packed := make([]byte, n)
	im.f.event("qcow2_read_compressed")
	if err := im.f.read(packed, at); err != nil {
		return err
	}
	data := make([]byte, im.cluster)
	if err := im.dec.unpack(data, packed); err != nil {
		return fmt.Errorf("%w: compressed data at byte %#x: %w", ErrCorrupt, at, err)
	}
	im.dec.keep(entry, data, no)
	_, err = v.CopyFrom(0, data[in:])
	return err
}

// unpack fills data, a cluster. What packed holds behind it is somebody else's or nobody's.
func (d *decompressors) unpack(data, packed []byte) error {
	src := bytes.NewReader(packed)
	if d.kind == Zstd {
		z, ok := zstdReaders.Get().(*zstd.Decoder)
		if !ok {
			var err error
			// Frames may ask for a window much larger than the data; QEMU's don't.
			z, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
				zstd.WithDecoderMaxWindow(8<<20), zstd.WithDecoderMaxMemory(64<<20))
			if err != nil {
				return err
			}
		}
		defer func() {
			_ = z.Reset(nil)
			zstdReaders.Put(z)
		}()
		if err := z.Reset(src); err != nil {
			return err
		}
		_, err := io.ReadFull(z, data)
		return err
	}
	z, ok := deflateReaders.Get().(io.ReadCloser)
	if !ok {
		z = flate.NewReader(src)
	} else if err := z.(flate.Resetter).Reset(src, nil); err != nil {
		return err
	}
	defer deflateReaders.Put(z)
	_, err := io.ReadFull(z, data)
	return err
}

// pack compresses a cluster, or answers errNotSmaller.
func (d *decompressors) pack(data []byte) ([]byte, error) {
	if d.kind == Zstd {
		z, ok := zstdWriters.Get().(*zstd.Encoder)
		if !ok {
			var err error
			z, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))
			if err != nil {
				return nil, err
			}
		}
		defer zstdWriters.Put(z)
		out := z.EncodeAll(data, make([]byte, 0, len(data)))
		if len(out) >= len(data) {
			return nil, errNotSmaller
		}
		return out, nil
	}
	out := &limited{b: make([]byte, 0, len(data))}
	z, ok := deflateWriters.Get().(*flate.Writer)
	if !ok {
		var err error
		if z, err = flate.NewWriterWindow(out, deflateWindow); err != nil {
			return nil, err
		}
	} else {
		z.Reset(out)
	}
	defer deflateWriters.Put(z)
	if _, err := z.Write(data); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	if len(out.b) >= len(data) {
		return nil, errNotSmaller
	}
	return out.b, nil
}

// limited takes no more than its capacity.
type limited struct{ b []byte }

func (l *limited) Write(p []byte) (int, error) {
	if len(p) > cap(l.b)-len(l.b) {
		return 0, errNotSmaller
	}
	l.b = append(l.b, p...)
	return len(p), nil
}

// WriteCompressed implements blk.CompressedWriter. Clusters that are allocated already are replaced.
func (im *Image) WriteCompressed(src iov.Vec, off int64) error {
	slot := im.begin()
	defer im.end(slot)
	n := int64(src.Size())
	if !im.aligned(off) || n != im.cluster && off+n != im.size.Load() || n > im.cluster {
		return fmt.Errorf("write image: %d bytes at byte %d are not a cluster: compressed data is written by whole ones", n, off)
	}
	if n == 0 {
		return nil
	}
	if err := im.writable(); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	buf := im.cow.Get().(*[]byte)
	defer im.cow.Put(buf)
	data := *buf
	if _, err := src.CopyTo(data[:n], 0); err != nil {
		return err
	}
	clear(data[n:])
	packed, err := im.dec.pack(data)
	if err == nil {
		err = im.writePacked(packed, off)
	} else if errors.Is(err, errNotSmaller) {
		_, err = im.write(src, off, n)
	}
	if err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	return nil
}

// writePacked stores packed as the cluster at off.
func (im *Image) writePacked(packed []byte, off int64) error {
	n := int64(len(packed))
	s, i, a, err := im.claimEntry(off)
	if err != nil {
		return err
	}
	host, err := im.refs.allocBytes(n)
	var entry uint64
	if err == nil {
		if entry, err = im.compressedEntry(host, n); err == nil {
			im.f.event("qcow2_write_compressed")
			err = im.f.write(packed, host)
		}
		if err != nil {
			im.refs.undo(host, n)
		}
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	s.pins--
	im.delist(a)
	if err == nil {
		im.unlinkEntry(s.get64(i), false)
		s.put64(i, entry)
	}
	return err
}

// claimEntry enlists an allocation for the cluster at off and pins the slice that holds its entry.
func (im *Image) claimEntry(off int64) (*slice, int, *alloc, error) {
	if err := im.crowded(); err != nil {
		return nil, 0, nil, err
	}
	for {
		i1 := int(off / im.reach)
		im.mu.Lock()
		if im.l1[i1]&entryCopied == 0 || im.l1[i1]&entryOffset == 0 {
			im.mu.Unlock()
			if err := im.makeL2(i1); err != nil {
				return nil, 0, nil, err
			}
			continue
		}
		s, i, err := im.l2slice(i1, off)
		if err != nil {
			im.mu.Unlock()
			return nil, 0, nil, err
		}
		if s == nil {
			im.mu.Unlock()
			continue
		}
		first := off >> im.cb
		if a, _ := im.conflict(first, first+1); a != nil {
			im.wait(a)
			im.mu.Unlock()
			continue
		}
		s.pins++
		a := im.enlist(first, first+1)
		im.mu.Unlock()
		return s, i, a, nil
	}
}
