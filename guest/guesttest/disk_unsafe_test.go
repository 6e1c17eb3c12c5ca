package guesttest_test

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctlRange calls an ioctl of a block device that takes an offset and a length in bytes.
func ioctlRange(fd, request uintptr, span *[2]uint64) error {
	// The kernel reads 16 bytes at span, which lives until the call returns.
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(unsafe.Pointer(span)))
	if errno != 0 {
		return errno
	}
	return nil
}
