package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
)

const (
	// MaxPayload is the most a frame carries, in bytes. With the header it makes 32 KiB, the most that Linux's
	// virtio console driver takes in one write.
	MaxPayload = 32<<10 - headerLen

	// Window is the number of bytes a sender may have under way on one byte stream of a process.
	Window = 256 << 10

	headerLen = 8
)

var (
	// ErrProtocol says that the other end sent what it must not. The connection is of no more use.
	ErrProtocol = errors.New("agent protocol violated")

	// ErrVersion says that the other end speaks another version of the protocol.
	ErrVersion = errors.New("agent speaks another protocol version")
)

// frameType is the first byte of a frame.
type frameType uint8

const (
	framePad     frameType = iota // a single zero byte, no header
	frameHello                    // both ways, stream 0
	frameStart                    // to the guest: a piece of an encoded Command; channel 1 marks the last
	frameStarted                  // to the host: pid, or errno and text if it failed
	frameData                     // both ways: bytes of a channel; none mean end of file
	frameCredit                   // both ways: u32, bytes of a channel that were consumed
	frameClose                    // both ways: nobody will read this channel any more
	frameSignal                   // to the guest: u32 signal number for the process group
	frameResize                   // to the guest: u16 rows, u16 columns
	frameExit                     // to the host: u32 exit code, u32 signal
	frameRequest                  // to the guest: a piece of a request; channel 1 marks the last
	frameReply                    // to the host: a piece of the reply; channel 1 marks the last
	frameTypes
)

// channel numbers a byte stream of a process as its file descriptor is numbered.
type channel uint8

const (
	stdin channel = iota
	stdout
	stderr
	channels
)

// Pieces of a message that does not fit one frame are told apart by the channel field.
const (
	pieceMore channel = iota
	pieceLast
)

// shape is what a frame of one type may look like.
type shape struct{ minLen, maxLen, maxChannel int }

var shapes = [frameTypes]shape{
	frameHello:   {helloLen, helloLen, 0},
	frameStart:   {0, MaxPayload, 1},
	frameStarted: {8, 8 + maxErrorText, 0},
	frameData:    {0, MaxPayload, 2},
	frameCredit:  {4, 4, 2},
	frameClose:   {0, 0, 2},
	frameSignal:  {4, 4, 0},
	frameResize:  {4, 4, 0},
	frameExit:    {8, 8, 0},
	frameRequest: {0, MaxPayload, 1},
	frameReply:   {0, MaxPayload, 1},
}

// frame is one decoded frame. Its payload is valid until the next call of the decoder.
type frame struct {
	typ     frameType
	channel channel
	stream  uint32
	payload []byte
}

// putHeader writes a frame's header to the front of b.
func putHeader(b []byte, t frameType, c channel, stream uint32, length int) {
	_ = b[headerLen-1]
	b[0], b[1] = byte(t), byte(c)
	binary.LittleEndian.PutUint16(b[2:], uint16(length))
	binary.LittleEndian.PutUint32(b[4:], stream)
}

// decoder reads frames from a byte stream through a buffer of fixed size.
type decoder struct {
	r          io.Reader
	buf        []byte
	start, end int // the unread part of buf
}

func newDecoder(r io.Reader) *decoder {
	return &decoder{r: r, buf: make([]byte, 2*(headerLen+MaxPayload))}
}

// fill reads until at least n bytes are buffered; n is at most one whole frame. It returns io.EOF where the stream ends
// before the first of them, and io.ErrUnexpectedEOF where it ends inside.
func (d *decoder) fill(n int) error {
	if len(d.buf)-d.start < n {
		d.end = copy(d.buf, d.buf[d.start:d.end])
		d.start = 0
	}
	for empty := 0; d.end-d.start < n; {
		got, err := d.r.Read(d.buf[d.end:])
		if got < 0 || got > len(d.buf)-d.end {
			return fmt.Errorf("read %d bytes into %d: %w", got, len(d.buf)-d.end, ErrProtocol)
		}
		d.end += got
		switch {
		case d.end-d.start >= n:
			return nil
		case err == io.EOF && d.end > d.start:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		case got > 0:
			empty = 0
		default:
			if empty++; empty == 100 {
				return io.ErrNoProgress
			}
		}
	}
	return nil
}

