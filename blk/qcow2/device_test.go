package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/blktest"
	"github.com/kvmlet/kvmlet/blk/fault"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// modelDisk says what blktest's model runs on: an image in a file in memory with limits, behind a Device.
type modelDisk struct {
	create  CreateOptions // but for its Size and the backing file
	open    Options
	file    blk.Limits  // of the file
	device  blk.Options // of the image
	backing []byte      // what the backing file holds; nil for none
	below   bool        // faults are those of the file
	resize  bool
	ops     int // 0 means 60
	seed    uint64

	kept  *mem.Disk // the file of the last run
	image *Image    // that was in it
}

// keptFile is a file that is still there when it was closed.
type keptFile struct{ *mem.Disk }

func (keptFile) Close() error { return nil }

// size returns the size of the disk: more than a cluster, and the end no multiple of any.
func (m *modelDisk) size() int64 {
	return max(3<<17, m.create.ClusterSize+m.create.ClusterSize/4) - blk.SectorSize
}

func (m *modelDisk) options() blktest.Options {
	o := blktest.Options{
		Open: m.make, After: m.look,
		Content: m.backing, Ops: 60, Seed: m.seed, Timeout: time.Minute,
	}
	if m.resize {
		o.MaxSize = m.size() + m.size()/3&^511
	}
	if m.below {
		// An image is not written any more when nobody knows which header its file has, because writing it failed. It must
		// not find contradictions, though, of which it says more.
		o.Injected = func(err error) bool {
			return m.image.broken.Load() && errors.Is(err, ErrCorrupt) && !strings.Contains(err.Error(), "see what is wrong")
		}
	}
	if m.ops > 0 {
		o.Ops = m.ops
	}
	if hosttest.Race {
		o.Ops = max(o.Ops/5, 4)
	}
	return o
}

