// Package raw is the block driver for disks whose bytes lie in a file or on a block device one to one. Whatever the
// bytes look like, they are never taken for another image format.
//
// Reads and writes go straight from and to the guest's memory, through the page cache or past it (Options.Cache). Those
// that are waited for are preadv and pwritev on the caller's goroutine; those that are started (blk.Starter) are carried
// out by an engine (Options.AIO). Flush is fdatasync. While a disk is open an open-file-description lock keeps other VMs
// away from it: exclusive for writing, shared for reading. It means the same to QEMU, and QEMU's means the same here.
package raw

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// ErrLocked says that someone else uses the disk: kvmlet, QEMU, or for a block device a mounted file system. The error
// returned names the disk and the remedy.
var ErrLocked = errors.New("disk is in use")

// cacheBlock is what the page cache reads and writes at once, in bytes. A smaller write to a page that is not cached
// costs a read, so guests are told to prefer it.
const cacheBlock = 4096

// Options says how a disk is opened. The zero value opens it for reading and writing through the page cache.
type Options struct {
	ReadOnly bool // open for reading only and share the disk with other readers
	Cache    Cache
	AIO      AIO

	// ForceShare takes no lock, so that a disk can be looked at while a VM writes to it; what is read may then be of
	// different times. Only with ReadOnly. (Readers, of a common backing file for example, share a disk without it.)
	ForceShare bool
}

// File is an open raw disk. It implements blk.Backend and most of what is optional beside it, and relies on blk's rules
// about concurrent calls and Close.
type File struct {
	path   string
	fd     int
	device bool // a block device, not a regular file
	direct bool // opened with O_DIRECT
	sys    *system
	size   atomic.Int64
	limits atomic.Pointer[blk.Limits]

	// align is what O_DIRECT needs, 1 without it; sector is the logical block of a device, 1 of a file. Both are found
	// out when the disk is opened.
	align, sector int

	lacks  lacks
	inline inline
	ring   *ring // nil: there is none
	pool   *pool

	mu     sync.Mutex // held by Flush and forced writes: the kernel reports a failed write to one caller only
	failed error      // what the first failed Flush returned
}

// system is what File calls of the kernel, where tests want other answers than the kernel's.
type system struct {
	fdsync    func(fd int) error
	ftruncate func(fd int, size int64) error
	fallocate func(fd int, mode uint32, off, n int64) error
	discard   func(fd int, off, n int64) error
	seek      func(fd int, off int64, whence int) (int64, error)
	pread     func(fd int, p []byte, off int64) (int, error)
	statx     func(fd int, st *unix.Statx_t) error
	transfer  func(fd int, op blk.Op, v iov.Vec, off int64, flags int) (int, unix.Errno)
	newRing   func(f *File) (*ring, error)
}

var linux = &system{
	fdsync:    unix.Fdatasync,
	ftruncate: unix.Ftruncate,
	fallocate: unix.Fallocate,
	discard:   discardDevice,
	seek:      unix.Seek,
	pread:     unix.Pread,
	statx: func(fd int, st *unix.Statx_t) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, st)
	},
	transfer: transfer,
	newRing:  newRing,
}

// Open opens and locks the file or block device at path.
//
// A file whose size is not a multiple of 512 bytes is presented up to the next multiple: the bytes beyond its end read
// as zeroes, and a write to its last sector extends the file. With CacheNone such a write is one of a whole block of
// Limits().RequestAlign, so the file may grow to a multiple of that; the disk does so when it is opened the next time or
// refreshed. Files do not grow otherwise, but by Truncate.
//
// Errors: fs.ErrNotExist and fs.ErrPermission as reported by the kernel, ErrLocked, and plain errors for a directory,
// anything else that is not a regular file or a block device, a disk without a single byte, CacheNone on a file system
// that has no O_DIRECT and AIOIOUring where the kernel has none.
func Open(path string, o Options) (*File, error) { return openWith(linux, path, o) }

