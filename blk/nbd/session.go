package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

const (
	defaultRequests = 64
	defaultBytes    = 64 << 20
	defaultStall    = time.Minute

	maxExtents = 1024 // runs in one answer to a block status
)

// session is the transmission phase with one client.
//
// Workers, goroutines that are all alike, take turns in reading: one holds the lead, reads a request with its payload,
// passes the lead on, carries the request out and answers it. A new worker is started when nobody is left to take the
// lead, up to the limit; then the client waits. So a request changes goroutines only where several are under way.
type session struct {
	c      *serverConn
	s      *Server
	export *Export
	disk   *blk.Device
	link   *link

	lead    sync.Mutex // held while a request is read; guards what follows
	head    [requestLen]byte
	over    bool // nothing more is read
	err     error
	ends    sync.WaitGroup // of the workers
	workers int
	most    int

	sendMu sync.Mutex // held while an answer is sent

	mu      sync.Mutex
	room    sync.Cond // signalled when bytes falls
	waiting int       // workers that wait for the lead
	active  int       // requests under way
	bytes   int64     // their payload
	limit   int64
	closing bool  // the server shuts down
	stalled error // the client did not take an answer

	memory *holder // of Server.memory
}

// task is a request under way. Each worker has one for its whole life.
type task struct {
	cmd, flags uint16
	cookie     uint64
	off        uint64
	n          uint32

	buf   *buffer // payload, or nil
	vec   iov.Vec // over what is used of buf
	req   blk.Request
	reply [structuredLen + 8]byte
	stat  []byte // payload of a block status
	taken int64  // of session.bytes
}

func newSession(c *serverConn) *session {
	ss := &session{
		c: c, s: c.s, export: c.export, disk: c.export.Disk, link: c.link,
		most:  orDefault(c.s.MaxRequests, defaultRequests),
		limit: orDefault(c.s.MaxBytes, defaultBytes),
	}
	ss.room.L = &ss.mu
	ss.link.limitStalls(orDefault(c.s.StallTimeout, defaultStall))
	return ss
}

// run serves requests until the client or the server ends the session.
func (ss *session) run() error {
	ss.memory = ss.s.memory.join()
	defer ss.memory.leave()
	ss.workers = 1
	ss.ends.Go(ss.work)
	ss.ends.Wait()
	if ss.stalled != nil {
		return ss.stalled
	}
	return ss.err
}

// wind lets the session end as soon as no request is under way.
func (ss *session) wind() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.closing = true
	if ss.active == 0 {
		ss.link.Close()
	}
}

// work is a worker.
func (ss *session) work() {
	t := &task{}
	for ss.next(t) {
		err := ss.carryOut(t)
		ss.done(t)
		if err != nil {
			ss.cut(err)
		}
	}
}

// cut ends the session when sending has failed: an answer is cut short, and nothing can follow.
func (ss *session) cut(err error) {
	ss.mu.Lock()
	if ss.stalled == nil && errors.Is(err, os.ErrDeadlineExceeded) {
		ss.stalled = fmt.Errorf("the client does not take its answers: %w", err)
	}
	ss.mu.Unlock()
	ss.c.plain.Close() // TLS would wait to say good-bye
}

// next waits for the lead and reads a request. It returns false when there will be none.
func (ss *session) next(t *task) bool {
	ss.mu.Lock()
	ss.waiting++
	ss.mu.Unlock()
	ss.lead.Lock()
	defer ss.lead.Unlock()
	ss.mu.Lock()
	ss.waiting--
	ss.mu.Unlock()
	if ss.over {
		return false
	}
	if err := ss.read(t); err != nil {
		ss.giveBack(t)
		ss.end(err)
		return false
	}
	ss.mu.Lock()
	ss.active++
	idle := ss.waiting
	ss.mu.Unlock()
	if idle == 0 && ss.workers < ss.most {
		ss.workers++
		ss.ends.Go(ss.work)
	}
	return true
}

