package nbd_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/blktest"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// modelExport says what the model runs on: a client of our server, which exports a disk in memory.
type modelExport struct {
	dir    string        // of the socket
	limits blk.Limits    // of the disk in memory
	server nbd.Server    // its limits
	wait   time.Duration // for a connection to come back
	device blk.Options
	below  bool // faults are those of the disk in memory, of which the client hears from the server
	seed   uint64

	kept *mem.Disk // the disk in memory of the last run
}

// modelSize is a multiple of every alignment: an export ends where its disk does, and not with a block.
const modelSize = 3 << 17

// local is a client whose server ends with it.
type local struct {
	*nbd.Client
	server *nbd.Server
	disk   *blk.Device
	served chan error
}

func (l *local) Close() error {
	errs := []error{l.Client.Close(), l.server.Close()}
	if err := <-l.served; !errors.Is(err, nbd.ErrServerClosed) {
		errs = append(errs, fmt.Errorf("serve: %w", err))
	}
	return errors.Join(append(errs, l.disk.Close())...)
}

// keptDisk is a disk that is still there when it was closed.
type keptDisk struct{ *mem.Disk }

func (keptDisk) Close() error { return nil }

func (m *modelExport) options() blktest.Options {
	o := blktest.Options{Open: m.open, After: m.look, Ops: 100, Seed: m.seed, Timeout: time.Minute}
	if m.below {
		o.Injected = func(err error) bool { return errors.Is(err, unix.EIO) }
	}
	if hosttest.Race {
		o.Ops = 20
	}
	return o
}

func (m *modelExport) open(tb testing.TB, wrap func(blk.Backend) blk.Backend) *blk.Device {
	tb.Helper()
	var err error
	if m.kept, err = mem.New(modelSize, mem.Options{Limits: m.limits}); err != nil {
		tb.Fatal(err)
	}
	below, top := blk.Backend(keptDisk{m.kept}), wrap
	if m.below {
		below, top = wrap(below), func(b blk.Backend) blk.Backend { return b }
	}
	l := &local{served: make(chan error, 1)}
	if l.disk, err = blk.New(below, blk.Options{}); err != nil {
		tb.Fatal(err)
	}
	l.server = &nbd.Server{
		Exports:     []nbd.Export{{Name: "disk", Disk: l.disk}},
		MaxRequests: m.server.MaxRequests, MaxBytes: m.server.MaxBytes,
	}
	socket := filepath.Join(m.dir, "socket")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		tb.Fatal(err)
	}
	go func() { l.served <- l.server.Serve(ln) }()
	if l.Client, err = nbd.Dial(tb.Context(), nbd.Options{Network: "unix", Address: socket, ReconnectDelay: m.wait}); err != nil {
		tb.Fatal(err)
	}
	d, err := blk.New(top(l), m.device)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

// look compares the disk in memory with what its client saw.
func (m *modelExport) look(tb testing.TB, want []byte, _ bool) {
	tb.Helper()
	d, err := blk.New(m.kept, blk.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	got := make([]byte, d.Size())
	if _, err := d.ReadVecAt(iov.Of(got), 0); err != nil || !bytes.Equal(got, want) {
		tb.Errorf("%v: the disk behind the server holds something else", err)
	}
	if err := d.Close(); err != nil {
		tb.Error(err)
	}
}

// TestModel compares an export with a plain array.
func TestModel(t *testing.T) {
	dir := t.TempDir()
	for i, align := range []int{1, 512, 4096, 65536} {
		for j, below := range []bool{false, true} {
			for k, tight := range []bool{false, true} {
				m := modelExport{dir: dir, limits: blk.Limits{RequestAlign: align}, below: below}
				m.seed = uint64(i*100+j*10+k) * 100
				m.device.DetectZeroes = blk.DetectZeroes((i + j) % 3)
				if tight {
					m.wait = time.Minute
					m.server.MaxRequests, m.server.MaxBytes = 2, 64<<10
					m.device.RequestAlign = align
					m.limits.MaxVec, m.limits.MaxTransfer = 3, 128<<10
				}
				t.Run(fmt.Sprintf("align=%d,below=%v,tight=%v", align, below, tight), func(t *testing.T) {
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
		m := modelExport{dir: dir, below: pick(2) == 1, wait: time.Duration(pick(2)) * time.Minute}
		align := 1 << pick(17)
		m.limits = blk.Limits{
			RequestAlign: align, MaxVec: pick(6), MaxTransfer: int64(max(align, 4096) * pick(9)),
			Cluster: 512 << pick(9),
		}
		m.device = blk.Options{
			// No more than a cluster, or a block could be zeroes in part only.
			RequestAlign: min(1<<pick(17), int(m.limits.Cluster)),
			DetectZeroes: blk.DetectZeroes(pick(3)), Writethrough: pick(8) == 7,
		}
		if pick(2) == 1 {
			m.server.MaxRequests, m.server.MaxBytes = 1+pick(4), int64(1+pick(1<<18))
		}
		return m.options()
	})
}
