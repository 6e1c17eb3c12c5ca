package agent

import (
	"errors"
	"fmt"
	"io"
	"sync"
)

// errClosed ends the goroutines that serve a byte stream nobody wants any more.
var errClosed = errors.New("stream closed")

// inbox holds what came on one byte stream until its consumer takes it: a ring that grows up to Window bytes.
type inbox struct {
	mu     sync.Mutex
	cond   sync.Cond // something below changed
	ring   []byte
	at, n  int   // n bytes from at, wrapping
	open   int   // what the sender may still send
	end    error // what Read returns when all is taken: io.EOF or why no more can come
	closed error // what Read returns at once
}

func newInbox() *inbox {
	b := &inbox{open: Window}
	b.cond.L = &b.mu
	return b
}

// put appends p; an empty p marks the end. It never waits: a sender that leaves its window gets ErrProtocol.
func (b *inbox) put(p []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed != nil:
		return nil // was under way when this end closed
	case b.end != nil:
		return fmt.Errorf("data after end of file: %w", ErrProtocol)
	case len(p) > b.open:
		return fmt.Errorf("data beyond the window of %d bytes: %w", Window, ErrProtocol)
	case len(p) == 0:
		b.end = io.EOF
	default:
		b.growLocked(b.n + len(p))
		tail := (b.at + b.n) % len(b.ring)
		copied := copy(b.ring[tail:], p)
		copy(b.ring, p[copied:])
		b.n += len(p)
		b.open -= len(p)
	}
	b.cond.Broadcast()
	return nil
}

func (b *inbox) growLocked(need int) {
	if need <= len(b.ring) {
		return
	}
	size := max(4096, len(b.ring))
	for size < need {
		size *= 2
	}
	ring := make([]byte, size)
	copied := copy(ring, b.ring[b.at:min(b.at+b.n, len(b.ring))])
	copy(ring[copied:], b.ring[:b.n-copied])
	b.ring, b.at = ring, 0
}

// Read waits for bytes and takes them. It returns the error of finish (io.EOF at the stream's end) after
// the last byte, and that of close at once.
func (b *inbox) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.n == 0 && b.end == nil && b.closed == nil {
		b.cond.Wait()
	}
	if b.closed != nil {
		return 0, b.closed
	}
	if b.n == 0 {
		return 0, b.end
	}
	copied := copy(p, b.ring[b.at:min(b.at+b.n, len(b.ring))])
	b.n -= copied
	if b.at += copied; b.at == len(b.ring) || b.n == 0 {
		b.at = 0
	}
	return copied, nil
}

// reopen lets the sender send n bytes more, that Read gave before.
func (b *inbox) reopen(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open += n
}

// finish makes Read return err once all that came is taken.
func (b *inbox) finish(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.end == nil {
		b.end = err
	}
	b.cond.Broadcast()
}

// close drops what is held and what still comes, and ends a waiting Read with err.
func (b *inbox) close(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed == nil {
		b.closed, b.ring, b.n = err, nil, 0
	}
	b.cond.Broadcast()
}

// credit counts the bytes that a sender may still send on one byte stream.
type credit struct {
	mu     sync.Mutex
	cond   sync.Cond
	n      int
	closed error
}

func newCredit() *credit {
	c := &credit{n: Window}
	c.cond.L = &c.mu
	return c
}

// wait returns how many bytes may be sent, at least one.
func (c *credit) wait() (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.n == 0 && c.closed == nil {
		c.cond.Wait()
	}
	return c.n, c.closed
}

// use takes n bytes, no more than the last wait returned.
func (c *credit) use(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n -= n
}

// give adds what the other end returned.
func (c *credit) give(n uint32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n > uint32(Window-c.n) {
		return fmt.Errorf("credit of %d bytes for %d under way: %w", n, Window-c.n, ErrProtocol)
	}
	c.n += int(n)
	c.cond.Broadcast()
	return nil
}

// close ends the sender with err.
func (c *credit) close(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed == nil {
		c.closed = err
	}
	c.cond.Broadcast()
}

// pump sends what src gives on a byte stream, within its credit, and its end. It returns when src, the connection or the
// credit ends.
func pump(w *writer, c channel, stream uint32, src io.Reader, cr *credit) {
	b := make([]byte, headerLen+MaxPayload)
	for {
		n, err := cr.wait()
		if err != nil {
			return
		}
		got, err := src.Read(b[headerLen:][:min(n, MaxPayload)])
		if got > 0 {
			cr.use(got)
			if err := w.sendInPlace(frameData, c, stream, b[:headerLen+got]); err != nil {
				return
			}
		}
		if err != nil {
			_ = w.send(frameData, c, stream, nil) // if this fails, so does the session
			return
		}
	}
}

// drain writes what comes on a byte stream to dst and returns credit for it. Where dst fails, it tells the sender to
// stop.
func drain(w *writer, c channel, stream uint32, in *inbox, dst io.Writer) error {
	b := make([]byte, MaxPayload)
	consumed := 0
	for {
		n, err := in.Read(b)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := dst.Write(b[:n]); err != nil {
			in.close(errClosed)
			return errors.Join(err, w.post(frameClose, c, stream)) // what waits to be sent may wait for ever
		}
		if consumed += n; consumed >= Window/4 {
			in.reopen(consumed)
			_ = w.sendU32(frameCredit, c, stream, uint32(consumed)) // if this fails, so does the session; what came stays
			consumed = 0
		}
	}
}
