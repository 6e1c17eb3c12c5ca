package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
)

// peer is a client that says what it wants.
type peer struct {
	tb testing.TB
	nc net.Conn
}

// dialRaw connects to s.
func (s *server) dialRaw(tb testing.TB) *peer {
	tb.Helper()
	nc, err := net.Dial("unix", s.socket)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(timeout))
	return &peer{tb, nc}
}

// connect connects to s and answers its greeting with flags.
func (s *server) connect(tb testing.TB, flags byte) *peer {
	tb.Helper()
	p := s.dialRaw(tb)
	p.expect("greeting", hello(3))
	p.send([]byte{0, 0, 0, flags})
	return p
}

func (p *peer) send(parts ...[]byte) {
	p.tb.Helper()
	if _, err := p.nc.Write(cat(parts...)); err != nil {
		p.tb.Error(err)
	}
}

func (p *peer) read(n int) []byte {
	p.tb.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(p.nc, b); err != nil {
		p.tb.Fatalf("read of %d bytes: %v", n, err)
	}
	return b
}

func (p *peer) expect(what string, want []byte) {
	p.tb.Helper()
	if got := p.read(len(want)); !bytes.Equal(got, want) {
		p.tb.Fatalf("%s: got %x, want %x", what, got, want)
	}
}

// gone expects the server to hang up.
func (p *peer) gone(what string) {
	p.tb.Helper()
	n, err := p.nc.Read(make([]byte, 1))
	if err == nil || errors.Is(err, context.DeadlineExceeded) {
		p.tb.Errorf("%s: the server does not hang up: %d, %v", what, n, err)
	}
}

// option sends an option and returns the types of the replies, and the data of the first.
func (p *peer) option(opt uint32, data []byte) (kinds []uint32, first []byte) {
	p.tb.Helper()
	p.send(nbd.AppendOption(nil, opt, data))
	for {
		head := p.read(20)
		if nbd.BE.Uint64(head) != magicOptReply || nbd.BE.Uint32(head[8:]) != opt {
			p.tb.Fatalf("reply to option %d: %x", opt, head)
		}
		payload := p.read(int(nbd.BE.Uint32(head[16:])))
		if kinds == nil {
			first = payload
		}
		kind := nbd.BE.Uint32(head[12:])
		if kinds = append(kinds, kind); kind == 1 || kind > 1<<31 {
			return kinds, first
		}
	}
}

// start goes on to the transmission phase.
func (p *peer) start(export string, structured bool) {
	p.tb.Helper()
	if structured {
		p.option(8, nil)
		p.option(10, cat(nbd.AppendString(nil, export), []byte{0, 0, 0, 1}, nbd.AppendString(nil, "base:allocation")))
	}
	if kinds, _ := p.option(7, append(nbd.AppendString(nil, export), 0, 0)); kinds[len(kinds)-1] != 1 {
		p.tb.Fatalf("go: %x", kinds)
	}
}

func request(flags, cmd uint16, cookie, off uint64, n uint32, payload ...byte) []byte {
	var head [28]byte
	nbd.PutRequest(&head, flags, cmd, cookie, off, n)
	return append(head[:], payload...)
}

