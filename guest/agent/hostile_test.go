package agent

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// fakeGuest answers a client's hello and lets the test write what it likes. The channel is closed when the client has
// sent the first frame after its hello.
func fakeGuest(t *testing.T) (c *Client, guest net.Conn, asked <-chan struct{}) {
	t.Helper()
	host, guest := net.Pipe()
	first := make(chan struct{})
	go func() {
		d := newDecoder(guest)
		h, err := d.sync()
		if err != nil {
			return
		}
		guest.Write(helloBytes(h.session))
		if _, err := d.next(); err == nil {
			close(first)
		}
		io.Copy(io.Discard, guest)
	}()
	c, err := Connect(testContext(t), host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); guest.Close() })
	return c, guest, first
}

// A guest that breaks the rules is cut off, and whoever waits for it gets the reason.
func TestClientEndsWithHostileGuest(t *testing.T) {
	t.Parallel()
	started := frameBytes(frameStarted, 0, 1, u32Bytes(7, 0))
	full := bytes.Repeat(frameBytes(frameData, stdout, 1, make([]byte, MaxPayload)), Window/MaxPayload+1)
	for name, b := range map[string][]byte{
		"unknown type":         {200, 0, 0, 0, 1, 0, 0, 0},
		"unknown process":      frameBytes(frameData, stdout, 99, []byte("x")),
		"unknown request":      frameBytes(frameReply, pieceLast, 99, u32Bytes(0)),
		"started twice":        append(started, started...),
		"data before start":    frameBytes(frameData, stdout, 1, []byte("x")),
		"exit before start":    frameBytes(frameExit, 0, 1, u32Bytes(0, 0)),
		"data on stdin":        append(started, frameBytes(frameData, stdin, 1, []byte("x"))...),
		"data after the end":   append(started, bytes.Repeat(frameBytes(frameData, stdout, 1, nil), 2)...),
		"data over the window": append(started, full...),
		"credit for nothing":   append(started, frameBytes(frameCredit, stdin, 1, u32Bytes(1))...),
		"credit overflow":      append(started, frameBytes(frameCredit, stdin, 1, u32Bytes(0xffffffff))...),
		"credit for stdout":    append(started, frameBytes(frameCredit, stdout, 1, u32Bytes(0))...),
		"close of stdout":      append(started, frameBytes(frameClose, stdout, 1, nil)...),
		"a command":            append(started, frameBytes(frameStart, pieceLast, 1, nil)...),
		"a signal":             append(started, frameBytes(frameSignal, 0, 1, u32Bytes(9))...),
		"wild exit code":       append(started, frameBytes(frameExit, 0, 1, u32Bytes(256, 0))...),
		"wild signal":          append(started, frameBytes(frameExit, 0, 1, u32Bytes(0, 65))...),
		"mixed reply":          append(started, append(frameBytes(frameReply, pieceMore, 1, nil), started...)...),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, guest, asked := fakeGuest(t)
			block := make(chan struct{})
			defer close(block)
			result := make(chan error, 1)
			go func() {
				_, err := c.Run(testContext(t), Command{Args: []string{"x"}, Stdout: blockedWriter(block)})
				result <- err
			}()
			<-asked // before that the process is not known
			go guest.Write(b)
			<-c.Done()
			if err := c.Err(); !errors.Is(err, ErrProtocol) {
				t.Errorf("connection ended with %v", err)
			}
			if name != "data over the window" { // there the writer holds Run back
				if err := <-result; !errors.Is(err, ErrProtocol) {
					t.Errorf("command ended with %v", err)
				}
			}
			if err := c.Sync(testContext(t)); !errors.Is(err, ErrProtocol) {
				t.Errorf("request afterwards: %v", err)
			}
		})
	}
}

type blockedWriter <-chan struct{}

func (w blockedWriter) Write(p []byte) (int, error) { <-w; return len(p), nil }

// A long reply may not fill the host's memory.
func TestClientBoundsReplies(t *testing.T) {
	t.Parallel()
	c, guest, _ := fakeGuest(t)
	go func() {
		for {
			if _, err := guest.Write(frameBytes(frameReply, pieceMore, 1, make([]byte, MaxPayload))); err != nil {
				return
			}
		}
	}()
	if _, err := c.Info(testContext(t)); !errors.Is(err, ErrProtocol) {
		t.Errorf("info: %v", err)
	}
}

func TestDisconnectEndsWaiters(t *testing.T) {
	t.Parallel()
	c, guest, _ := fakeGuest(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := c.Run(testContext(t), Command{Args: []string{"x"}}); !errors.Is(err, ErrDisconnected) {
			t.Errorf("run: %v", err)
		}
	})
	wg.Go(func() {
		if err := c.Sync(testContext(t)); !errors.Is(err, ErrDisconnected) {
			t.Errorf("sync: %v", err)
		}
	})
	guest.Close()
	wg.Wait()
}

