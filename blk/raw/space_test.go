package raw_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/iov"
)

// allocated returns how many bytes the file at path takes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestDiscardAndZeroes(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	for _, o := range []raw.Options{{}, {Cache: raw.CacheNone}} {
		path := image(t, pattern(size))
		f := open(t, path, o)
		want := pattern(size)
		if err := f.Flush(); err != nil {
			t.Fatal(err)
		}
		full := allocated(t, path)

		if err := f.WriteZeroes(4096, 8192, false); err != nil {
			t.Fatal(err)
		}
		clear(want[4096:][:8192])
		if err := f.WriteZeroes(512, 512, false); err != nil { // any range will do
			t.Fatal(err)
		}
		clear(want[512:][:512])
		if n := allocated(t, path); n < full {
			t.Errorf("zeroes gave %d bytes back", full-n)
		}
		if err := f.WriteZeroes(64<<10, 128<<10, true); err != nil {
			t.Fatal(err)
		}
		clear(want[64<<10:][:128<<10])
		if err := f.Discard(512<<10, 256<<10); err != nil {
			t.Fatal(err)
		}
		clear(want[512<<10:][:256<<10])
		if n := allocated(t, path); n > full-(368<<10) { // the file system needs some for its own account
			t.Errorf("%d bytes of %d are still allocated", n, full)
		}
		if !bytes.Equal(contents(t, path), want) {
			t.Error("the file holds something else")
		}
		p := aligned(t, size) // and so does the disk, whatever caches it goes through
		if n, err := f.ReadVecAt(iov.Of(p), 0); n != size || err != nil || !bytes.Equal(p, want) {
			t.Errorf("read: %d, %v", n, err)
		}
	}
}

// Zeroes up to the end of a disk whose file ends in the middle of a sector don't change the file's size.
func TestZeroesAtOddEnd(t *testing.T) {
	t.Parallel()
	path := image(t, pattern(5000))
	f := open(t, path, raw.Options{})
	for _, unmap := range []bool{false, true} {
		if err := f.WriteZeroes(4608, 512, unmap); err != nil {
			t.Fatal(err)
		}
	}
	if got := contents(t, path); !bytes.Equal(got, append(pattern(4608), make([]byte, 392)...)) {
		t.Errorf("file of %d bytes", len(got))
	}
}

func TestBlockStatus(t *testing.T) {
	t.Parallel()
	for _, o := range []raw.Options{{}, {Cache: raw.CacheNone}} {
		path := image(t, nil)
		if err := os.Truncate(path, 1<<20+100); err != nil {
			t.Fatal(err)
		}
		f := open(t, path, o)
		for _, off := range []int64{256 << 10, 640 << 10} {
			if _, err := f.WriteVecAt(iov.Of(aligned(t, 64<<10)), off); err != nil {
				t.Fatal(err)
			}
		}
		const data, zero = blk.StatusData, blk.StatusZero
		type run struct {
			flags blk.StatusFlags
			n     int64
		}
		want := []run{{zero, 256 << 10}, {data, 64 << 10}, {zero, 320 << 10}, {data, 64 << 10}, {zero, 1<<20 + 512 - 704<<10}}
		off := int64(0)
		for _, w := range want {
			s, n, err := f.BlockStatus(off, f.Size()-off)
			if err != nil || s.Flags != w.flags|blk.StatusAllocated|blk.StatusOffset || s.Offset != off || n != w.n {
				t.Errorf("at %d: %+v, %d, %v; want %+v", off, s, n, err, w)
			}
			off += w.n
		}
		if s, n, err := f.BlockStatus(0, 4096); err != nil || s.Flags&zero == 0 || n != 4096 {
			t.Errorf("no more than asked: %+v, %d, %v", s, n, err)
		}
		if s, n, err := f.BlockStatus(300<<10, 4096); err != nil || s.Flags&data == 0 || n != 4096 {
			t.Errorf("in the middle: %+v, %d, %v", s, n, err)
		}
	}
}

