package agent

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

var (
	// ErrClosed says that Close ended the connection.
	ErrClosed = errors.New("agent connection closed")

	// ErrDisconnected says that the guest's end went away: it powered off, crashed or was reset.
	ErrDisconnected = errors.New("agent disconnected")
)

const (
	helloRetry    = 2 * time.Second // until the hello is first repeated, with padding
	helloRetryMax = time.Minute
)

// Client is the host's end of a connection to a guest's agent. Its methods may be called from any goroutine.
type Client struct {
	conn    io.ReadWriteCloser
	w       *writer
	session uint64
	asking  chan struct{} // holds a token while a request is under way
	ended   chan struct{} // closed when err is set
	wg      sync.WaitGroup

	opening sync.Mutex // held from drawing a stream number until it is on the wire, as the guest wants them in order

	mu        sync.Mutex
	err       error                  // why the connection ended; guarded by mu
	last      uint32                 // the newest stream number given out; guarded by mu
	processes map[uint32]*Process    // guarded by mu
	replies   map[uint32]chan []byte // guarded by mu
}

// Connect waits for the agent at the other end of conn, which may appear later, and opens a session with it; commands
// of an earlier session are killed. conn's Close must end its blocked reads and writes. Connect owns conn: it is closed
// by Client.Close, and by Connect itself if that fails. Where the agent speaks another version the error is ErrVersion.
func Connect(ctx context.Context, conn io.ReadWriteCloser) (*Client, error) {
	c := &Client{
		conn:      conn,
		w:         newWriter(conn),
		asking:    make(chan struct{}, 1),
		ended:     make(chan struct{}),
		processes: make(map[uint32]*Process),
		replies:   make(map[uint32]chan []byte),
	}
	for c.session == 0 {
		var b [8]byte
		rand.Read(b[:]) // never fails
		c.session = binary.LittleEndian.Uint64(b[:])
	}
	synced, announced := make(chan struct{}), make(chan struct{}, 1)
	c.wg.Go(func() { c.fail(c.read(synced, announced)) })
	c.wg.Go(func() { c.greet(synced, announced) })
	select {
	case <-synced:
		return c, nil
	case <-c.ended:
		conn.Close()
		c.wg.Wait()
		return nil, fmt.Errorf("connect to the guest's agent: %w", c.err)
	case <-ctx.Done():
		conn.Close()
		c.wg.Wait()
		return nil, fmt.Errorf("connect to the guest's agent: %w", context.Cause(ctx))
	}
}

