package nbd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// maxInFlight is how many requests of one Client the server may owe an answer to; more wait.
const maxInFlight = 256

// Client is an export of an NBD server as a blk.Backend. All methods may be called from any goroutine at any time; the
// requests of many goroutines are on their way at once.
//
// It offers whatever the server does: Discard, WriteZeroes, WriteVecFUA and BlockStatus answer blk.ErrUnsupported where
// the server lacks them. A request that the server refuses fails with *Error. Requests while the connection is lost: see
// the package's comment. Transfers that are started take no goroutine each (Start).
type Client struct {
	o      Options
	ctx    context.Context // ended by Close
	cancel context.CancelFunc
	ends   sync.WaitGroup // of the goroutines
	export atomic.Pointer[export]

	mu      sync.Mutex
	cur     *conn         // nil while there is no connection
	changed chan struct{} // closed, and made anew, when one of these changes
	fatal   error         // what every request gets from now on
	outage  outage
	losses  uint64 // connections lost with writes that were not flushed
	told    uint64 // of these, how many a Flush has reported
	starter
}

var (
	_ blk.Backend        = (*Client)(nil)
	_ blk.Discarder      = (*Client)(nil)
	_ blk.ZeroWriter     = (*Client)(nil)
	_ blk.StatusReporter = (*Client)(nil)
	_ blk.FUAWriter      = (*Client)(nil)
	_ blk.Resetter       = (*Client)(nil)
	_ blk.Starter        = (*Client)(nil)
)

// Error is the server's refusal of a request.
type Error struct {
	Command string // what was asked for
	Off     int64
	Len     int64
	Errno   unix.Errno // what it stands for on this system
	Message string     // what the server says, for a human; often empty
}

func (e *Error) Error() string {
	s := fmt.Sprintf("nbd: %s of %d bytes at %d: the server says: %s", e.Command, e.Len, e.Off, e.Errno.Error())
	if e.Message != "" {
		s += fmt.Sprintf(" (%q)", e.Message)
	}
	return s
}

// Unwrap returns the errno.
func (e *Error) Unwrap() error { return e.Errno }

// DialURI is Dial for ParseURI(uri).
func DialURI(ctx context.Context, uri string) (*Client, error) {
	o, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	return Dial(ctx, o)
}

// Dial connects to a server and negotiates. ctx counts until Dial returns. Errors: ErrTLS, ErrProtocol, those of the
// network, and the server's refusal in its words.
func Dial(ctx context.Context, o Options) (*Client, error) {
	l, e, err := connect(ctx, &o)
	if err != nil {
		return nil, fmt.Errorf("nbd: %s: %w", o.String(), err)
	}
	c := &Client{o: o, changed: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.send = c.sendStarted
	c.export.Store(e)
	c.mu.Lock() // the connection may be lost at once
	defer c.mu.Unlock()
	c.cur = c.start(l, e)
	return c, nil
}

// Size returns the size of the disk in bytes: that of the export, rounded up to whole sectors. The bytes behind the
// export's end read as zeroes. Zeroes may be written there; anything else fails with ENOSPC, before any of it is sent,
// since an export does not grow as a file does.
func (c *Client) Size() int64 { return c.export.Load().sectors() }

// Limits returns the server's block size constraints.
func (c *Client) Limits() blk.Limits { return c.export.Load().limits() }

// ReadOnly reports whether the server refuses writes.
func (c *Client) ReadOnly() bool { return c.export.Load().has(flagReadOnly) }

// ReadVecAt reads the bytes at off into dst, in pieces where it is longer than Limits().MaxTransfer. Errors:
// blk.ErrRange, blk.ErrClosed, *Error, ErrLost, ErrProtocol.
func (c *Client) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	return c.transfer(cmdRead, 0, dst, off)
}

// WriteVecAt writes src at off, as ReadVecAt reads. Errors: blk.ErrReadOnly besides.
func (c *Client) WriteVecAt(src iov.Vec, off int64) (int, error) {
	return c.transfer(cmdWrite, 0, src, off)
}

// WriteVecFUA writes src at off and returns when it is on the server's stable storage.
func (c *Client) WriteVecFUA(src iov.Vec, off int64) (int, error) {
	if !c.export.Load().has(flagSendFUA) {
		return 0, blk.ErrUnsupported
	}
	return c.transfer(cmdWrite, cmdFUA, src, off)
}