func TestServerOptions(t *testing.T) {
	t.Parallel()
	m := newMemory(8192)
	d := newDevice(t, m, blk.Options{})
	s := serve(t, nbd.Export{Name: "a", Description: "the first", Disk: d}, nbd.Export{Name: "b", Disk: d, ReadOnly: true})
	p := s.connect(t, 3)
	const refused = 1 << 31
	name := func(s string, rest ...byte) []byte { return append(nbd.AppendString(nil, s), rest...) }
	query := func(export string, queries ...string) []byte {
		b := nbd.BE.AppendUint32(nbd.AppendString(nil, export), uint32(len(queries)))
		for _, q := range queries {
			b = nbd.AppendString(b, q)
		}
		return b
	}
	for _, tc := range []struct {
		what string
		opt  uint32
		data []byte
		want []uint32
	}{
		{"unknown", 4711, []byte("whatever"), []uint32{refused + 1}},
		{"extended headers", 11, nil, []uint32{refused + 1}},
		{"TLS", 5, nil, []uint32{refused + 2}},
		{"list", 3, nil, []uint32{2, 2, 1}},
		{"list with data", 3, []byte("x"), []uint32{refused + 3}},
		{"too long", 3, make([]byte, 100_000), []uint32{refused + 9}},
		{"info", 6, name("a", 0, 0), []uint32{3, 1}},
		{"all info", 6, name("a", 0, 5, 0, 0, 0, 1, 0, 2, 0, 3, 0, 77), []uint32{3, 3, 3, 3, 1}},
		{"info twice", 6, name("b", 0, 3, 0, 3, 0, 3, 0, 2), []uint32{3, 3, 1}},
		{"info of nobody", 6, name("c", 0, 0), []uint32{refused + 6}},
		{"info without name", 6, nil, []uint32{refused + 3}},
		{"info, name too long", 6, []byte{0, 0, 0, 9, 'a', 0, 0}, []uint32{refused + 3}},
		{"info, name far too long", 6, []byte{255, 255, 255, 255, 'a', 0, 0}, []uint32{refused + 3}},
		{"info, list too short", 6, name("a", 0, 2, 0, 3), []uint32{refused + 3}},
		{"info, list too long", 6, name("a", 0, 0, 0, 3), []uint32{refused + 3}},
		{"go to nobody", 7, name("c", 0, 0), []uint32{refused + 6}},
		{"context before structured replies", 10, query("a", "base:allocation"), []uint32{refused + 3}},
		{"list contexts", 9, query("a"), []uint32{4, 1}},
		{"list base", 9, query("a", "base:"), []uint32{4, 1}},
		{"structured, with data", 8, []byte("x"), []uint32{refused + 3}},
		{"structured", 8, nil, []uint32{1}},
		{"context", 10, query("a", "qemu:dirty-bitmap:x", "base:allocation", "base:nothing"), []uint32{4, 1}},
		{"no context", 10, query("a"), []uint32{1}},
		{"no wildcard", 10, query("a", "base:"), []uint32{1}},
		{"unknown contexts", 9, query("a", "x-y:z"), []uint32{1}},
		{"no namespace", 9, query("a", "allocation"), []uint32{refused + 3}},
		{"context of nobody", 10, query("c", "base:allocation"), []uint32{refused + 6}},
		{"many queries", 10, query("a", make([]string, 129)...), []uint32{refused + 9}},
		{"query too long", 10, cat(name("a"), []byte{0, 0, 0, 1, 0, 0, 0, 9, 'x'}), []uint32{refused + 3}},
		{"queries missing", 10, cat(name("a"), []byte{0, 0, 0, 2}, name("base:allocation")), []uint32{refused + 3}},
		{"more than queries", 10, append(query("a", "base:allocation"), 0), []uint32{refused + 3}},
	} {
		got, _ := p.option(tc.opt, tc.data)
		if len(got) != len(tc.want) {
			t.Errorf("%s: %x, want %x", tc.what, got, tc.want)
			continue
		}
		for i := range got {
			if got[i] != tc.want[i] {
				t.Errorf("%s: %x, want %x", tc.what, got, tc.want)
			}
		}
	}
	if kinds, _ := p.option(2, []byte("ignored")); kinds[0] != 1 {
		t.Errorf("abort: %x", kinds)
	}
	p.gone("abort")

	for what, b := range map[string][]byte{
		"wrong magic":     make([]byte, 16),
		"endless option":  cat([]byte("IHAVEOPT\x00\x00\x00\x03\xff\xff\xff\xff"), make([]byte, 100)),
		"no such export":  nbd.AppendOption(nil, 1, []byte("c")),
		"no default":      nbd.AppendOption(nil, 1, nil),
		"long name":       nbd.AppendOption(nil, 1, make([]byte, 70_000)),
		"half an option":  []byte("IHAVEOPT\x00\x00"),
		"half its header": nbd.AppendOption(nil, 3, []byte("data"))[:18],
	} {
		p := s.connect(t, 3)
		go func() { // the server may hang up before it has it all
			p.nc.Write(b)
			p.nc.(*net.UnixConn).CloseWrite()
		}()
		p.gone(what)
	}
	s.connect(t, 4).gone("unknown client flags")
}

