package memory

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// hugePage is the size of a second-level page on x86-64. KVM maps guest pages of this size only where guest-physical and
// host addresses agree below it, so guest memory starts on such a border.
const hugePage = 2 << 20

// reserve maps private zeroed memory and returns the mapping, to be unmapped as it is, and the size bytes of it that
// start on a hugePage border. The mapping goes on to the next border, so that their end may lie in a huge page, too.
func reserve(size int) (mapping, host []byte, err error) {
	length := (size + hugePage - 1) &^ (hugePage - 1)
	mapping, err = unix.Mmap(-1, 0, length+hugePage, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, nil, err
	}
	start := uintptr(unsafe.Pointer(unsafe.SliceData(mapping))) // a number for arithmetic: the mapping does not move
	head := int(-start % hugePage)                              // bytes up to the next border
	// Fewer faults while a kernel is loaded and fewer TLB misses later. A host without huge pages does without.
	_ = unix.Madvise(mapping, unix.MADV_HUGEPAGE)
	return mapping, mapping[head : head+size : head+size], nil
}

// mapFile puts private pages of the file fd in the place of the pages of b.
func mapFile(b []byte, fd int, off int64) error {
	at := unsafe.Pointer(unsafe.SliceData(b)) // pages of our own mapping, which the new ones stay a part of
	_, err := unix.MmapPtr(fd, off, at, uintptr(len(b)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_FIXED)
	return err
}
