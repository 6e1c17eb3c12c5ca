package ring

import (
	"bytes"
	"testing"
)

// TestDesc checks the bytes of a descriptor against struct virtq_desc (virtio 1.2, 2.7.5), and sizes and offsets against
// the tables of 2.7 and 2.7.6 to 2.7.8.
func TestDesc(t *testing.T) {
	t.Parallel()
	table := make([]byte, 2*DescSize)
	d := Desc{Addr: 0x1122_3344_5566_7788, Len: 0xAABB_CCDD, Flags: FlagNext | FlagIndirect, Next: 0x0102}
	d.Store(table, 1)
	want := append(make([]byte, DescSize),
		0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // le64 addr
		0xDD, 0xCC, 0xBB, 0xAA, // le32 len
		0x05, 0x00, // le16 flags
		0x02, 0x01, // le16 next
	)
	if !bytes.Equal(table, want) {
		t.Errorf("stored %x, want %x", table, want)
	}
	if got := LoadDesc(table, 1); got != d {
		t.Errorf("loaded %+v, want %+v", got, d)
	}
	for _, size := range []uint16{1, 256, MaxSize} {
		if got, want := AvailEvents(size)+EventSize, 6+2*int(size); got != want {
			t.Errorf("available ring of %d: %d bytes, want %d", size, got, want)
		}
		if got, want := UsedEvents(size)+EventSize, 6+8*int(size); got != want {
			t.Errorf("used ring of %d: %d bytes, want %d", size, got, want)
		}
	}
}

// TestUint16 stores every kind of step in both halves of a word and checks that the other half stays.
func TestUint16(t *testing.T) {
	t.Parallel()
	word := [2]uint32{0, 0x5555_5555}
	b := wordBytes(&word)
	for half := range 2 {
		u, other := Uint16At(b[2*half:]), Uint16At(b[2-2*half:])
		other.Store(0xA5C3)
		for _, v := range []uint16{0, 1, 0xFFFF, 0, 0x8000, 0x7FFF, 0xFFFE, 0xFFFF, 1} {
			u.Store(v)
			if u.Load() != v || other.Load() != 0xA5C3 || word[1] != 0x5555_5555 {
				t.Fatalf("half %d: stored %#x: %#x", half, v, word)
			}
		}
	}
	if w := Uint32At(b[4:]); *w != word[1] {
		t.Errorf("word %#x, want %#x", *w, word[1])
	}
}