// end notes that nothing more is read. Requests under way are still answered (proto, Terminating the transmission
// phase), to whom it takes the answers. The caller holds the lead.
func (ss *session) end(err error) {
	ss.over = true
	ss.mu.Lock()
	closing := ss.closing
	ss.mu.Unlock()
	switch {
	case err == errSoft, err == io.EOF, closing:
	case errors.Is(err, os.ErrDeadlineExceeded):
		ss.err = fmt.Errorf("the client stopped in the midst of a request: %w", err)
	default:
		ss.err = err
	}
	if errors.Is(err, ErrProtocol) {
		ss.link.Close()
	}
}

// giveBack gives back the buffer of t.
func (ss *session) giveBack(t *task) {
	if t.buf != nil {
		n := int64(len(t.buf.data))
		t.buf.release()
		t.buf = nil
		ss.memory.release(n)
	}
}

// done gives back what t has taken.
func (ss *session) done(t *task) {
	ss.giveBack(t)
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.active--
	if t.taken > 0 {
		ss.bytes -= t.taken
		t.taken = 0
		ss.room.Signal()
	}
	if ss.closing && ss.active == 0 {
		ss.link.Close()
	}
}

// read reads one request and its payload. The caller holds the lead.
func (ss *session) read(t *task) error {
	if err := ss.link.readFull(ss.head[:]); err != nil {
		return err
	}
	if magic := be.Uint32(ss.head[0:]); magic != magicRequest {
		return violation("request begins with %#x", magic)
	}
	t.flags, t.cmd = be.Uint16(ss.head[4:]), be.Uint16(ss.head[6:])
	t.cookie, t.off, t.n = be.Uint64(ss.head[8:]), be.Uint64(ss.head[16:]), be.Uint32(ss.head[24:])
	switch t.cmd {
	case cmdDisc:
		return errSoft
	case cmdRead, cmdWrite:
		if t.n > maxBlock {
			if t.cmd == cmdWrite {
				return violation("a write of %d bytes", t.n)
			}
			return nil // refused later
		}
		ss.take(t)
		class := bufferClass(int(t.n))
		ss.memory.take(1 << class)
		t.buf = getBuffer(class)
		t.vec = append(t.vec[:0], iov.RangeOf(t.buf.data[:t.n]))
		if t.cmd == cmdWrite {
			return unexpected(ss.link.readVec(t.vec, 0, int(t.n)))
		}
	}
	return nil
}

// take waits until the payload of t fits under the session's limit.
func (ss *session) take(t *task) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for ss.bytes > 0 && ss.bytes+int64(t.n) > ss.limit {
		ss.room.Wait()
	}
	t.taken = int64(t.n)
	ss.bytes += t.taken
}

// Flags that a command may have besides NBD_CMD_FLAG_FUA, which all may have: proto, Command flags.
var cmdFlags = map[uint16]uint16{
	cmdRead:        cmdDF,
	cmdWrite:       0,
	cmdFlush:       0,
	cmdTrim:        0,
	cmdWriteZeroes: cmdNoHole | cmdFastZero,
	cmdBlockStatus: cmdReqOne,
}

// refusal is an answer with an error that the client itself is the cause of.
type refusal struct {
	code errno
	why  string
}

var (
	refUnknown   = &refusal{errInval, "unknown command, or flag not known for it"}
	refShutdown  = &refusal{errShutdown, "the server is shutting down"}
	refReadOnly  = &refusal{errPerm, "the export is read-only"}
	refTooLong   = &refusal{errInval, "longer than the maximum block size"}
	refBeyond    = &refusal{errInval, "beyond the end of the export"}
	refNoSpace   = &refusal{errNoSpace, "beyond the end of the export"}
	refNoContext = &refusal{errInval, "no metadata context was negotiated"}
	refEmpty     = &refusal{errInval, "an empty range has no status"}
)

