package raw_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/guest/lab/labtest"
	"github.com/kvmlet/kvmlet/iov"
)

func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i%251) + 1
	}
	return p
}

func image(t *testing.T, contents []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string, o raw.Options) *raw.File {
	t.Helper()
	f, err := raw.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func contents(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReadWrite(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	path := image(t, make([]byte, size))
	f := open(t, path, raw.Options{})
	if f.Size() != size || f.Limits().PhysicalBlock != 4096 {
		t.Fatalf("size %d, limits %+v", f.Size(), f.Limits())
	}

	// 2,000 elements are more than one preadv takes (IOV_MAX is 1,024).
	want := pattern(2000 * 7)
	var src iov.Vec
	for i := 0; i < len(want); i += 7 {
		src = src.Append(want[i : i+7])
	}
	if n, err := f.WriteVecAt(src, 12345); n != len(want) || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
	got := make([]byte, len(want))
	var dst iov.Vec
	for i := 0; i < len(got); i += 7 {
		dst = dst.Append(got[i : i+7])
	}
	if n, err := f.ReadVecAt(dst, 12345); n != len(got) || err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read: %d, %v", n, err)
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); !errors.Is(err, os.ErrClosed) { // and closes nobody else's file
		t.Errorf("second close: %v", err)
	}
	file := contents(t, path)
	if len(file) != size || !bytes.Equal(file[12345:12345+len(want)], want) {
		t.Error("the file holds something else")
	}
}

// The last sector of a file of odd size is there in full: its missing bytes are zeroes until they are written.
func TestOddSize(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ file, disk int }{{1, 512}, {511, 512}, {512, 512}, {513, 1024}, {5000, 5120}} {
		path := image(t, pattern(tc.file))
		f := open(t, path, raw.Options{})
		if f.Size() != int64(tc.disk) {
			t.Errorf("a file of %d bytes is a disk of %d, want %d", tc.file, f.Size(), tc.disk)
			continue
		}
		d, err := blk.New(f, blk.Options{})
		if err != nil {
			t.Fatal(err)
		}
		last, off := make([]byte, 512), int64(tc.disk-512)
		if _, err := d.ReadVecAt(iov.Of(last), off); err != nil {
			t.Fatal(err)
		}
		want := append(pattern(tc.file)[off:], make([]byte, tc.disk-tc.file)...)
		if !bytes.Equal(last, want) {
			t.Errorf("a file of %d bytes: wrong last sector", tc.file)
		}
		if _, err := d.WriteVecAt(iov.Of(pattern(512)), off); err != nil {
			t.Fatal(err)
		}
		if file := contents(t, path); len(file) != tc.disk || !bytes.Equal(file[off:], pattern(512)) {
			t.Errorf("a file of %d bytes: %d after its last sector was written", tc.file, len(file))
		}
	}
}

func TestFileShrinksUnderUs(t *testing.T) {
	t.Parallel()
	path := image(t, pattern(8192))
	f := open(t, path, raw.Options{})
	if err := os.Truncate(path, 1000); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	if n, err := f.ReadVecAt(iov.Of(got), 0); n != 1000 || err != nil {
		t.Errorf("across the new end: %d, %v", n, err)
	}
	if n, err := f.ReadVecAt(iov.Of(got), 4096); n != 0 || err != nil {
		t.Errorf("beyond the new end: %d, %v", n, err)
	}
	if f.Size() != 8192 {
		t.Errorf("size changed to %d", f.Size())
	}
}

func TestReadOnlyFile(t *testing.T) {
	t.Parallel()
	path := image(t, pattern(512))
	f := open(t, path, raw.Options{ReadOnly: true})
	if n, err := f.ReadVecAt(iov.Of(make([]byte, 512)), 0); n != 512 || err != nil {
		t.Errorf("read: %d, %v", n, err)
	}
	_, err := f.WriteVecAt(iov.Of(make([]byte, 512)), 0)
	if !errors.Is(err, unix.EBADF) || !strings.Contains(err.Error(), path) {
		t.Errorf("write: %v", err)
	}
	if !bytes.Equal(contents(t, path), pattern(512)) {
		t.Error("the file was written")
	}
}