// next returns the next frame, or an error of the stream, or ErrProtocol. After ErrProtocol only sync helps.
func (d *decoder) next() (frame, error) {
	for {
		if err := d.fill(1); err != nil {
			return frame{}, err
		}
		if d.buf[d.start] != byte(framePad) {
			break
		}
		for d.start < d.end && d.buf[d.start] == byte(framePad) {
			d.start++
		}
	}
	if err := d.fill(headerLen); err != nil {
		return frame{}, err
	}
	h := d.buf[d.start:]
	f := frame{typ: frameType(h[0]), channel: channel(h[1]), stream: binary.LittleEndian.Uint32(h[4:])}
	length := int(binary.LittleEndian.Uint16(h[2:]))
	if f.typ >= frameTypes {
		return frame{}, fmt.Errorf("frame of unknown type %d: %w", f.typ, ErrProtocol)
	}
	if s := shapes[f.typ]; length < s.minLen || length > s.maxLen || int(f.channel) > s.maxChannel {
		return frame{}, fmt.Errorf("frame of type %d with %d bytes on channel %d: %w", f.typ, length, f.channel, ErrProtocol)
	}
	if (f.stream == 0) != (f.typ == frameHello) {
		return frame{}, fmt.Errorf("frame of type %d on stream %d: %w", f.typ, f.stream, ErrProtocol)
	}
	if err := d.fill(headerLen + length); err != nil {
		return frame{}, err
	}
	f.payload = d.buf[d.start+headerLen : d.start+headerLen+length : d.start+headerLen+length]
	d.start += headerLen + length
	return f, nil
}

// sync skips what comes before the next hello and returns that.
func (d *decoder) sync() (hello, error) {
	const need = headerLen + helloLen
	for {
		if err := d.fill(need); err != nil {
			return hello{}, err
		}
		at := bytes.Index(d.buf[d.start:d.end], helloPrefix[:])
		if at < 0 { // keep what may be the prefix's beginning
			d.start = max(d.start+1, d.end-len(helloPrefix)+1)
			continue
		}
		d.start += at
		if err := d.fill(need); err != nil {
			return hello{}, err
		}
		h, err := parseHello(d.buf[d.start+headerLen : d.start+need])
		if errors.Is(err, ErrProtocol) { // the prefix was in somebody's data
			d.start++
			continue
		}
		d.start += need
		return h, err
	}
}

// writer sends whole frames. Its methods may be called from any goroutine and, but for post, wait until the frame is
// written, which may be for ever if the other end reads no more.
type writer struct {
	mu  sync.Mutex
	w   io.Writer // guarded by mu
	err error     // the first failure, after which nothing is sent; guarded by mu
	buf []byte    // guarded by mu

	postMu sync.Mutex // taken with or without mu, and never held while something is written
	posted []byte     // whole frames to be sent ahead of all others; guarded by postMu
}

// maxPosted is how many bytes may wait to be sent because the other end reads nothing.
const maxPosted = 16 << 10

func newWriter(w io.Writer) *writer {
	return &writer{w: w, buf: make([]byte, headerLen+MaxPayload)}
}

// send writes one frame. The payload must fit.
func (w *writer) send(t frameType, c channel, stream uint32, payload []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.flushLocked(); err != nil {
		return err
	}
	putHeader(w.buf, t, c, stream, len(payload))
	n := copy(w.buf[headerLen:], payload)
	return w.writeLocked(w.buf[:headerLen+n])
}

// sendInPlace writes a frame whose payload the caller put at b[headerLen:], without copying it.
func (w *writer) sendInPlace(t frameType, c channel, stream uint32, b []byte) error {
	putHeader(b, t, c, stream, len(b)-headerLen)
	return w.write(b)
}

