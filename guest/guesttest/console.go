package guesttest

import (
	"strings"
	"sync"
)

// consoleSize is how much of a guest's console is kept.
const consoleSize = 64 << 10

// console keeps the end of what a guest sends to its serial port.
type console struct {
	mu  sync.Mutex
	buf []byte // guarded by mu
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf = append(c.buf, p...)
	if over := len(c.buf) - consoleSize; over > 0 {
		c.buf = append(c.buf[:0], c.buf[over:]...)
	}
	return len(p), nil
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.buf)
}

// last returns the last n lines.
func (c *console) last(n int) string {
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(c.String(), "\r", "")), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