func TestSparseGiant(t *testing.T) {
	t.Parallel()
	path := image(t, nil)
	const size = 1 << 40
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	f := open(t, path, raw.Options{})
	if n, err := f.WriteVecAt(iov.Of(pattern(512)), size-512); n != 512 || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
	got := make([]byte, 512)
	if n, err := f.ReadVecAt(iov.Of(got), size-512); n != 512 || err != nil || !bytes.Equal(got, pattern(512)) {
		t.Errorf("read: %d, %v", n, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	fifo, sock, empty := filepath.Join(dir, "fifo"), filepath.Join(dir, "sock"), filepath.Join(dir, "empty")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(sock, unix.S_IFSOCK|0o600, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, path, text string
		want             error
	}{
		{"missing", filepath.Join(dir, "none"), "no such file", fs.ErrNotExist},
		{"below a file", filepath.Join(empty, "x"), "not a directory", unix.ENOTDIR},
		{"directory", dir, "a directory", nil},
		{"pipe", fifo, "a pipe", nil},
		{"socket", sock, "a socket", nil},
		{"character device", "/dev/null", "a character device", nil},
		{"empty", empty, "empty", nil},
		{"symbolic link to itself", loop, "symbolic link", unix.ELOOP},
		{"no name", "", "no such file", fs.ErrNotExist},
	} {
		for _, ro := range []bool{false, true} {
			f, err := raw.Open(tc.path, raw.Options{ReadOnly: ro})
			if f != nil || err == nil {
				t.Errorf("%s: opened", tc.name)
				continue
			}
			if tc.want != nil && !errors.Is(err, tc.want) {
				t.Errorf("%s: %v is not %v", tc.name, err, tc.want)
			}
			msg := err.Error()
			if !strings.Contains(msg, tc.text) || !strings.Contains(msg, tc.path) || strings.Contains(msg, "\n") {
				t.Errorf("%s: message %q", tc.name, msg)
			}
		}
	}
}

func TestLock(t *testing.T) {
	t.Parallel()
	rw, ro := raw.Options{}, raw.Options{ReadOnly: true}
	for _, tc := range []struct {
		name          string
		first, second raw.Options
		locked        bool
	}{
		{"two writers", rw, rw, true},
		{"writer, then reader", rw, ro, true},
		{"reader, then writer", ro, rw, true},
		{"two readers", ro, ro, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			path := image(t, pattern(512))
			link := path + ".link"
			if err := os.Link(path, link); err != nil { // the lock is on the file, whatever its name
				t.Fatal(err)
			}
			first := open(t, path, tc.first)
			second, err := raw.Open(link, tc.second)
			if !tc.locked {
				if err != nil {
					t.Fatal(err)
				}
				_ = second.Close()
				return
			}
			if !errors.Is(err, raw.ErrLocked) || !strings.Contains(err.Error(), link) {
				t.Fatalf("second open: %v", err)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			open(t, link, tc.second)
		})
	}
}

// QEMU and we keep away from each other's disks, in both directions, and read a disk together.
func TestLocksOfQEMU(t *testing.T) {
	t.Parallel()
	hosttest.Tool(t, "qemu-io")
	for _, ours := range []bool{false, true} { // whether we are a reader
		for _, theirs := range []bool{false, true} {
			path := image(t, pattern(4096))
			free := ours && theirs

			// We come second.
			args := []string{"-f", "raw", path}
			if theirs {
				args = append([]string{"-r"}, args...)
			}
			cmd := exec.Command("qemu-io", args...)
			in, out := hosttest.Start(t, cmd)
			if _, err := io.ReadFull(out, make([]byte, len("qemu-io> "))); err != nil { // it has the disk open
				t.Fatal(err)
			}
			f, err := raw.Open(path, raw.Options{ReadOnly: ours})
			if free != (err == nil) || !free && !errors.Is(err, raw.ErrLocked) {
				t.Errorf("we read only %v, QEMU has it and reads only %v: %v", ours, theirs, err)
			}
			if err == nil {
				_ = f.Close()
			}
			_ = in.Close()
			_ = cmd.Wait()

			// QEMU comes second.
			open(t, path, raw.Options{ReadOnly: ours})
			args = append(args, "-c", "read 0 512")
			if said, err := exec.Command("qemu-io", args...).CombinedOutput(); free != (err == nil) ||
				!free && !strings.Contains(string(said), "lock") {
				t.Errorf("we have it and read only %v, QEMU reads only %v: %v\n%s", ours, theirs, err, said)
			}
		}
	}
}

func TestBlockDevice(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	path := image(t, make([]byte, size))
	device := attachLoop(t, path)

	f := open(t, device, raw.Options{})
	if f.Size() != size || f.Limits().PhysicalBlock < 512 {
		t.Errorf("size %d, limits %+v", f.Size(), f.Limits())
	}
	if n, err := f.WriteVecAt(iov.Of(pattern(4096)), 8192); n != 4096 || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(contents(t, path)[8192:8192+4096], pattern(4096)) {
		t.Error("the bytes are not on the device after a flush")
	}
	if _, err := raw.Open(device, raw.Options{}); !errors.Is(err, raw.ErrLocked) {
		t.Errorf("second writer: %v", err)
	}
	if _, err := raw.Open(device, raw.Options{ReadOnly: true}); !errors.Is(err, raw.ErrLocked) {
		t.Errorf("reader beside a writer: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}

	// A mounted file system claims its device the same way, without a lock on the node.
	claim, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(claim)
	if _, err := raw.Open(device, raw.Options{}); !errors.Is(err, raw.ErrLocked) {
		t.Errorf("claimed device: %v", err)
	}
	open(t, device, raw.Options{ReadOnly: true})
}

// freeLoop opens a loop device that nobody uses yet.
func freeLoop() (fd int, device string, err error) {
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, "", fmt.Errorf("no loop devices: %w", err)
	}
	defer unix.Close(control)
	free, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return -1, "", fmt.Errorf("no free loop device: %w", err)
	}
	device = "/dev/loop" + strconv.Itoa(free)
	if fd, err = unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return -1, "", fmt.Errorf("open %s: %w", device, err)
	}
	return fd, device, nil
}

// TestMain runs the tests in a lab where this host has no loop devices for them.
func TestMain(m *testing.M) {
	labtest.MainWhere(m, func() error {
		fd, _, err := freeLoop()
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	})
}

// attachLoop makes a block device of the file at path.
func attachLoop(t *testing.T, path string) string {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for {
		fd, device, err := freeLoop()
		if err != nil {
			t.Fatal(err)
		}
		err = unix.IoctlSetInt(fd, unix.LOOP_SET_FD, int(file.Fd()))
		if errors.Is(err, unix.EBUSY) { // someone else was faster
			_ = unix.Close(fd)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0)
			_ = unix.Close(fd)
		})
		return device
	}
}

func TestRequestsDoNotAllocate(t *testing.T) {
	f := open(t, image(t, pattern(8192)), raw.Options{})
	v := iov.Of(make([]byte, 4096))
	for name, fn := range map[string]func(){
		"read":  func() { _, _ = f.ReadVecAt(v, 0) },
		"write": func() { _, _ = f.WriteVecAt(v, 0) },
	} {
		if n := testing.AllocsPerRun(100, fn); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