func TestExportName(t *testing.T) {
	t.Parallel()
	s, m := serveMemory(t, 8192)
	mustWrite(t, m, []byte("hello"), 0)
	for _, flags := range []byte{0, 1, 2, 3} {
		p := s.connect(t, flags)
		p.send(nbd.AppendOption(nil, 1, []byte("disk")))
		p.expect("size and flags", []byte{0, 0, 0, 0, 0, 0, 0x20, 0, 0x09, 0x6d})
		if flags&2 == 0 {
			p.expect("zeroes", make([]byte, 124))
		}
		p.send(request(0, 0, 7, 0, 5))
		p.expect("answer", simple(0, 7, []byte("hello")...))
		p.send(request(4, 0, 8, 0, 5)) // DF needs structured replies
		p.expect("answer", simple(22, 8))
		p.send(request(0, 0, 9, 8190, 5))
		p.expect("answer", simple(22, 9))
		p.send(request(0, 7, 10, 0, 512))
		p.expect("answer", simple(22, 10))
		p.send(request(0, 2, 0, 0, 0))
		p.gone("disconnect")
	}
}

func TestServerRequests(t *testing.T) {
	t.Parallel()
	m := newMemory(64 << 10)
	d := newDevice(t, m, blk.Options{})
	s := serve(t, nbd.Export{Name: "rw", Disk: d}, nbd.Export{Name: "ro", Disk: d, ReadOnly: true})
	rw, ro := s.connect(t, 3), s.connect(t, 3)
	rw.start("rw", true)
	ro.start("ro", true)
	m.noFast.Store(true)
	const cookie = 0x1122334455667788
	for _, tc := range []struct {
		what string
		p    *peer
		req  []byte
		code uint32 // 0: a simple reply without an error
	}{
		{"unknown command", rw, request(0, 99, cookie, 0, 0), 22},
		{"resize", rw, request(0, 8, cookie, 0, 0), 22},
		{"unknown flag", rw, request(1<<9, 0, cookie, 0, 512), 22},
		{"DF for a write", rw, request(4, 1, cookie, 0, 3, 1, 2, 3), 22},
		{"fast zero for a write", rw, request(16, 1, cookie, 0, 3, 1, 2, 3), 22},
		{"read beyond", rw, request(0, 0, cookie, 64<<10-1, 2), 22},
		{"read far beyond", rw, request(0, 0, cookie, 1<<63, 2), 22},
		{"read, overflow", rw, request(0, 0, cookie, 1<<64-1, 2), 22},
		{"read too long", rw, request(0, 0, cookie, 0, 32<<20+1), 22},
		{"read endless", rw, request(0, 0, cookie, 0, 1<<32-1), 22},
		{"write beyond", rw, request(0, 1, cookie, 64<<10, 3, 1, 2, 3), 28},
		{"zeroes beyond", rw, request(0, 6, cookie, 0, 64<<10+1), 28},
		{"trim beyond", rw, request(0, 4, cookie, 1, 64<<10), 22},
		{"status beyond", rw, request(0, 7, cookie, 1, 64<<10), 22},
		{"status of nothing", rw, request(0, 7, cookie, 1, 0), 22},
		{"fast zeroes that are not", rw, request(16, 6, cookie, 0, 4096), 95},
		{"write to read-only", ro, request(0, 1, cookie, 0, 3, 1, 2, 3), 1},
		{"zeroes to read-only", ro, request(0, 6, cookie, 0, 3), 1},
		{"trim of read-only", ro, request(0, 4, cookie, 0, 3), 1},
		{"flush of read-only", ro, request(0, 3, cookie, 0, 0), 0},
		{"write of nothing", rw, request(0, 1, cookie, 0, 0), 0},
		{"zeroes of nothing", rw, request(0, 6, cookie, 0, 0), 0},
		{"flush with FUA", rw, request(1, 3, cookie, 0, 0), 0},
		{"trim with FUA", rw, request(1, 4, cookie, 0, 4096), 0},
		{"zeroes without a hole", rw, request(2, 6, cookie, 1, 4096), 0},
	} {
		tc.p.send(tc.req)
		if tc.code == 0 {
			tc.p.expect(tc.what, simple(0, cookie))
			continue
		}
		head := tc.p.read(20)
		payload := tc.p.read(int(nbd.BE.Uint32(head[16:])))
		if want := chunk(1, 1<<15+1, cookie, payload); !bytes.Equal(head, want[:20]) || nbd.BE.Uint32(payload) != tc.code {
			t.Errorf("%s: %x %x", tc.what, head, payload)
		}
	}
	rw.send(request(0, 0, cookie, 0, 0))
	rw.expect("read of nothing", chunk(1, 0, cookie, nil))
	rw.send(request(1, 1, cookie, 5, 3, 'x', 'y', 'z'))
	rw.expect("write", simple(0, cookie))
	rw.send(request(4|1, 0, cookie+1, 5, 3))
	rw.expect("read", chunk(1, 1, cookie+1, append(data(5, 0), "xyz"...)))

	m.mu.Lock()
	for i := range m.hole {
		m.hole[i] = i >= 3 && i != 8
	}
	m.mu.Unlock()
	rw.send(request(0, 7, cookie, 100, 40<<10))
	runs := extent(1, 12288-100, 0)
	for _, run := range [][2]uint32{{20480, 3}, {4096, 0}, {4196, 3}} {
		runs = nbd.BE.AppendUint32(nbd.BE.AppendUint32(runs, run[0]), run[1])
	}
	rw.expect("status", chunk(1, 5, cookie, runs))
	rw.send(request(8, 7, cookie, 100, 60<<10))
	rw.expect("status, one", chunk(1, 5, cookie, extent(1, 12288-100, 0)))

	for what, b := range map[string][]byte{
		"wrong magic":    make([]byte, 28),
		"huge write":     request(0, 1, 1, 0, 1<<31),
		"half a request": request(0, 1, 1, 0, 4)[:10],
		"half a write":   request(0, 1, 1, 0, 4, 1, 2),
	} {
		p := s.connect(t, 3)
		p.start("rw", true)
		p.send(b)
		p.nc.(*net.UnixConn).CloseWrite()
		p.gone(what)
	}
}

