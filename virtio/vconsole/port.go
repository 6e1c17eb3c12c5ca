package vconsole

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"

	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// ErrGuestClosed is what Write returns when the guest closed the port after it had taken a part of the bytes.
var ErrGuestClosed = errors.New("vconsole: the guest closed the port")

// ErrHungUp is what Write and WaitOpen return after Hangup.
var ErrHungUp = errors.New("vconsole: the VM has ended")

// ringSize bounds what the guest can have sent and the host not read.
const ringSize = 64 << 10

var _ io.ReadWriteCloser = (*Port)(nil)

// Port is the host's end of one byte channel. It is open on the host's side from New until Close; the guest opens and
// closes its side as it likes, and each time it does is one session, until Hangup. All methods may be called from any
// goroutine.
type Port struct {
	dev  *Device
	id   uint32
	name string

	writing sync.Mutex // held by Write from end to end: two of them never mix

	// What follows is guarded by dev.mu.
	changed *sync.Cond // of anything below
	closed  bool       // on the host's side
	hungUp  bool       // the guest does not run any more
	resets  uint64     // counts resets of an active device

	// As the driver sees the port.
	ready   bool  // the driver has set it up
	pending uint8 // control messages to send
	open    bool  // on the guest's side
	session uint64

	// From guest to host.
	tx      *queue.Queue // while a worker drains it
	in      ring
	closing bool // the guest closed the port, but its queue may still hold what it sent before
	eof     bool // the session ends behind what is in the ring
	over    bool // and no other follows: it ended after the hang-up

	// From host to guest.
	out        []byte // what the Write in progress has left
	outSession uint64 // the session that took the first byte of it, or 0
}

func newPort(d *Device, id uint32, name string) *Port {
	return &Port{dev: d, id: id, name: name, changed: sync.NewCond(&d.mu), in: ring{buf: make([]byte, ringSize)}}
}

func rxQueue(port int) int {
	if port == 0 {
		return 0
	}
	return 2*port + 2
}

func txQueue(port int) int { return rxQueue(port) + 1 }

// Name returns the port's name; the console's is empty.
func (p *Port) Name() string { return p.name }

// Open reports whether the guest has the port open.
func (p *Port) Open() bool {
	p.dev.mu.Lock()
	defer p.dev.mu.Unlock()
	return p.open
}

// WaitOpen waits until the guest has the port open. It returns ctx's error when that ends first, os.ErrClosed once the
// port is closed on the host's side, and ErrHungUp after Hangup.
func (p *Port) WaitOpen(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		p.dev.mu.Lock()
		defer p.dev.mu.Unlock()
		p.changed.Broadcast()
	})()
	p.dev.mu.Lock()
	defer p.dev.mu.Unlock()
	for {
		switch {
		case p.closed:
			return os.ErrClosed
		case p.hungUp:
			return ErrHungUp
		case p.open:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		}
		p.changed.Wait()
	}
}

// Read waits for bytes from the guest and returns as soon as there are any. When the guest closes the port, or the
// device is reset, Read returns the bytes sent before and then io.EOF, once; later calls wait for the next session. A
// guest that opens the port again before the host has taken everything continues the same session. After Hangup the
// last io.EOF is repeated for ever. After Close Read returns os.ErrClosed.
func (p *Port) Read(b []byte) (int, error) {
	p.dev.mu.Lock()
	defer p.dev.mu.Unlock()
	for {
		if p.closed {
			return 0, os.ErrClosed
		}
		if len(b) == 0 {
			return 0, nil
		}
		if n := p.in.read(b); n > 0 {
			p.changed.Broadcast()
			return n, nil
		}
		if p.eof {
			p.eof = p.over
			p.changed.Broadcast()
			return 0, io.EOF
		}
		p.changed.Wait()
	}
}

// Write hands b to the guest and returns when the guest's own buffers hold all of it. Before the guest has opened the
// port, and whenever it reads slowly, Write waits. It returns os.ErrClosed when the port is closed or an active device is
// reset meanwhile, ErrHungUp after Hangup, and ErrGuestClosed when the guest closes the port with a part of b taken, each
// with the number of bytes taken; the guest may not have read them. One Write's bytes never end up in two sessions.
func (p *Port) Write(b []byte) (int, error) {
	p.writing.Lock()
	defer p.writing.Unlock()
	p.dev.mu.Lock()
	defer p.dev.mu.Unlock()
	switch {
	case p.closed:
		return 0, os.ErrClosed
	case p.hungUp:
		return 0, ErrHungUp
	}
	p.out, p.outSession = b, 0
	p.changed.Broadcast()
	resets := p.resets
	var err error
	for err == nil && len(p.out) > 0 {
		switch {
		case p.closed || p.resets != resets:
			err = os.ErrClosed
		case p.hungUp:
			err = ErrHungUp
		case p.outSession != 0 && (!p.open || p.session != p.outSession):
			err = ErrGuestClosed
		default:
			p.changed.Wait()
		}
	}
	n := len(b) - len(p.out)
	p.out = nil
	return n, err
}

