// Package pipe is a network cable in memory: what goes into one End comes out of the other, in order and without loss.
// Tests and user-mode networking put a Go program at one end.
package pipe

import (
	"io"
	"os"
	"sync"
	"time"

	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/net"
)

// DefaultDepth is the number of frames that are under way in each direction before Send waits.
const DefaultDepth = 256

// Options describe a cable. The zero value is one without offloads.
type Options struct {
	Features net.Features // offloads that both ends offer; the frames travel as they are
	Depth    int          // frames under way in each direction; 0: DefaultDepth
}

// End is one end of a cable, a net.Backend. The virtio-net header travels with the frame: an End without a header, or
// with a shorter one, gets what its own length holds, and what it does not say is zero. num_buffers always arrives as 1.
//
// When one End is closed, the other still receives what was sent before and then io.EOF; its Send returns
// io.ErrClosedPipe.
type End struct {
	features  net.Features
	in, out   *lane
	headerLen int

	mu       sync.Mutex // guards what follows
	deadline time.Time
	timer    *time.Timer
}

var _ net.Backend = (*End)(nil)

// lane is one direction. Its slots are a ring of frames, each with a header of net.HeaderLen in front. A slot's storage
// grows to the longest frame that it has carried and is then reused.
type lane struct {
	mu     sync.Mutex
	change sync.Cond
	slots  [][]byte
	first  int // index of the oldest frame
	n      int // frames held

	sender, receiver end
}

// end is what a lane knows about one of its users.
type end struct {
	closed  bool
	expired bool // the deadline has passed
}

// New returns the two ends of a new cable.
func New(o Options) (*End, *End) {
	if o.Depth == 0 {
		o.Depth = DefaultDepth
	}
	ab, ba := newLane(o.Depth), newLane(o.Depth)
	return &End{features: o.Features, in: ba, out: ab}, &End{features: o.Features, in: ab, out: ba}
}

func newLane(depth int) *lane {
	l := &lane{slots: make([][]byte, depth)}
	l.change.L = &l.mu
	return l
}

// Features returns the offloads that New was given.
func (e *End) Features() net.Features { return e.features }

// SetFeatures accepts any of them, and every header length.
func (e *End) SetFeatures(f net.Features, headerLen int) error {
	if f&^e.features != 0 {
		return net.ErrFeatures
	}
	switch headerLen {
	case net.NoHeaderLen, net.ShortHeaderLen, net.HeaderLen:
	default:
		return net.ErrFeatures
	}
	e.headerLen = headerLen
	return nil
}

// Send puts a frame into the cable, and waits while it is full.
func (e *End) Send(frame iov.Vec) (int, error) {
	size := frame.Size()
	payload := size - e.headerLen
	switch {
	case payload < 0:
		return 0, net.ErrHeader
	case payload > net.MaxFrame:
		return 0, net.ErrFrameTooLong
	}
	l := e.out
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		if err := l.sender.err(); err != nil {
			return 0, err
		}
		if l.receiver.closed {
			return 0, io.ErrClosedPipe
		}
		if l.n < len(l.slots) {
			break
		}
		l.change.Wait()
	}
	slot := &l.slots[(l.first+l.n)%len(l.slots)]
	if need := net.HeaderLen + payload; cap(*slot) < need {
		*slot = make([]byte, need)
	} else {
		*slot = (*slot)[:need]
	}
	b := *slot
	clear(b[:net.HeaderLen])
	if _, err := frame.CopyTo(b[:e.headerLen], 0); err != nil {
		return 0, err
	}
	b[10], b[11] = 1, 0 // num_buffers
	if _, err := frame.CopyTo(b[net.HeaderLen:], e.headerLen); err != nil {
		return 0, err
	}
	l.n++
	l.change.Broadcast()
	return size, nil
}

// Recv waits for the next frame out of the cable.
func (e *End) Recv(frame iov.Vec) (int, error) {
	l := e.in
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		if err := l.receiver.err(); err != nil {
			return 0, err
		}
		if l.n > 0 {
			break
		}
		if l.sender.closed {
			return 0, io.EOF
		}
		l.change.Wait()
	}
	b := l.slots[l.first]
	l.first = (l.first + 1) % len(l.slots)
	l.n--
	l.change.Broadcast()

	size := e.headerLen + len(b) - net.HeaderLen
	if size > frame.Size() {
		return 0, net.ErrFrameTooLong
	}
	if _, err := frame.CopyFrom(0, b[:e.headerLen]); err != nil {
		return 0, err
	}
	if _, err := frame.CopyFrom(e.headerLen, b[net.HeaderLen:]); err != nil {
		return 0, err
	}
	return size, nil
}

func (u *end) err() error {
	switch {
	case u.closed:
		return os.ErrClosed
	case u.expired:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// SetDeadline implements net.Backend.
func (e *End) SetDeadline(t time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.timer != nil {
		e.timer.Stop()
		e.timer = nil
	}
	e.deadline = t
	left := time.Until(t)
	if !t.IsZero() && left > 0 {
		e.timer = time.AfterFunc(left, func() { e.expire(t) })
	}
	return e.update(func(u *end) { u.expired = !t.IsZero() && left <= 0 })
}

// expire lets the deadline t pass, unless another one has been set meanwhile.
func (e *End) expire(t time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.deadline.Equal(t) {
		_ = e.update(func(u *end) { u.expired = true })
	}
}

// Close pulls this end out.
func (e *End) Close() error {
	_ = e.SetDeadline(time.Time{}) // stops the timer
	_ = e.update(func(u *end) { u.closed = true })
	return nil
}

// update changes how both lanes see this end and wakes whoever waits there. It returns os.ErrClosed after Close.
func (e *End) update(change func(*end)) error {
	wasClosed := e.in.update(&e.in.receiver, change)
	e.out.update(&e.out.sender, change)
	if wasClosed {
		return os.ErrClosed
	}
	return nil
}

func (l *lane) update(u *end, change func(*end)) (wasClosed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	wasClosed = u.closed
	change(u)
	l.change.Broadcast()
	return wasClosed
}
