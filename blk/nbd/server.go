package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/kvmlet/kvmlet/blk"
)

// Export is a disk under the name that clients know it by.
type Export struct {
	Name        string      // the empty name is the default export; so is the only export, whatever its name
	Description string      // for humans, shown in lists
	ReadOnly    bool        // refuse writes, even if Disk takes them
	Disk        *blk.Device // stays the caller's, who closes it after the Server
}

// Server exports disks over NBD. Its fields must not change once it serves.
//
// Every export offers flush, FUA, discards, zeroes, block status and any number of connections at once; requests may
// begin and end at any byte and be up to 32 MiB long.
type Server struct {
	Exports []Export

	// TLS demands TLS of every client, before it learns anything about the exports. Nil means plain text.
	TLS *tls.Config

	// HandshakeTimeout is how long a client may take until it has chosen an export; 0 means 10 s. After that it may idle.
	HandshakeTimeout time.Duration

	// StallTimeout is how long a client that has begun a request may take for the rest of it, or for an answer that it
	// is sent; or for 64 KiB of these where they are longer. 0 means a minute. Later it is disconnected.
	StallTimeout time.Duration

	// MaxConns is how many connections are served at a time; 0 means 32. More are left waiting, without a greeting, until
	// one of these ends.
	MaxConns int

	MaxRequests int   // requests under way on one connection, more wait to be read; 0 means 64
	MaxBytes    int64 // their payload in bytes, likewise; 0 means 64 MiB. At least one request of any length is let in.

	// MaxMemory is how many bytes the payload of all connections may take up at a time; 0 means 256 MiB, and anything
	// below the largest request, of 32 MiB, that. Requests wait for it before their payload is read or fetched. Beyond a
	// single request, every connection gets the same share. Memory that was given back and not collected yet comes on top.
	MaxMemory int64

	// Log is told why connections ended that did not end well. Nil means that nobody wants to know.
	Log func(client net.Addr, err error)

	mu        sync.Mutex
	ctx       context.Context // of the requests; ended by Close
	cancel    context.CancelFunc
	listeners map[net.Listener]struct{}
	conns     map[*serverConn]struct{}
	stopping  chan struct{} // closed when Shutdown or Close begins
	stopped   bool
	ends      sync.WaitGroup // of the connections
	slots     chan struct{}  // one value for each connection
	memory    budget
}

// Serve exports over ln until ctx ends, gives requests under way five seconds to end then, and returns. The error is
// that of ln, or of ctx. It closes ln.
func Serve(ctx context.Context, ln net.Listener, exports ...Export) error {
	s := &Server{Exports: exports}
	end := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = s.Shutdown(grace)
	})
	err := s.Serve(ln)
	if !end() {
		<-s.done()
		err = ctx.Err()
	}
	_ = s.Close() // for a listener that failed; else nothing is left to close
	return err
}

// Serve accepts connections on ln and serves them, until Shutdown or Close, when it returns ErrServerClosed, or an error
// of ln. It closes ln. Several listeners may be served at once.
func (s *Server) Serve(ln net.Listener) error {
	defer ln.Close()
	if err := s.checkExports(); err != nil {
		return err
	}
	s.mu.Lock()
	s.init()
	if s.stopped {
		s.mu.Unlock()
		return ErrServerClosed
	}
	s.listeners[ln] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.listeners, ln)
	}()
	pause := time.Duration(0)
	for {
		nc, err := ln.Accept()
		switch {
		case err == nil:
			pause = 0
			select {
			case s.slots <- struct{}{}:
				s.admit(nc)
			case <-s.stopping:
				nc.Close()
			}
			continue
		case s.isStopping():
			return ErrServerClosed
		case !temporary(err):
			return fmt.Errorf("nbd: %w", err)
		}
		// Out of descriptors, most likely: they come back when connections end.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		select {
		case <-time.After(pause):
		case <-s.stopping:
			return ErrServerClosed
		}
	}
}

// temporary reports whether accepting may work later.
func temporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

// Shutdown stops listening and waits for the requests under way; those that come later are answered NBD_ESHUTDOWN. It
// disconnects every client that waits for nothing any more. When ctx ends first, it does what Close does and returns
// its error.
func (s *Server) Shutdown(ctx context.Context) error {
	for _, c := range s.stop() {
		c.wind()
	}
	select {
	case <-s.done():
		return nil
	case <-ctx.Done():
		_ = s.Close()
		return ctx.Err()
	}
}

// Close stops listening, disconnects every client and cancels the requests under way. It returns when they have ended.
func (s *Server) Close() error {
	conns := s.stop()
	s.mu.Lock()
	s.cancel()
	s.mu.Unlock()
	for _, c := range conns {
		c.plain.Close()
	}
	s.ends.Wait()
	return nil
}

// init makes what a zero Server lacks. The caller holds s.mu.
func (s *Server) init() {
	if s.conns == nil {
		s.listeners, s.conns = map[net.Listener]struct{}{}, map[*serverConn]struct{}{}
		s.stopping = make(chan struct{})
		s.slots = make(chan struct{}, orDefault(s.MaxConns, 32))
		s.memory.limit = max(orDefault(s.MaxMemory, 256<<20), maxBlock)
		s.ctx, s.cancel = context.WithCancel(context.Background())
	}
}

func orDefault[T int | int64 | time.Duration](v, d T) T {
	if v <= 0 {
		return d
	}
	return v
}

// stop ends the listening and returns the connections that are left.
func (s *Server) stop() []*serverConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.init()
	if !s.stopped {
		s.stopped = true
		close(s.stopping)
	}
	for ln := range s.listeners {
		ln.Close()
	}
	conns := make([]*serverConn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	return conns
}

func (s *Server) isStopping() bool {
	select {
	case <-s.stopping:
		return true
	default:
		return false
	}
}

// done returns a channel that is closed when no connection is left.
func (s *Server) done() <-chan struct{} {
	ch := make(chan struct{})
	go func() {
		s.ends.Wait()
		close(ch)
	}()
	return ch
}

func (s *Server) checkExports() error {
	names := map[string]bool{}
	for i := range s.Exports {
		e := &s.Exports[i]
		if len(e.Name) > maxString || len(e.Description) > maxString {
			return fmt.Errorf("nbd: name or description of an export longer than %d bytes", maxString)
		}
		if names[e.Name] {
			return fmt.Errorf("nbd: two exports of the name %q", e.Name)
		}
		names[e.Name] = true
	}
	return nil
}

// find returns the export of that name.
func (s *Server) find(name string) *Export {
	for i := range s.Exports {
		if s.Exports[i].Name == name {
			return &s.Exports[i]
		}
	}
	if name == "" && len(s.Exports) == 1 {
		return &s.Exports[0]
	}
	return nil
}

func (e *Export) readOnly() bool { return e.ReadOnly || e.Disk.ReadOnly() }

// admit starts to serve nc, which has a slot.
func (s *Server) admit(nc net.Conn) {
	c := &serverConn{s: s, link: newLink(nc), plain: nc}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		nc.Close()
		<-s.slots
		return
	}
	s.conns[c] = struct{}{}
	s.ends.Go(func() {
		err := c.serve()
		c.link.Close()
		if err != nil && s.Log != nil {
			s.Log(nc.RemoteAddr(), err)
		}
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		<-s.slots
	})
}
