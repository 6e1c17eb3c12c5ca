package iov

import "unsafe"

// Range is one contiguous run of host bytes. It has the layout of struct iovec (POSIX <sys/uio.h>), so a Vec is handed
// to the kernel as it stands.
type Range struct {
	base *byte  // 0: iov_base
	n    uint64 // 8: iov_len
}

// RangeOf returns the Range that covers b. It keeps a reference to b.
func RangeOf(b []byte) Range {
	return Range{base: unsafe.SliceData(b), n: uint64(len(b))} // a slice's first byte, valid for len(b) bytes
}

// Bytes returns the bytes that r covers, without copying them.
func (r Range) Bytes() []byte {
	return unsafe.Slice(r.base, r.n) // base and n came from one slice in RangeOf
}

// Len returns the number of bytes that r covers.
func (r Range) Len() int { return int(r.n) }

// addr returns where r starts, to compare it with other ranges; it is never turned back into a pointer.
func (r Range) addr() uintptr {
	return uintptr(unsafe.Pointer(r.base)) // only compared: the pointer in r keeps the bytes alive
}
