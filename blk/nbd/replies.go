package nbd

import (
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// errLost ends a request on a conn that can't answer it any more. It is bare: do compares it.
var errLost = errors.New("nbd: no answer on this connection")

var errPeerLeaves = errors.New("the server is shutting down")

// maxErrorChunks bounds the error chunks for one request, of which the first is kept; maxUnknownError the length of one
// of unknown type, in bytes.
const (
	maxErrorChunks  = 1000
	maxUnknownError = 64 << 10
)

// conn is one connection of a Client, from the end of the handshake to its loss.
type conn struct {
	c    *Client
	link *link
	e    *export

	sendMu sync.Mutex  // held while a request is sent
	free   chan uint32 // slots that no request has
	dead   chan struct{}

	mu    sync.Mutex
	ended bool
	slots [maxInFlight]slot

	// How many writes without FUA have ended well, and how many of them a flush has made stable.
	writes, flushed atomic.Uint64
	answered        atomic.Uint64 // requests that have ended
}

// slot is a place for a request. Cookies are its number and a count, so that an answer which comes twice is noticed.
type slot struct {
	r   *request
	gen uint32
}

// start begins the transmission phase. The caller holds c.mu, and makes it c.cur before it lets go.
func (c *Client) start(l *link, e *export) *conn {
	cn := &conn{c: c, link: l, e: e, free: make(chan uint32, maxInFlight), dead: make(chan struct{})}
	for i := range uint32(maxInFlight) {
		cn.free <- i
	}
	c.ends.Go(cn.receive)
	return cn
}

// roundTrip sends r and waits for the answer. errLost means that there will be none.
func (cn *conn) roundTrip(r *request) error {
	if !cn.begin(r) {
		return errLost
	}
	<-r.done
	cn.free <- r.slot
	return r.err
}

// begin sends r and returns true: receive sees to the rest, even if sending fails. It returns false where the connection
// has ended before.
func (cn *conn) begin(r *request) bool {
	select {
	case r.slot = <-cn.free:
	case <-cn.dead:
		return false
	}
	r.err, r.errors, r.extent = nil, 0, 0
	r.got.reset()
	r.mark = cn.writes.Load()
	cookie, ok := cn.register(r)
	if !ok {
		return false
	}
	payload := 0
	if r.cmd == cmdWrite {
		payload = int(r.n)
	}
	putRequest(&r.head, r.flags, r.cmd, cookie, uint64(r.off), uint32(r.n))
	cn.sendMu.Lock()
	err := cn.link.send(r.head[:], r.vec, r.vecOff, payload)
	cn.sendMu.Unlock()
	if err != nil {
		cn.link.Close() // the stream is broken
	}
	return true
}

// register makes r known to receive.
func (cn *conn) register(r *request) (cookie uint64, ok bool) {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	if cn.ended {
		return 0, false
	}
	s := &cn.slots[r.slot]
	s.gen++
	s.r = r
	return uint64(s.gen)<<32 | uint64(r.slot), true
}

// find returns the request that waits for an answer with this cookie.
func (cn *conn) find(cookie uint64) (*request, error) {
	i, gen := uint32(cookie), uint32(cookie>>32)
	cn.mu.Lock()
	defer cn.mu.Unlock()
	if i >= maxInFlight || cn.slots[i].r == nil || cn.slots[i].gen != gen {
		return nil, violation("answer to a request that does not wait for one (cookie %#x)", cookie)
	}
	return cn.slots[i].r, nil
}

// finish ends r, whose answer is complete.
func (cn *conn) finish(r *request) {
	if r.err == nil {
		switch {
		case r.cmd == cmdFlush:
			cn.flushed.Store(max(cn.flushed.Load(), r.mark)) // receive alone writes it
		case (r.cmd == cmdWrite || r.cmd == cmdWriteZeroes) && r.flags&cmdFUA == 0:
			cn.writes.Add(1)
		}
	}
	cn.mu.Lock()
	cn.slots[r.slot].r = nil
	cn.mu.Unlock()
	cn.answered.Add(1)
	cn.answer(r)
}

// answer passes r on, with its answer or errLost.
func (cn *conn) answer(r *request) {
	if r.io != nil {
		cn.letGo(r)
		return
	}
	r.done <- struct{}{}
}

// unflushed reports whether writes that ended well may be lost with the server.
func (cn *conn) unflushed() bool {
	return cn.e.has(flagSendFlush) && cn.writes.Load() != cn.flushed.Load()
}

// leave disconnects in the way that the protocol asks for (proto, Terminating the transmission phase), if that can be
// done at once.
func (cn *conn) leave() {
	if cn.sendMu.TryLock() {
		var p [requestLen]byte
		putRequest(&p, 0, cmdDisc, 0, 0, 0)
		_ = cn.link.conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)) // fails on a closed one, as send does
		_ = cn.link.send(p[:], nil, 0, 0)                                         // the connection ends in any case
		cn.sendMu.Unlock()
	}
	cn.link.Close()
}

