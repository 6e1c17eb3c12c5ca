package vmm

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// setupIOUring makes a ring of one entry, to see whether it can be done. The parameters (struct io_uring_params, 120
// bytes, linux/io_uring.h) may all be zero.
func setupIOUring() (fd int, err error) {
	var params [120]byte
	r, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0) // rule 4
	if errno != 0 {
		return -1, errno
	}
	return int(r), nil
}
