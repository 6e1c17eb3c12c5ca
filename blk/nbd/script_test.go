package nbd_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/iov"
)

// A script is what a server sends, in segments: one for the handshake, and one for each request that comes. It ends the
// connection after the last.
type script [][]byte

// encode and decode put a script into the one byte slice that a fuzz test changes: each segment behind its length.
func (s script) encode() []byte {
	var p []byte
	for _, seg := range s {
		p = append(nbd.BE.AppendUint16(p, uint16(len(seg))), seg...)
	}
	return p
}

func decode(p []byte) script {
	var s script
	for len(p) >= 2 {
		n := min(int(nbd.BE.Uint16(p)), len(p)-2)
		s = append(s, p[2:2+n])
		p = p[2+n:]
	}
	return s
}

// scripted is the client's end of a connection to a server that follows a script.
type scripted struct {
	net.Conn // nil: what is not here is not called
	mu       sync.Mutex
	cond     *sync.Cond
	rest     script
	cur      []byte
	closed   bool
	requests int
	client   *nbd.Client // set before the first request
}

func newScripted(s script) *scripted {
	c := &scripted{rest: s}
	c.cond = sync.NewCond(&c.mu)
	c.next()
	return c
}

func (c *scripted) next() {
	if len(c.rest) > 0 {
		c.cur, c.rest = c.rest[0], c.rest[1:]
	}
}

func (c *scripted) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// A request that has its answer leads to the next one. One that has not would wait for ever.
	for len(c.cur) == 0 && len(c.rest) > 0 && !c.closed && (c.requests == 0 || c.client.Answered() == c.requests) {
		c.cond.Wait()
	}
	if len(c.cur) == 0 || c.closed {
		return 0, io.EOF
	}
	n := copy(p, c.cur)
	c.cur = c.cur[n:]
	return n, nil
}

var requestMagic = []byte{0x25, 0x60, 0x95, 0x13}

func (c *scripted) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if bytes.HasPrefix(p, requestMagic) {
		c.requests++
		c.next()
		c.cond.Broadcast()
	}
	return len(p), nil
}

func (c *scripted) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.cond.Broadcast()
	return nil
}

// SetDeadline is called with the past, when the handshake takes too long.
func (c *scripted) SetDeadline(time.Time) error { return c.Close() }

func (c *scripted) SetWriteDeadline(time.Time) error { return nil }

// play lets a client dial a script, carry out what drive does, and close.
func play(tb testing.TB, s script, patience time.Duration) (errs []error, dialErr error) {
	tb.Helper()
	dials := 0
	nc := newScripted(s)
	c, err := nbd.Dial(tb.Context(), nbd.Options{Export: "disk", HandshakeTimeout: patience, Dial: func(context.Context) (net.Conn, error) {
		if dials++; dials > 1 {
			return nil, io.ErrClosedPipe
		}
		return nc, nil
	}})
	if err != nil {
		return nil, err
	}
	nc.client = c
	errs = drive(c)
	if err := c.Close(); err != nil {
		tb.Error(err)
	}
	return errs, nil
}

// drive sends one request of each kind after the other.
func drive(c *nbd.Client) []error {
	v := func(n int) iov.Vec { return iov.Of(make([]byte, n/2), make([]byte, n-n/2)) }
	_, read := c.ReadVecAt(v(1024), 512)
	_, write := c.WriteVecAt(v(512), 1024)
	_, fua := c.WriteVecFUA(v(512), 0)
	_, _, status := c.BlockStatus(0, 8192)
	errs := []error{read, write, fua, status, c.WriteZeroes(0, 512, true), c.Discard(0, 512), c.Flush()}
	for range 3 {
		_, read := c.ReadVecAt(v(512), 0)
		_, _, status := c.BlockStatus(512, 512)
		errs = append(errs, read, status)
	}
	return errs
}

// Parts of scripts.
const (
	magicOptReply = 0x0003e889045565a9
	allFlags      = 1 | 4 | 8 | 32 | 64 | 128 | 256 | 2048
)

func hello(flags uint16) []byte { return nbd.BE.AppendUint16([]byte("NBDMAGICIHAVEOPT"), flags) }

func cat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func info(size uint64, flags uint16) []byte {
	p := nbd.BE.AppendUint64([]byte{0, 0}, size)
	return nbd.AppendOptReply(nil, 7, 3, nbd.BE.AppendUint16(p, flags))
}

func blocks(smallest, preferred, largest uint32) []byte {
	p := nbd.BE.AppendUint32([]byte{0, 3}, smallest)
	p = nbd.BE.AppendUint32(p, preferred)
	return nbd.AppendOptReply(nil, 7, 3, nbd.BE.AppendUint32(p, largest))
}

