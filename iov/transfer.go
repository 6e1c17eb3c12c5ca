package iov

import (
	"fmt"
	"io"
	"math"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// ReadAt reads from the file fd at off into all of v, in as many preadv calls as that takes: at most MaxElems elements
// each, interrupted ones again, short ones continued. It returns how many bytes it read. At the end of the file that is
// less than v.Size() with a nil error. A failing call ends it with the count so far and the error, which wraps the
// errno; a file opened with O_DIRECT may answer EINVAL so, when a read that its end cut short is continued.
//
// The caller keeps fd open for the whole call. ErrRange reports an offset that is negative or whose end is beyond 2^63-1.
func ReadAt(fd int, v Vec, off int64) (int, error) { return transferAt(opPreadv, fd, v, off) }

// WriteAt writes all of v to the file fd at off with pwritev, as ReadAt reads. It returns how many bytes it wrote; less
// than v.Size() comes with an error.
func WriteAt(fd int, v Vec, off int64) (int, error) { return transferAt(opPwritev, fd, v, off) }

// Read fills v with one readv, for descriptors on which each call is one message: a tap device, an eventfd, a datagram
// socket. An interrupted call is made again. It returns how many bytes were read, 0 at the end of a file, and the errno
// itself where there is nothing to read yet (EAGAIN). ErrTooMany reports more than MaxElems elements.
func Read(fd int, v Vec) (int, error) { return single(opReadv, fd, v) }

// Write writes v with one writev, as Read reads. What a short count means is the descriptor's matter.
func Write(fd int, v Vec) (int, error) { return single(opWritev, fd, v) }

// Send sends the n bytes of v at off over the stream socket fd and returns how many it sent. It goes on after partial
// and interrupted sends until all are sent or a call fails. On a non-blocking socket that is full it returns what it
// sent with a nil error, or EAGAIN itself if that was nothing. Any other failure comes with the count so far. A closed
// peer is EPIPE; no SIGPIPE is raised.
func Send(fd int, v Vec, off, n int) (int, error) { return sendRecv(opSendmsg, fd, v, off, n) }

// Recv receives n bytes from the stream socket fd into v at off, as Send sends. When the peer has shut its side down in
// order, it returns what came before, with io.EOF if that is less than n.
func Recv(fd int, v Vec, off, n int) (int, error) { return sendRecv(opRecvmsg, fd, v, off, n) }

func transferAt(o op, fd int, v Vec, off int64) (int, error) {
	n := v.Size()
	if off < 0 || int64(n) > math.MaxInt64-off {
		return 0, fmt.Errorf("%w: %s of %d bytes at file offset %d", ErrRange, o, n, off)
	}
	t := transfer{rest: v, left: n}
	return t.run(o, fd, off)
}

func sendRecv(o op, fd int, v Vec, off, n int) (int, error) {
	if _, err := v.Count(off, n); err != nil {
		return 0, err
	}
	i, skip, err := v.seek(off)
	if err != nil {
		return 0, err
	}
	t := transfer{rest: v[i:], skip: skip, left: n}
	return t.run(o, fd, 0)
}

func single(o op, fd int, v Vec) (int, error) {
	t := transfer{rest: v, left: v.Size()}
	if len(v) > MaxElems {
		defer t.release()
		if v = t.pack(); t.left > v.Size() {
			return 0, fmt.Errorf("%w: %s of more than %d", ErrTooMany, o, MaxElems)
		}
	}
	if t.left == 0 {
		return 0, nil
	}
	n, errno := o.retry(fd, v, 0)
	return n, o.err(errno)
}

// transfer is what remains of a read or write that may take several system calls.
type transfer struct {
	rest Vec
	skip int              // bytes of rest[0] that are done
	left int              // bytes to go; rest holds at least as many
	list *[MaxElems]Range // borrowed, while a call needs elements that are not rest's own
}

// lists lends the elements of one system call to transfers that cannot use their Vec as it stands.
var lists = sync.Pool{New: func() any { return new([MaxElems]Range) }}

// release gives the list back, emptied so that it keeps nobody's buffers alive.
func (t *transfer) release() {
	if t.list != nil {
		clear(t.list[:])
		lists.Put(t.list)
		t.list = nil
	}
}

// run makes system calls until nothing is left.
func (t *transfer) run(o op, fd int, pos int64) (int, error) {
	defer t.release()
	done := 0
	for t.left > 0 {
		n, errno := o.retry(fd, t.window(), pos)
		switch {
		case errno == unix.EAGAIN && done > 0 && o.socket():
			return done, nil
		case errno != 0:
			return done, o.err(errno)
		case n > 0:
			done += n
			pos += int64(n)
			t.advance(n)
		case o == opPreadv:
			return done, nil
		case o == opRecvmsg:
			return done, io.EOF
		default: // the kernel took nothing and gave no reason; asking again might never end
			return done, os.NewSyscallError(o.String(), io.ErrShortWrite)
		}
	}
	return done, nil
}

// window returns the elements for the next system call: a part of rest where it can be used as it stands, a cut copy
// otherwise. Its size is above zero.
func (t *transfer) window() Vec {
	if t.skip == 0 {
		size := 0
		for i := range t.rest {
			size += t.rest[i].Len()
			if size > t.left || size < 0 {
				break
			}
			if size == t.left || i == MaxElems-1 && size > 0 {
				return t.rest[:i+1]
			}
			if i == MaxElems-1 {
				break
			}
		}
	}
	return t.pack()
}

// pack fills the list with up to MaxElems elements that are not empty, cut at both ends.
func (t *transfer) pack() Vec {
	if t.list == nil {
		t.list = lists.Get().(*[MaxElems]Range)
	}
	n, skip, left := 0, t.skip, t.left
	for i := 0; i < len(t.rest) && n < MaxElems && left > 0; i++ {
		if k := min(left, t.rest[i].Len()-skip); k > 0 {
			t.list[n] = t.rest[i].sub(skip, k)
			left -= k
			n++
		}
		skip = 0
	}
	return t.list[:n]
}

// advance marks n more bytes as done.
func (t *transfer) advance(n int) {
	t.left -= n
	t.skip += n
	for len(t.rest) > 0 && t.skip >= t.rest[0].Len() {
		t.skip -= t.rest[0].Len()
		t.rest = t.rest[1:]
	}
}

// op is a system call that takes a list of ranges.
type op int

const (
	opPreadv op = iota
	opPwritev
	opReadv
	opWritev
	opSendmsg
	opRecvmsg
)

var opNames = [...]string{"preadv", "pwritev", "readv", "writev", "sendmsg", "recvmsg"}

func (o op) String() string { return opNames[o] }

func (o op) socket() bool { return o == opSendmsg || o == opRecvmsg }

// retry makes the call, again while a signal interrupts it.
func (o op) retry(fd int, v Vec, pos int64) (int, unix.Errno) {
	for {
		n, errno := o.call(fd, v, pos)
		if errno != unix.EINTR {
			return n, errno
		}
	}
}

// err makes an error of errno. EAGAIN stays bare: it is no failure, and callers meet it all the time.
func (o op) err(errno unix.Errno) error {
	switch errno {
	case 0:
		return nil
	case unix.EAGAIN:
		return unix.EAGAIN
	}
	return os.NewSyscallError(o.String(), errno)
}