// receive reads answers until the connection ends, and then ends the requests that wait.
func (cn *conn) receive() {
	err := cn.readReplies()
	if err == errPeerLeaves {
		cn.leave()
	}
	cn.link.Close()
	cn.c.lost(cn, err)
	cn.mu.Lock()
	cn.ended = true
	cn.mu.Unlock() // nobody else changes the slots from now on
	close(cn.dead)
	for i := range cn.slots {
		if r := cn.slots[i].r; r != nil {
			cn.slots[i].r = nil
			r.err = errLost
			cn.answer(r)
		}
	}
}

func (cn *conn) readReplies() error {
	head := make([]byte, structuredLen)
	for {
		if err := cn.link.readFull(head[:simpleLen]); err != nil {
			if err == io.EOF {
				err = errors.New("the server closed it")
			}
			return err
		}
		r, err := cn.find(be.Uint64(head[8:]))
		if err != nil {
			return err
		}
		done := true
		switch magic := be.Uint32(head); magic {
		case magicSimple:
			err = cn.simple(r, errno(be.Uint32(head[4:])))
		case magicStructured:
			if err = cn.link.readFull(head[simpleLen:]); err == nil {
				done, err = cn.chunk(r, be.Uint16(head[4:]), be.Uint16(head[6:]), be.Uint32(head[16:]))
			}
		default:
			return violation("answer begins with %#x", magic)
		}
		if err != nil {
			return unexpected(err)
		}
		if done {
			cn.finish(r)
		}
	}
}

// simple takes a simple reply (proto, Simple reply message).
func (cn *conn) simple(r *request, e errno) error {
	switch {
	case r.got.any() || r.errors > 0 || r.extent > 0:
		return violation("simple reply after chunks of a structured one")
	case cn.e.structured && (r.cmd == cmdRead || r.cmd == cmdBlockStatus && e == 0):
		return violation("simple reply to a %s", r.name())
	case e != 0:
		return r.fail(e, "")
	case r.cmd == cmdRead:
		return cn.link.readVec(r.vec, r.vecOff, int(r.n))
	}
	return nil
}

// chunk takes a chunk of a structured reply (proto, Structured reply types).
func (cn *conn) chunk(r *request, flags, kind uint16, n uint32) (done bool, err error) {
	if !cn.e.structured {
		return false, violation("structured reply, which was not negotiated")
	}
	done = flags&chunkDone != 0
	switch {
	case kind == chunkNone && n == 0 && done:
	case kind == chunkData && r.cmd == cmdRead && n > 8:
		err = cn.dataChunk(r, int64(n)-8)
	case kind == chunkHole && r.cmd == cmdRead && n == 12:
		err = cn.holeChunk(r)
	case kind == chunkBlockStatus && r.cmd == cmdBlockStatus && n == 12:
		err = cn.statusChunk(r)
	case kind&chunkErrBit != 0:
		err = cn.errorChunk(r, kind, n)
	default:
		return false, violation("reply chunk of type %d, flags %#x and %d bytes to a %s", kind, flags, n, r.name())
	}
	if err == nil && done && r.err == nil {
		switch {
		case r.cmd == cmdRead && !r.got.all(r.n):
			err = violation("the answer to a read ends before its data")
		case r.cmd == cmdBlockStatus && r.extent == 0:
			err = violation("the answer to a block status says nothing")
		}
	}
	return done, err
}

// place checks where a content chunk lies and returns its offset in the request.
func (r *request) place(off uint64, n int64) (int, error) {
	if off < uint64(r.off) || off > math.MaxInt64 || n <= 0 || n > r.n || int64(off)-r.off > r.n-n {
		return 0, violation("%d bytes at %d in the answer to a read of %d bytes at %d", n, off, r.n, r.off)
	}
	at := int64(off) - r.off
	if !r.got.add(at, n) {
		return 0, violation("chunks overlap, or are too many, in the answer to a read of %d bytes at %d", r.n, r.off)
	}
	return int(at), nil
}

func (cn *conn) dataChunk(r *request, n int64) error {
	off, err := cn.uint64()
	if err != nil {
		return err
	}
	at, err := r.place(off, n)
	if err != nil {
		return err
	}
	return cn.link.readVec(r.vec, r.vecOff+at, int(n))
}