func openWith(sys *system, path string, o Options) (*File, error) {
	if o.ForceShare && !o.ReadOnly {
		return nil, fmt.Errorf("open disk %s: a disk without a lock can't be written (use it read-only)", path)
	}
	// Looked at before it is opened: opening some device nodes has effects, and opening a pipe waits for a peer.
	info, err := os.Stat(path)
	if err != nil {
		return nil, openError(path, o, err)
	}
	if err := CheckMode(info.Mode()); err != nil {
		return nil, fmt.Errorf("open disk %s: %w", path, err)
	}
	fd, err := open(path, o, info.Mode())
	if err != nil {
		return nil, openError(path, o, err)
	}
	f := &File{path: path, fd: fd, sys: sys}
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
	f.align, f.sector = 1, 1
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFBLK:
		f.device = true
		n, err := unix.IoctlGetInt(f.fd, unix.BLKSSZGET)
		if err != nil {
			return fmt.Errorf("logical block of disk %s: %w", f.path, err)
		}
		f.sector = n
	default:
		return fmt.Errorf("open disk %s: it was replaced by something that is not a file or a block device", f.path)
	}
	if o.Cache == CacheNone {
		n, err := f.probeAlign()
		if err != nil {
			return err
		}
		f.direct, f.align = true, n
	}
	if err := f.measure(); err != nil {
		return err
	}
	return f.setUpEngine(o)
}

// measure finds out size and limits. A device without preferences is not an error.
func (f *File) measure() error {
	l := blk.Limits{PhysicalBlock: cacheBlock}
	if f.direct {
		l.RequestAlign, l.MemoryAlign = f.align, f.align
	}
	var size int64
	if f.device {
		var err error
		if size, err = deviceSize(f.fd); err != nil {
			return fmt.Errorf("size of disk %s: %w", f.path, err)
		}
		l.PhysicalBlock = 0
		if n, err := unix.IoctlGetInt(f.fd, unix.BLKPBSZGET); err == nil && n > 0 && n&(n-1) == 0 {
			l.PhysicalBlock = n
		}
		if n, err := unix.IoctlGetInt(f.fd, unix.BLKIOOPT); err == nil && n > 0 {
			l.OptimalTransfer = n
		}
		l.DiscardAlign, l.ZeroAlign = int64(max(f.sector, f.align)), int64(max(f.sector, f.align))
	} else {
		var st unix.Stat_t
		if err := unix.Fstat(f.fd, &st); err != nil {
			return fmt.Errorf("size of disk %s: %w", f.path, err)
		}
		size = st.Size
		l.DiscardAlign = int64(max(cacheBlock, f.align)) // parts of a block would be written as zeroes, for no gain
	}
	if size == 0 {
		return fmt.Errorf("open disk %s: it is empty (give a file a size with: truncate -s 64M FILE)", f.path)
	}
	const sector = blk.SectorSize
	f.size.Store((min(size, math.MaxInt64&^(sector-1)) + sector - 1) &^ (sector - 1))
	f.limits.Store(&l)
	return nil
}

// Bytes by which QEMU tells what it does with a file and what others must not do, with read locks on them
// (RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE in its block/file-posix.c, the bits of BLK_PERM_* added).
const (
	qemuReads         = 100
	qemuWrites        = 101
	qemuResizes       = 103
	qemuForbidsRead   = 200
	qemuForbidsWrite  = 201
	qemuForbidsResize = 203
)

// lock keeps others away with open-file-description locks. They belong to the open file, not to the process, so they also
// keep two VMs of one process apart and end with Close (fcntl(2), F_OFD_SETLK).
//
// A writer locks the whole file, which conflicts with every lock of QEMU's. A reader says in QEMU's way that it reads and
// wants no writers, so that QEMU may read the file too, and looks whether somebody writes.
func (f *File) lock(o Options) error {
	if o.ForceShare {
		return nil
	}
	if !o.ReadOnly {
		return f.lockBytes(unix.F_WRLCK, 0, 0)
	}
	for _, at := range []int64{qemuReads, qemuForbidsWrite, qemuForbidsResize} {
		if err := f.lockBytes(unix.F_RDLCK, at, 1); err != nil {
			return err
		}
	}
	for _, at := range []int64{qemuWrites, qemuResizes, qemuForbidsRead} {
		lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: at, Len: 1}
		if err := unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_GETLK, &lk); err != nil {
			return f.lockError(err)
		}
		if lk.Type != unix.F_UNLCK {
			return lockedError(f.path)
		}
	}
	return nil
}

// lockBytes locks n bytes at off; n 0 stands for all that follow.
func (f *File) lockBytes(kind int16, off, n int64) error {
	lk := unix.Flock_t{Type: kind, Whence: unix.SEEK_SET, Start: off, Len: n}
	return f.lockError(unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_SETLK, &lk))
}

