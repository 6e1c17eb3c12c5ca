package blk

import (
	"unsafe"

	"github.com/kvmlet/kvmlet/iov"
)

// alignedBytes returns n zero bytes whose address is a multiple of align, a power of two. The garbage collector does not
// move what is on the heap.
func alignedBytes(n, align int) []byte {
	b := make([]byte, n+align-1)
	// The address is only looked at, to find where in b to begin.
	at := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (align - 1)
	return b[at : at+n : at+n]
}

// memoryAligned reports whether address and length of each element of v are multiples of align, a power of two.
func memoryAligned(v iov.Vec, align int) bool {
	bits := 0
	for i := range v {
		b := v[i].Bytes()
		if len(b) == 0 {
			continue
		}
		// The address is only looked at.
		bits |= len(b) | int(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
	}
	return bits&(align-1) == 0
}