func (cn *conn) holeChunk(r *request) error {
	off, err := cn.uint64()
	if err != nil {
		return err
	}
	n, err := cn.uint32()
	if err != nil {
		return err
	}
	at, err := r.place(off, int64(n))
	if err != nil {
		return err
	}
	return r.vec.Fill(r.vecOff+at, int(n), 0)
}

// statusChunk takes the one descriptor that NBD_CMD_FLAG_REQ_ONE asked for.
func (cn *conn) statusChunk(r *request) error {
	var p [12]byte
	if err := cn.link.readFull(p[:]); err != nil {
		return err
	}
	id, n, state := be.Uint32(p[0:]), be.Uint32(p[4:]), be.Uint32(p[8:])
	if id != cn.e.metaID || n == 0 || r.extent != 0 {
		return violation("block status of context %d for %d bytes (expected one, of context %d)", id, n, cn.e.metaID)
	}
	r.extent, r.state = n, state
	return nil
}

// errorChunk takes an error; the first one counts.
func (cn *conn) errorChunk(r *request, kind uint16, n uint32) error {
	if r.errors++; r.errors > maxErrorChunks {
		return violation("more than %d errors for one request", maxErrorChunks)
	}
	rest := uint32(0) // what follows the message
	if kind == chunkErrOffset {
		rest = 8
	}
	if n < 6+rest || n > maxUnknownError {
		return violation("error chunk of type %#x with %d bytes", kind, n)
	}
	var p [6]byte
	if err := cn.link.readFull(p[:]); err != nil {
		return err
	}
	e, msgLen := errno(be.Uint32(p[0:])), uint32(be.Uint16(p[4:]))
	if e == 0 || msgLen > n-6-rest || msgLen > maxString {
		return violation("error chunk with error %d and a message of %d in %d bytes", e, msgLen, n)
	}
	msg := make([]byte, msgLen)
	if err := cn.link.readFull(msg); err != nil {
		return err
	}
	if err := cn.link.skip(int(n - 6 - msgLen)); err != nil {
		return err
	}
	return r.fail(e, string(msg))
}

func (cn *conn) uint64() (uint64, error) {
	var p [8]byte
	err := cn.link.readFull(p[:])
	return be.Uint64(p[:]), err
}

func (cn *conn) uint32() (uint32, error) {
	var p [4]byte
	err := cn.link.readFull(p[:])
	return be.Uint32(p[:]), err
}

// fail notes the server's refusal. A server that shuts down refuses everything: the request goes to the next one
// (proto, Terminating the transmission phase).
func (r *request) fail(e errno, msg string) error {
	if e == errShutdown {
		return errPeerLeaves
	}
	if r.err == nil {
		r.err = &Error{Command: r.name(), Off: r.off, Len: r.n, Errno: e.system(), Message: msg}
	}
	return nil
}

func (r *request) name() string {
	switch r.cmd {
	case cmdRead:
		return "read"
	case cmdWrite:
		return "write"
	case cmdFlush:
		return "flush"
	case cmdTrim:
		return "discard"
	case cmdWriteZeroes:
		return "write of zeroes"
	case cmdBlockStatus:
		return "block status query"
	}
	return fmt.Sprintf("command %d", r.cmd)
}

// maxSpans bounds the runs of an answer that have come, with gaps between them, at any time.
const maxSpans = 1024

// coverage is the part of a read for which content has come: runs in order that neither touch nor overlap.
type coverage struct{ spans []span }

type span struct{ from, to int64 }

func (c *coverage) reset() { c.spans = c.spans[:0] }

func (c *coverage) any() bool { return len(c.spans) > 0 }

// all reports whether the bytes from 0 to n are there.
func (c *coverage) all(n int64) bool { return len(c.spans) == 1 && c.spans[0] == span{0, n} }

// add notes n bytes at off. It returns false if some were there, or if there are too many gaps.
func (c *coverage) add(off, n int64) bool {
	i := len(c.spans) // most servers send in order: look from the end
	for i > 0 && c.spans[i-1].from >= off {
		i--
	}
	end := off + n
	before := i > 0 && c.spans[i-1].to >= off
	after := i < len(c.spans) && c.spans[i].from <= end
	switch {
	case before && c.spans[i-1].to > off, after && c.spans[i].from < end:
		return false
	case before && after:
		c.spans[i-1].to = c.spans[i].to
		c.spans = append(c.spans[:i], c.spans[i+1:]...)
	case before:
		c.spans[i-1].to = end
	case after:
		c.spans[i].from = off
	case len(c.spans) == maxSpans:
		return false
	default:
		c.spans = append(c.spans, span{})
		copy(c.spans[i+1:], c.spans[i:])
		c.spans[i] = span{off, end}
	}
	return true
}
