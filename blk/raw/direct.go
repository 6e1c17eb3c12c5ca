package raw

import (
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"
)

// Cache says whether the host's page cache stands between the guest and the medium. The names are those of QEMU's cache
// option, as far as they concern the driver.
type Cache uint8

// The cache modes. In both, what was written is on stable storage after a Flush, and not before.
const (
	CacheWriteback Cache = iota // through the page cache; any offset, length and memory will do
	CacheNone                   // past it (O_DIRECT); Limits says to what requests and memory must be aligned
)

var cacheNames = [...]string{CacheWriteback: "writeback", CacheNone: "none"}

// String returns QEMU's name of the mode.
func (c Cache) String() string { return nameOf(cacheNames[:], int(c)) }

const (
	// safeAlign suits every medium and file system where nothing better is known: no logical block is larger.
	safeAlign = 4096

	// trialMax is the largest alignment that is tried, and the largest that blk.Limits allows.
	trialMax = 64 << 10
)

// probeAlign returns the unit, a power of two in bytes, of offsets and lengths under O_DIRECT. It is that of memory too:
// an element's address may often be aligned to less, but for long the kernel has refused vectors with an element whose
// length is not a multiple of the logical block (bdev_iter_is_aligned), and blk.Limits has one number for both.
func (f *File) probeAlign() (int, error) {
	var st unix.Statx_t
	if err := f.sys.statx(f.fd, &st); err == nil && st.Mask&unix.STATX_DIOALIGN != 0 {
		if st.Dio_offset_align == 0 {
			return 0, noDirectError(f.path)
		}
		return f.checkAlign(max(int(st.Dio_offset_align), int(st.Dio_mem_align)))
	}
	if f.device {
		return f.checkAlign(f.sector)
	}
	// Read into memory that is aligned to a page at least.
	buf, err := unix.Mmap(-1, 0, trialMax, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return 0, fmt.Errorf("open disk %s: mmap: %w", f.path, err)
	}
	defer func() { _ = unix.Munmap(buf) }()
	n := trialAlign(func(n int) error {
		_, err := f.sys.pread(f.fd, buf[:n], 0)
		return err
	})
	if n == 0 {
		return 0, noDirectError(f.path)
	}
	return n, nil
}

func (f *File) checkAlign(n int) (int, error) {
	if n <= 0 || n > trialMax || bits.OnesCount(uint(n)) != 1 {
		return 0, fmt.Errorf("open disk %s: cache=none: its medium asks for an alignment of %d bytes (use cache=writeback)",
			f.path, n)
	}
	return n, nil
}

// trialAlign finds the shortest read that is not refused for its length; 0 means that all are. Where one byte can be
// read there is a hole, which some kernels read in any way, or a network file system: that says nothing.
func trialAlign(read func(n int) error) int {
	for n := 1; n <= trialMax; n *= 2 {
		if n > 1 && n < 512 {
			continue
		}
		switch err := retry(func() error { return read(n) }); {
		case err == unix.EINVAL:
		case n == 1:
			return safeAlign
		default: // a bad sector too is read in the right way
			return n
		}
	}
	return 0
}

func noDirectError(path string) error {
	return fmt.Errorf("open disk %s: cache=none: its file system has no O_DIRECT: %w "+
		"(use cache=writeback, or move the disk to ext4, XFS or Btrfs)", path, unix.EINVAL)
}

// retry calls do again while a signal interrupts it.
func retry(do func() error) error {
	for {
		if err := do(); err != unix.EINTR {
			return err
		}
	}
}
