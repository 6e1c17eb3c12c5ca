// Package raw is the block driver for disks whose bytes lie in a file or on a block device one to one. Whatever the
// bytes look like, they are never taken for another image format.
//
// Reads and writes go through the page cache with preadv and pwritev straight from and to the guest's memory; Flush is
// fdatasync. While a disk is open an open-file-description lock keeps other VMs away from it: exclusive for writing,
// shared for reading. QEMU's image locks conflict with it in both directions.
package raw

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// ErrLocked says that someone else uses the disk: another VM, or for a block device a mounted file system. The error
// returned names the disk and the remedy.
var ErrLocked = errors.New("disk is in use")

// cacheBlock is what the page cache reads and writes at once, in bytes. A smaller write to a page that is not cached
// costs a read, so guests are told to prefer it.
const cacheBlock = 4096

// Options says how a disk is opened. The zero value opens it for reading and writing.
type Options struct {
	ReadOnly bool // open for reading only and share the disk with other readers
}

// File is an open raw disk. It implements blk.Backend, whose rules about concurrent calls and Close it relies on.
type File struct {
	path   string
	fd     int
	size   int64
	limits blk.Limits

	mu     sync.Mutex         // held by Flush: the kernel reports a failed write to one caller only
	fdsync func(fd int) error // unix.Fdatasync, but in tests of its failures
	failed error              // what the first failed Flush returned
}

// Open opens and locks the file or block device at path.
//
// A file whose size is not a multiple of 512 bytes is presented up to the next multiple: the bytes beyond its end read
// as zeroes, and a write to its last sector extends the file. Files do not grow otherwise.
//
// Errors: fs.ErrNotExist and fs.ErrPermission as reported by the kernel, ErrLocked, and plain errors for a directory,
// anything else that is not a regular file or a block device, and a disk without a single byte.
func Open(path string, o Options) (*File, error) {
	// Looked at before it is opened: opening some device nodes has effects, and opening a pipe waits for a peer.
	info, err := os.Stat(path)
	if err != nil {
		return nil, openError(path, o, err)
	}
	if err := checkMode(path, info.Mode()); err != nil {
		return nil, err
	}
	fd, err := open(path, o, info.Mode())
	if err != nil {
		return nil, openError(path, o, err)
	}
	f := &File{path: path, fd: fd, fdsync: unix.Fdatasync}
	if err := f.init(o); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return f, nil
}

// init locks and measures the file that was really opened.
func (f *File) init(o Options) error {
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return fmt.Errorf("stat disk %s: %w", f.path, err)
	}
	if err := f.lock(o); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		f.size = st.Size
		f.limits = blk.Limits{PhysicalBlock: cacheBlock}
	case unix.S_IFBLK:
		if err := f.measureDevice(); err != nil {
			return err
		}
	default:
		return fmt.Errorf("open disk %s: it was replaced by something that is not a file or a block device", f.path)
	}
	if f.size == 0 {
		return fmt.Errorf("open disk %s: it is empty (give a file a size with: truncate -s 64M FILE)", f.path)
	}
	const sector = blk.SectorSize
	f.size = (min(f.size, math.MaxInt64&^(sector-1)) + sector - 1) &^ (sector - 1)
	return nil
}

// measureDevice asks a block device for its size and preferences. A device without preferences is not an error.
func (f *File) measureDevice() error {
	size, err := unix.Seek(f.fd, 0, unix.SEEK_END)
	if err != nil {
		return fmt.Errorf("size of disk %s: %w", f.path, err)
	}
	f.size = size
	if n, err := unix.IoctlGetInt(f.fd, unix.BLKPBSZGET); err == nil && n > 0 && n&(n-1) == 0 {
		f.limits.PhysicalBlock = n
	}
	if n, err := unix.IoctlGetInt(f.fd, unix.BLKIOOPT); err == nil && n > 0 {
		f.limits.OptimalTransfer = n
	}
	return nil
}

// lock takes an open-file-description lock on the whole file. It belongs to the open file, not to the process, so it
// also keeps two VMs of one process apart and ends with Close (fcntl(2), F_OFD_SETLK).
func (f *File) lock(o Options) error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}
	if o.ReadOnly {
		lk.Type = unix.F_RDLCK
	}
	err := unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_SETLK, &lk)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		return lockedError(f.path)
	}
	return fmt.Errorf("lock disk %s: %w (move it to a file system with locks)", f.path, err)
}

