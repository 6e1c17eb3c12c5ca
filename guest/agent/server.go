package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
)

const (
	maxProcesses = 256 // running at a time in one session
	maxRequests  = 16  // waiting at a time
)

// errReplaced ends a session whose host made another, or went away.
var errReplaced = errors.New("session ended")

// system is what the agent does to its machine. PID 1 has a real one; other processes refuse.
type system interface {
	// greet is called with each new host's hello: it has the time and random bytes.
	greet(h *hello)
	info() (Info, error)
	// shutdown prepares to power off or reboot; begin starts it, once the host has its answer.
	shutdown(reboot bool) (begin func(), err error)
	sync() error
	mount(mounts []Mount) error
	switchRoot(dir string) error
	// ended is told why a session was cut off.
	ended(err error)
	// start forks and execs; the channel gets the child's status.
	start(path string, args []string, attr *syscall.ProcAttr) (pid int, exited <-chan syscall.WaitStatus, err error)
}

// Serve is the guest's end for a process that is not PID 1: it runs commands, as Main does, and refuses what only PID 1
// can do. It returns when conn ends, having killed what it ran.
func Serve(conn io.ReadWriter) error { return serve(conn, unprivileged{}) }

// serve serves the sessions that come one after the other on one connection, until that ends.
func serve(conn io.ReadWriter, sys system) error {
	dec := newDecoder(conn)
	if err := sendHello(newWriter(conn), 0); err != nil {
		return err
	}
	for {
		h, err := dec.sync()
		for err == nil {
			h, err = serveSession(conn, dec, sys, h)
		}
		switch {
		case errors.Is(err, ErrVersion): // let the host see ours
			err = sendHello(newWriter(conn), h.session)
		case errors.Is(err, ErrProtocol): // let it see that its session is over
			sys.ended(err)
			err = sendHello(newWriter(conn), 0)
		}
		if err != nil {
			return err
		}
	}
}

func sendHello(w *writer, session uint64) error {
	h := hello{session: session}
	return w.send(frameHello, 0, 0, h.append(make([]byte, 0, helloLen)))
}

// session is one host's time with the agent.
type session struct {
	w        *writer
	sys      system
	id       uint64
	pieces   assembler
	last     uint32 // newest stream number
	requests chan request

	mu      sync.Mutex
	running map[uint32]*running // guarded by mu
}

type request struct {
	id  uint32
	msg []byte
}

// serveSession serves until the connection fails or another hello comes, which it returns.
func serveSession(conn io.Writer, dec *decoder, sys system, h hello) (hello, error) {
	s := &session{
		w: newWriter(conn), sys: sys, id: h.session,
		requests: make(chan request, maxRequests), running: make(map[uint32]*running),
	}
	sys.greet(&h)
	if err := sendHello(s.w, s.id); err != nil {
		return hello{}, err
	}
	go s.answer()
	defer s.end()
	for {
		f, err := dec.next()
		if err != nil {
			return hello{}, err
		}
		if f.typ == frameHello {
			h, err := parseHello(f.payload)
			if err != nil || h.session != s.id {
				return h, err
			}
			continue // repeated before our answer came
		}
		if err := s.receive(f); err != nil {
			return hello{}, err
		}
	}
}

// end kills the session's commands and lets nothing of them reach the connection any more.
func (s *session) end() {
	close(s.requests)
	s.mu.Lock()
	for _, r := range s.running {
		r.abort()
	}
	s.mu.Unlock()
	s.w.stop(errReplaced)
}

func (s *session) receive(f frame) error {
	if s.pieces.typ != 0 && f.typ != s.pieces.typ {
		return fmt.Errorf("frame of type %d inside a message: %w", f.typ, ErrProtocol)
	}
	switch f.typ {
	case frameStart, frameRequest:
		if f.stream <= s.last && s.pieces.typ == 0 {
			return fmt.Errorf("stream %d used again: %w", f.stream, ErrProtocol)
		}
		s.last = max(s.last, f.stream)
		msg, err := s.pieces.add(f)
		if err != nil || msg == nil {
			return err
		}
		if f.typ == frameStart {
			return s.start(f.stream, msg)
		}
		select {
		case s.requests <- request{f.stream, msg}:
			return nil
		default:
			return fmt.Errorf("more than %d requests at a time: %w", maxRequests, ErrProtocol)
		}
	}
	if f.stream > s.last {
		return fmt.Errorf("frame of type %d for process %d, which was never started: %w", f.typ, f.stream, ErrProtocol)
	}
	s.mu.Lock()
	r := s.running[f.stream]
	s.mu.Unlock()
	if r == nil {
		return nil // was under way when the process ended
	}
	return r.receive(f)
}

