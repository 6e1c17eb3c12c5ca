package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
)

// Command is what to run in the guest. Args[0] is the program: a path, or a name looked up in PATH.
type Command struct {
	Args []string
	Env  []string // nil: the agent's own, which has PATH, HOME and TERM
	Dir  string   // empty: /
	Root string   // chroot directory in the guest; Dir is inside; empty: none
	User *User    // nil: root

	// TTY gives the command a terminal of its own of the given size. Its output comes on Stdout, that to stderr too.
	TTY           bool
	Rows, Columns uint16

	// Stdin is read from the process's start until it ends or closes its stdin; one more Read may then be under way.
	// Stdout and Stderr are written to from a goroutine each. Nil means /dev/null.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// User says on whose behalf a command runs.
type User struct {
	UID, GID uint32
	Groups   []uint32
}

// ExitStatus says how a process ended.
type ExitStatus struct {
	Code   int            // as a shell has it in $?: 128 + signal for a killed process
	Signal syscall.Signal // 0 if it exited by itself
}

// StartError says why a command did not start.
type StartError struct {
	Name string // Args[0]
	Err  error  // an *Error
}

func (e *StartError) Error() string { return fmt.Sprintf("start %s in the guest: %v", e.Name, e.Err) }
func (e *StartError) Unwrap() error { return e.Err }

// Status is the exit status that a shell gives to such a failure: 127 for a command that is not found, else 126.
func (e *StartError) Status() ExitStatus {
	if errors.Is(e.Err, syscall.ENOENT) || errors.Is(e.Err, syscall.ENOTDIR) {
		return ExitStatus{Code: 127}
	}
	return ExitStatus{Code: 126}
}

// OutputError says that one of a command's outputs could not be written on the host. The guest's command learned of it as
// from a pipe whose reader is gone, or from a terminal that was hung up.
type OutputError struct {
	Name string // stdout or stderr
	Err  error
}

func (e *OutputError) Error() string { return fmt.Sprintf("write the command's %s: %v", e.Name, e.Err) }
func (e *OutputError) Unwrap() error { return e.Err }

// Process is a command that was started in the guest.
type Process struct {
	client  *Client
	id      uint32
	pid     int
	started chan error    // takes one value
	exited  chan struct{} // closed when status or err is set by the reader
	done    chan struct{} // closed when the outputs are written too
	in      [channels]*inbox
	out     *credit
	pumps   sync.WaitGroup

	mu     sync.Mutex
	began  bool // the start was answered; guarded by mu
	over   bool // exited is closed; guarded by mu
	status ExitStatus
	err    error
}

// Start runs a command in the guest. When ctx ends the command is killed, and Wait returns ctx's cause. A command that
// cannot be started gives a *StartError.
func (c *Client) Start(ctx context.Context, cmd Command) (*Process, error) {
	if len(cmd.Args) == 0 {
		return nil, errors.New("start a command in the guest: no Args")
	}
	s := spec{
		args: cmd.Args, env: cmd.Env, defaultEnv: cmd.Env == nil, dir: cmd.Dir, root: cmd.Root, user: cmd.User,
		tty: cmd.TTY, rows: cmd.Rows, columns: cmd.Columns,
		wired: [channels]bool{cmd.Stdin != nil, cmd.Stdout != nil, cmd.Stderr != nil && !cmd.TTY},
	}
	msg := s.encode()
	if len(msg) > maxMessage {
		return nil, fmt.Errorf("start %s in the guest: arguments and environment are longer than %d bytes",
			cmd.Args[0], maxMessage)
	}
	p := &Process{
		client: c, started: make(chan error, 1), exited: make(chan struct{}), done: make(chan struct{}),
		in: [channels]*inbox{stdout: newInbox(), stderr: newInbox()}, out: newCredit(),
	}
	register := func(id uint32) { p.id, c.processes[id] = id, p }
	if _, err := c.open(ctx, frameStart, msg, register, func(uint32) { p.abandon() }); err != nil {
		return nil, fmt.Errorf("start %s in the guest: %w", cmd.Args[0], err)
	}
	var failed error
	select {
	case failed = <-p.started:
	case <-p.exited:
		select {
		case failed = <-p.started: // and ended since
		default: // the connection ended
			return nil, fmt.Errorf("start %s in the guest: %w", cmd.Args[0], p.err)
		}
	case <-ctx.Done():
		p.abandon()
		return nil, fmt.Errorf("start %s in the guest: %w", cmd.Args[0], context.Cause(ctx))
	}
	if failed != nil {
		return nil, &StartError{cmd.Args[0], failed}
	}
	p.serve(ctx, cmd)
	return p, nil
}

// abandon has the guest end a process that nobody waits for.
func (p *Process) abandon() {
	_ = p.Signal(syscall.SIGKILL) // if this is not sent, nothing is
	for ch := stdout; ch < channels; ch++ {
		p.in[ch].close(errClosed)
		_ = p.client.w.post(frameClose, ch, p.id)
	}
}

// serve starts the goroutines that carry the process's streams and wait for its end.
func (p *Process) serve(ctx context.Context, cmd Command) {
	if cmd.Stdin != nil {
		go pump(p.client.w, stdin, p.id, cmd.Stdin, p.out) // not waited for: a terminal's Read may never return
	}
	var failed [channels]error
	for ch, w := range map[channel]io.Writer{stdout: cmd.Stdout, stderr: cmd.Stderr} {
		if w == nil {
			w = io.Discard
		}
		p.pumps.Go(func() { failed[ch] = drain(p.client.w, ch, p.id, p.in[ch], w) })
	}
	stop := context.AfterFunc(ctx, func() { _ = p.Signal(syscall.SIGKILL) })
	go func() {
		<-p.exited
		p.out.close(errClosed)
		p.pumps.Wait()
		cancelled := !stop()
		p.mu.Lock()
		defer p.mu.Unlock()
		switch {
		case p.err != nil:
		case cancelled:
			p.err = context.Cause(ctx)
		case failed[stdout] != nil:
			p.err = &OutputError{"stdout", failed[stdout]}
		case failed[stderr] != nil:
			p.err = &OutputError{"stderr", failed[stderr]}
		}
		close(p.done)
	}()
}

// receive takes a frame from the guest. It is called by the connection's reader and never waits.
func (p *Process) receive(f frame) error {
	p.mu.Lock()
	began := p.began
	p.began = true
	p.mu.Unlock()
	if began == (f.typ == frameStarted) {
		return fmt.Errorf("frame of type %d, and process %d started %t: %w", f.typ, p.id, began, ErrProtocol)
	}
	switch {
	case f.typ == frameStarted:
		if len(f.payload) == 8 {
			p.pid = int(binary.LittleEndian.Uint32(f.payload))
			p.started <- nil
		} else {
			p.forget()
			p.started <- decodeError(f.payload[4:])
		}
		return nil
	case f.typ == frameData && f.channel != stdin:
		return p.in[f.channel].put(f.payload)
	case f.typ == frameCredit && f.channel == stdin:
		return p.out.give(binary.LittleEndian.Uint32(f.payload))
	case f.typ == frameClose && f.channel == stdin:
		p.out.close(errClosed)
		return nil
	case f.typ == frameExit:
		code, sig := binary.LittleEndian.Uint32(f.payload), binary.LittleEndian.Uint32(f.payload[4:])
		if code > 255 || sig > maxSignal {
			return fmt.Errorf("process %d exited with code %d, signal %d: %w", p.id, code, sig, ErrProtocol)
		}
		p.forget()
		p.end(ExitStatus{int(code), syscall.Signal(sig)}, nil)
		return nil
	}
	return fmt.Errorf("frame of type %d on channel %d from the guest: %w", f.typ, f.channel, ErrProtocol)
}

// forget takes the process out of the connection's table: what still comes for it is dropped.
func (p *Process) forget() {
	p.client.mu.Lock()
	defer p.client.mu.Unlock()
	delete(p.client.processes, p.id)
}

// lost ends the process as the connection ended.
func (p *Process) lost(err error) { p.end(ExitStatus{}, err) }

// end sets the process's fate; the first one stays. What came of its output is still written.
func (p *Process) end(status ExitStatus, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over {
		return
	}
	p.over, p.status, p.err = true, status, err
	p.in[stdout].finish(io.EOF)
	p.in[stderr].finish(io.EOF)
	close(p.exited)
}

// PID is the process's number in the guest.
func (p *Process) PID() int { return p.pid }

// Signal sends a signal to the command's process group, or to the foreground group of its terminal. It does not wait for
// the guest to take it. After the command's end it returns os.ErrProcessDone, and EAGAIN if the guest has left very many
// signals unread.
func (p *Process) Signal(sig syscall.Signal) error {
	if sig < 1 || sig > maxSignal {
		return fmt.Errorf("signal %d of the guest: %w", int(sig), syscall.EINVAL)
	}
	select {
	case <-p.exited:
		return os.ErrProcessDone
	default:
		return p.client.w.post(frameSignal, 0, p.id, uint32(sig))
	}
}

// Resize sets the size of the command's terminal. It waits and fails as Signal does.
func (p *Process) Resize(rows, columns uint16) error {
	select {
	case <-p.exited:
		return os.ErrProcessDone
	default:
		return p.client.w.post(frameResize, 0, p.id, uint32(rows)<<16|uint32(columns))
	}
}

// Wait returns how the command ended, once its output is written. An error means that the connection ended before, that
// the context of Start did, or that Stdout or Stderr failed; in the last case it is an *OutputError, and the status is
// valid too. Any number of goroutines may wait.
func (p *Process) Wait() (ExitStatus, error) {
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status, p.err
}

// Run starts a command and waits for it. For a command that cannot be started the status is as a shell gives it.
func (c *Client) Run(ctx context.Context, cmd Command) (ExitStatus, error) {
	p, err := c.Start(ctx, cmd)
	if err != nil {
		var start *StartError
		if errors.As(err, &start) {
			return start.Status(), err
		}
		return ExitStatus{}, err
	}
	return p.Wait()
}
