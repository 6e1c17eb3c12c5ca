package iov

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Vec goes to the kernel as it stands, so a Range must be a struct iovec.
func TestRangeIsIovec(t *testing.T) {
	t.Parallel()
	var r Range
	var k unix.Iovec
	if unsafe.Sizeof(r) != unsafe.Sizeof(k) || unsafe.Alignof(r) != unsafe.Alignof(k) {
		t.Errorf("Range is %d bytes, struct iovec %d", unsafe.Sizeof(r), unsafe.Sizeof(k))
	}
	if unsafe.Offsetof(r.base) != unsafe.Offsetof(k.Base) || unsafe.Offsetof(r.n) != unsafe.Offsetof(k.Len) {
		t.Errorf("base and n are at %d and %d, want %d and %d", unsafe.Offsetof(r.base), unsafe.Offsetof(r.n),
			unsafe.Offsetof(k.Base), unsafe.Offsetof(k.Len))
	}
	if unsafe.Offsetof(r.base) != 0 || unsafe.Offsetof(r.n) != 8 || unsafe.Sizeof(r) != 16 {
		t.Error("Range does not match its offset comments")
	}
}