var (
	ackSR   = nbd.AppendOptReply(nil, 8, 1, nil)
	ackMeta = cat(nbd.AppendOptReply(nil, 10, 4, []byte("\x00\x00\x00\x2abase:allocation")), nbd.AppendOptReply(nil, 10, 1, nil))
	ackGo   = nbd.AppendOptReply(nil, 7, 1, nil)
	begun   = cat(hello(3), ackSR, ackMeta, info(8192, allFlags), ackGo)
	first   = uint64(1) << 32 // the cookie of a client's first request
)

func simple(e uint32, cookie uint64, payload ...byte) []byte {
	p := nbd.BE.AppendUint32([]byte{0x67, 0x44, 0x66, 0x98}, e)
	return append(nbd.BE.AppendUint64(p, cookie), payload...)
}

func chunk(flags, kind uint16, cookie uint64, payload []byte) []byte {
	p := make([]byte, 20)
	nbd.PutStructured(p, flags, kind, cookie, uint32(len(payload)))
	return append(p, payload...)
}

func data(off uint64, n int) []byte { return append(nbd.BE.AppendUint64(nil, off), make([]byte, n)...) }

func hole(off uint64, n uint32) []byte {
	return nbd.BE.AppendUint32(nbd.BE.AppendUint64(nil, off), n)
}

func failure(code uint32, msgLen int, msg string) []byte {
	return append(nbd.BE.AppendUint16(nbd.BE.AppendUint32(nil, code), uint16(msgLen)), msg...)
}

func extent(id, n, state uint32) []byte {
	return nbd.BE.AppendUint32(nbd.BE.AppendUint32(nbd.BE.AppendUint32(nil, id), n), state)
}

// handshakes that a client must refuse.
var badHandshakes = map[string][]byte{
	"nothing":               nil,
	"half a greeting":       hello(3)[:9],
	"not NBD":               []byte("SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"),
	"oldstyle":              cat([]byte("NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"), make([]byte, 136)),
	"unknown style":         cat([]byte("NBDMAGICWHATEVER"), make([]byte, 136)),
	"end after greeting":    hello(3),
	"wrong magic":           cat(hello(3), make([]byte, 20)),
	"wrong option":          cat(hello(3), nbd.AppendOptReply(nil, 7, 1, nil)),
	"long reply":            cat(hello(3), nbd.BE.AppendUint64(nil, magicOptReply), []byte{0, 0, 0, 8, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff}),
	"ack with data":         cat(hello(3), nbd.AppendOptReply(nil, 8, 1, []byte("x"))),
	"info for a yes or no":  cat(hello(3), nbd.AppendOptReply(nil, 8, 3, []byte("x"))),
	"short context":         cat(hello(3), ackSR, nbd.AppendOptReply(nil, 10, 4, []byte("x"))),
	"other context":         cat(hello(3), ackSR, nbd.AppendOptReply(nil, 10, 4, []byte("0000qemu:x"))),
	"context twice":         cat(hello(3), ackSR, ackMeta[:len(ackMeta)-20], ackMeta),
	"no size":               cat(hello(3), ackSR, ackMeta, ackGo),
	"size negative":         cat(hello(3), ackSR, ackMeta, info(1<<63, allFlags), ackGo),
	"short info":            cat(hello(3), ackSR, ackMeta, nbd.AppendOptReply(nil, 7, 3, []byte{0, 0, 1})),
	"no info type":          cat(hello(3), ackSR, ackMeta, nbd.AppendOptReply(nil, 7, 3, []byte{0})),
	"short blocks":          cat(hello(3), ackSR, ackMeta, nbd.AppendOptReply(nil, 7, 3, []byte{0, 3, 1})),
	"minimum 0":             cat(hello(3), ackSR, ackMeta, info(8192, allFlags), blocks(0, 4096, 65536), ackGo),
	"minimum 3":             cat(hello(3), ackSR, ackMeta, info(8192, allFlags), blocks(3, 4096, 65536), ackGo),
	"minimum 128 KiB":       cat(hello(3), ackSR, ackMeta, info(1<<20, allFlags), blocks(128<<10, 128<<10, 1<<20), ackGo),
	"preferred below":       cat(hello(3), ackSR, ackMeta, info(8192, allFlags), blocks(4096, 512, 65536), ackGo),
	"maximum 0":             cat(hello(3), ackSR, ackMeta, info(8192, allFlags), blocks(512, 4096, 0), ackGo),
	"maximum odd":           cat(hello(3), ackSR, ackMeta, info(8192, allFlags), blocks(512, 4096, 65537), ackGo),
	"end out of reach":      cat(hello(3), ackSR, ackMeta, info(8193, allFlags), blocks(512, 4096, 65536), ackGo),
	"unknown export":        cat(hello(3), ackSR, ackMeta, nbd.AppendOptReply(nil, 7, 1<<31+6, []byte("no such thing"))),
	"TLS wanted":            cat(hello(3), nbd.AppendOptReply(nil, 8, 1<<31+5, nil)),
	"shutting down":         cat(hello(3), nbd.AppendOptReply(nil, 8, 1<<31+7, nil)),
	"unknown refusal":       cat(hello(3), ackSR, ackMeta, nbd.AppendOptReply(nil, 7, math.MaxUint32, nil)),
	"endless information":   cat(hello(3), ackSR, ackMeta, bytes.Repeat(nbd.AppendOptReply(nil, 7, 3, []byte{0, 9}), 1001), info(8192, allFlags), ackGo),
	"no export, old way":    cat(hello(3), ackSR, ackMeta, nbd.AppendOptReply(nil, 7, 1<<31+1, nil)),
	"half an export, newst": cat(hello(0), []byte{0, 0, 0}),
}