// rawHost is the host's end of a connection to a real agent, for frames no client would send.
type rawHost struct {
	net.Conn
	t   *testing.T
	dec *decoder
}

func newRawHost(t *testing.T) *rawHost {
	host, guest := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- Serve(guest) }()
	t.Cleanup(func() {
		host.Close()
		err := <-served
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("the agent ended with %v", err)
		}
	})
	host.SetDeadline(time.Now().Add(patience))
	return &rawHost{host, t, newDecoder(host)}
}

// hello opens a session, skipping what comes before the answer.
func (h *rawHost) hello(session uint64) {
	h.t.Helper()
	go h.Write(helloBytes(session))
	for {
		got, err := h.dec.sync()
		if err != nil {
			h.t.Fatalf("no hello for session %d: %v", session, err)
		}
		if got.session == session {
			return
		}
	}
}

func commandBytes(stream uint32, args ...string) []byte {
	s := spec{args: args, defaultEnv: true, wired: [channels]bool{true, true, true}}
	return frameBytes(frameStart, pieceLast, stream, s.encode())
}

// A host that breaks the rules loses its session, and the agent serves the next one.
func TestAgentSurvivesHostileHost(t *testing.T) {
	t.Parallel()
	cat := commandBytes(1, "cat")
	piece := frameBytes(frameStart, pieceMore, 1, make([]byte, MaxPayload))
	full := bytes.Repeat(frameBytes(frameData, stdin, 1, make([]byte, MaxPayload)), 100+Window/MaxPayload)
	for name, b := range map[string][]byte{
		"unknown type":         {200, 0, 0, 0, 1, 0, 0, 0},
		"unknown process":      frameBytes(frameData, stdin, 99, []byte("x")),
		"malformed command":    frameBytes(frameStart, pieceLast, 1, []byte("what")),
		"no arguments":         frameBytes(frameStart, pieceLast, 1, (&spec{}).encode()),
		"stream used again":    append(cat, cat...),
		"endless command":      bytes.Repeat(piece, maxMessage/MaxPayload+2),
		"mixed messages":       append(piece, frameBytes(frameRequest, pieceLast, 2, nil)...),
		"data over the window": append(commandBytes(1, "sleep", "1000"), full...),
		"data on stdout":       append(cat, frameBytes(frameData, stdout, 1, nil)...),
		"data after the end":   append(cat, bytes.Repeat(frameBytes(frameData, stdin, 1, nil), 2)...),
		"credit overflow":      append(cat, frameBytes(frameCredit, stdout, 1, u32Bytes(1))...),
		"credit for stdin":     append(cat, frameBytes(frameCredit, stdin, 1, u32Bytes(0))...),
		"signal 0":             append(cat, frameBytes(frameSignal, 0, 1, u32Bytes(0))...),
		"signal 65":            append(cat, frameBytes(frameSignal, 0, 1, u32Bytes(65))...),
		"a started frame":      append(cat, frameBytes(frameStarted, 0, 1, u32Bytes(1, 0))...),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newRawHost(t)
			h.hello(1)
			go h.Write(append(b, helloBytes(2)...))
			for {
				got, err := h.dec.sync()
				if err != nil {
					t.Fatalf("no answer to the next hello: %v", err)
				}
				if got.session == 2 {
					break
				}
			}
		})
	}
}

