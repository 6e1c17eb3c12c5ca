package raw

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A flush that failed once may have lost writes for good: the kernel would report success the next time.
func TestFlushStaysFailed(t *testing.T) {
	t.Parallel()
	calls := 0
	results := []error{nil, unix.EINTR, nil, unix.EIO, nil}
	f := &File{path: "/some/disk", fd: -1, sys: &system{fdsync: func(int) error { calls++; return results[calls-1] }}}
	for range 2 { // the second is interrupted once
		if err := f.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if err := f.Flush(); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "/some/disk") {
			t.Errorf("flush: %v", err)
		}
	}
	if calls != 4 {
		t.Errorf("%d calls of fdatasync, want 4", calls)
	}
}

func TestOpenErrorNamesTheRemedy(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		err      error
		readOnly bool
		is       error
		text     string
	}{
		{&fs.PathError{Op: "stat", Path: "/d", Err: unix.ENOENT}, false, fs.ErrNotExist, "no such file"},
		{unix.EACCES, false, fs.ErrPermission, "read-only"},
		{unix.EACCES, true, fs.ErrPermission, "right to read"},
		{unix.EROFS, false, unix.EROFS, "read-only"},
		{unix.EBUSY, false, ErrLocked, "mount"},
		{unix.EIO, false, unix.EIO, "/d"},
	} {
		err := openError("/d", Options{ReadOnly: tc.readOnly}, tc.err)
		if !errors.Is(err, tc.is) || !strings.Contains(err.Error(), tc.text) || strings.Count(err.Error(), "/d:") != 1 {
			t.Errorf("%v: %v", tc.err, err)
		}
	}
}

// What was looked at and what was opened may differ; the second look counts.
func TestReplacedByAnotherKind(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	f := &File{path: path, fd: int(p.Fd())}
	if err := f.init(Options{}); err == nil || !strings.Contains(err.Error(), "replaced") {
		t.Errorf("init: %v", err)
	}
}