func TestBadHandshakes(t *testing.T) {
	t.Parallel()
	for name, p := range badHandshakes {
		if _, err := play(t, script{p}, timeout); err == nil {
			t.Errorf("%s: accepted", name)
		} else if testing.Verbose() {
			t.Logf("%s: %v", name, err)
		}
	}
}

// What comes behind the answer to the request for TLS in plain text may be somebody else's.
func TestPlainTextBehindTLS(t *testing.T) {
	t.Parallel()
	nc := newScripted(script{cat(hello(3), nbd.AppendOptReply(nil, 5, 1, nil), ackSR)})
	_, err := nbd.Dial(t.Context(), nbd.Options{TLS: &tls.Config{ServerName: "h"},
		Dial: func(context.Context) (net.Conn, error) { return nc, nil }})
	if !errors.Is(err, nbd.ErrProtocol) {
		t.Error(err)
	}
}

// answers to the read of 1024 bytes at 512, the first request, that break the protocol.
var badAnswers = map[string][]byte{
	"wrong magic":         make([]byte, 20),
	"simple":              simple(0, first, make([]byte, 1024)...),
	"simple error":        simple(5, first),
	"unknown cookie":      chunk(1, 1, first+1, data(512, 1024)),
	"stale cookie":        chunk(1, 1, 0, data(512, 1024)),
	"cookie out of range": chunk(1, 1, first+math.MaxUint32, data(512, 1024)),
	"nothing, done":       chunk(1, 0, first, nil),
	"nothing, not done":   chunk(0, 0, first, nil),
	"nothing with data":   chunk(1, 0, first, []byte("x")),
	"too little":          chunk(1, 1, first, data(512, 1023)),
	"too much":            chunk(1, 1, first, data(512, 1025)),
	"empty data":          chunk(1, 1, first, data(512, 0)),
	"before":              chunk(1, 1, first, data(511, 1024)),
	"behind":              chunk(1, 1, first, data(513, 1024)),
	"far away":            chunk(1, 1, first, data(math.MaxUint64, 1)),
	"half way round":      chunk(1, 1, first, data(1<<63, 1)),
	"twice":               cat(chunk(0, 1, first, data(512, 1024)), chunk(1, 1, first, data(512, 1024))),
	"overlap":             cat(chunk(0, 1, first, data(512, 600)), chunk(1, 1, first, data(1111, 425))),
	"data in a hole":      cat(chunk(0, 2, first, hole(512, 1024)), chunk(1, 1, first, data(600, 1))),
	"hole of nothing":     chunk(1, 2, first, hole(512, 0)),
	"hole too large":      chunk(1, 2, first, hole(512, math.MaxUint32)),
	"hole of odd length":  chunk(1, 2, first, append(hole(512, 1024), 0)),
	"gap":                 cat(chunk(0, 1, first, data(512, 500)), chunk(1, 1, first, data(1013, 523))),
	"block status":        chunk(1, 5, first, extent(42, 1024, 0)),
	"unknown type":        chunk(1, 99, first, nil),
	"error 0":             chunk(1, 1<<15+1, first, failure(0, 0, "")),
	"short error":         chunk(1, 1<<15+1, first, []byte{0, 0, 0, 5}),
	"long message":        chunk(1, 1<<15+1, first, failure(5, 10, "short")),
	"longer message":      chunk(1, 1<<15+1, first, failure(5, 5000, string(make([]byte, 5000)))),
	"offset missing":      chunk(1, 1<<15+2, first, failure(5, 0, "")),
	"huge error":          chunk(1, 1<<15+1, first, make([]byte, 65530))[:20],
	"endless errors":      bytes.Repeat(chunk(0, 1<<15+1, first, failure(5, 0, "")), 1001),
	"simple after chunk":  cat(chunk(0, 1, first, data(512, 24)), simple(0, first)),
}

