package iov

import (
	"cmp"
	"fmt"
	"slices"
)

// Clone copies the bytes of v into buf and returns a Vec over buf whose elements have the lengths of v's and overlap
// where v's overlap, so that a write to the clone shows in the same places as the same write to v. Bytes that several
// elements share take room once; v.Size() bytes of buf always suffice. A buf that is too short gives ErrRange.
func (v Vec) Clone(buf []byte) (Vec, error) {
	order := make([]int, len(v))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(i, j int) int { return cmp.Compare(v[i].addr(), v[j].addr()) })
	clone := make(Vec, len(v))
	var end uintptr // where in memory the bytes end that buf[:used] is a copy of
	used := 0
	for _, i := range order {
		n := v[i].Len()
		if n == 0 {
			continue
		}
		shared := 0 // bytes at the start of v[i], or beyond it, that are in buf already
		if start := v[i].addr(); start < end {
			shared = int(end - start)
		}
		if fresh := n - shared; fresh > 0 {
			if fresh > len(buf)-used {
				return nil, fmt.Errorf("%w: clone of a vector of %d bytes into %d", ErrRange, v.Size(), len(buf))
			}
			copy(buf[used:], v[i].Bytes()[shared:])
			used += fresh
			end = v[i].addr() + uintptr(n)
			shared = n
		}
		at := used - shared
		clone[i] = RangeOf(buf[at : at+n])
	}
	return clone, nil
}
