package iov

// CopyTo gathers the bytes of v from off on into dst and returns how many it copied: len(dst), or less where v ends.
func (v Vec) CopyTo(dst []byte, off int) (int, error) {
	i, skip, err := v.seek(off)
	if err != nil {
		return 0, err
	}
	done := 0
	for ; i < len(v) && done < len(dst); i++ {
		done += copy(dst[done:], v[i].Bytes()[skip:])
		skip = 0
	}
	return done, nil
}

// CopyFrom scatters src over the bytes of v from off on and returns how many it copied: len(src), or less where v ends.
func (v Vec) CopyFrom(off int, src []byte) (int, error) {
	i, skip, err := v.seek(off)
	if err != nil {
		return 0, err
	}
	done := 0
	for ; i < len(v) && done < len(src); i++ {
		done += copy(v[i].Bytes()[skip:], src[done:])
		skip = 0
	}
	return done, nil
}

// Fill sets the n bytes of v at off to b. When v does not hold them all, it sets none and returns ErrRange.
func (v Vec) Fill(off, n int, b byte) error {
	if _, err := v.Count(off, n); err != nil {
		return err
	}
	c := cursor{rest: v}
	c.skip(off)
	for n > 0 && c.more() {
		p := c.take(n)
		fill(p, b)
		n -= len(p)
	}
	return nil
}

// fill sets p to b. The compiler has a fast loop for zero only; anything else doubles a run that it copies.
func fill(p []byte, b byte) {
	if b == 0 {
		clear(p)
		return
	}
	const block = 4096 // large enough for copy to run at full speed, small enough to stay in the first-level cache
	if len(p) == 0 {
		return
	}
	p[0] = b
	for done := 1; done < len(p); {
		done += copy(p[done:], p[:min(done, block)])
	}
}

// Copy copies n bytes of src at srcOff to dst at dstOff and returns how many it copied: n, or less where src or dst
// ends. The copy goes front to back in pieces that are contiguous on both sides. Each piece may overlap itself, as with
// the built-in copy; where bytes of one piece's destination are the source of a later piece, the later one sees them
// changed.
func Copy(dst Vec, dstOff int, src Vec, srcOff, n int) (int, error) {
	if n < 0 {
		return 0, src.outside(srcOff, n)
	}
	di, dskip, err := dst.seek(dstOff)
	if err != nil {
		return 0, err
	}
	si, sskip, err := src.seek(srcOff)
	if err != nil {
		return 0, err
	}
	d, s := cursor{rest: dst[di:]}, cursor{rest: src[si:]}
	d.skip(dskip)
	s.skip(sskip)
	done := 0
	for done < n && d.more() && s.more() {
		k := min(n-done, len(d.cur), len(s.cur))
		done += copy(d.take(k), s.take(k))
	}
	return done, nil
}

// cursor walks the bytes of a Vec in contiguous pieces.
type cursor struct {
	cur  []byte // what is left of the current element
	rest Vec    // the elements after it
}

// more makes cur the next piece that is not empty and reports whether there is one.
func (c *cursor) more() bool {
	for len(c.cur) == 0 {
		if len(c.rest) == 0 {
			return false
		}
		c.cur, c.rest = c.rest[0].Bytes(), c.rest[1:]
	}
	return true
}

// take consumes and returns up to n bytes of cur.
func (c *cursor) take(n int) []byte {
	n = min(n, len(c.cur))
	p := c.cur[:n]
	c.cur = c.cur[n:]
	return p
}

// skip consumes n bytes, over as many elements as that takes.
func (c *cursor) skip(n int) {
	for n > 0 && c.more() {
		n -= len(c.take(n))
	}
}
