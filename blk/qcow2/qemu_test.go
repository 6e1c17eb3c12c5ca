package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// shape is a kind of image.
type shape struct {
	cluster int64
	compat  Compat
	bits    int
	lazy    bool
	zstd    bool
}

func (s shape) String() string {
	return fmt.Sprintf("%d,%s,%d,%v,%v", s.cluster, s.compat, s.bits, s.lazy, s.zstd)
}

// qemuOptions is s as qemu-img create -o takes it.
func (s shape) qemuOptions() string {
	o := fmt.Sprintf("cluster_size=%d,compat=%s", s.cluster, s.compat)
	if s.compat == Compat11 {
		o += fmt.Sprintf(",refcount_bits=%d", s.bits)
		if s.lazy {
			o += ",lazy_refcounts=on"
		}
		if s.zstd {
			o += ",compression_type=zstd"
		}
	}
	return o
}

func (s shape) create(size int64) CreateOptions {
	o := CreateOptions{Size: size, ClusterSize: s.cluster, RefcountBits: s.bits, Compat: s.compat, LazyRefcounts: s.lazy}
	if s.zstd {
		o.Compression = Zstd
	}
	return o
}

var shapes = []shape{
	{512, Compat11, 16, false, false}, {512, Compat010, 16, false, false}, {512, Compat11, 64, false, true},
	{1024, Compat11, 1, false, false}, {2048, Compat11, 2, false, true}, {4096, Compat11, 4, true, false},
	{4096, Compat010, 16, false, false}, {8192, Compat11, 8, false, false}, {16384, Compat11, 32, false, true},
	{32768, Compat11, 16, false, false}, {65536, Compat11, 16, false, false}, {65536, Compat010, 16, false, false},
	{65536, Compat11, 16, true, true}, {131072, Compat11, 64, false, false}, {262144, Compat11, 16, false, false},
	{524288, Compat11, 16, false, false}, {1 << 20, Compat11, 16, false, false}, {2 << 20, Compat11, 16, false, false},
}

// scatter is where tests write: off, length and byte of each.
type scatter struct {
	off, n int64
	b      byte
}

func scattered(seed uint64, size int64, count int) []scatter {
	r := rand.New(rand.NewPCG(seed, 0))
	var s []scatter
	for i := range count {
		off := r.Int64N(size/512) * 512
		n := min((r.Int64N(1<<r.IntN(9))+1)*512, size-off)
		s = append(s, scatter{off, n, byte(i%255) + 1})
	}
	return s
}

// eachShape runs f with images of every shape for which want is true, side by side. path is of a file that does not exist
// yet, in a directory of its own.
func eachShape(t *testing.T, want func(s shape) bool, f func(t *testing.T, s shape, path string)) {
	t.Helper()
	t.Parallel()
	needQEMU(t)
	for _, s := range shapes {
		if want(s) {
			t.Run(s.String(), func(t *testing.T) {
				t.Parallel()
				f(t, s, filepath.Join(t.TempDir(), "image"))
			})
		}
	}
}

func anyShape(shape) bool { return true }

// scribble writes to an image at random, and to want, which is what its disk holds.
func scribble(t *testing.T, im *Image, want []byte, seed uint64, count int) {
	t.Helper()
	for _, w := range scattered(seed, int64(len(want)), count) {
		writeAt(t, im, w.off, fill(w.b, w.n))
		copy(want[w.off:], fill(w.b, w.n))
	}
}

// scribbleAll is scribble with discards and zeroes among the writes, and compressed clusters where packed is set.
func scribbleAll(t *testing.T, im *Image, want []byte, seed uint64, count int, packed bool) {
	t.Helper()
	size := int64(len(want))
	for i, w := range scattered(seed, size, count) {
		switch i % 7 {
		case 3:
			if err := im.Discard(w.off, w.n); err != nil {
				t.Fatal(err)
			}
			copy(want[w.off:], readAt(t, im, w.off, w.n))
			continue
		case 5:
			if !packed {
				break
			}
			w.off &^= im.cluster - 1
			w.n = min(im.cluster, size-w.off)
			if err := im.WriteCompressed(iov.Of(fill(w.b, w.n)), w.off); err != nil {
				t.Fatal(err)
			}
			copy(want[w.off:], fill(w.b, w.n))
			continue
		case 6:
			if err := im.WriteZeroes(w.off, w.n, i%2 == 0); err == nil {
				clear(want[w.off : w.off+w.n])
				continue
			} else if err != blk.ErrUnsupported {
				t.Fatal(err)
			}
		}
		writeAt(t, im, w.off, fill(w.b, w.n))
		copy(want[w.off:], fill(w.b, w.n))
	}
}