// A client whose session the agent cut off hears of it.
func TestClientLearnsThatItsSessionIsOver(t *testing.T) {
	t.Parallel()
	c := connect(t)
	p, err := c.Start(testContext(t), Command{Args: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.w.write([]byte{200, 0, 0, 0, 1, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	if status, err := p.Wait(); !errors.Is(err, ErrDisconnected) && status.Signal != syscall.SIGKILL {
		t.Errorf("wait: %+v, %v", status, err)
	}
	<-c.Done()
	if err := c.Err(); !errors.Is(err, ErrDisconnected) {
		t.Errorf("connection: %v", err)
	}
}

// A new host may find the agent inside a frame that an earlier one did not finish.
func TestHelloAfterHalfFrame(t *testing.T) {
	t.Parallel()
	for name, half := range map[string][]byte{
		"header":        {byte(frameData), 0, 100},
		"payload":       append([]byte{byte(frameData), 0, 0xf8, 0x7f, 1, 0, 0, 0}, "some"...),
		"half a hello":  helloBytes(3)[:30],
		"inner message": frameBytes(frameStart, pieceMore, 1, make([]byte, 99))[:50],
	} {
		synctest.Test(t, func(t *testing.T) { // skips the wait before the hello is repeated
			host, guest := net.Pipe()
			served := make(chan error, 1)
			go func() { served <- Serve(guest) }()
			d := newDecoder(host)
			go host.Write(helloBytes(1))
			for h, err := d.sync(); h.session != 1; h, err = d.sync() {
				if err != nil {
					t.Fatal(err)
				}
			}
			if _, err := host.Write(half); err != nil {
				t.Fatal(err)
			}
			c, err := Connect(t.Context(), host)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if err := c.Sync(t.Context()); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			c.Close()
			<-served
		})
	}
}

// The same the other way: a client finds its answer behind what the agent still sent to an earlier host.
func TestConnectSkipsGarbage(t *testing.T) {
	t.Parallel()
	src := rand.New(rand.NewPCG(3, 4))
	for range 50 {
		host, guest := net.Pipe()
		junk := make([]byte, src.IntN(100000))
		for i := range junk {
			junk[i] = byte(src.Uint32())
		}
		junk = append(junk, helloBytes(12345)...) // an answer to somebody else
		junk = append(junk, helloBytes(0)[:src.IntN(len(helloBytes(0)))]...)
		go guest.Write(junk)
		served := make(chan error, 1)
		go func() {
			d := newDecoder(guest)
			h, err := d.sync()
			if err == nil {
				_, err = guest.Write(helloBytes(h.session))
			}
			served <- err
		}()
		c, err := Connect(testContext(t), host)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		c.Close()
	}
}

// Random frames in a running session, of every type, do no harm beyond ending it.
func TestAgentSurvivesRandomFrames(t *testing.T) {
	t.Parallel()
	h := newRawHost(t)
	src := rand.New(rand.NewPCG(5, 6))
	for session := uint64(1); session < 600; session += 2 {
		h.hello(session)
		var b []byte
		if src.IntN(2) == 0 {
			b = commandBytes(1, "cat")
		}
		for range src.IntN(20) {
			payload := make([]byte, src.IntN(20))
			for i := range payload {
				payload[i] = byte(src.Uint32N(4))
			}
			typ := frameType(src.IntN(int(frameTypes)))
			if typ == frameRequest {
				continue // could be a sync, which is slow
			}
			b = append(b, frameBytes(typ, channel(src.IntN(4)), src.Uint32N(4), payload)...)
		}
		b = append(b, make([]byte, headerLen+MaxPayload)...) // fills what is open, as Connect does
		go h.Write(append(b, helloBytes(session+1)...))
		for {
			got, err := h.dec.sync()
			if err != nil {
				t.Fatal(err)
			}
			if got.session == session+1 {
				break
			}
		}
	}
}

func TestOtherVersion(t *testing.T) {
	t.Parallel()
	old := helloBytes(0)
	old[headerLen+16]++
	host, guest := net.Pipe()
	go guest.Write(old)
	go io.Copy(io.Discard, guest)
	if _, err := Connect(testContext(t), host); !errors.Is(err, ErrVersion) {
		t.Errorf("connect: %v", err)
	}
	// The agent shows its own version to such a host.
	h := newRawHost(t)
	b := helloBytes(9)
	b[headerLen+16]++
	go h.Write(b)
	for {
		got, err := h.dec.sync()
		if err != nil {
			t.Fatal(err)
		}
		if got.session == 9 {
			return
		}
	}
}

// A new session kills what the old one ran, with everything in its kernel session.
func TestNewSessionKillsOldCommands(t *testing.T) {
	t.Parallel()
	h := newRawHost(t)
	h.hello(1)
	// All processes hold the writing end; the reading end sees when the last is gone.
	fifo := t.TempDir() + "/fifo"
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	script := `exec 5>"$0"; echo up >&5; sleep 1000 & sh -c 'set -m; sleep 1000 & wait' & wait`
	go h.Write(commandBytes(1, "sh", "-c", script, fifo))
	f, err := os.OpenFile(fifo, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.SetReadDeadline(time.Now().Add(patience))
	up := make([]byte, 3)
	if _, err := io.ReadFull(f, up); err != nil {
		t.Fatal(err)
	}
	h.hello(2)
	if rest, err := io.ReadAll(f); err != nil || len(rest) != 0 {
		t.Errorf("waiting for the commands' end: %q, %v", rest, err)
	}
}

func TestRequestsThatNeedInit(t *testing.T) {
	t.Parallel()
	c := connect(t)
	ctx := testContext(t)
	for name, err := range map[string]error{
		"power off":   c.Poweroff(ctx),
		"reboot":      c.Reboot(ctx),
		"mount":       c.Mount(ctx, Mount{Source: "a", Target: "/b", Type: "c"}),
		"switch root": c.SwitchRoot(ctx, "/x"),
	} {
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "not PID 1") {
			t.Errorf("%s: %v", name, err)
		}
	}
	i, err := c.Info(ctx)
	if err != nil || i.CPUs < 1 || i.Memory < 1<<20 || !strings.HasPrefix(i.Kernel, "Linux ") || i.Uptime <= 0 {
		t.Errorf("info %+v, %v", i, err)
	}
}