func TestTruncateAndRefresh(t *testing.T) {
	t.Parallel()
	path := image(t, pattern(8192))
	f := open(t, path, raw.Options{})
	if err := f.Truncate(4096); err != nil || f.Size() != 4096 {
		t.Errorf("smaller: %v, %d", err, f.Size())
	}
	if err := f.Truncate(1 << 20); err != nil || f.Size() != 1<<20 {
		t.Errorf("larger: %v, %d", err, f.Size())
	}
	if got := contents(t, path); len(got) != 1<<20 || !bytes.Equal(got[:4096], pattern(4096)) || bytes.ContainsFunc(got[4096:], func(r rune) bool { return r != 0 }) {
		t.Error("new bytes are not zeroes")
	}
	for _, bad := range []int64{-512, 100} {
		if err := f.Truncate(bad); !errors.Is(err, blk.ErrRange) {
			t.Errorf("%d: %v", bad, err)
		}
	}
	if err := os.Truncate(path, 2<<20); err != nil {
		t.Fatal(err)
	}
	if f.Size() != 1<<20 {
		t.Errorf("size is %d before Refresh", f.Size())
	}
	if err := f.Refresh(); err != nil || f.Size() != 2<<20 {
		t.Errorf("refresh: %v, %d", err, f.Size())
	}
}

func TestForcedWrite(t *testing.T) {
	t.Parallel()
	for _, o := range []raw.Options{{}, {Cache: raw.CacheNone}} {
		path := image(t, make([]byte, 16384))
		f := open(t, path, o)
		p := aligned(t, 8192)
		copy(p, pattern(8192))
		if n, err := f.WriteVecFUA(iov.Of(p[:4096], p[4096:]), 4096); n != 8192 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		if !bytes.Equal(contents(t, path)[4096:12288], pattern(8192)) {
			t.Error("the file holds something else")
		}
		if _, err := f.WriteVecFUA(make(iov.Vec, 1025).Append(p), 0); !errors.Is(err, blk.ErrUnsupported) {
			t.Errorf("1,026 elements: %v", err)
		}
		if n, err := f.WriteVecFUA(nil, 0); n != 0 || err != nil {
			t.Errorf("nothing: %d, %v", n, err)
		}
	}
}

func TestForceShare(t *testing.T) {
	t.Parallel()
	path := image(t, pattern(4096))
	open(t, path, raw.Options{})
	if _, err := raw.Open(path, raw.Options{ReadOnly: true}); !errors.Is(err, raw.ErrLocked) {
		t.Errorf("with a lock: %v", err)
	}
	f := open(t, path, raw.Options{ReadOnly: true, ForceShare: true})
	if n, err := f.ReadVecAt(iov.Of(make([]byte, 4096)), 0); n != 4096 || err != nil {
		t.Errorf("read: %d, %v", n, err)
	}
	if _, err := raw.Open(path, raw.Options{ForceShare: true}); err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("for writing: %v", err)
	}
	// It does not keep others away either.
	other := image(t, pattern(4096))
	open(t, other, raw.Options{ReadOnly: true, ForceShare: true})
	open(t, other, raw.Options{})
}

func TestCreate(t *testing.T) {
	t.Parallel()
	ctx, dir := context.Background(), t.TempDir()
	for _, p := range []raw.Preallocation{raw.PreallocOff, raw.PreallocFalloc, raw.PreallocFull} {
		path := filepath.Join(dir, p.String())
		const size = 3<<20 + 512
		var progress int64
		o := raw.CreateOptions{Preallocation: p, Progress: func(done int64) { progress = done }}
		if err := raw.Create(ctx, path, size, o); err != nil {
			t.Fatal(err)
		}
		if got := contents(t, path); !bytes.Equal(got, make([]byte, size)) {
			t.Errorf("%v: %d bytes, or not all zero", p, len(got))
		}
		if n := allocated(t, path); (n >= size) != (p != raw.PreallocOff) {
			t.Errorf("%v: %d bytes allocated", p, n)
		}
		if (progress == size) != (p == raw.PreallocFull) {
			t.Errorf("%v: progress %d", p, progress)
		}
		if err := raw.Create(ctx, path, 512, raw.CreateOptions{}); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), path) {
			t.Errorf("%v: again: %v", p, err)
		}

		if err := os.WriteFile(path, pattern(1024), 0o600); err != nil {
			t.Fatal(err)
		}
		o.Overwrite = true
		f := open(t, path, raw.Options{ReadOnly: true})
		if err := raw.Create(ctx, path, 512, o); !errors.Is(err, raw.ErrLocked) {
			t.Errorf("%v: over a disk in use: %v", p, err)
		}
		if !bytes.Equal(contents(t, path), pattern(1024)) {
			t.Errorf("%v: a disk in use was overwritten", p)
		}
		_ = f.Close()
		if err := raw.Create(ctx, path, 4096, o); err != nil || !bytes.Equal(contents(t, path), make([]byte, 4096)) {
			t.Errorf("%v: overwritten: %v", p, err)
		}
	}
}