// What comes behind the request for TLS in plain text may be somebody else's.
func TestPlainTextBeforeTLS(t *testing.T) {
	t.Parallel()
	s := (&server{Server: nbd.Server{TLS: newCerts(t).server}}).start(t)
	p := s.connect(t, 3)
	if kinds, _ := p.option(3, nil); kinds[0] != 1<<31+5 {
		t.Errorf("list: %x", kinds)
	}
	if kinds, _ := p.option(5, []byte("x")); kinds[0] != 1<<31+3 {
		t.Errorf("TLS with data: %x", kinds)
	}
	p.send(nbd.AppendOption(nil, 5, nil), nbd.AppendOption(nil, 3, nil))
	p.gone("plain text")
	p = s.connect(t, 3)
	p.send(nbd.AppendOption(nil, 1, nil))
	p.gone("export without TLS")
}

// A client that disconnects gets its answers first.
func TestDisconnect(t *testing.T) {
	t.Parallel()
	m := newMemory(8192)
	m.gate = make(chan struct{})
	s := serve(t, nbd.Export{Disk: newDevice(t, m, blk.Options{})})
	p := s.connect(t, 3)
	p.start("", false)
	p.send(request(0, 0, 1, 0, 5), request(0, 2, 0, 0, 0))
	m.gate <- struct{}{}
	p.expect("answer", simple(0, 1, make([]byte, 5)...))
	p.gone("disconnect")
}

