// Package tail keeps the end of an output, such as a console's, to be shown when something failed.
package tail

import (
	"bytes"
	"sync"
)

// Buffer keeps the last bytes that were written to it. Its methods may be called from any goroutine.
type Buffer struct {
	size int

	mu  sync.Mutex
	buf []byte // guarded by mu; may be twice as long as what is kept, so that not every Write moves it
}

// New returns a buffer for the last size bytes.
func New(size int) *Buffer { return &Buffer{size: size} }

// Write takes all of p and never fails.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	end := p[max(0, len(p)-b.size):]
	if len(b.buf)+len(end) > 2*b.size {
		b.buf = append(b.buf[:0], b.kept()...)
	}
	b.buf = append(b.buf, end...)
	return len(p), nil
}

// kept is what a reader sees. b.mu is held.
func (b *Buffer) kept() []byte { return b.buf[max(0, len(b.buf)-b.size):] }

// String returns what is kept, as it came.
func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.kept())
}

// Lines returns the last n lines that are kept, without their ends and without empty lines at either end of the output.
func (b *Buffer) Lines(n int) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	text := bytes.TrimSpace(bytes.ReplaceAll(b.kept(), []byte("\r"), nil))
	if len(text) == 0 {
		return nil
	}
	all := bytes.Split(text, []byte("\n"))
	var lines []string
	for _, l := range all[max(0, len(all)-n):] {
		lines = append(lines, string(l))
	}
	return lines
}
