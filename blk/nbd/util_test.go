package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// timeout is far longer than anything here takes.
const timeout = 60 * time.Second

func testContext(tb testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	tb.Cleanup(cancel)
	return ctx
}

// memory is a blk.Backend over a byte slice. Where there is no data it remembers that there is none, in blocks.
type memory struct {
	mu   sync.RWMutex
	data []byte
	hole []bool // for each block
	err  error  // what every request returns; see fail

	gate    chan struct{} // if it is set, each request takes a value first
	arrived atomic.Int64  // requests that wanted to
	flushes atomic.Int64
	fua     atomic.Int64
	noFast  atomic.Bool // zeroes are not faster than data
}

const block = 4096

func newMemory(size int) *memory {
	m := &memory{data: make([]byte, size), hole: make([]bool, (size+block-1)/block)}
	for i := range m.hole {
		m.hole[i] = true
	}
	return m
}

func (m *memory) enter() error {
	m.arrived.Add(1)
	if m.gate != nil {
		<-m.gate
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.err
}

func (m *memory) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

func (m *memory) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	if err := m.enter(); err != nil {
		return 0, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return dst.CopyFrom(0, m.data[off:off+int64(dst.Size())])
}

func (m *memory) WriteVecAt(src iov.Vec, off int64) (int, error) {
	if err := m.enter(); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := int64(src.Size())
	m.mark(off, n, false)
	return src.CopyTo(m.data[off:off+n], 0)
}

func (m *memory) WriteVecFUA(src iov.Vec, off int64) (int, error) {
	m.fua.Add(1)
	return m.WriteVecAt(src, off)
}

// bytes returns a copy of what is stored.
func (m *memory) bytes(off, n int) []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return bytes.Clone(m.data[off : off+n])
}

// isHole reports whether a block has no data.
func (m *memory) isHole(i int) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.hole[i]
}

func (m *memory) mark(off, n int64, hole bool) {
	for i := off / block; i*block < off+n; i++ {
		m.hole[i] = hole
	}
}

func (m *memory) WriteZeroes(off, n int64, unmap bool) error {
	if err := m.enter(); err != nil {
		return err
	}
	if m.noFast.Load() {
		return blk.ErrUnsupported
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	m.mark(off, n, unmap)
	return nil
}

func (m *memory) Discard(off, n int64) error { return m.WriteZeroes(off, n, true) }

func (m *memory) BlockStatus(off, n int64) (blk.Status, int64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	i := off / block
	run := (i+1)*block - off
	for run < n && m.hole[i] == m.hole[(off+run)/block] {
		run += block
	}
	s := blk.Status{Flags: blk.StatusData | blk.StatusAllocated}
	if m.hole[i] {
		s.Flags = blk.StatusZero | blk.StatusAllocated
	}
	return s, min(run, n), m.err
}

func (m *memory) Flush() error {
	m.flushes.Add(1)
	return m.enter()
}

func (m *memory) Size() int64 { return int64(len(m.data)) }
func (m *memory) Limits() blk.Limits {
	return blk.Limits{ZeroAlign: block, DiscardAlign: block}
}
func (m *memory) Close() error { return nil }

func newDevice(tb testing.TB, b blk.Backend, o blk.Options) *blk.Device {
	tb.Helper()
	d, err := blk.New(b, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
	})
	return d
}

func dial(tb testing.TB, o nbd.Options) *nbd.Client {
	tb.Helper()
	c, err := nbd.Dial(testContext(tb), o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := c.Close(); err != nil && !errors.Is(err, blk.ErrClosed) {
			tb.Error(err)
		}
	})
	return c
}

func listenUnix(tb testing.TB) net.Listener {
	tb.Helper()
	ln, err := net.Listen("unix", filepath.Join(tb.TempDir(), "nbd.sock"))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { ln.Close() })
	return ln
}

// noise returns n bytes that nobody else has.
func noise(n int, seed uint64) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), 1}).Read(p)
	return p
}

func mustWrite(tb testing.TB, c iov.WriterAt, p []byte, off int64) {
	tb.Helper()
	if n, err := c.WriteVecAt(iov.Of(p), off); n != len(p) || err != nil {
		tb.Fatalf("write of %d bytes at %d: %d, %v", len(p), off, n, err)
	}
}

func mustRead(tb testing.TB, c iov.ReaderAt, want []byte, off int64) {
	tb.Helper()
	got := make([]byte, len(want))
	if n, err := c.ReadVecAt(iov.Of(got), off); n != len(want) || err != nil {
		tb.Fatalf("read of %d bytes at %d: %d, %v", len(want), off, n, err)
	}
	if !bytes.Equal(got, want) {
		tb.Fatalf("%d bytes at %d are not what was written", len(want), off)
	}
}

// contents returns what is in a file.
func contents(tb testing.TB, path string) []byte {
	tb.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// run runs a program to its end and returns what it printed.
func run(tb testing.TB, name string, args ...string) string {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		tb.Fatalf("%s %q: %v\n%s%s", filepath.Base(name), args, err, &out, &errs)
	}
	return out.String()
}

// eventually waits for ok.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(timeout); !ok(); runtime.Gosched() {
		if time.Now().After(deadline) {
			tb.Fatal("never: " + what)
		}
	}
}

// leaks returns a check that nothing has been left behind since. No other test may run meanwhile.
func leaks(tb testing.TB) func() {
	tb.Helper()
	return hosttest.Leaks(tb, timeout)
}