// Discard tells the server that nobody needs these bytes.
func (c *Client) Discard(off, n int64) error {
	if !c.export.Load().has(flagSendTrim) {
		return blk.ErrUnsupported
	}
	return c.ranged(cmdTrim, 0, off, n, c.Limits().MaxDiscard)
}

// WriteZeroes lets the server write zeroes, as fast as it can.
func (c *Client) WriteZeroes(off, n int64, unmap bool) error { return c.writeZeroes(off, n, unmap, 0) }

// WriteZeroesFast is WriteZeroes that answers blk.ErrUnsupported, and writes nothing, where the server can't do it faster
// than by writing.
func (c *Client) WriteZeroesFast(off, n int64, unmap bool) error {
	if !c.export.Load().has(flagSendFastZero) {
		return blk.ErrUnsupported
	}
	return c.writeZeroes(off, n, unmap, cmdFastZero)
}

func (c *Client) writeZeroes(off, n int64, unmap bool, flags uint16) error {
	if !c.export.Load().has(flagSendZeroes) {
		return blk.ErrUnsupported
	}
	if !unmap {
		flags |= cmdNoHole
	}
	err := c.ranged(cmdWriteZeroes, flags, off, n, c.Limits().MaxZero)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: %w", blk.ErrUnsupported, err)
	}
	return err
}

// BlockStatus asks the server for the context base:allocation at off.
func (c *Client) BlockStatus(off, n int64) (blk.Status, int64, error) {
	e := c.export.Load()
	if !e.meta {
		return blk.Status{}, 0, blk.ErrUnsupported
	}
	if err := e.checkRange(off, n); err != nil || n <= 0 {
		return blk.Status{}, 0, err
	}
	if off >= e.size {
		return blk.Status{Flags: blk.StatusZero | blk.StatusAllocated}, n, nil
	}
	align := int64(e.limits().RequestAlign)
	n = min(n, e.size-off, c.Limits().MaxDiscard)
	r := getRequest(cmdBlockStatus, cmdReqOne, off, n)
	defer putBack(r)
	if err := c.do(r); err != nil {
		return blk.Status{}, 0, err
	}
	run, state := int64(r.extent), r.state
	if run = min(run, n); run%align != 0 {
		// The protocol wants a multiple. What is left over is known to be something, and data is always right.
		if run -= run % align; run == 0 {
			run, state = min(align, n), 0
		}
	}
	s := blk.Status{Flags: blk.StatusAllocated | blk.StatusOffset, Offset: off}
	if state&stateHole == 0 {
		s.Flags |= blk.StatusData
	}
	if state&stateZero != 0 {
		s.Flags |= blk.StatusZero
	}
	return s, run, nil
}

// Flush returns when what was written before is on the server's stable storage. A server without NBD_CMD_FLUSH has
// nothing to flush. Errors: ErrUnflushed besides those of ReadVecAt.
func (c *Client) Flush() error {
	c.mu.Lock()
	told := c.told
	c.mu.Unlock()
	if err := c.flush(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if told == c.losses {
		return nil
	}
	c.told = c.losses // one that began before this one ended reports the loss as well
	return ErrUnflushed
}

// flush flushes and leaves it to Flush to tell of writes that were lost.
func (c *Client) flush() error {
	if !c.export.Load().has(flagSendFlush) {
		return nil
	}
	r := getRequest(cmdFlush, 0, 0, 0)
	defer putBack(r)
	return c.do(r)
}

// Refresh connects anew to learn whether the export has changed, as one that was resized, and takes it as it is. It
// also ends the waiting for a lost connection to an export that is not the same any more (ErrChanged).
func (c *Client) Refresh() error {
	c.mu.Lock()
	connected, fatal := c.cur != nil, c.fatal
	c.mu.Unlock()
	if fatal != nil {
		return fatal
	}
	if connected { // the next connection's flush may not cover this one's writes
		if err := c.flush(); err != nil && !errors.Is(err, ErrLost) {
			return err
		}
	}
	l, e, err := connect(c.ctx, &c.o)
	if err != nil {
		return fmt.Errorf("nbd: %s: %w", c.o.String(), err)
	}
	c.mu.Lock()
	if c.fatal != nil {
		c.mu.Unlock()
		l.Close()
		return c.fatal
	}
	old := c.cur
	c.export.Store(e)
	c.cur = c.start(l, e)
	c.broadcast()
	c.mu.Unlock()
	if old != nil {
		old.leave()
	}
	return nil
}

// Close disconnects. Requests under way, and later ones, get blk.ErrClosed; whether writes among them were carried out
// is not known. It does not flush.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.fatal != nil && errors.Is(c.fatal, blk.ErrClosed) {
		c.mu.Unlock()
		return blk.ErrClosed
	}
	c.fatal = blk.ErrClosed
	cur := c.cur
	c.cur = nil
	c.broadcast()
	c.mu.Unlock()
	c.cancel()
	if cur != nil {
		cur.leave()
	}
	c.ends.Wait()
	return nil
}