// closeForQEMU closes an image, in which QEMU must find nothing wrong and read want.
func closeForQEMU(t *testing.T, im *Image, path string, want []byte) {
	t.Helper()
	mustClose(t, im)
	qemuCheck(t, path)
	wantBytes(t, "QEMU's read", qemuRead(t, path), want)
}

// TestOursForQEMU makes images of every shape; QEMU checks and reads them.
func TestOursForQEMU(t *testing.T) {
	eachShape(t, anyShape, func(t *testing.T, s shape, path string) {
		const size = 5<<20 + 512
		d := onDisk(t, path)
		mustCreate(t, d, s.create(size))
		qemuCheck(t, path)
		im := mustOpen(t, d, Options{})
		want := make([]byte, size)
		scribbleAll(t, im, want, uint64(s.cluster), 60, true)
		wantBytes(t, "own read", readAt(t, im, 0, size), want)
		wantClean(t, im)
		closeForQEMU(t, im, path, want)
		im = mustOpen(t, onDisk(t, path), Options{ReadOnly: true})
		wantBytes(t, "own read again", readAt(t, im, 0, size), want)
	})
}

// TestTheirs reads and changes images of every shape that QEMU made.
func TestTheirs(t *testing.T) {
	eachShape(t, anyShape, func(t *testing.T, s shape, path string) {
		const size = 5<<20 + 512
		qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", s.qemuOptions(), path, fmt.Sprint(size))
		args := []string{"-f", "qcow2", "-d", "unmap"}
		for i, w := range scattered(uint64(s.cluster)+1, size, 40) {
			c := fmt.Sprintf("write -P %d %d %d", w.b, w.off, w.n)
			switch {
			case i%6 == 2 && s.compat == Compat11:
				c = fmt.Sprintf("write -z %d %d", w.off, w.n)
			case i%6 == 3 && s.compat == Compat11:
				c = fmt.Sprintf("write -z -u %d %d", w.off, w.n)
			case i%6 == 4:
				c = fmt.Sprintf("discard %d %d", w.off, w.n)
			}
			args = append(args, "-c", c)
		}
		qemu(t, "qemu-io", append(args, path)...)
		packed := path + ".packed"
		qemu(t, "qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", s.qemuOptions(), path, packed)
		theirs := qemuRead(t, path)
		for _, path := range []string{path, packed} {
			want := bytes.Clone(theirs)
			im := mustOpen(t, onDisk(t, path), Options{})
			wantClean(t, im)
			wantBytes(t, "own read", readAt(t, im, 0, size), want)
			scribble(t, im, want, uint64(s.cluster)+2, 30)
			closeForQEMU(t, im, path, want)
		}
	})
}

func TestPreallocated(t *testing.T) {
	t.Parallel()
	needQEMU(t)
	for _, cluster := range []int64{512, 4096, 65536} {
		dir := t.TempDir()
		const size = 3<<20 + 1024
		ours, theirs := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
		d := onDisk(t, ours)
		mustCreate(t, d, CreateOptions{Size: size, ClusterSize: cluster, Preallocation: PreallocateMetadata})
		qemuCheck(t, ours)
		qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("preallocation=metadata,cluster_size=%d", cluster),
			theirs, fmt.Sprint(size))
		for _, path := range []string{ours, theirs} {
			im := mustOpen(t, onDisk(t, path), Options{})
			wantBytes(t, path, readAt(t, im, 0, size), make([]byte, size))
			want := fill(7, size)
			writeAt(t, im, 0, want)
			closeForQEMU(t, im, path, want)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBacking reads through to a backing file that is shorter, and copies on write.
func TestBacking(t *testing.T) {
	eachShape(t, anyShape, func(t *testing.T, s shape, path string) {
		const baseSize, size = 3<<20 + 512, 4 << 20
		base := path + ".base"
		old := make([]byte, baseSize)
		for i := range old {
			old[i] = byte(i>>9) ^ byte(i)
		}
		writeFile(t, base, old)
		o := s.create(size)
		o.BackingFile, o.BackingFormat = base, "raw"
		d := onDisk(t, path)
		if err := Create(t.Context(), d, o); err != nil {
			if s.cluster > 512 {
				t.Fatal(err)
			}
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", "-o", s.qemuOptions(), path, fmt.Sprint(size))
			d = onDisk(t, path)
		}
		im := mustOpen(t, d, Options{Backing: func(name, format string) (*blk.Device, error) {
			if name != base || format != "raw" {
				return nil, fmt.Errorf("backing file %q, format %q", name, format)
			}
			return onDisk(t, name), nil
		}})
		want := append(bytes.Clone(old), make([]byte, size-baseSize)...)
		wantBytes(t, "before", readAt(t, im, 0, size), want)
		scribbleAll(t, im, want, uint64(s.cluster)+3, 45, false)
		wantBytes(t, "own read", readAt(t, im, 0, size), want)
		closeForQEMU(t, im, path, want)
	})
}