// Close closes the host's side for good and tells the guest so. Read and Write return os.ErrClosed from then on, what
// was not read is dropped, and what the guest still sends is discarded. Closing again does nothing.
func (p *Port) Close() error {
	p.dev.mu.Lock()
	defer p.dev.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	p.changed.Broadcast()
	if p.ready {
		p.dev.send(p, pendingOpen)
	}
	return nil
}

// Hangup says that the guest does not run any more, and will not. What it has sent can still be read, and then Read
// returns io.EOF for ever; Write fails. Hangup does not wait for the device's workers, so a vCPU's own thread may call
// it, at any time. Hanging up again does nothing.
func (p *Port) Hangup() {
	p.dev.mu.Lock()
	defer p.dev.mu.Unlock()
	if p.hungUp {
		return
	}
	p.hungUp, p.open = true, false
	p.endSession()
}

// setOpen follows the guest opening or closing the port. What a vCPU does that has yet to stop after a hang-up changes
// nothing. dev.mu is held.
func (p *Port) setOpen(open bool) {
	if p.open == open || p.hungUp {
		return
	}
	p.open = open
	if !open {
		p.endSession()
		return
	}
	p.session++
	p.closing = false
	p.changed.Broadcast()
}

// endSession ends the session behind what the guest has sent. dev.mu is held.
func (p *Port) endSession() {
	p.closing = true
	if p.tx != nil {
		p.tx.Wake() // drain sees closing, and that its queue is empty
		p.changed.Broadcast()
		return
	}
	p.sessionEnded()
}

// sessionEnded marks the end of a session whose bytes are all in the ring. dev.mu is held.
func (p *Port) sessionEnded() {
	p.closing, p.eof, p.over = false, true, p.hungUp
	p.changed.Broadcast()
}

// endActivation follows a reset, with all workers gone. dev.mu is held.
func (p *Port) endActivation() {
	if p.open || p.closing {
		p.sessionEnded()
	}
	p.open, p.ready, p.pending, p.tx = false, false, 0, nil
	p.changed.Broadcast()
}

// feed is the worker that brings what Write has to the guest.
func (p *Port) feed(w *worker) error {
	ready := func() bool {
		return len(p.out) > 0 && p.open && !p.closed && (p.outSession == 0 || p.outSession == p.session)
	}
	return p.dev.supply(w, p.changed, ready, func(dst iov.Vec) (int, error) {
		n, err := dst.CopyFrom(0, p.out[:min(len(p.out), dst.Size())])
		p.out = p.out[n:]
		p.outSession = p.session
		p.dev.stats.ToGuest += uint64(n)
		p.changed.Broadcast()
		return n, err
	})
}

// drain is the worker that takes what the guest sends.
func (p *Port) drain(w *worker) error {
	err := p.takeAll(w)
	p.dev.mu.Lock()
	defer p.dev.mu.Unlock()
	p.tx = nil // nothing more comes from a queue that is broken, and a session ends without it
	if p.closing {
		p.sessionEnded()
	}
	return err
}

// takeAll takes what the guest sends until the device is reset. Then it still takes what is in the queue, at most once
// around it.
func (p *Port) takeAll(w *worker) error {
	for left := w.queue.Size(); ; {
		// Asked before Pop: what was sent before the port was closed is in the queue when this says that it was.
		p.dev.mu.Lock()
		closing, stopping := p.closing, w.stopping
		p.dev.mu.Unlock()
		if stopping {
			if left == 0 {
				return nil
			}
			left--
		}
		ok, err := w.queue.Pop(&w.chain)
		switch {
		case err != nil:
			return err
		case ok:
			if !p.take(w) {
				return nil
			}
			w.done(0)
		case stopping:
			return nil
		case closing:
			p.drained()
		default:
			if w.queue.Wait() != nil {
				return nil // the transport has closed the kick
			}
		}
	}
}

// drained ends a session whose bytes are all in the ring, unless the guest has opened the port again.
func (p *Port) drained() {
	p.dev.mu.Lock()
	defer p.dev.mu.Unlock()
	if p.closing {
		p.sessionEnded()
	}
}

// take moves the popped chain's bytes into the ring. While the ring is full, or holds the end of an earlier session, it
// waits for the reader. Only a console's bytes are dropped instead: its driver spins with interrupts off until they are
// taken. It returns false when a reset ended the wait.
func (p *Port) take(w *worker) bool {
	p.dev.mu.Lock()
	defer p.dev.mu.Unlock()
	src := w.chain.Readable
	for off, size := 0, src.Size(); off < size; {
		var space []byte
		if !p.eof {
			space = p.in.space()
		}
		switch {
		case p.closed, len(space) == 0 && p.id == 0:
			p.dev.stats.Discarded += uint64(size - off)
			return true
		case len(space) == 0 && w.stopping:
			return false
		case len(space) == 0:
			p.changed.Wait()
			continue
		}
		n, err := src.CopyTo(space, off)
		if err != nil {
			return true // cannot happen: off is inside src
		}
		p.in.commit(n)
		p.dev.stats.FromGuest += uint64(n)
		off += n
		p.changed.Broadcast()
	}
	return true
}
