package raw

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// transfer makes one preadv2 or pwritev2 call with flags (RWF_*) on v, which has 1 to iov.MaxElems elements.
func transfer(fd int, op blk.Op, v iov.Vec, off int64, flags int) (int, unix.Errno) {
	trap := uintptr(unix.SYS_PREADV2)
	if op == blk.OpWrite {
		trap = unix.SYS_PWRITEV2
	}
	p := unsafe.Pointer(unsafe.SliceData(v)) // a Range is a struct iovec, so this is the array that the kernel wants
	// The fifth argument is the offset's high half on 32-bit kernels and ignored on 64-bit ones.
	n, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(p), uintptr(len(v)), uintptr(off), 0, uintptr(flags))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// discardDevice forgets bytes of a block device (BLKDISCARD, linux/fs.h).
func discardDevice(fd int, off, n int64) error {
	area := [2]uint64{uint64(off), uint64(n)}
	p := unsafe.Pointer(&area) // read during the call only
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(p)); errno != 0 {
		return errno
	}
	return nil
}