func (f *File) lockError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		return lockedError(f.path)
	}
	return fmt.Errorf("lock disk %s: %w (move it to a file system with locks)", f.path, err)
}

// Opened returns where the file that is open lies now, whatever name it was opened by (proc(5), /proc/pid/fd).
func (f *File) Opened() (string, error) { return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.fd)) }

// Size returns the size of the disk in bytes, rounded up to whole sectors: that at Open, or at the last Truncate or
// Refresh.
func (f *File) Size() int64 { return f.size.Load() }

// Limits returns the alignment that CacheNone needs and the preferences of the medium. With CacheWriteback any request
// is accepted, but discards and zeroes on a device.
func (f *File) Limits() blk.Limits { return *f.limits.Load() }

// ReadVecAt implements blk.Backend.
func (f *File) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	n, err := iov.ReadAt(f.fd, dst, off)
	if err != nil && n > 0 && f.atEnd(off+int64(n)) {
		return n, nil // the call before was cut short by the end of the file, and this one was out of line
	}
	if err != nil {
		err = f.transferError(blk.OpRead, off, err)
	}
	return n, err
}

// atEnd reports whether a read that stopped at off did so at the end of the file: under O_DIRECT, it stops elsewhere
// only at a multiple of the alignment.
func (f *File) atEnd(off int64) bool { return f.direct && off%int64(f.align) != 0 }

// WriteVecAt implements blk.Backend.
func (f *File) WriteVecAt(src iov.Vec, off int64) (int, error) {
	n, err := iov.WriteAt(f.fd, src, off)
	if err != nil {
		err = f.transferError(blk.OpWrite, off, err)
	}
	return n, err
}

func (f *File) transferError(op blk.Op, off int64, err error) error {
	what := "read"
	if op == blk.OpWrite {
		what = "write"
	}
	return fmt.Errorf("%s disk %s at byte %d: %w", what, f.path, off, err)
}

// Flush implements blk.Backend. After one failure every later Flush fails too: the kernel drops or marks clean what it
// could not write, so a later success would promise bytes that are gone.
func (f *File) Flush() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.flushLocked()
}

func (f *File) flushLocked() error {
	if f.failed != nil {
		return f.failed
	}
	if err := retry(func() error { return f.sys.fdsync(f.fd) }); err != nil {
		return f.flushFailed(err)
	}
	return nil
}

// flushFailed has every later Flush fail as this one did. f.mu is held.
func (f *File) flushFailed(err error) error {
	f.failed = fmt.Errorf("flush disk %s: %w (what was written since the last flush may be lost)", f.path, err)
	return f.failed
}

// Close ends the engine and closes the file, which also ends its lock. A second Close returns os.ErrClosed.
func (f *File) Close() error {
	fd := f.fd
	if fd < 0 {
		return fmt.Errorf("close disk %s: %w", f.path, os.ErrClosed)
	}
	f.closeEngine()
	// A completed transfer of the ring may hold the open file, and with it the lock, for a moment longer.
	_ = unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Whence: unix.SEEK_SET})
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
	if o.Cache == CacheNone {
		flags |= unix.O_DIRECT
	}
	for {
		fd, err := unix.Open(path, flags, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// CheckMode refuses what can't be a disk, and says what it is.
func CheckMode(mode fs.FileMode) error {
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
	return fmt.Errorf("it is %s (a disk is a regular file or a block device)", what)
}

func openError(path string, o Options, err error) error {
	var perr *fs.PathError
	if errors.As(err, &perr) {
		err = perr.Err // the path is named once
	}
	remedy := ""
	switch {
	case err == unix.EINVAL && o.Cache == CacheNone:
		return noDirectError(path)
	case errors.Is(err, unix.EBUSY):
		return lockedError(path)
	case errors.Is(err, unix.EROFS), errors.Is(err, fs.ErrPermission) && !o.ReadOnly:
		remedy = " (get the right to write it, or use it read-only)"
	case errors.Is(err, fs.ErrPermission):
		remedy = " (get the right to read it)"
	}
	return fmt.Errorf("open disk %s: %w%s", path, err, remedy)
}

func lockedError(path string) error {
	const remedy = "another program has it: kvmlet, QEMU or a mount; end that, or have all of them only read it"
	return fmt.Errorf("open disk %s: %w (%s)", path, ErrLocked, remedy)
}
