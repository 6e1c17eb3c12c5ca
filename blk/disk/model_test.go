package disk_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/blktest"
	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/blk/fault"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/blk/qcow2"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// modelChain says what the model runs on: an image in a file, with a raw backing file, and an NBD connection somewhere
// between the image and its user.
type modelChain struct {
	dir    string
	create disk.CreateSpec // of the image
	spec   disk.Spec       // options of the disk that is used
	far    disk.Spec       // options of the disk that is served
	inside bool            // the connection is below the image and not above
	below  bool            // faults are on the server's side
	seed   uint64
}

const modelSize = 3 << 17

// modelBacking is shorter than the disk above it, and ends with none of its larger clusters.
var modelBacking = bytes.Repeat([]byte("backing file "), 20_000)[:250<<10]

func (m *modelChain) image() string { return filepath.Join(m.dir, "image.qcow2") }

func (m *modelChain) options() blktest.Options {
	o := blktest.Options{Open: m.open, After: m.look, Content: modelBacking, Ops: 20, Seed: m.seed, Timeout: time.Minute}
	if m.below {
		o.Injected = func(err error) bool { return errors.Is(err, unix.EIO) }
	}
	return o
}

// whole is a driver that closes more than itself.
type whole struct {
	*fault.Disk
	also func() error
}

func (w whole) Close() error { return errors.Join(w.Disk.Close(), w.also()) }

// open makes a chain anew: the image, an export, and the disk that its user sees.
func (m *modelChain) open(tb testing.TB, wrap func(blk.Backend) blk.Backend) *blk.Device {
	tb.Helper()
	must := func(err error) {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
	}
	same := func(b blk.Backend) blk.Backend { return b }
	near, far := wrap, same
	if m.below {
		near, far = same, wrap
	}
	below := filepath.Join(m.dir, "below")
	must(os.WriteFile(below, modelBacking, 0o600))
	create := m.create
	create.Path, create.Format, create.Size, create.Overwrite = m.image(), disk.QCOW2, modelSize, true
	create.BackingFile, create.BackingFormat = below, disk.Raw
	must(disk.Create(tb.Context(), create))

	s := m.far
	s.Path = m.image()
	if m.inside {
		must(os.Truncate(m.image(), 8<<20)) // an export does not grow
	} else {
		s.Format, s.Backing = disk.QCOW2, disk.BackingOn
	}
	opened, err := disk.Open(tb.Context(), s)
	must(err)
	served, err := blk.New(far(opened.Backend()), blk.Options{})
	must(err)
	server := &nbd.Server{Exports: []nbd.Export{{Disk: served}}}
	ln, err := net.Listen("unix", filepath.Join(m.dir, "s"))
	must(err)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ln) }()

	s = m.spec
	s.Path = "nbd+unix:///?socket=" + filepath.Join(m.dir, "s")
	if m.inside {
		s.Format, s.Backing = disk.QCOW2, disk.BackingOn
	}
	used, err := disk.Open(tb.Context(), s)
	must(err)
	d, err := blk.New(near(whole{fault.New(used.Backend(), fault.Options{}), func() error {
		err := server.Close()
		if end := <-ended; !errors.Is(end, nbd.ErrServerClosed) {
			err = errors.Join(err, end)
		}
		return errors.Join(err, served.Close())
	}}), blk.Options{CopyOnRead: s.CopyOnRead, DetectZeroes: s.DetectZeroes, RequestAlign: s.RequestAlign})
	must(err)
	return d
}

// look opens the image that a run leaves.
func (m *modelChain) look(tb testing.TB, want []byte, faults bool) {
	tb.Helper()
	d, err := disk.Open(tb.Context(), disk.Spec{Path: m.image(), Format: disk.QCOW2, Backing: disk.BackingOn})
	if err != nil {
		tb.Fatal(err)
	}
	got := make([]byte, d.Size())
	if _, err := d.ReadVecAt(iov.Of(got), 0); err != nil || !bytes.Equal(got, want) {
		tb.Errorf("%v: the image holds something else", err)
	}
	im, ok := d.Backend().(*qcow2.Image)
	if !ok {
		tb.Fatalf("a disk of format qcow2 is a %T", d.Backend())
	}
	r, err := qcow2.Check(context.Background(), im, qcow2.RepairNone)
	if err != nil || r.Corruptions > 0 || r.Errors > 0 || r.Leaks > 0 && !faults {
		tb.Errorf("check: %v, %+v", err, r)
	}
	if err := d.Close(); err != nil {
		tb.Error(err)
	}
	if strings.HasSuffix(tb.Name(), "/concurrent") {
		m.inQEMU(tb, want)
	}
}

// inQEMU has QEMU check the image and read it.
func (m *modelChain) inQEMU(tb testing.TB, want []byte) {
	tb.Helper()
	out := filepath.Join(m.dir, "out")
	for _, args := range [][]string{
		{"check", "-q", "-f", "qcow2", m.image()}, {"convert", "-f", "qcow2", "-O", "raw", m.image(), out},
	} {
		if text, err := exec.Command(hosttest.Tool(tb, "qemu-img"), args...).CombinedOutput(); err != nil {
			tb.Errorf("qemu-img %q: %v: %s", args, err, text)
		}
	}
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, want) {
		tb.Errorf("QEMU reads something else (%v)", err)
	}
}

// TestModel compares chains with a plain array: an export of an image in a file, and an image in an export of a file.
func TestModel(t *testing.T) {
	for i, cluster := range []int64{512, 4096, 65536} {
		for j, inside := range []bool{false, true} {
			for k, below := range []bool{false, true} {
				m := modelChain{dir: t.TempDir()}
				m.create.ClusterSize, m.create.LazyRefcounts = cluster, (i+j+k)%2 == 1
				m.inside, m.below = inside, below
				m.seed = uint64(i*100+j*10+k) * 100
				m.spec.CopyOnRead = inside && k == 1
				m.spec.DetectZeroes = blk.DetectZeroes((i + j + k) % 3)
				m.far.AIO = []raw.AIO{raw.AIOIOUring, raw.AIOThreads}[i%2]
				if (i+k)%2 == 1 {
					m.far.Cache, m.spec.RequestAlign = disk.CacheNone, blk.SectorSize
				}
				t.Run(fmt.Sprintf("cluster=%d,inside=%v,below=%v", cluster, inside, below), func(t *testing.T) {
					blktest.Run(t, m.options())
				})
			}
		}
	}
}

// FuzzModel is TestModel for as long as the fuzzer runs.
func FuzzModel(f *testing.F) {
	dir := f.TempDir()
	blktest.Fuzz(f, func(n uint64) blktest.Options {
		pick := func(k uint64) int { defer func() { n /= k }(); return int(n % k) }
		m := modelChain{dir: dir, inside: pick(2) == 1, below: pick(2) == 1}
		m.create.ClusterSize, m.create.LazyRefcounts = 512<<pick(9), pick(2) == 1
		m.spec.CopyOnRead = pick(2) == 1 && m.inside
		m.spec.DetectZeroes, m.spec.RequestAlign = blk.DetectZeroes(pick(3)), 1+pick(2)*(blk.SectorSize-1)
		m.far.Cache, m.far.AIO = []disk.Cache{disk.CacheWriteback, disk.CacheNone}[pick(2)], raw.AIO(pick(3))
		return m.options()
	})
}
