package cli

import (
	"bytes"
	"io"
	"sync"
)

// tailSize is how much of the guest's console is kept for error messages.
const tailSize = 64 << 10

// tail passes a guest's console output on and keeps its end, which is shown when the guest fails.
type tail struct {
	w io.Writer // may be nil

	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - tailSize; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	t.mu.Unlock()
	if t.w != nil {
		return t.w.Write(p)
	}
	return len(p), nil
}

// last returns the last n lines, each with a margin in front.
func (t *tail) last(n int) []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := bytes.Split(bytes.TrimRight(t.buf, "\r\n"), []byte("\n"))
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	var out []byte
	for _, l := range lines {
		if l = bytes.TrimRight(l, "\r"); len(l) > 0 {
			out = append(out, "  | "...)
			out = append(out, l...)
			out = append(out, '\n')
		}
	}
	return out
}
