package legacy

import (
	"context"
	"io"
	"os"
	"sync"
	"time"
)

const (
	// outputSize is the room for bytes the writer has not taken yet: far more than a screenful.
	outputSize = 16 << 10
	// outputPause is how long the output goroutine rests after a write, so that a guest printing byte by byte makes a few
	// hundred writes a second rather than one for each byte.
	outputPause = 2 * time.Millisecond
)

// serialHost is the host's side of a Serial, guarded by its mu.
type serialHost struct {
	room   sync.Cond // the receiver may have room, or the port closed
	closed bool
	left   bool // Close gave up on the writer: the goroutine ends as soon as it can

	w         io.Writer     // nil: no one listens, and no goroutine runs
	out       []byte        // transmitted and not yet taken by the goroutine; capacity is outputSize
	idle      bool          // the goroutine sleeps until woken
	wake      chan struct{} // capacity 1
	done      chan struct{} // closed when the goroutine has ended
	queued    uint64        // bytes ever put into out
	delivered uint64        // of them, given to w
	progress  chan struct{} // closed at the next delivery; nil when no one waits
	dropped   uint64
	err       error // of w; after it the output is discarded
}

// Write sends p to the guest, as if typed at a terminal on the line. It waits until the guest's receiver has taken every
// byte, which may be for ever: a guest that does not listen (RTS low) takes nothing. Close ends the wait; then Write
// returns the number of bytes taken and os.ErrClosed. Any goroutine may call Write; the bytes of two calls may mix.
func (s *Serial) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for n < len(p) {
		if s.host.closed {
			return n, os.ErrClosed
		}
		// In loopback the receiver's pin is cut off.
		if s.st.MCR&(mcrRTS|mcrLoop) != mcrRTS || s.st.RXLen >= s.capacity() {
			s.host.room.Wait()
			continue
		}
		took := copy(s.st.RX[s.st.RXLen:s.capacity()], p[n:])
		s.st.RXLen += uint8(took)
		n += took
		s.update()
	}
	return n, nil
}

// Flush waits until everything the guest has transmitted so far was given to the writer, or ctx is done. It returns
// ctx's error, or the writer's, if it ever failed.
func (s *Serial) Flush(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &s.host
	for until := h.queued; h.delivered < until && !h.left; {
		if h.progress == nil {
			h.progress = make(chan struct{})
		}
		progress := h.progress
		s.wakeOutput()
		s.mu.Unlock()
		select {
		case <-progress:
			s.mu.Lock()
		case <-ctx.Done():
			s.mu.Lock()
			return ctx.Err()
		}
	}
	return h.err
}

// Close ends pending and later calls of Write, delivers what was transmitted and ends the goroutine. It returns the
// writer's error, if it ever failed. If ctx is done first, Close gives up on the writer and returns ctx's error: what was
// not delivered is dropped, and a Write of the writer that is under way is left to end by itself; it has its own bytes
// and touches nothing else. The registers keep answering the guest; what it transmits from then on is dropped.
func (s *Serial) Close(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &s.host
	h.closed = true
	h.room.Broadcast()
	if h.w == nil || h.left {
		return h.err
	}
	s.wakeOutput()
	s.mu.Unlock()
	select {
	case <-h.done:
		s.mu.Lock()
		return h.err
	case <-ctx.Done():
		s.mu.Lock()
	}
	h.left = true
	h.dropped += h.queued - h.delivered
	h.out = nil
	if h.progress != nil {
		close(h.progress) // Flush has nothing to wait for any more
		h.progress = nil
	}
	s.wakeOutput()
	return ctx.Err()
}

// Dropped returns the number of bytes the guest transmitted that found the buffer full, the port closed or the writer
// broken.
func (s *Serial) Dropped() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.host.dropped
}

func (s *Serial) startOutput(w io.Writer) {
	s.host.w = w
	s.host.out = make([]byte, 0, outputSize)
	s.host.wake = make(chan struct{}, 1)
	s.host.done = make(chan struct{})
	go s.drain()
}

// output takes one transmitted byte.
func (s *Serial) output(b byte) {
	h := &s.host
	if h.w == nil {
		return
	}
	if h.closed || h.err != nil || len(h.out) == outputSize {
		h.dropped++
		return
	}
	h.out = append(h.out, b)
	h.queued++
	// A driver that finds the transmitter empty may send a full FIFO without looking again.
	s.empty = len(h.out) <= outputSize-fifoSize
	if h.idle || len(h.out) == outputSize/2 {
		h.idle = false
		s.wakeOutput()
	}
}

func (s *Serial) wakeOutput() {
	select {
	case s.host.wake <- struct{}{}:
	default:
	}
}

// drain is the output goroutine: it swaps the buffer for an empty one, writes the full one without the lock, rests.
func (s *Serial) drain() {
	h := &s.host
	defer close(h.done)
	spare := make([]byte, 0, outputSize)
	rest := time.NewTimer(outputPause)
	defer rest.Stop()
	for {
		s.mu.Lock()
		if len(h.out) == 0 {
			if h.closed {
				s.mu.Unlock()
				return
			}
			h.idle = true
			s.mu.Unlock()
			<-h.wake
			continue
		}
		h.idle = false
		chunk := h.out
		h.out = spare[:0]
		if !s.empty {
			s.empty, s.st.THREPending = true, true
			s.update()
		}
		failed := h.err != nil
		s.mu.Unlock()

		var n int
		var err error
		if !failed {
			if n, err = h.w.Write(chunk); err == nil && n < len(chunk) {
				err = io.ErrShortWrite
			}
		}
		spare = chunk

		s.mu.Lock()
		if h.left {
			s.mu.Unlock()
			return
		}
		h.delivered += uint64(len(chunk))
		if err != nil {
			h.err = err
		}
		if h.err != nil {
			h.dropped += uint64(len(chunk) - n)
		}
		if h.progress != nil {
			close(h.progress)
			h.progress = nil
		}
		s.mu.Unlock()

		rest.Reset(outputPause)
		select {
		case <-rest.C:
		case <-h.wake:
		}
	}
}
