package cli

import "io"

// escapeKey is Ctrl-A, as in QEMU's -nographic.
const escapeKey = 0x01

// escapeReader passes a terminal's input on and watches for Ctrl-A x, which leaves. Ctrl-A Ctrl-A, or Ctrl-A a, sends
// one Ctrl-A; before any other key the Ctrl-A is passed on too.
type escapeReader struct {
	r     io.Reader
	leave func() // called once, at Ctrl-A x; the input ends there

	in      [4096]byte
	out     []byte // filtered and not yet read
	err     error  // what r said; reported when out is empty
	pending bool   // a Ctrl-A came and its companion has not
}

func (e *escapeReader) Read(p []byte) (int, error) {
	for len(e.out) == 0 {
		if e.err != nil {
			return 0, e.err
		}
		n, err := e.r.Read(e.in[:])
		e.err = err
		e.filter(e.in[:n])
	}
	n := copy(p, e.out)
	e.out = e.out[n:]
	return n, nil
}

func (e *escapeReader) filter(in []byte) {
	e.out = e.out[:0]
	for _, b := range in {
		switch {
		case !e.pending && b == escapeKey:
			e.pending = true
		case !e.pending:
			e.out = append(e.out, b)
		case b == 'x' || b == 'X':
			e.err = io.EOF
			e.leave()
			return
		case b == escapeKey || b == 'a':
			e.pending = false
			e.out = append(e.out, escapeKey)
		default:
			e.pending = false
			e.out = append(e.out, escapeKey, b)
		}
	}
}
