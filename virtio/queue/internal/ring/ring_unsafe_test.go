package ring

import "unsafe"

// wordBytes returns the bytes of two words, which are aligned as words are.
func wordBytes(w *[2]uint32) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(w)), 8) // the array's own 8 bytes
}
