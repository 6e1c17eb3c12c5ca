package iov

import (
	"encoding/hex"
	"io"
	"strconv"
)

// Dump writes the first limit bytes of v to w, 16 to a line as offset, hexadecimal and printable characters, each line
// after prefix. A last line counts the bytes beyond the limit. Its memory does not depend on v.
func (v Vec) Dump(w io.Writer, prefix string, limit int) error {
	const width = 16
	c := cursor{rest: v}
	line := make([]byte, 0, len(prefix)+80)
	size := v.Size()
	shown := min(size, max(limit, 0))
	for off := 0; off < shown; off += width {
		var row [width]byte
		want := min(width, shown-off)
		for n := 0; n < want && c.more(); {
			n += copy(row[n:], c.take(want-n))
		}
		line = append(line[:0], prefix...)
		shift := 28 // eight digits, more where the offset needs them
		for off>>shift > 15 {
			shift += 4
		}
		for ; shift >= 0; shift -= 4 {
			line = append(line, "0123456789abcdef"[off>>shift&15])
		}
		for i := range width {
			if i%8 == 0 {
				line = append(line, ' ')
			}
			if i < want {
				line = hex.AppendEncode(append(line, ' '), row[i:i+1])
			} else {
				line = append(line, "   "...)
			}
		}
		line = append(line, "  |"...)
		for _, b := range row[:want] {
			if b < ' ' || b > '~' {
				b = '.'
			}
			line = append(line, b)
		}
		if _, err := w.Write(append(line, "|\n"...)); err != nil {
			return err
		}
	}
	if size > shown {
		line = strconv.AppendInt(append(line[:0], prefix...), int64(size-shown), 10)
		_, err := w.Write(append(line, " more bytes\n"...))
		return err
	}
	return nil
}