// Requests that come while the server shuts down are refused; those under way are not.
func TestShutdownAnswers(t *testing.T) {
	t.Parallel()
	m := newMemory(8192)
	m.gate = make(chan struct{})
	s := &server{Server: nbd.Server{Exports: []nbd.Export{{Disk: newDevice(t, m, blk.Options{})}}}}
	s.listen(t)
	p, haggling := s.connect(t, 3), s.connect(t, 3)
	p.start("", false)
	p.send(request(0, 0, 1, 0, 5))
	eventually(t, "the request under way", func() bool { return m.arrived.Load() == 1 })
	down := make(chan error)
	go func() { down <- s.Shutdown(testContext(t)) }()
	<-s.served
	eventually(t, "refused", func() bool {
		p.send(request(0, 7, 2, 0, 5)) // EINVAL before, as no context was negotiated
		return bytes.Equal(p.read(16), simple(108, 2))
	})
	if kinds, _ := haggling.option(3, nil); kinds[0] != 1<<31+7 {
		t.Errorf("option: %x", kinds)
	}
	haggling.send(nbd.AppendOption(nil, 2, nil))
	m.gate <- struct{}{}
	p.expect("answer", simple(0, 1, make([]byte, 5)...))
	p.gone("shutdown")
	if err := <-down; err != nil {
		t.Error(err)
	}
}

func TestServerPatience(t *testing.T) {
	t.Parallel()
	var logged atomic.Int64
	s := (&server{Server: nbd.Server{HandshakeTimeout: time.Second, Exports: only(t, newMemory(4096)),
		Log: func(_ net.Addr, err error) {
			if errors.Is(err, unix.ETIMEDOUT) || strings.Contains(err.Error(), "timeout") {
				logged.Add(1)
			}
		}}}).start(t)
	idle := s.connect(t, 3)
	idle.start("", false)
	silent := s.connect(t, 3)
	silent.gone("silence")
	idle.send(request(0, 0, 1, 0, 5)) // later than that
	idle.expect("answer", simple(0, 1, make([]byte, 5)...))
	eventually(t, "logged", func() bool { return logged.Load() == 1 })
}

// Requests of one client that are under way, and their bytes, are bounded; so are clients.
func TestServerBounds(t *testing.T) {
	t.Parallel()
	m := newMemory(1 << 20)
	m.gate = make(chan struct{})
	s := (&server{Server: nbd.Server{MaxRequests: 3, MaxBytes: 10_000, MaxConns: 1, Exports: only(t, m)}}).start(t)
	for _, tc := range []struct {
		size uint32
		most int64
	}{{100, 3}, {5000, 2}, {50_000, 1}} {
		p := s.connect(t, 3) // the last one has gone
		p.start("", false)
		before := m.arrived.Load()
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := range 10 {
				p.nc.Write(request(0, 0, uint64(i), 0, tc.size))
			}
		})
		for i := range int64(10) {
			eventually(t, "requests arrive", func() bool { return m.arrived.Load()-before >= min(10, i+tc.most) })
			if n := m.arrived.Load() - before - i; n > tc.most {
				t.Errorf("%d requests of %d bytes under way", n, tc.size)
			}
			m.gate <- struct{}{}
			p.read(16 + int(tc.size))
		}
		wg.Wait()
		p.send(request(0, 2, 0, 0, 0))
		p.gone("disconnect")
	}
}

