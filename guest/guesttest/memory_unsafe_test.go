package guesttest_test

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"unsafe"
)

// frames returns the numbers of the physical pages behind b, which are all present (Documentation/admin-guide/mm/
// pagemap.rst: a 64-bit word for each page, the frame's number in bits 0 to 54, bit 63 if it is present).
func frames(b []byte) ([]uint64, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	page := os.Getpagesize()
	first := int64(uintptr(unsafe.Pointer(&b[0]))) / int64(page) // b is a mapping of its own, which does not move
	raw, err := io.ReadAll(io.NewSectionReader(f, 8*first, int64(8*len(b)/page)))
	if err != nil {
		return nil, err
	}
	list := make([]uint64, 0, len(raw)/8)
	for ; len(raw) > 0; raw = raw[8:] {
		word := binary.NativeEndian.Uint64(raw)
		if word>>63 == 0 {
			return nil, errors.New("a page is not present")
		}
		list = append(list, word&(1<<55-1))
	}
	return list, nil
}