// check looks at a request before the disk sees it. Which error is due: proto, Error values.
func (ss *session) check(t *task) *refusal {
	known, ok := cmdFlags[t.cmd]
	if !ok || t.flags&^(known|cmdFUA) != 0 || t.flags&cmdDF != 0 && !ss.c.structured {
		return refUnknown
	}
	ss.mu.Lock()
	closing := ss.closing
	ss.mu.Unlock()
	if closing {
		return refShutdown
	}
	writes := t.cmd == cmdWrite || t.cmd == cmdTrim || t.cmd == cmdWriteZeroes
	size := uint64(ss.disk.Size())
	switch {
	case t.cmd == cmdFlush:
		return nil
	case writes && ss.export.readOnly():
		return refReadOnly
	case t.cmd == cmdRead && t.n > maxBlock:
		return refTooLong
	case t.off > size || uint64(t.n) > size-t.off:
		if t.cmd == cmdWrite || t.cmd == cmdWriteZeroes {
			return refNoSpace
		}
		return refBeyond
	case t.cmd == cmdBlockStatus && ss.c.meta == nil:
		return refNoContext
	case t.cmd == cmdBlockStatus && t.n == 0:
		return refEmpty
	}
	return nil
}

// carryOut carries t out and answers it. An error is one of sending.
func (ss *session) carryOut(t *task) error {
	if r := ss.check(t); r != nil {
		return ss.answerError(t, r.code, r.why)
	}
	if t.cmd == cmdBlockStatus {
		return ss.blockStatus(t)
	}
	t.req = blk.Request{Off: int64(t.off)}
	switch t.cmd {
	case cmdRead:
		t.req.Op, t.req.Vec = blk.OpRead, t.vec
	case cmdWrite:
		t.req.Op, t.req.Vec = blk.OpWrite, t.vec
	case cmdFlush:
		t.req = blk.Request{Op: blk.OpFlush}
	case cmdTrim:
		t.req.Op, t.req.Len = blk.OpDiscard, int64(t.n)
	case cmdWriteZeroes:
		t.req.Op, t.req.Len = blk.OpWriteZeroes, int64(t.n)
		if t.flags&cmdNoHole == 0 {
			t.req.Flags |= blk.MayUnmap
		}
		if t.flags&cmdFastZero != 0 {
			t.req.Flags |= blk.NoFallback
		}
	}
	if t.flags&cmdFUA != 0 && (t.cmd == cmdWrite || t.cmd == cmdWriteZeroes) {
		t.req.Flags |= blk.FUA
	}
	err := error(nil)
	if t.n > 0 || t.cmd == cmdFlush {
		err = ss.disk.Do(ss.s.ctx, &t.req)
	}
	if err == nil && t.cmd == cmdTrim && t.flags&cmdFUA != 0 {
		t.req = blk.Request{Op: blk.OpFlush}
		err = ss.disk.Do(ss.s.ctx, &t.req)
	}
	t.req.Vec = nil
	switch {
	case err != nil:
		return ss.answerFailure(t, err)
	case t.cmd == cmdRead:
		return ss.answerRead(t)
	}
	return ss.answerDone(t)
}

// blockStatus answers with the runs of equal status from t.off on.
func (ss *session) blockStatus(t *task) error {
	most := maxExtents
	if t.flags&cmdReqOne != 0 {
		most = 1
	}
	t.stat = be.AppendUint32(t.stat[:0], metaID)
	off, left := int64(t.off), int64(t.n)
	last, extents := uint32(0), 0
	for calls := 0; left > 0 && calls < 4*maxExtents; calls++ {
		s, _, run, err := ss.disk.StatusAbove(ss.s.ctx, nil, off, left)
		switch {
		case errors.Is(err, errors.ErrUnsupported):
			s, run = blk.Status{Flags: blk.StatusData | blk.StatusAllocated}, left
		case err != nil && extents == 0:
			return ss.answerFailure(t, err)
		case err != nil || run <= 0:
			left = 0
			continue
		}
		run = min(run, left)
		state := allocation(s.Flags)
		if extents > 0 && state == last {
			at := len(t.stat) - 8
			be.PutUint32(t.stat[at:], be.Uint32(t.stat[at:])+uint32(run)) // their sum is t.n at most
		} else {
			if extents == most {
				break
			}
			t.stat = be.AppendUint32(t.stat, uint32(run))
			t.stat = be.AppendUint32(t.stat, state)
			last = state
			extents++
		}
		off += run
		left -= run
	}
	if extents == 0 {
		return ss.answerError(t, errIO, "")
	}
	putStructured(t.reply[:], chunkDone, chunkBlockStatus, t.cookie, uint32(len(t.stat)))
	t.vec = append(t.vec[:0], iov.RangeOf(t.stat))
	return ss.send(t, structuredLen, len(t.stat))
}