func TestAllocationStates(t *testing.T) {
	t.Parallel()
	const hole, zero = 1, 2
	for flags, want := range map[blk.StatusFlags]uint32{
		blk.StatusAllocated | blk.StatusData:                  0,
		blk.StatusAllocated | blk.StatusData | blk.StatusZero: zero,
		blk.StatusAllocated | blk.StatusZero:                  hole | zero,
		blk.StatusAllocated:                                   hole,
		0:                                                     hole | zero,
		blk.StatusAllocated | blk.StatusData | blk.StatusCompressed: 0,
	} {
		if got := nbd.Allocation(flags); got != want {
			t.Errorf("%#x: %d, want %d", flags, got, want)
		}
	}
}

// oneConn is a listener with one connection.
type oneConn struct {
	nc   chan net.Conn
	done chan struct{}
	once sync.Once
}

func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case nc := <-l.nc:
		return nc, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *oneConn) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{Name: "fuzz"} }

// said is a connection to a client that says this, and does not listen.
type said struct {
	net.Conn // nil: what is not here is not called
	rest     *bytes.Reader
	closed   chan struct{}
	once     sync.Once
}

func (c *said) Read(p []byte) (int, error)       { return c.rest.Read(p) }
func (c *said) Write(p []byte) (int, error)      { return len(p), nil }
func (c *said) Close() error                     { c.once.Do(func() { close(c.closed) }); return nil }
func (c *said) SetDeadline(time.Time) error      { return nil }
func (c *said) SetReadDeadline(time.Time) error  { return nil }
func (c *said) SetWriteDeadline(time.Time) error { return nil }
func (c *said) RemoteAddr() net.Addr             { return &net.UnixAddr{Name: "fuzz"} }

func FuzzServer(f *testing.F) {
	opts := cat([]byte{0, 0, 0, 3}, nbd.AppendOption(nil, 8, nil),
		nbd.AppendOption(nil, 10, cat(nbd.AppendString(nil, ""), []byte{0, 0, 0, 1}, nbd.AppendString(nil, "base:allocation"))),
		nbd.AppendOption(nil, 3, nil), nbd.AppendOption(nil, 6, append(nbd.AppendString(nil, "disk"), 0, 1, 0, 3)))
	begin := cat(opts, nbd.AppendOption(nil, 7, append(nbd.AppendString(nil, ""), 0, 0)))
	f.Add(opts)
	f.Add(cat(begin, request(0, 0, 1, 0, 4096), request(1, 1, 2, 5, 3, 1, 2, 3), request(0, 3, 3, 0, 0), request(0, 7, 4, 0, 8192),
		request(2, 6, 5, 10, 5000), request(0, 4, 6, 0, 8192), request(16, 6, 7, 0, 8192), request(8, 7, 8, 1, 8191), request(0, 2, 0, 0, 0)))
	f.Add(cat([]byte{0, 0, 0, 1}, nbd.AppendOption(nil, 1, []byte("disk")), request(0, 0, 1, 0, 100), request(0, 0, 1, 1<<63, 1<<31)))
	f.Add(cat(begin, request(0, 1, 1, 0, 32<<20), make([]byte, 100)))
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 256<<10 {
			return
		}
		d, err := blk.New(newMemory(8192), blk.Options{})
		if err != nil {
			t.Fatal(err)
		}
		s := &nbd.Server{Exports: []nbd.Export{{Name: "disk", Disk: d}}}
		ln := &oneConn{nc: make(chan net.Conn, 1), done: make(chan struct{})}
		nc := &said{rest: bytes.NewReader(p), closed: make(chan struct{})}
		ln.nc <- nc
		served := make(chan error, 1)
		go func() { served <- s.Serve(ln) }()
		select {
		case <-nc.closed:
		case <-time.After(timeout):
			t.Error("the session does not end with its client")
		}
		s.Close()
		<-served
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}
