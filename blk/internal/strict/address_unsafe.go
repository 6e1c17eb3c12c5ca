package strict

import (
	"unsafe"

	"github.com/kvmlet/kvmlet/iov"
)

// address returns where r begins.
func address(r iov.Range) uintptr {
	return uintptr(unsafe.Pointer(unsafe.SliceData(r.Bytes()))) // only looked at
}