// write sends bytes that are whole frames already.
func (w *writer) write(b []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.flushLocked(); err != nil {
		return err
	}
	return w.writeLocked(b)
}

// post sends a frame whose payload is numbers, and does not wait until it is written. It goes ahead of what is sent after
// it. Where too much waits already, it is dropped and the error is EAGAIN.
func (w *writer) post(t frameType, c channel, stream uint32, values ...uint32) error {
	w.postMu.Lock()
	defer w.postMu.Unlock()
	length := 4 * len(values)
	if len(w.posted)+headerLen+length > maxPosted {
		return fmt.Errorf("the agent's other end reads nothing: %w", syscall.EAGAIN)
	}
	if len(w.posted) == 0 {
		go w.flush() // ends with the connection at the latest
	}
	var h [headerLen]byte
	putHeader(h[:], t, c, stream, length)
	w.posted = append(w.posted, h[:]...)
	for _, v := range values {
		w.posted = binary.LittleEndian.AppendUint32(w.posted, v)
	}
	return nil
}

// pad posts a byte that means nothing, unless something is to be sent anyway.
func (w *writer) pad() {
	w.postMu.Lock()
	defer w.postMu.Unlock()
	if len(w.posted) == 0 {
		w.posted = append(w.posted, byte(framePad))
		go w.flush() // ends with the connection at the latest
	}
}

// flush writes what was posted.
func (w *writer) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = w.flushLocked() // stays in w.err for the next
}

func (w *writer) flushLocked() error {
	w.postMu.Lock()
	b := w.posted
	w.posted = nil
	w.postMu.Unlock()
	if len(b) == 0 {
		return w.err
	}
	return w.writeLocked(b)
}

func (w *writer) writeLocked(b []byte) error {
	if w.err != nil {
		return w.err
	}
	n, err := w.w.Write(b)
	if err == nil && n != len(b) {
		err = io.ErrShortWrite
	}
	w.err = err
	return err
}

// sendU32 sends a frame whose payload is numbers.
func (w *writer) sendU32(t frameType, c channel, stream uint32, values ...uint32) error {
	b := make([]byte, 0, 8)
	for _, v := range values {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return w.send(t, c, stream, b)
}

// sendPieces sends a message of any length, the last piece marked, with no other frame between its pieces.
func (w *writer) sendPieces(t frameType, stream uint32, message []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.flushLocked(); err != nil {
		return err
	}
	for mark := pieceMore; mark != pieceLast; {
		n := copy(w.buf[headerLen:], message)
		if message = message[n:]; len(message) == 0 {
			mark = pieceLast
		}
		putHeader(w.buf, t, mark, stream, n)
		if err := w.writeLocked(w.buf[:headerLen+n]); err != nil {
			return err
		}
	}
	return nil
}

// stop makes later sends fail with err. It waits for a frame that is being written.
func (w *writer) stop(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
}

// assembler joins the pieces of messages, which come one after the other.
type assembler struct {
	typ    frameType // 0 between messages
	stream uint32
	buf    []byte
}

// add takes a frame and returns the whole message with its last piece, and nil before.
func (a *assembler) add(f frame) ([]byte, error) {
	if a.typ != 0 && (a.typ != f.typ || a.stream != f.stream) {
		return nil, fmt.Errorf("frame of type %d inside a message of type %d: %w", f.typ, a.typ, ErrProtocol)
	}
	if len(a.buf)+len(f.payload) > maxMessage {
		return nil, fmt.Errorf("message longer than %d bytes: %w", maxMessage, ErrProtocol)
	}
	a.typ, a.stream = f.typ, f.stream
	a.buf = append(a.buf, f.payload...)
	if f.channel != pieceLast {
		return nil, nil
	}
	message := a.buf
	*a = assembler{}
	if message == nil {
		message = []byte{}
	}
	return message, nil
}
