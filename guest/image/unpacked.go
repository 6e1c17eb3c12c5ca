package image

import (
	"io"
	"strconv"
)

const (
	cpioHeaderSize = 110     // the magic number and 13 fields
	cpioMaxName    = 4096    // PATH_MAX, to which the kernel bounds names
	pageSize       = 4096    // a tmpfs keeps files in pages
	cpioMaxEntries = 1 << 16 // kvmlet's archives have some hundred
)

// UnpackedSize returns how many bytes of a tmpfs the files take that Linux unpacks from archives, one behind the other.
// Of files with the same name the last counts. ok is false if one is no uncompressed archive as this package writes them.
func UnpackedSize(archives ...io.ReaderAt) (n uint64, ok bool) {
	files := map[string]uint64{}
	for _, a := range archives {
		if !listFiles(a, files) {
			return 0, false
		}
	}
	for _, size := range files {
		n += size
	}
	return n, true
}

// listFiles notes the size, in whole pages, of each of the archive's regular files.
func listFiles(r io.ReaderAt, files map[string]uint64) bool {
	align := func(off int64) int64 { return (off + 3) &^ 3 }
	head := make([]byte, cpioHeaderSize)
	off := int64(0)
	for range cpioMaxEntries {
		if n, _ := r.ReadAt(head, off); n < len(head) || string(head[:len(cpioMagic)]) != cpioMagic {
			return false
		}
		mode, okMode := headerField(head, 1)
		size, okSize := headerField(head, 6)
		length, okLength := headerField(head, 11)
		if !okMode || !okSize || !okLength || length == 0 || length > cpioMaxName {
			return false
		}
		name := make([]byte, length)
		if n, _ := r.ReadAt(name, off+cpioHeaderSize); n < len(name) {
			return false
		}
		file := string(name[:length-1])
		if file == cpioTrailer {
			return true
		}
		delete(files, file) // the kernel replaces what is there
		if mode&modeType == modeFile {
			files[file] = uint64(size+pageSize-1) &^ (pageSize - 1)
		}
		off = align(align(off+cpioHeaderSize+length) + size)
	}
	return false
}

// headerField returns a field of an entry's header (see writeHeader), counted from 0 on.
func headerField(head []byte, i int) (int64, bool) {
	const digits = 8
	at := len(cpioMagic) + i*digits
	v, err := strconv.ParseUint(string(head[at:at+digits]), 16, 32)
	return int64(v), err == nil
}
