package memory_test

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// mincore sets bit 0 of vec[i] where page i of b is resident.
func mincore(b, vec []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)),
		uintptr(unsafe.Pointer(unsafe.SliceData(vec)))) // both are used during the call only
	if errno != 0 {
		return errno
	}
	return nil
}

// hostAddr returns where b starts, as a number.
func hostAddr(b []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) // only looked at
}
