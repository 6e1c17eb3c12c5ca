package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// memory is a Backend in memory. It counts requests.
type memory struct {
	mu       sync.RWMutex
	b        []byte
	requests int
	limit    int64           // it does not grow beyond; 0 means 1 GiB
	events   func(blk.Event) // told of every event
}

func (m *memory) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	m.mu.Lock()
	m.requests++
	m.mu.Unlock()
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off >= int64(len(m.b)) {
		return 0, nil
	}
	return dst.CopyFrom(0, m.b[off:])
}

func (m *memory) WriteVecAt(src iov.Vec, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.requests++
	return src.CopyTo(m.b[off:], 0)
}

func (m *memory) Flush() error { return nil }

func (m *memory) Size() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return (int64(len(m.b)) + 511) &^ 511
}

func (m *memory) Limits() blk.Limits { return blk.Limits{} }
func (m *memory) Close() error       { return nil }
func (m *memory) Observing() bool    { return m.events != nil }
func (m *memory) Event(e blk.Event)  { m.events(e) }

func (m *memory) Truncate(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if limit := m.limit; size > 1<<30 && limit == 0 || limit > 0 && size > limit {
		return fmt.Errorf("memory: %d bytes are too many", size)
	}
	if size <= int64(cap(m.b)) {
		old := len(m.b)
		m.b = m.b[:size]
		if int(size) > old {
			clear(m.b[old:])
		}
		return nil
	}
	n := make([]byte, size, size+size/4)
	copy(n, m.b)
	m.b = n
	return nil
}

// disk is a Backend on a file, which other programs can read.
type disk struct{ f *os.File }

func (d *disk) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	return iov.ReadAt(int(d.f.Fd()), dst, off)
}

func (d *disk) WriteVecAt(src iov.Vec, off int64) (int, error) {
	return iov.WriteAt(int(d.f.Fd()), src, off)
}

func (d *disk) Flush() error { return nil }

func (d *disk) Size() int64 {
	i, err := d.f.Stat()
	if err != nil {
		panic(err)
	}
	return (i.Size() + 511) &^ 511
}

func (d *disk) Limits() blk.Limits        { return blk.Limits{} }
func (d *disk) Close() error              { return d.f.Close() }
func (d *disk) Truncate(size int64) error { return d.f.Truncate(size) }

func device(t testing.TB, b blk.Backend) *blk.Device {
	t.Helper()
	d, err := blk.New(b, blk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// onDisk opens a file, which it makes if there is none.
func onDisk(t testing.TB, path string) *blk.Device {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return device(t, &disk{f})
}

// mustOpen opens an image that closes with the test if it was not closed by then.
func mustOpen(t testing.TB, d *blk.Device, o Options) *Image {
	t.Helper()
	im, err := Open(d, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !im.closed.Load() {
			_ = im.Close()
		}
	})
	return im
}

func mustCreate(t testing.TB, d *blk.Device, o CreateOptions) {
	t.Helper()
	if err := Create(context.Background(), d, o); err != nil {
		t.Fatal(err)
	}
}

func mustClose(t testing.TB, im *Image) {
	t.Helper()
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

func writeAt(t testing.TB, im *Image, off int64, p []byte) {
	t.Helper()
	if _, err := im.WriteVecAt(iov.Of(p), off); err != nil {
		t.Fatalf("write %d bytes at %d: %v", len(p), off, err)
	}
}

func readAt(t testing.TB, im *Image, off, n int64) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xee}, int(n))
	if _, err := im.ReadVecAt(iov.Of(p), off); err != nil {
		t.Fatalf("read %d bytes at %d: %v", n, off, err)
	}
	return p
}

// wantBytes compares without printing megabytes.
func wantBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if i := iov.Mismatch(iov.Of(got), iov.Of(want)); i >= 0 {
		g, w := byte(0), byte(0)
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		t.Fatalf("%s: byte %#x is %#x, want %#x (%d and %d bytes)", what, i, g, w, len(got), len(want))
	}
}

// wantClean checks an image with our own check.
func wantClean(t testing.TB, im *Image) {
	t.Helper()
	r, err := Check(context.Background(), im, RepairNone)
	if err != nil || !r.Clean() {
		t.Fatalf("check: %+v, %v", r, err)
	}
}

func fill(b byte, n int64) []byte { return bytes.Repeat([]byte{b}, int(n)) }

// qemu runs one of QEMU's tools, of which the tests make sure that it is there.
func qemu(t testing.TB, tool string, args ...string) string {
	t.Helper()
	out, err := tryQEMU(t, tool, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", tool, strings.Join(args, " "), err, out)
	}
	return out
}

func tryQEMU(t testing.TB, tool string, args ...string) (string, error) {
	t.Helper()
	needQEMU(t)
	out, err := exec.Command(tool, args...).CombinedOutput()
	return string(out), err
}

func needQEMU(t testing.TB) {
	t.Helper()
	hosttest.Tool(t, "qemu-img")
	hosttest.Tool(t, "qemu-io")
}

// qemuCheck has qemu-img check an image for everything, leaks included.
func qemuCheck(t testing.TB, path string) {
	t.Helper()
	qemu(t, "qemu-img", "check", "-f", "qcow2", path)
}

// qemuRead returns the disk in an image as QEMU reads it.
func qemuRead(t testing.TB, path string) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "raw")
	qemu(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