func TestCreateFails(t *testing.T) {
	t.Parallel()
	ctx, dir := context.Background(), t.TempDir()
	ended, cancel := context.WithCancel(ctx)
	cancel()
	for _, tc := range []struct {
		name string
		ctx  context.Context
		path string
		size int64
		o    raw.CreateOptions
		want error
		text string
	}{
		{"no size", ctx, filepath.Join(dir, "a"), 0, raw.CreateOptions{}, nil, "512"},
		{"odd size", ctx, filepath.Join(dir, "a"), 1000, raw.CreateOptions{}, nil, "512"},
		{"no space", ctx, filepath.Join(dir, "a"), 15 << 40, raw.CreateOptions{Preallocation: raw.PreallocFalloc}, unix.ENOSPC, "preallocation=off"},
		{"no directory", ctx, filepath.Join(dir, "b", "a"), 512, raw.CreateOptions{}, fs.ErrNotExist, ""},
		{"a directory", ctx, dir, 512, raw.CreateOptions{Overwrite: true}, nil, "directory"},
		{"cancelled", ended, filepath.Join(dir, "a"), 512, raw.CreateOptions{Preallocation: raw.PreallocFull}, context.Canceled, ""},
	} {
		err := raw.Create(tc.ctx, tc.path, tc.size, tc.o)
		if err == nil || tc.want != nil && !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.text) || !strings.Contains(err.Error(), tc.path) {
			t.Errorf("%s: %v", tc.name, err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Fatalf("%s: left %v, %v", tc.name, left, err)
		}
	}
}

// The same on a block device, which says for itself what it can do.
func TestBlockDeviceSpace(t *testing.T) {
	t.Parallel()
	const size = 4 << 20
	for name, o := range modes() {
		path := image(t, pattern(size))
		device := attachLoop(t, path)
		f := open(t, device, o)
		l := f.Limits()
		if (l.RequestAlign >= 512) != (o.Cache == raw.CacheNone) || l.DiscardAlign < 512 || l.ZeroAlign < 512 {
			t.Errorf("%s: limits %+v", name, l)
		}
		want := pattern(size)
		p := aligned(t, size)
		for i, do := range []func(off, n int64) error{
			f.Discard,
			func(off, n int64) error { return f.WriteZeroes(off, n, false) },
			func(off, n int64) error { return f.WriteZeroes(off, n, true) },
		} {
			off := int64(i) << 20
			if err := do(off, 64<<10); err != nil {
				t.Fatalf("%s, %d: %v", name, i, err)
			}
			clear(want[off:][:64<<10]) // a loop device discards to zeroes
			if err := do(off+100, 300); !errors.Is(err, blk.ErrUnsupported) {
				t.Errorf("%s, %d: parts of a sector: %v", name, i, err)
			}
		}
		io := &blk.IO{Op: blk.OpRead, Vec: iov.Of(p)}
		carryOut(f, io)
		if io.N != size || io.Err != nil || !bytes.Equal(p, want) {
			t.Errorf("%s: read: %d, %v", name, io.N, io.Err)
		}
		if s, n, err := f.BlockStatus(0, size); s.Flags&blk.StatusData == 0 || n != size || err != nil {
			t.Errorf("%s: status: %+v, %d, %v", name, s, n, err)
		}
		if err := f.Truncate(size / 2); !errors.Is(err, blk.ErrUnsupported) {
			t.Errorf("%s: another size: %v", name, err)
		}
		if err := f.Truncate(size); err != nil {
			t.Errorf("%s: the size it has: %v", name, err)
		}
		copy(p, pattern(4096))
		if n, err := f.WriteVecFUA(iov.Of(p[:4096]), 8192); n != 4096 || err != nil || !bytes.Equal(contents(t, path)[8192:12288], pattern(4096)) {
			t.Errorf("%s: forced write: %d, %v", name, n, err)
		}

		if err := os.Truncate(path, 2*size); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Open(device, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		const loopSetCapacity = 0x4c07 // LOOP_SET_CAPACITY, linux/loop.h
		if err := unix.IoctlSetInt(fd, loopSetCapacity, 0); err != nil {
			t.Fatal(err)
		}
		_ = unix.Close(fd)
		if err := f.Refresh(); err != nil || f.Size() != 2*size {
			t.Errorf("%s: refresh: %v, %d", name, err, f.Size())
		}
		_ = f.Close()
		if err := raw.Create(context.Background(), device, 512, raw.CreateOptions{Overwrite: true}); err == nil || !strings.Contains(err.Error(), "as it is") {
			t.Errorf("%s: create: %v", name, err)
		}
	}
}