// Size returns the size of the disk in bytes, rounded up to whole sectors. It stays what it was at Open.
func (f *File) Size() int64 { return f.size }

// Limits returns the preferences of the medium; any request is accepted.
func (f *File) Limits() blk.Limits { return f.limits }

// ReadVecAt implements blk.Backend.
func (f *File) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	n, err := iov.ReadAt(f.fd, dst, off)
	if err != nil {
		err = fmt.Errorf("read disk %s at byte %d: %w", f.path, off, err)
	}
	return n, err
}

// WriteVecAt implements blk.Backend.
func (f *File) WriteVecAt(src iov.Vec, off int64) (int, error) {
	n, err := iov.WriteAt(f.fd, src, off)
	if err != nil {
		err = fmt.Errorf("write disk %s at byte %d: %w", f.path, off, err)
	}
	return n, err
}

// Flush implements blk.Backend. After one failure every later Flush fails too: the kernel drops or marks clean what it
// could not write, so a later success would promise bytes that are gone.
func (f *File) Flush() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed != nil {
		return f.failed
	}
	err := f.fdsync(f.fd)
	for errors.Is(err, unix.EINTR) {
		err = f.fdsync(f.fd)
	}
	if err != nil {
		f.failed = fmt.Errorf("flush disk %s: %w (what was written since the last flush may be lost)", f.path, err)
	}
	return f.failed
}

// Close closes the file, which also ends its lock. A second Close returns os.ErrClosed.
func (f *File) Close() error {
	fd := f.fd
	if fd < 0 {
		return fmt.Errorf("close disk %s: %w", f.path, os.ErrClosed)
	}
	f.fd = -1 // the number may be another file's by the time of a second Close
	if err := unix.Close(fd); err != nil {
		return fmt.Errorf("close disk %s: %w", f.path, err)
	}
	return nil
}

// open opens path. A block device is claimed for writing with O_EXCL, which fails while a file system on it is mounted
// (open(2)).
func open(path string, o Options, mode fs.FileMode) (int, error) {
	flags := unix.O_RDWR | unix.O_CLOEXEC
	if o.ReadOnly {
		flags = unix.O_RDONLY | unix.O_CLOEXEC
	} else if mode&fs.ModeDevice != 0 {
		flags |= unix.O_EXCL
	}
	for {
		fd, err := unix.Open(path, flags, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// checkMode refuses what can't be a disk.
func checkMode(path string, mode fs.FileMode) error {
	var what string
	switch {
	case mode.IsRegular(), mode&(fs.ModeDevice|fs.ModeCharDevice) == fs.ModeDevice:
		return nil
	case mode.IsDir():
		what = "a directory"
	case mode&fs.ModeNamedPipe != 0:
		what = "a pipe"
	case mode&fs.ModeSocket != 0:
		what = "a socket"
	case mode&fs.ModeCharDevice != 0:
		what = "a character device"
	default:
		what = "a special file"
	}
	return fmt.Errorf("open disk %s: it is %s (a disk is a regular file or a block device)", path, what)
}

func openError(path string, o Options, err error) error {
	var perr *fs.PathError
	if errors.As(err, &perr) {
		err = perr.Err // the path is named once
	}
	remedy := ""
	switch {
	case errors.Is(err, unix.EBUSY):
		return lockedError(path)
	case errors.Is(err, fs.ErrNotExist):
		remedy = fmt.Sprintf(" (create it, for example with: truncate -s 64M %s)", path)
	case errors.Is(err, unix.EROFS), errors.Is(err, fs.ErrPermission) && !o.ReadOnly:
		remedy = " (get the right to write it, or use it read-only)"
	case errors.Is(err, fs.ErrPermission):
		remedy = " (get the right to read it)"
	}
	return fmt.Errorf("open disk %s: %w%s", path, err, remedy)
}

func lockedError(path string) error {
	const remedy = "stop the other VM or unmount the disk, or use it read-only everywhere"
	return fmt.Errorf("open disk %s: %w (%s)", path, ErrLocked, remedy)
}