func (s *session) start(id uint32, msg []byte) error {
	sp, err := decodeSpec(msg)
	if err != nil {
		return err
	}
	s.mu.Lock()
	n := len(s.running)
	s.mu.Unlock()
	var r *running
	if n >= maxProcesses {
		err = fmt.Errorf("more than %d commands at a time: %w", maxProcesses, syscall.EAGAIN)
	} else {
		r, err = startCommand(s, id, sp)
	}
	b := make([]byte, 4, 8)
	if err != nil {
		return s.w.send(frameStarted, 0, id, appendError(b, err))
	}
	s.mu.Lock()
	s.running[id] = r
	s.mu.Unlock()
	binary.LittleEndian.PutUint32(b, uint32(r.pid))
	err = s.w.send(frameStarted, 0, id, b[:8])
	go r.serve()
	return err
}

func (s *session) forget(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.running, id)
}

// answer does the requests, one after the other, until the session ends.
func (s *session) answer() {
	for r := range s.requests {
		body, after, err := s.do(r.msg)
		reply := make([]byte, 4, 64)
		if err != nil {
			reply[0] = 1
			reply = appendError(reply, err)
		}
		if s.w.sendPieces(frameReply, r.id, append(reply, body...)) != nil {
			return
		}
		if after != nil {
			after()
		}
	}
}

// do does a request. It returns the reply's body, and what to do once that is sent.
func (s *session) do(msg []byte) (body []byte, after func(), err error) {
	m := message{b: msg}
	switch kind := m.u32(); kind {
	case requestInfo:
		info, err := s.sys.info()
		if err != nil {
			return nil, nil, err
		}
		return info.encode(), nil, nil
	case requestPoweroff, requestReboot:
		after, err = s.sys.shutdown(kind == requestReboot)
		return nil, after, err
	case requestSync:
		return nil, nil, s.sys.sync()
	case requestMount:
		mounts := decodeMounts(&m)
		if err := m.done("list of mounts"); err != nil {
			return nil, nil, err
		}
		return nil, nil, s.sys.mount(mounts)
	case requestSwitchRoot:
		dir := m.string()
		if err := m.done("root directory"); err != nil {
			return nil, nil, err
		}
		return nil, nil, s.sys.switchRoot(dir)
	default:
		return nil, nil, fmt.Errorf("request of unknown kind %d: %w", kind, ErrProtocol)
	}
}

// unprivileged is the system of an agent that is not PID 1.
type unprivileged struct{}

func (unprivileged) greet(*hello)                  {}
func (unprivileged) ended(error)                   {}
func (unprivileged) info() (Info, error)           { return readInfo() }
func (unprivileged) sync() error                   { syscall.Sync(); return nil }
func (unprivileged) shutdown(bool) (func(), error) { return nil, notInit("power off") }
func (unprivileged) mount([]Mount) error           { return notInit("mount") }
func (unprivileged) switchRoot(string) error       { return notInit("switch the root") }

func (unprivileged) start(path string, args []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	pid, err := syscall.ForkExec(path, args, attr)
	if err != nil {
		return 0, nil, err
	}
	exited := make(chan syscall.WaitStatus, 1)
	go func() {
		var status syscall.WaitStatus
		for {
			if _, err := syscall.Wait4(pid, &status, 0, nil); err != syscall.EINTR {
				break
			}
		}
		exited <- status
	}()
	return pid, exited, nil
}

func notInit(what string) error {
	return fmt.Errorf("%s: the agent is not PID 1 (it is %d): %w", what, os.Getpid(), syscall.EPERM)
}
