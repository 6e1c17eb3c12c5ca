package kvm

import (
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// The ioctls that take a pointer are issued here and not through gokvm: there the pointer becomes a uintptr in the
// caller, and the stack it points into may move before the system call is made (unsafe.Pointer, rule 4).

// ioctlPtr issues request op with a pointer to its argument structure.
func ioctlPtr[T any](fd int, op uintptr, arg *T) error {
	_, err := ioctlCount(fd, op, arg)
	return err
}

// ioctlCount is ioctlPtr for the requests whose result is a count.
func ioctlCount[T any](fd int, op uintptr, arg *T) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), op, uintptr(unsafe.Pointer(arg))) // rule 4
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(r), nil
	}
}

// size returns the size of T in bytes, for an ioctl's number.
func size[T any]() uintptr {
	var t T
	return unsafe.Sizeof(t)
}

func iow[T any](nr uintptr) uintptr  { return gokvm.IIOW(nr, size[T]()) }
func ior[T any](nr uintptr) uintptr  { return gokvm.IIOR(nr, size[T]()) }
func iowr[T any](nr uintptr) uintptr { return gokvm.IIOWR(nr, size[T]()) }

// bytesOf returns the bytes of s, which holds a structure of the kernel's.
func bytesOf[T any](s []T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(s))), uintptr(len(s))*size[T]()) // the same allocation
}

// address returns the address of mem's first byte for a memory slot. The bytes must not be Go heap.
func address(mem []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem)))) // an mmap'ed page never moves
}
