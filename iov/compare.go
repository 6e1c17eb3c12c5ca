package iov

import (
	"bytes"
	"encoding/binary"
	"math/bits"
)

// IsZero reports whether every byte of v is zero. An empty Vec is.
func (v Vec) IsZero() bool {
	for i := range v {
		if !isZero(v[i].Bytes()) {
			return false
		}
	}
	return true
}

// IsZeroRange reports whether the n bytes of v at off are all zero.
func (v Vec) IsZeroRange(off, n int) (bool, error) {
	if _, err := v.Count(off, n); err != nil {
		return false, err
	}
	c := cursor{rest: v}
	c.skip(off)
	for n > 0 && c.more() {
		p := c.take(n)
		if !isZero(p) {
			return false, nil
		}
		n -= len(p)
	}
	return true, nil
}

// isZero looks at the first bytes, where data mostly shows, and then compares p with itself, moved by that much.
func isZero(p []byte) bool {
	const first = 32
	if len(p) < first {
		for _, b := range p {
			if b != 0 {
				return false
			}
		}
		return true
	}
	a, b := binary.NativeEndian.Uint64(p), binary.NativeEndian.Uint64(p[8:])
	c, d := binary.NativeEndian.Uint64(p[16:]), binary.NativeEndian.Uint64(p[24:])
	return a|b|c|d == 0 && bytes.Equal(p[first:], p[:len(p)-first])
}

// Mismatch returns the offset of the first byte in which a and b differ, or -1 when they hold the same bytes. Where one
// is the beginning of the other, that is the size of the shorter. How they are divided into elements does not matter.
func Mismatch(a, b Vec) int {
	x, y := cursor{rest: a}, cursor{rest: b}
	off := 0
	for {
		xmore, ymore := x.more(), y.more()
		if !xmore || !ymore {
			if xmore == ymore {
				return -1
			}
			return off
		}
		k := min(len(x.cur), len(y.cur))
		if i := mismatch(x.take(k), y.take(k)); i >= 0 {
			return off + i
		}
		off += k
	}
}

// mismatch returns the index of the first difference of two slices of the same length, or -1.
func mismatch(p, q []byte) int {
	const block = 1024
	i := 0
	for len(p)-i >= block && bytes.Equal(p[i:i+block], q[i:i+block]) {
		i += block
	}
	for ; len(p)-i >= 8; i += 8 {
		if x := binary.LittleEndian.Uint64(p[i:]) ^ binary.LittleEndian.Uint64(q[i:]); x != 0 {
			return i + bits.TrailingZeros64(x)/8
		}
	}
	for ; i < len(p); i++ {
		if p[i] != q[i] {
			return i
		}
	}
	return -1
}