// checkRange checks a range of the disk, which may end behind the export.
func (e *export) checkRange(off, n int64) error {
	if size := e.sectors(); off < 0 || n < 0 || off > size || n > size-off {
		return blk.ErrRange
	}
	return nil
}

// inside returns how many of n bytes at off are the export's.
func (e *export) inside(off, n int64) int64 { return min(n, max(e.size-off, 0)) }

// transfer carries out a read or write, in pieces of MaxTransfer. A read is short where the export ends.
func (c *Client) transfer(cmd, flags uint16, v iov.Vec, off int64) (int, error) {
	e, size := c.export.Load(), v.Size()
	if cmd == cmdWrite && e.has(flagReadOnly) {
		return 0, blk.ErrReadOnly
	}
	if err := e.checkRange(off, int64(size)); err != nil || size == 0 {
		return 0, err
	}
	end := int(e.inside(off, int64(size)))
	if cmd == cmdWrite && end < size {
		if zero, err := v.IsZeroRange(end, size-end); err != nil || !zero {
			return 0, errors.Join(err, fmt.Errorf("nbd: write behind the end of an export of %d bytes: %w", e.size, unix.ENOSPC))
		}
	}
	most := int(e.limits().MaxTransfer)
	for done := 0; done < end; {
		n := min(end-done, most)
		r := getRequest(cmd, flags, off+int64(done), int64(n))
		r.vec, r.vecOff = v, done
		err := c.do(r)
		putBack(r)
		if err != nil {
			return done, err
		}
		done += n
	}
	if cmd == cmdRead {
		return end, nil
	}
	return size, nil
}

// ranged carries out a command on a range, in pieces of most bytes.
func (c *Client) ranged(cmd, flags uint16, off, n, most int64) error {
	e := c.export.Load()
	if e.has(flagReadOnly) {
		return blk.ErrReadOnly
	}
	if err := e.checkRange(off, n); err != nil {
		return err
	}
	for n = e.inside(off, n); n > 0; {
		k := min(n, most)
		r := getRequest(cmd, flags, off, k)
		err := c.do(r)
		putBack(r)
		if err != nil {
			return err
		}
		off += k
		n -= k
	}
	return nil
}

// request is one request and what has come back for it. Its goroutine owns it, but from register to done the conn's
// reader does. One that was started has no goroutine: see letGo.
type request struct {
	cmd, flags uint16
	off, n     int64
	vec        iov.Vec // with vecOff: n bytes to read into or to write
	vecOff     int

	head [requestLen]byte
	done chan struct{} // gets one value when the answer is complete, or none will come
	slot uint32        // of the conn

	io    *blk.IO      // for one that was started
	next  *request     // to be sent behind it
	users atomic.Int32 // goroutines that are not done with it

	// The answer.
	err    error // errLost where none came
	got    coverage
	errors int    // error chunks
	extent uint32 // of block status: length and state of the first run; 0 before it came
	state  uint32
	mark   uint64 // of a flush: which writes it covers

	firstLost time.Time // when its connection was first lost
}

var requests = sync.Pool{New: func() any { return &request{done: make(chan struct{}, 1)} }}

func getRequest(cmd, flags uint16, off, n int64) *request {
	r := requests.Get().(*request)
	r.cmd, r.flags, r.off, r.n = cmd, flags, off, n
	r.firstLost = time.Time{}
	return r
}

func putBack(r *request) {
	r.vec, r.vecOff, r.err, r.io, r.next = nil, 0, nil, nil, nil
	requests.Put(r)
}

// do carries out r, on as many connections as it takes.
func (c *Client) do(r *request) error {
	for {
		cn, err := c.connected()
		if err != nil {
			return err
		}
		if err := cn.roundTrip(r); err != errLost {
			return err
		}
		if err := c.mayRepeat(r); err != nil {
			return err
		}
	}
}