// greet sends the host's hello until it is answered: at once, whenever the guest announces itself, and behind padding
// when nothing came for a while, as the guest may be inside a frame that an earlier host did not finish.
func (c *Client) greet(synced, announced <-chan struct{}) {
	const padding = headerLen + MaxPayload
	b := make([]byte, padding+headerLen, padding+headerLen+helloLen)
	putHeader(b[padding:], frameHello, 0, 0, helloLen)
	retry := helloRetry
	for skip := padding; ; {
		h := hello{session: c.session, clock: time.Now().UnixNano()}
		rand.Read(h.seed[:])
		if err := c.w.write(h.append(b)[skip:]); err != nil {
			c.fail(err)
			return
		}
		timer := time.NewTimer(retry)
		select {
		case <-announced:
			skip = padding
		case <-timer.C:
			skip = 0
			retry = min(2*retry, helloRetryMax)
		case <-synced:
			timer.Stop()
			return
		case <-c.ended:
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// read serves the connection until it ends.
func (c *Client) read(synced chan<- struct{}, announced chan<- struct{}) error {
	dec := newDecoder(c.conn)
	for {
		h, err := dec.sync()
		if err != nil {
			return err
		}
		if h.session == c.session {
			break
		}
		if h.session == 0 {
			select {
			case announced <- struct{}{}:
			default: // one is enough
			}
		}
	}
	close(synced)
	var replies assembler
	for {
		f, err := dec.next()
		if err != nil {
			return err
		}
		if err := c.dispatch(f, &replies); err != nil {
			return err
		}
	}
}

func (c *Client) dispatch(f frame, replies *assembler) error {
	if replies.typ != 0 && f.typ != frameReply {
		return fmt.Errorf("frame of type %d inside a reply: %w", f.typ, ErrProtocol)
	}
	switch f.typ {
	case frameHello:
		h, err := parseHello(f.payload)
		if err == nil && h.session != c.session {
			err = fmt.Errorf("the guest's agent started anew: %w", ErrDisconnected)
		}
		return err
	case frameReply:
		msg, err := replies.add(f)
		if err != nil || msg == nil {
			return err
		}
		c.mu.Lock()
		reply := c.replies[f.stream]
		delete(c.replies, f.stream)
		known := f.stream <= c.last
		c.mu.Unlock()
		if reply != nil {
			reply <- msg // has room for it
		} else if !known {
			return fmt.Errorf("reply to request %d, which was never made: %w", f.stream, ErrProtocol)
		}
		return nil
	}
	c.mu.Lock()
	p, known := c.processes[f.stream], f.stream <= c.last
	c.mu.Unlock()
	switch {
	case p != nil:
		return p.receive(f)
	case !known:
		return fmt.Errorf("frame for process %d, which was never started: %w", f.stream, ErrProtocol)
	}
	return nil // was under way when the process ended
}

// fail ends the connection for everybody who waits for it. The first reason stays.
func (c *Client) fail(err error) {
	switch {
	case errors.Is(err, ErrClosed), errors.Is(err, ErrDisconnected):
	case errors.Is(err, ErrProtocol), errors.Is(err, ErrVersion):
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		err = ErrDisconnected
	default:
		err = fmt.Errorf("%w: %w", ErrDisconnected, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	close(c.ended)
	for id, p := range c.processes {
		delete(c.processes, id)
		p.lost(err)
	}
}

// Err returns why the connection ended, or nil while it lasts.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.ended }

// Nudge sends the guest a byte that means nothing, which interrupts it all the same, and does not wait for that.
func (c *Client) Nudge() { c.w.pad() }

// Close ends the connection; the guest kills the session's commands, and waiters get ErrClosed.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	err := c.conn.Close()
	c.wg.Wait()
	return err
}

// request sends a request and returns the body of its reply, or ctx's cause when that ends. Requests go one at a time.
func (c *Client) request(ctx context.Context, what string, msg []byte) (body []byte, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", what, err)
		}
	}()
	if len(msg) > maxMessage {
		return nil, fmt.Errorf("request of %d bytes, more than %d", len(msg), maxMessage)
	}
	select {
	case c.asking <- struct{}{}:
		defer func() { <-c.asking }()
	case <-c.ended:
		return nil, c.Err()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	reply := make(chan []byte, 1)
	forget := func(id uint32) {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.replies, id)
	}
	id, err := c.open(ctx, frameRequest, msg, func(id uint32) { c.replies[id] = reply }, forget)
	if err != nil {
		return nil, err
	}
	defer forget(id)
	var m message
	select {
	case m.b = <-reply:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-c.ended:
		select {
		case m.b = <-reply: // came just before the end, as that of a power-off does
		default:
			return nil, c.Err()
		}
	}
	if failed := m.u32(); failed != 0 || m.bad {
		return nil, decodeError(m.b)
	}
	return m.b, nil
}

// open sends the message that opens a stream. register notes under c.mu who gets what comes back on it.
//
// A guest that reads nothing any more does not hold open up for longer than ctx. A message that is half sent then is
// still sent to its end, as long as the connection lasts, for what follows it on the wire; late is called after that.
func (c *Client) open(
	ctx context.Context, t frameType, msg []byte, register, late func(id uint32),
) (uint32, error) {
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	type result struct {
		id  uint32
		err error
	}
	sent := make(chan result, 1)
	go func() {
		id, err := c.sendOpening(t, msg, register)
		sent <- result{id, err}
	}()
	select {
	case r := <-sent:
		return r.id, r.err
	case <-c.ended:
		return 0, c.Err()
	case <-ctx.Done():
		go func() {
			if r := <-sent; r.err == nil {
				late(r.id)
			}
		}()
		return 0, context.Cause(ctx)
	}
}

// sendOpening is open without a bound.
func (c *Client) sendOpening(t frameType, msg []byte, register func(id uint32)) (uint32, error) {
	c.opening.Lock()
	defer c.opening.Unlock()
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return 0, c.err
	}
	c.last++
	id := c.last
	register(id)
	c.mu.Unlock()
	if err := c.w.sendPieces(t, id, msg); err != nil {
		c.fail(err)
		return 0, c.Err()
	}
	return id, nil
}

// Info is what a guest tells of itself. Durations count from the guest kernel's start, by its boot clock.
type Info struct {
	Kernel      string // as uname -srvm prints it
	Hostname    string
	CPUs        int           // online
	Memory      uint64        // usable RAM, bytes
	InitStarted time.Duration // PID 1 entered Main
	AgentReady  time.Duration // the agent opened its port
	Uptime      time.Duration // now
}

// Info asks the guest for its kernel, size and times.
func (c *Client) Info(ctx context.Context) (Info, error) {
	b, err := c.request(ctx, "ask the guest for its state", requestHead(requestInfo))
	if err != nil {
		return Info{}, err
	}
	return decodeInfo(b)
}

// Poweroff asks PID 1 to end all processes, sync, unmount and power the machine off. It returns when the guest began.
func (c *Client) Poweroff(ctx context.Context) error {
	_, err := c.request(ctx, "power the guest off", requestHead(requestPoweroff))
	return err
}

// Reboot is Poweroff with a reset at the end.
func (c *Client) Reboot(ctx context.Context) error {
	_, err := c.request(ctx, "reboot the guest", requestHead(requestReboot))
	return err
}

// Sync returns when all file systems of the guest are written back.
func (c *Client) Sync(ctx context.Context) error {
	_, err := c.request(ctx, "sync the guest's file systems", requestHead(requestSync))
	return err
}

// Mount is one mount(2) call of the guest. A target that is missing is made first, as a file where one is bound to it and
// as a directory elsewhere; with neither source nor type that is all.
type Mount struct {
	Source, Target, Type string
	Flags                uintptr // MS_*
	Options              string
}

// Mount does several mounts in order and stops at the first that fails.
func (c *Client) Mount(ctx context.Context, mounts ...Mount) error {
	_, err := c.request(ctx, "mount in the guest", encodeMounts(mounts))
	return err
}

// SwitchRoot makes dir, a mount point, the root directory of PID 1 and all commands started later.
func (c *Client) SwitchRoot(ctx context.Context, dir string) error {
	m := message{b: requestHead(requestSwitchRoot)}
	m.putString(dir)
	_, err := c.request(ctx, "switch the guest's root to "+dir, m.b)
	return err
}