// make creates an image and opens it.
func (m *modelDisk) make(tb testing.TB, wrap func(blk.Backend) blk.Backend) *blk.Device {
	tb.Helper()
	create := m.create
	create.Size = m.size()
	if m.backing != nil {
		create.BackingFile, create.BackingFormat = "below", "raw"
	}
	var err error
	if m.kept, err = mem.New(512, mem.Options{Limits: m.file, MaxSize: 1 << 30}); err != nil {
		tb.Fatal(err)
	}
	mustCreate(tb, device(tb, keptFile{m.kept}), create)
	file, top := blk.Backend(keptFile{m.kept}), wrap
	if m.below {
		file, top = wrap(file), func(b blk.Backend) blk.Backend { return b }
	}
	if m.image, err = Open(device(tb, file), m.openOptions()); err != nil {
		tb.Fatal(err)
	}
	d, err := blk.New(top(m.image), m.device)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func (m *modelDisk) openOptions() Options {
	o := m.open
	o.Backing = func(string, string) (*blk.Device, error) {
		b, err := mem.New(int64(len(m.backing)), mem.Options{})
		if err != nil {
			return nil, err
		}
		if _, err := b.WriteVecAt(iov.Of(m.backing), 0); err != nil {
			return nil, err
		}
		return blk.New(b, blk.Options{ReadOnly: true})
	}
	return o
}

// look checks the image that a run leaves: it holds the same bytes, and nothing contradicts itself. Clusters may be lost
// where the file failed.
func (m *modelDisk) look(tb testing.TB, want []byte, faults bool) {
	tb.Helper()
	im, err := Open(device(tb, keptFile{m.kept}), m.openOptions())
	if err != nil {
		tb.Fatal(err)
	}
	d := device(tb, im)
	got := make([]byte, d.Size())
	if _, err := d.ReadVecAt(iov.Of(got), 0); err != nil {
		tb.Error(err)
	}
	if m.image.broken.Load() { // of the size that failed, or of the one before
		n := min(len(got), len(want))
		got, want = got[:n], want[:n]
	}
	wantBytes(tb, "opened again", got, want)
	r, err := Check(context.Background(), im, RepairNone)
	if err != nil || r.Corruptions > 0 || r.Errors > 0 || r.Leaks > 0 && !(faults && m.below) {
		tb.Errorf("check: %v, %+v", err, r)
	}
	if err := d.Close(); err != nil {
		tb.Error(err)
	}
	if m.backing == nil && strings.HasSuffix(tb.Name(), "/concurrent") {
		image := make([]byte, m.kept.Size())
		if _, err := device(tb, keptFile{m.kept}).ReadVecAt(iov.Of(image), 0); err != nil {
			tb.Fatal(err)
		}
		path := filepath.Join(tb.TempDir(), "image")
		writeFile(tb, path, image)
		qemuCheck(tb, path)
	}
	if err := m.kept.Close(); err != nil {
		tb.Error(err)
	}
}

// modelBacking is shorter than the disks above it, and ends within a cluster.
var modelBacking = bytes.Repeat([]byte("backing file "), 20_000)[:250<<10]

// TestModelDevice runs blktest's model on images of all cluster sizes over files of all alignments.
func TestModelDevice(t *testing.T) {
	for i, cluster := range []int64{512, 4096, 65536, 2 << 20} {
		for j, align := range []int{1, 512, 4096, 65536} {
			for k, below := range []bool{false, true} {
				if cluster > 1<<20 && align != 512<<(3*k) {
					continue // they are slow
				}
				m := modelDisk{
					create: CreateOptions{ClusterSize: cluster, LazyRefcounts: (i+j)%2 == 1, RefcountBits: 64 >> (3 * k)},
					open:   Options{L2Cache: 1, RefcountCache: 1}, // the smallest: tables come and go
					file:   blk.Limits{RequestAlign: align},
					below:  below,
					resize: !below || j%2 == 0,
					seed:   uint64(i*100+j*10+k) * 100,
				}
				if (i+j+k)%2 == 1 {
					m.backing = modelBacking
					m.device.CopyOnRead = !below && j%2 == 0 // it fails with the image
				} else {
					m.device.DetectZeroes = blk.DetectZeroes((i + j) % 3)
				}
				switch (i + k) % 3 {
				case 1:
					m.file.MaxVec, m.file.MemoryAlign = 3, min(align, 512)
				case 2:
					m.file.MaxTransfer = max(128<<10, int64(align))
				}
				if cluster > 1<<20 {
					m.ops = 15
				}
				name := fmt.Sprintf("cluster=%d,align=%d,lazy=%v,backing=%v,below=%v", cluster, align, m.create.LazyRefcounts,
					m.backing != nil, below)
				t.Run(name, func(t *testing.T) { blktest.Run(t, m.options()) })
			}
		}
	}
}

// FuzzModel is TestModelDevice for as long as the fuzzer runs, with images that it picks.
func FuzzModel(f *testing.F) {
	blktest.Fuzz(f, func(n uint64) blktest.Options {
		pick := func(k uint64) int { defer func() { n /= k }(); return int(n % k) }
		m := modelDisk{below: pick(2) == 1, resize: pick(4) > 0}
		m.create.ClusterSize = 512 << pick(8)
		align := 1 << pick(17)
		m.file = blk.Limits{
			RequestAlign: align, MemoryAlign: min(1<<pick(14), align),
			MaxVec: pick(6), MaxTransfer: int64(max(align, 4096) * pick(9)),
		}
		m.create.LazyRefcounts = pick(2) == 1
		m.create.RefcountBits = 1 << pick(7)
		if pick(8) == 7 {
			m.create.Compat, m.create.LazyRefcounts, m.create.RefcountBits = Compat010, false, 16
		}
		m.open.L2Cache = m.create.ClusterSize * int64(pick(4))
		m.open.RefcountCache = m.create.ClusterSize * int64(pick(4))
		if pick(2) == 1 {
			m.backing = modelBacking
		}
		m.device = blk.Options{
			DetectZeroes: blk.DetectZeroes(pick(3)), CopyOnRead: pick(2) == 1 && !m.below, Writethrough: pick(8) == 7,
			RequestAlign: 1 << pick(10), // up to a sector: with more, the disk would have to end with a block
		}
		return m.options()
	})
}

// TestShrinkFails has a disk keep its size because its file failed. What lay behind the new end is old or zeroes then, and
// never what the backing file holds.
func TestShrinkFails(t *testing.T) {
	t.Parallel()
	const size, cluster = 1 << 20, 4096
	f := fault.New(&memory{}, fault.Options{})
	mustCreate(t, device(t, f), CreateOptions{Size: size, ClusterSize: cluster, BackingFile: "b", BackingFormat: "raw"})
	im := mustOpen(t, device(t, f), Options{Backing: func(string, string) (*blk.Device, error) {
		return device(t, &memory{b: fill('b', size)}), nil
	}})
	writeAt(t, im, size-cluster, fill('a', cluster))
	f.Add(fault.Rule{Op: fault.OpFlush, Err: errors.New("no luck")})
	if err := im.Truncate(size / 2); err == nil {
		t.Fatal("the file can't flush, and the disk shrank")
	}
	f.Clear()
	if got := readAt(t, im, size-cluster, cluster); !bytes.Equal(got, fill('a', cluster)) && !bytes.Equal(got, fill(0, cluster)) {
		t.Errorf("%q... was %q before, or should be zeroes", got[:4], "aaaa")
	}
}
