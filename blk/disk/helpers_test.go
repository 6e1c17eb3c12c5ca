package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// create makes a disk.
func create(t testing.TB, c CreateSpec) string {
	t.Helper()
	must(t, Create(t.Context(), c))
	return c.Path
}

// open opens a disk until the end of the test, or until it is closed.
func open(t testing.TB, s Spec) *blk.Device {
	t.Helper()
	d, err := Open(t.Context(), s)
	must(t, err)
	t.Cleanup(func() {
		if err := d.Close(); err != nil && !errors.Is(err, blk.ErrClosed) {
			t.Error(err)
		}
	})
	return d
}

func write(t testing.TB, d *blk.Device, off int64, b []byte) {
	t.Helper()
	_, err := d.WriteVecAt(iov.Of(b), off)
	must(t, err)
}

// contents returns all bytes of a disk.
func contents(t testing.TB, d *blk.Device) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	_, err := d.ReadVecAt(iov.Of(b), 0)
	must(t, err)
	return b
}

// pattern returns n bytes, none of them zero.
func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7)%251 + 1 ^ seed&1
		if b[i] == 0 {
			b[i] = seed | 1
		}
	}
	return b
}

// scribble writes data, zeroes and discards at random.
func scribble(t testing.TB, d *blk.Device, r *rand.Rand, n int) {
	t.Helper()
	for range n {
		size := d.Size()
		off := r.Int64N(size)
		length := min(1+r.Int64N(200<<10), size-off)
		if r.IntN(2) == 0 {
			off, length = off&^511, max(length&^511, 512)
			length = min(length, size-off)
		}
		switch r.IntN(4) {
		case 0:
			must(t, d.WriteZeroes(t.Context(), off, length, blk.MayUnmap*blk.Flags(r.IntN(2))))
		case 1:
			must(t, d.Discard(t.Context(), off, length))
		default:
			b := make([]byte, length)
			word := binary.LittleEndian.AppendUint64(nil, r.Uint64())
			for i := range b { // in part zero
				if b[i] = word[i%8]; i>>12&3 == 1 {
					b[i] = 0
				}
			}
			write(t, d, off, b)
		}
	}
}

// export serves a disk on a unix socket and returns its URI.
func export(t testing.TB, e nbd.Export) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	must(t, err)
	s := &nbd.Server{Exports: []nbd.Export{e}}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ln) }()
	t.Cleanup(func() {
		must(t, s.Close())
		if err := <-ended; !errors.Is(err, nbd.ErrServerClosed) {
			t.Error(err)
		}
	})
	return "nbd+unix:///?socket=" + socket
}

// leaks fails the test if it leaves a goroutine or a file behind. Tests that call it are not parallel.
func leaks(t testing.TB) {
	t.Helper()
	t.Cleanup(hosttest.Leaks(t, 10*time.Second))
}

// qemu runs one of QEMU's tools and returns its output and exit status.
func qemu(t testing.TB, name string, args ...string) (string, int) {
	t.Helper()
	hosttest.Tool(t, name)
	out, err := exec.CommandContext(context.WithoutCancel(t.Context()), name, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit != nil {
		return string(out), exit.ExitCode()
	}
	return string(out), 0
}

// qemuOK is qemu for what must go well.
func qemuOK(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, status := qemu(t, name, args...)
	if status != 0 {
		t.Fatalf("%s %q: status %d: %s", name, args, status, out)
	}
	return out
}
