package raw

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
)

// Preallocation says how much of a new file is there from the start. The names are QEMU's.
type Preallocation uint8

// The ways to make a file.
const (
	PreallocOff    Preallocation = iota // a hole: space is taken as it is written
	PreallocFalloc                      // space is reserved (fallocate)
	PreallocFull                        // zeroes are written, and flushed
)

var preallocationNames = [...]string{PreallocOff: "off", PreallocFalloc: "falloc", PreallocFull: "full"}

// String returns the name that ParsePreallocation takes.
func (p Preallocation) String() string { return nameOf(preallocationNames[:], int(p)) }

// ParsePreallocation returns the way of that name: off, falloc or full.
func ParsePreallocation(name string) (Preallocation, error) {
	i, err := parseName("preallocation", preallocationNames[:], name)
	return Preallocation(i), err
}

// CreateOptions says how Create makes a file.
type CreateOptions struct {
	Preallocation Preallocation
	Overwrite     bool             // empty a regular file that exists; else it is an error that matches fs.ErrExist
	Progress      func(done int64) // called now and then with the bytes written by PreallocFull; may be nil
}

// Create makes a file of size zero bytes at path, a positive multiple of 512 bytes, and closes it. A file that a VM uses
// is not overwritten: ErrLocked. When it fails, or ctx ends, a file that it made is removed again.
func Create(ctx context.Context, path string, size int64, o CreateOptions) error {
	return createWith(ctx, linux, path, size, o)
}

func createWith(ctx context.Context, sys *system, path string, size int64, o CreateOptions) (err error) {
	if size <= 0 || size%blk.SectorSize != 0 {
		return fmt.Errorf("create disk %s: size of %d bytes: want a positive multiple of %d", path, size, blk.SectorSize)
	}
	fd, made, err := createFile(path, o.Overwrite)
	if err != nil {
		return err
	}
	f := &File{path: path, fd: fd, sys: sys}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil && made {
			_ = os.Remove(path)
		}
	}()
	if err := f.lock(Options{}); err != nil {
		return err
	}
	for _, n := range []int64{0, size} { // what was there goes first
		if err := retry(func() error { return sys.ftruncate(fd, n) }); err != nil {
			return createError(path, size, err)
		}
	}
	if o.Preallocation != PreallocOff {
		// Asked first: a file system gives all that it has before it says that this is not enough.
		var st unix.Statfs_t
		if err := unix.Fstatfs(fd, &st); err == nil && st.Bsize > 0 && st.Bavail < uint64(size)/uint64(st.Bsize) {
			return createError(path, size, unix.ENOSPC)
		}
	}
	switch o.Preallocation {
	case PreallocFalloc:
		if err := retry(func() error { return sys.fallocate(fd, 0, 0, size) }); err != nil {
			return createError(path, size, err)
		}
	case PreallocFull:
		return f.writeOut(ctx, size, o.Progress)
	}
	return nil
}

// createFile opens a new file, or with overwrite an old one, which it does not touch yet.
func createFile(path string, overwrite bool) (fd int, made bool, err error) {
	const flags = unix.O_RDWR | unix.O_CLOEXEC
	open := func(flags int) error {
		return retry(func() error { fd, err = unix.Open(path, flags, 0o644); return err })
	}
	err = open(flags | unix.O_CREAT | unix.O_EXCL)
	if err != unix.EEXIST {
		if err != nil {
			return -1, false, fmt.Errorf("create disk %s: %w", path, err)
		}
		return fd, true, nil
	}
	if !overwrite {
		const remedy = "remove it, choose another name, or have it overwritten"
		return -1, false, fmt.Errorf("create disk %s: %w (%s)", path, err, remedy)
	}
	info, err := os.Stat(path)
	if err != nil {
		return -1, false, openError(path, Options{}, err)
	}
	if !info.Mode().IsRegular() {
		if err := CheckMode(info.Mode()); err != nil {
			return -1, false, fmt.Errorf("create disk %s: %w", path, err)
		}
		return -1, false, fmt.Errorf("create disk %s: it is a block device (use it as it is)", path)
	}
	if err := open(flags); err != nil {
		return -1, false, openError(path, Options{}, err)
	}
	return fd, false, nil
}

// writeOut writes size bytes of zeroes.
func (f *File) writeOut(ctx context.Context, size int64, progress func(done int64)) error {
	zeroes := make([]byte, min(size, 1<<20))
	for done := int64(0); done < size; {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("create disk %s: %w", f.path, err)
		}
		n, err := unix.Pwrite(f.fd, zeroes[:min(size-done, int64(len(zeroes)))], done)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return createError(f.path, size, err)
		}
		done += int64(n)
		if progress != nil {
			progress(done)
		}
	}
	return f.Flush()
}

func createError(path string, size int64, err error) error {
	remedy := ""
	switch {
	case errors.Is(err, unix.ENOSPC):
		remedy = " (free space, or create it with preallocation=off)"
	case errors.Is(err, unix.EFBIG):
		remedy = " (more than the file system, or ulimit -f, allows for a file)"
	case errors.Is(err, unix.EOPNOTSUPP):
		remedy = " (the file system can't reserve space: create it with preallocation=off or full)"
	}
	return fmt.Errorf("create disk %s of %d bytes: %w%s", path, size, err, remedy)
}
