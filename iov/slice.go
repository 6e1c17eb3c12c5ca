package iov

import "math"

// Count returns how many elements the n bytes of v at off take: what AppendSlice would append. Elements of length zero
// do not count.
func (v Vec) Count(off, n int) (int, error) {
	if n < 0 {
		return 0, v.outside(off, n)
	}
	i, skip, err := v.seek(off)
	if err != nil {
		return 0, err
	}
	count, left := 0, n
	for ; i < len(v) && left > 0; i++ {
		k := min(left, v[i].Len()-skip)
		skip = 0
		if k > 0 {
			left -= k
			count++
		}
	}
	if left > 0 {
		return 0, v.outside(off, n)
	}
	return count, nil
}

// AppendSlice appends the n bytes of v at off to dst, leaving out empty elements. It does not copy bytes, and does not
// allocate when dst has room for Count(off, n) more elements. When v does not hold them all, it returns dst as it was
// and ErrRange.
func (v Vec) AppendSlice(dst Vec, off, n int) (Vec, error) {
	if n < 0 {
		return dst, v.outside(off, n)
	}
	i, skip, err := v.seek(off)
	if err != nil {
		return dst, err
	}
	out, left := dst, n
	for ; i < len(v) && left > 0; i++ {
		k := min(left, v[i].Len()-skip)
		if k > 0 {
			out = append(out, v[i].sub(skip, k))
			left -= k
		}
		skip = 0
	}
	if left > 0 {
		return dst, v.outside(off, n)
	}
	return out, nil
}

// Slice returns a new Vec over the n bytes of v at off. It shares the bytes with v, but no elements, so that discarding
// from one leaves the other alone.
func (v Vec) Slice(off, n int) (Vec, error) {
	count, err := v.Count(off, n)
	if err != nil {
		return nil, err
	}
	return v.AppendSlice(make(Vec, 0, count), off, n)
}

// AppendPadded appends head, the n bytes of v at off, and tail to dst: a request widened to its backend's alignment.
// An empty head or tail adds no element. On an error, which is ErrRange, it returns dst as it was.
func (v Vec) AppendPadded(dst Vec, head []byte, off, n int, tail []byte) (Vec, error) {
	if n > math.MaxInt-len(head)-len(tail) {
		return dst, v.outside(off, n)
	}
	out := dst
	if len(head) > 0 {
		out = out.Append(head)
	}
	out, err := v.AppendSlice(out, off, n)
	if err != nil {
		return dst, err
	}
	if len(tail) > 0 {
		out = out.Append(tail)
	}
	return out, nil
}

// sub returns the n bytes of r at off, which the caller has checked.
func (r Range) sub(off, n int) Range { return RangeOf(r.Bytes()[off : off+n]) }

// DiscardFront removes the first n bytes of v and returns how many it removed: n, or less where v held less; 0 for a
// negative n. It shortens the first element that stays in place, so that any other Vec over the same elements sees it
// too; take a Slice to keep them apart, or use DiscardFrontUndo.
func (v *Vec) DiscardFront(n int) int {
	done, _ := v.DiscardFrontUndo(n)
	return done
}

// DiscardBack removes the last n bytes of v as DiscardFront does the first.
func (v *Vec) DiscardBack(n int) int {
	done, _ := v.DiscardBackUndo(n)
	return done
}

// DiscardFrontUndo is DiscardFront that can be taken back.
func (v *Vec) DiscardFrontUndo(n int) (int, Undo) {
	u := Undo{old: *v, cut: -1}
	if n < 0 {
		return 0, u
	}
	left, i := n, 0
	for ; i < len(u.old); i++ {
		k := u.old[i].Len()
		if left < k {
			if left > 0 {
				u.cutAt(i, left, k-left)
				left = 0
			}
			break
		}
		left -= k
	}
	*v = u.old[i:]
	return n - left, u
}

// DiscardBackUndo is DiscardBack that can be taken back.
func (v *Vec) DiscardBackUndo(n int) (int, Undo) {
	u := Undo{old: *v, cut: -1}
	if n < 0 {
		return 0, u
	}
	left, end := n, len(u.old)
	for ; end > 0; end-- {
		k := u.old[end-1].Len()
		if left < k {
			if left > 0 {
				u.cutAt(end-1, 0, k-left)
				left = 0
			}
			break
		}
		left -= k
	}
	*v = u.old[:end]
	return n - left, u
}

// Undo takes one discard back.
type Undo struct {
	old  Vec   // as it was, but for the element that was cut
	cut  int   // its index, or -1
	orig Range // what it was
}

func (u *Undo) cutAt(i, off, n int) {
	u.cut, u.orig = i, u.old[i]
	u.old[i] = u.orig.sub(off, n)
}

// Restore makes v, from which u's bytes were discarded, what it was before. Several discards are taken back last first.
// The elements must not have changed in between. The zero Undo does nothing.
//
// Undo does not remember v itself: that would move every Vec that is discarded from to the heap.
func (u Undo) Restore(v *Vec) {
	if len(u.old) == 0 {
		return
	}
	if u.cut >= 0 {
		u.old[u.cut] = u.orig
	}
	*v = u.old
}
