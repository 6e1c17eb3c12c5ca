package raw

import (
	"fmt"
	"io"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// lacks remembers what the file system or device was found not to do, so that it is not asked each time.
type lacks struct {
	punch, zero, allocate, discard, seek, dsync atomic.Bool
}

// Discard implements blk.Discarder: it makes a hole in a file, which reads as zeroes, or tells a device
// (fallocate with FALLOC_FL_PUNCH_HOLE, BLKDISCARD). A file's size stays.
func (f *File) Discard(off, n int64) error {
	if n <= 0 {
		return nil
	}
	if !f.device {
		return f.spaceError("discard", off, f.punch(off, n))
	}
	if !f.inSectors(off, n) {
		return blk.ErrUnsupported
	}
	return f.spaceError("discard", off, try(&f.lacks.discard, func() error { return f.sys.discard(f.fd, off, n) }))
}

// WriteZeroes implements blk.ZeroWriter with fallocate, on files and block devices: FALLOC_FL_PUNCH_HOLE with unmap,
// FALLOC_FL_ZERO_RANGE without, which on devices is what BLKZEROOUT does. Where a file system has no ZERO_RANGE, a hole
// is made and allocated again. A file's size stays.
func (f *File) WriteZeroes(off, n int64, unmap bool) error {
	switch {
	case n <= 0:
		return nil
	case f.device && !f.inSectors(off, n):
		return blk.ErrUnsupported
	}
	err := blk.ErrUnsupported
	if unmap {
		err = f.punch(off, n)
	}
	if err == blk.ErrUnsupported {
		err = try(&f.lacks.zero, func() error {
			return f.sys.fallocate(f.fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		})
	}
	if err == blk.ErrUnsupported && !unmap && !f.device && !f.lacks.allocate.Load() {
		if err = f.punch(off, n); err == nil {
			err = try(&f.lacks.allocate, func() error { return f.sys.fallocate(f.fd, unix.FALLOC_FL_KEEP_SIZE, off, n) })
		}
	}
	return f.spaceError("write zeroes to", off, err)
}

func (f *File) punch(off, n int64) error {
	return try(&f.lacks.punch, func() error {
		return f.sys.fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

// inSectors reports whether a device can be asked for the range.
func (f *File) inSectors(off, n int64) bool {
	return off%int64(f.sector) == 0 && n%int64(f.sector) == 0
}

// try calls do unless it is known to be lacking, and translates the ways in which kernels say so. EINVAL may be due to
// the range and is not remembered.
func try(lacking *atomic.Bool, do func() error) error {
	if lacking.Load() {
		return blk.ErrUnsupported
	}
	switch err := retry(do); err {
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.ENODEV, unix.ENOTTY:
		lacking.Store(true)
		return blk.ErrUnsupported
	case unix.EINVAL:
		return blk.ErrUnsupported
	default:
		return err
	}
}

// spaceError names what failed. ErrUnsupported stays bare: Device meets it often and acts on it.
func (f *File) spaceError(what string, off int64, err error) error {
	if err == nil || err == blk.ErrUnsupported {
		return err
	}
	return fmt.Errorf("%s disk %s at byte %d: %w", what, f.path, off, err)
}

// BlockStatus implements blk.StatusReporter from the holes that the file system knows (lseek with SEEK_DATA and
// SEEK_HOLE). A device, and a file system that does not know, is data throughout.
//
// lseek moves the offset of the open file, which nothing here uses: transfers name their own, and both calls answer with
// their result. A write or discard between the two is as one just before or after both, but where a hole appears under
// the data just found; then one unit is reported as data, which is never wrong.
func (f *File) BlockStatus(off, n int64) (blk.Status, int64, error) {
	data := blk.Status{Flags: blk.StatusData | blk.StatusAllocated | blk.StatusOffset, Offset: off}
	zero := blk.Status{Flags: blk.StatusZero | blk.StatusAllocated | blk.StatusOffset, Offset: off}
	if f.device || f.lacks.seek.Load() {
		return data, n, nil
	}
	unit := int64(max(f.Limits().RequestAlign, 1))
	start, err := f.sys.seek(f.fd, off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO: // no data from here on, or beyond the end, which reads as zeroes too
		return zero, n, nil
	case err == unix.EINVAL, err == unix.EOPNOTSUPP, err == unix.ENOSYS:
		f.lacks.seek.Store(true)
		return data, n, nil
	case err != nil:
		return blk.Status{}, 0, fmt.Errorf("find data of disk %s at byte %d: %w", f.path, off, err)
	}
	if hole := (start - off) / unit * unit; hole > 0 {
		return zero, min(hole, n), nil
	}
	end, err := f.sys.seek(f.fd, max(start, off), unix.SEEK_HOLE)
	switch {
	case err == unix.ENXIO: // the file became shorter
		return data, min(unit, n), nil
	case err != nil:
		return blk.Status{}, 0, fmt.Errorf("find holes of disk %s at byte %d: %w", f.path, off, err)
	}
	run := max((end-off+unit-1)/unit*unit, unit)
	return data, min(run, n), nil
}

// Truncate implements blk.Truncater. A device keeps its size: any other is answered with ErrUnsupported.
func (f *File) Truncate(size int64) error {
	if size < 0 || size%blk.SectorSize != 0 {
		return fmt.Errorf("%w: size of %d bytes for disk %s", blk.ErrRange, size, f.path)
	}
	if f.device {
		now, err := deviceSize(f.fd)
		if err != nil || now != size {
			return blk.ErrUnsupported
		}
	} else if err := retry(func() error { return f.sys.ftruncate(f.fd, size) }); err != nil {
		return fmt.Errorf("resize disk %s to %d bytes: %w", f.path, size, err)
	}
	f.size.Store(size)
	return nil
}

// Refresh implements blk.Resetter: a device or file that others made larger or smaller has its new size from now on.
// What was found not to work is tried again.
func (f *File) Refresh() error {
	l := &f.lacks
	for _, b := range []*atomic.Bool{&l.punch, &l.zero, &l.allocate, &l.discard, &l.seek, &l.dsync} {
		b.Store(false)
	}
	return f.measure()
}

// WriteVecFUA implements blk.FUAWriter (pwritev2 with RWF_DSYNC).
func (f *File) WriteVecFUA(src iov.Vec, off int64) (int, error) {
	size := src.Size()
	if size == 0 {
		return 0, nil
	}
	if len(src) > iov.MaxElems || off < 0 || f.lacks.dsync.Load() {
		return 0, blk.ErrUnsupported // Device writes and flushes
	}
	f.mu.Lock() // the kernel tells one caller only of a failed writeback: Flush must not miss it
	defer f.mu.Unlock()
	if f.failed != nil {
		return 0, f.failed
	}
	var n int
	err := retry(func() error {
		var errno unix.Errno
		if n, errno = f.sys.transfer(f.fd, blk.OpWrite, src, off, unix.RWF_DSYNC); errno != 0 {
			return errno
		}
		return nil
	})
	switch {
	case err == nil && n == size:
		return n, nil
	case err == unix.EOPNOTSUPP, err == unix.ENOSYS:
		f.lacks.dsync.Store(true)
		return 0, blk.ErrUnsupported
	case err == nil: // a short count is rare; writing it all again, then flushing all, is simplest
		if n, err = f.WriteVecAt(src, off); err != nil {
			return n, err
		}
		return n, f.flushLocked()
	}
	// Either the write failed, or the flush behind it. In the second case the kernel has told of a failed writeback, and
	// it does so only once, so Flush must not succeed any more. Writing once more tells the two apart.
	if n, werr := f.WriteVecAt(src, off); werr != nil {
		return n, werr
	}
	return 0, f.flushFailed(err)
}

var (
	_ blk.Backend        = (*File)(nil)
	_ blk.Discarder      = (*File)(nil)
	_ blk.ZeroWriter     = (*File)(nil)
	_ blk.StatusReporter = (*File)(nil)
	_ blk.FUAWriter      = (*File)(nil)
	_ blk.Truncater      = (*File)(nil)
	_ blk.Resetter       = (*File)(nil)
	_ blk.Starter        = (*File)(nil)
)

// deviceSize returns the size of a block device in bytes.
func deviceSize(fd int) (int64, error) { return unix.Seek(fd, 0, io.SeekEnd) }