// allocation translates to base:allocation. What no layer has reads as zeroes.
func allocation(f blk.StatusFlags) uint32 {
	state := uint32(0)
	if f&blk.StatusData == 0 {
		state |= stateHole
	}
	if f&blk.StatusZero != 0 || f&blk.StatusAllocated == 0 {
		state |= stateZero
	}
	return state
}

// answerRead sends the data. It is one chunk, and the last: nothing can fail any more.
func (ss *session) answerRead(t *task) error {
	switch {
	case !ss.c.structured:
		putSimple(t.reply[:], 0, t.cookie)
		return ss.send(t, simpleLen, int(t.n))
	case t.n == 0:
		putStructured(t.reply[:], chunkDone, chunkNone, t.cookie, 0)
		return ss.send(t, structuredLen, 0)
	}
	putStructured(t.reply[:], chunkDone, chunkData, t.cookie, t.n+8)
	be.PutUint64(t.reply[structuredLen:], t.off)
	return ss.send(t, structuredLen+8, int(t.n))
}

// answerDone says that all went well.
func (ss *session) answerDone(t *task) error {
	putSimple(t.reply[:], 0, t.cookie)
	return ss.send(t, simpleLen, 0)
}

// answerFailure sends an error of the disk. Of its words the client hears nothing: they may tell of the host.
func (ss *session) answerFailure(t *task, err error) error {
	return ss.answerError(t, failure(err, t.flags&cmdFastZero != 0), "")
}

func (ss *session) answerError(t *task, code errno, why string) error {
	if !ss.c.structured {
		putSimple(t.reply[:], code, t.cookie)
		return ss.send(t, simpleLen, 0)
	}
	t.stat = be.AppendUint32(t.stat[:0], uint32(code))
	t.stat = be.AppendUint16(t.stat, uint16(len(why)))
	t.stat = append(t.stat, why...)
	putStructured(t.reply[:], chunkDone, chunkErr, t.cookie, uint32(len(t.stat)))
	t.vec = append(t.vec[:0], iov.RangeOf(t.stat))
	return ss.send(t, structuredLen, len(t.stat))
}

// send sends the first head bytes of t.reply and then n bytes of t.vec.
func (ss *session) send(t *task, head, n int) error {
	ss.sendMu.Lock()
	defer ss.sendMu.Unlock()
	if err := ss.link.send(t.reply[:head], t.vec, 0, n); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	return nil
}

// failure translates an error of the disk (proto, Error values).
func failure(err error, fast bool) errno {
	is := func(targets ...error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return true
			}
		}
		return false
	}
	switch {
	case is(blk.ErrClosed, context.Canceled, unix.ESHUTDOWN):
		return errShutdown
	case is(blk.ErrReadOnly, unix.EPERM, unix.EACCES, unix.EROFS):
		return errPerm
	case is(unix.ENOSPC, unix.EDQUOT, unix.EFBIG):
		return errNoSpace
	case is(unix.ENOMEM):
		return errNoMem
	case fast && is(errors.ErrUnsupported):
		return errNotSup
	case is(blk.ErrRange, unix.EINVAL, errors.ErrUnsupported):
		return errInval
	}
	return errIO
}

// buffer is memory for payload, from a pool of its size. Sizes are powers of two from 4 KiB on, which the runtime
// places at multiples of the page size, so that disks that want aligned memory need not copy.
type buffer struct {
	data []byte
	pool *sync.Pool
}

const minBuffer = 4 << 10

var buffers [bits.UintSize]sync.Pool // by the binary logarithm of the size

// bufferClass returns the binary logarithm of the size of a buffer for n bytes.
func bufferClass(n int) int { return bits.Len(uint(max(n, minBuffer) - 1)) }

func getBuffer(class int) *buffer {
	pool := &buffers[class]
	if b, ok := pool.Get().(*buffer); ok {
		return b
	}
	return &buffer{data: make([]byte, 1<<class), pool: pool}
}

func (b *buffer) release() { b.pool.Put(b) }
