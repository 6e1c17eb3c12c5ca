package nbd

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/iov"
)

const (
	readAhead = 8 << 10  // read with a header; below what another system call costs to copy
	gatherLen = 16 << 10 // written at once where bytes are copied anyhow: a TLS record

	// leastProgress is how many bytes a peer must take or send in the time that it is given. Any fewer would do to tell
	// that it is there, and let it hold on to the memory of a request for days.
	leastProgress = 64 << 10
)

// patience bounds how long a peer may keep us waiting within a message. The zero value never ends.
type patience struct {
	limit time.Duration // for leastProgress bytes, or what is left of the message
	set   func(time.Time) error
	armed bool // a deadline is set
	moved int  // bytes since then
}

// wait is called when the peer lets us wait, or may do so. Messages that need no waiting cost no deadline.
func (p *patience) wait() {
	if p.limit > 0 && !p.armed {
		p.arm()
	}
}

func (p *patience) arm() {
	p.armed, p.moved = true, 0
	_ = p.set(time.Now().Add(p.limit)) // fails on a closed connection, as what follows does
}

// progress notes n bytes.
func (p *patience) progress(n int) {
	if !p.armed {
		return
	}
	if p.moved += n; p.moved >= leastProgress {
		p.arm()
	}
}

// end is called when nothing is owed any more.
func (p *patience) end() {
	if p.armed {
		p.armed = false
		_ = p.set(time.Time{})
	}
}

// link carries the bytes of one connection. One goroutine at a time may read and one may send, beside each other.
type link struct {
	conn net.Conn
	raw  syscall.RawConn // nil where conn is no plain socket, but TLS

	buf  []byte // read ahead and not used yet: buf[r:w]
	r, w int

	rx struct {
		vec  iov.Vec
		n    int
		err  error
		owed bool // a message has begun, and is not complete
		patience
	}
	tx struct {
		vec       iov.Vec
		off, left int
		err       error
		patience
	}
	receiving, sending func(fd uintptr) bool // made once: a method value allocates

	gather []byte
}

// newLink returns a link over conn, which it owns.
func newLink(conn net.Conn) *link {
	l := &link{conn: conn, buf: make([]byte, readAhead)}
	l.receiving, l.sending = l.receive, l.transmit
	switch conn.(type) {
	case *net.TCPConn, *net.UnixConn:
		if raw, err := conn.(syscall.Conn).SyscallConn(); err == nil {
			l.raw = raw
		}
	}
	return l
}

// upgrade goes on over conn, which is TLS over the old one. Bytes that came ahead of it are the work of somebody in
// between.
func (l *link) upgrade(conn net.Conn) error {
	if l.r != l.w {
		return violation("%d bytes of plain text before the TLS handshake", l.w-l.r)
	}
	l.conn, l.raw = conn, nil
	return nil
}

func (l *link) Close() error { return l.conn.Close() }

// limitStalls bounds how long the peer may take for a message that has begun, in both directions. Between messages it may
// take all the time in the world.
func (l *link) limitStalls(limit time.Duration) {
	l.rx.patience = patience{limit: limit, set: l.conn.SetReadDeadline}
	l.tx.patience = patience{limit: limit, set: l.conn.SetWriteDeadline}
}

// readFull fills p, with which a message may begin. io.EOF means that nothing came, io.ErrUnexpectedEOF that less did.
func (l *link) readFull(p []byte) error {
	for n := 0; n < len(p); {
		if l.r == l.w {
			l.rx.owed = n > 0
			if err := l.fill(); err != nil {
				if err == io.EOF && n > 0 {
					err = io.ErrUnexpectedEOF
				}
				return err
			}
		}
		k := copy(p[n:], l.buf[l.r:l.w])
		l.r += k
		n += k
	}
	l.rx.end()
	return nil
}

// readVec receives n bytes into v at off, in the midst of a message.
func (l *link) readVec(v iov.Vec, off, n int) error {
	l.rx.owed = true
	if n > 0 && l.r < l.w {
		k, err := v.CopyFrom(off, l.buf[l.r:min(l.w, l.r+n)])
		if err != nil {
			return err
		}
		l.r += k
		off += k
		n -= k
	}
	for n > 0 {
		vec, err := v.AppendSlice(l.rx.vec[:0], off, n)
		if err != nil {
			return err
		}
		l.rx.vec = vec
		if len(vec) < iov.MaxElems {
			l.rx.vec = vec.Append(l.buf)
		} else {
			l.rx.vec = vec[:iov.MaxElems]
		}
		k, err := l.recv()
		clear(vec) // keep nobody's buffers alive
		if err != nil {
			return unexpected(err)
		}
		if k > n {
			l.r, l.w = 0, k-n
			k = n
		}
		off += k
		n -= k
	}
	l.rx.end()
	return nil
}

