package ring

import (
	"sync/atomic"
	"unsafe"
)

// Uint16 is a 16-bit field of a ring, accessed atomically through the aligned 32-bit word that holds it, since
// sync/atomic has nothing smaller. The word never leaves the field's page.
type Uint16 struct {
	word  *uint32
	shift uint
}

// Uint16At returns the field in the first two bytes of b, which must lie at an even address.
func Uint16At(b []byte) Uint16 {
	p := unsafe.Pointer(&b[:2][0]) // a ring's bytes are mapped, and never move
	odd := uintptr(p) & 2          // nonzero: the field is the word's upper half
	return Uint16{
		word:  (*uint32)(unsafe.Add(p, -int(odd))), // aligned to 4, so on the same page as the field
		shift: uint(odd) * 8,
	}
}

// Load reads the field.
func (u Uint16) Load() uint16 { return uint16(atomic.LoadUint32(u.word) >> u.shift) }

// Store writes the field and leaves the rest of the word to its owner. It is a full memory barrier. Only one goroutine
// at a time may store, and nobody else is expected to: the difference is added to the word, so if a guest changes the
// field behind our back it only spoils its own memory.
func (u Uint16) Store(v uint16) {
	old := u.Load()
	atomic.AddUint32(u.word, (uint32(v)-uint32(old))<<u.shift)
}

// Uint32At returns the word in the first four bytes of b, which must be aligned to 4.
func Uint32At(b []byte) *uint32 {
	return (*uint32)(unsafe.Pointer(&b[:4][0])) // the caller checked the alignment of the ring
}
