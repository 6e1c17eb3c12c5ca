package vconsole

// ring is a first-in, first-out buffer of fixed size.
type ring struct {
	buf   []byte
	start int // index of the oldest byte
	n     int // bytes held
}

// space returns the next contiguous free part, which is empty only when the ring is full. What is written to it counts
// after commit.
func (r *ring) space() []byte {
	end := r.start + r.n
	if end >= len(r.buf) {
		return r.buf[end-len(r.buf) : r.start]
	}
	return r.buf[end:]
}

func (r *ring) commit(n int) { r.n += n }

// read moves the oldest bytes into b and returns how many.
func (r *ring) read(b []byte) int {
	total := 0
	for total < len(b) && r.n > 0 {
		n := copy(b[total:], r.buf[r.start:min(r.start+r.n, len(r.buf))])
		r.start += n
		if r.start == len(r.buf) {
			r.start = 0
		}
		r.n -= n
		total += n
	}
	return total
}
