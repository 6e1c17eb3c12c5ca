package iov

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// call makes the system call once on v, which has 1 to MaxElems elements. pos counts for preadv and pwritev only.
func (o op) call(fd int, v Vec, pos int64) (int, unix.Errno) {
	p := unsafe.Pointer(unsafe.SliceData(v)) // a Range is a struct iovec, so this is the array that the kernel wants
	var n uintptr
	var errno unix.Errno
	switch o {
	case opPreadv, opPwritev:
		trap := uintptr(unix.SYS_PREADV)
		if o == opPwritev {
			trap = unix.SYS_PWRITEV
		}
		// The last argument is the offset's high half on 32-bit kernels and ignored on 64-bit ones.
		n, _, errno = unix.Syscall6(trap, uintptr(fd), uintptr(p), uintptr(len(v)), uintptr(pos), 0, 0)
	case opReadv:
		n, _, errno = unix.Syscall(unix.SYS_READV, uintptr(fd), uintptr(p), uintptr(len(v)))
	case opWritev:
		n, _, errno = unix.Syscall(unix.SYS_WRITEV, uintptr(fd), uintptr(p), uintptr(len(v)))
	case opSendmsg, opRecvmsg:
		msg := unix.Msghdr{Iov: (*unix.Iovec)(p), Iovlen: uint64(len(v))} // same layout, see Range
		trap, flags := uintptr(unix.SYS_RECVMSG), uintptr(0)
		if o == opSendmsg {
			trap, flags = unix.SYS_SENDMSG, unix.MSG_NOSIGNAL
		}
		n, _, errno = unix.Syscall(trap, uintptr(fd), uintptr(unsafe.Pointer(&msg)), flags) // read during the call only
	}
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}