// skip drops n bytes.
func (l *link) skip(n int) error {
	l.rx.owed = true
	for n > 0 {
		if l.r == l.w {
			if err := l.fill(); err != nil {
				return unexpected(err)
			}
		}
		k := min(n, l.w-l.r)
		l.r += k
		n -= k
	}
	l.rx.end()
	return nil
}

// fill reads ahead into the empty buffer.
func (l *link) fill() error {
	l.rx.vec = append(l.rx.vec[:0], iov.RangeOf(l.buf))
	n, err := l.recv()
	if err != nil {
		return err
	}
	l.r, l.w = 0, n
	return nil
}

// recv waits for bytes and receives at least one into rx.vec.
func (l *link) recv() (int, error) {
	if l.raw == nil {
		if l.rx.owed {
			l.rx.wait()
		}
		for _, r := range l.rx.vec {
			if r.Len() > 0 {
				n, err := l.conn.Read(r.Bytes())
				if n > 0 {
					l.rx.progress(n)
					return n, nil
				}
				if err == nil {
					err = io.ErrNoProgress
				}
				return 0, err
			}
		}
		return 0, io.ErrNoProgress
	}
	if err := l.raw.Read(l.receiving); err != nil {
		return 0, err
	}
	if l.rx.n == 0 && l.rx.err == nil {
		return 0, io.EOF
	}
	l.rx.progress(l.rx.n)
	return l.rx.n, l.rx.err
}

// receive makes one readv; false asks to be called again when there is something to read.
func (l *link) receive(fd uintptr) bool {
	l.rx.n, l.rx.err = iov.Read(int(fd), l.rx.vec)
	if l.rx.err != unix.EAGAIN {
		return true
	}
	if l.rx.owed {
		l.rx.wait()
	}
	return false
}

// send sends head and then n bytes of v at off.
func (l *link) send(head []byte, v iov.Vec, off, n int) error {
	if l.raw == nil {
		return l.copyOut(head, v, off, n)
	}
	l.tx.vec = append(l.tx.vec[:0], iov.RangeOf(head))
	if n > 0 {
		vec, err := v.AppendSlice(l.tx.vec, off, n)
		if err != nil {
			return err
		}
		l.tx.vec = vec
	}
	l.tx.off, l.tx.left, l.tx.err = 0, len(head)+n, nil
	err := l.raw.Write(l.sending)
	l.tx.end()
	clear(l.tx.vec)
	return errors.Join(err, l.tx.err)
}

// transmit sends what the socket takes; false asks to be called again when it takes more.
func (l *link) transmit(fd uintptr) bool {
	n, err := iov.Send(int(fd), l.tx.vec, l.tx.off, l.tx.left)
	l.tx.off += n
	l.tx.left -= n
	l.tx.progress(n)
	if err == unix.EAGAIN {
		err = nil
	}
	l.tx.err = err
	if err != nil || l.tx.left == 0 {
		return true
	}
	l.tx.wait()
	return false
}

// copyOut sends through a buffer.
func (l *link) copyOut(head []byte, v iov.Vec, off, n int) error {
	if l.gather == nil {
		l.gather = make([]byte, gatherLen)
	}
	for len(head)+n > 0 {
		used := copy(l.gather, head)
		head = head[used:]
		k := min(n, len(l.gather)-used)
		if k > 0 {
			if _, err := v.CopyTo(l.gather[used:used+k], off); err != nil {
				return err
			}
			off += k
			n -= k
		}
		l.tx.wait()
		if _, err := l.conn.Write(l.gather[:used+k]); err != nil {
			return err
		}
		l.tx.progress(used + k)
	}
	l.tx.end()
	return nil
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// timedOut says of err, which ended a handshake, that its time was over, if so.
func timedOut(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("no answer in time: %w", err)
	}
	return err
}