func TestBadAnswers(t *testing.T) {
	t.Parallel()
	for name, p := range badAnswers {
		errs, err := play(t, script{begun, p, simple(0, first+1)}, timeout)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if name == "huge error" { // cut short
			if !errors.Is(errs[0], nbd.ErrLost) {
				t.Errorf("%s: %v", name, errs[0])
			}
			continue
		}
		for i, err := range errs {
			if !errors.Is(err, nbd.ErrProtocol) {
				t.Errorf("%s: request %d: %v", name, i, err)
			}
		}
	}
}

func TestGoodAnswers(t *testing.T) {
	t.Parallel()
	for name, p := range map[string][]byte{
		"data":          chunk(1, 1, first, data(512, 1024)),
		"data, nothing": cat(chunk(0, 1, first, data(512, 1024)), chunk(1, 0, first, nil)),
		"hole":          chunk(1, 2, first, hole(512, 1024)),
		"backwards": cat(chunk(0, 1, first, data(1500, 36)), chunk(0, 2, first, hole(1000, 500)), chunk(0, 1, first, data(513, 487)),
			chunk(1, 1, first, data(512, 1))),
		"unknown flags": chunk(0xffff, 1, first, data(512, 1024)),
	} {
		if errs, err := play(t, script{begun, p, simple(0, first+1)}, timeout); err != nil || errs[0] != nil || errs[1] != nil {
			t.Errorf("%s: %v, %v", name, err, errs)
		}
	}
	for name, p := range map[string][]byte{
		"error":             chunk(1, 1<<15+1, first, failure(28, 4, "full")),
		"error with offset": chunk(1, 1<<15+2, first, append(failure(28, 4, "full"), make([]byte, 8)...)),
		"unknown error":     chunk(1, 1<<15+77, first, append(failure(28, 4, "full"), make([]byte, 100)...)),
		"error, then data":  cat(chunk(0, 1<<15+1, first, failure(28, 4, "full")), chunk(1, 1, first, data(512, 100))),
		"data, then errors": cat(chunk(0, 1, first, data(512, 100)), chunk(0, 1<<15+1, first, failure(28, 4, "full")),
			chunk(0, 1<<15+1, first, failure(5, 0, "")), chunk(1, 0, first, nil)),
	} {
		errs, err := play(t, script{begun, p, simple(0, first+1)}, timeout)
		var refused *nbd.Error
		if err != nil || !errors.As(errs[0], &refused) || refused.Errno != 28 || refused.Message != "full" || errs[1] != nil {
			t.Errorf("%s: %v, %v", name, err, errs)
		}
	}
}

// Runs of block status that are not what was asked for.
func TestStatusAnswers(t *testing.T) {
	t.Parallel()
	handshake := cat(hello(3), ackSR, ackMeta, info(8192, allFlags), blocks(512, 4096, 65536), ackGo)
	for name, tc := range map[string]struct {
		p    []byte
		run  int64
		want blk.StatusFlags
		bad  bool
	}{
		"data":      {p: extent(42, 1024, 0), run: 1024, want: blk.StatusData},
		"hole":      {p: extent(42, 4096, 3), run: 4096, want: blk.StatusZero},
		"zero":      {p: extent(42, 4096, 2), run: 4096, want: blk.StatusZero | blk.StatusData},
		"too long":  {p: extent(42, math.MaxUint32, 3), run: 4096, want: blk.StatusZero},
		"odd":       {p: extent(42, 1000, 3), run: 512, want: blk.StatusZero},
		"tiny":      {p: extent(42, 1, 3), run: 512, want: blk.StatusData},
		"empty":     {p: extent(42, 0, 3), bad: true},
		"two":       {p: append(extent(42, 512, 3), 0, 0, 2, 0, 0, 0, 0, 0), bad: true},
		"context":   {p: extent(43, 512, 3), bad: true},
		"nothing":   {p: nil, bad: true},
		"too short": {p: []byte{0, 0, 0, 42}, bad: true},
	} {
		nc := newScripted(script{handshake, chunk(1, 5, first, tc.p)})
		c, err := nbd.Dial(t.Context(), nbd.Options{Dial: func(context.Context) (net.Conn, error) { return nc, nil }})
		if err != nil {
			t.Fatal(err)
		}
		nc.client = c
		s, run, err := c.BlockStatus(4096, 8192-4096)
		if tc.bad {
			if !errors.Is(err, nbd.ErrProtocol) {
				t.Errorf("%s: %v", name, err)
			}
		} else if err != nil || run != tc.run || s.Flags != tc.want|blk.StatusAllocated|blk.StatusOffset {
			t.Errorf("%s: %+v, %d, %v", name, s, run, err)
		}
		c.Close()
	}
}

func FuzzClient(f *testing.F) {
	for _, p := range badHandshakes {
		f.Add(script{p}.encode())
	}
	for _, p := range badAnswers {
		f.Add(script{begun, p}.encode())
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 256<<10 {
			return
		}
		play(t, decode(p), 10*time.Millisecond) // a script may be silent
	})
}
