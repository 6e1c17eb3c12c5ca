package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/term"

	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/lab"
)

// session is one command in a guest, connected to our own streams.
type session struct {
	streams streams
	signals *signals
	args    []string
	dir     string
	env     []string
	tty     bool
}

// run starts the command and passes input, output, signals and window sizes until it ends. The status is the
// command's, as a shell has it; it is valid too if the error is an *agent.OutputError. The terminal, if there is one, is as
// before when run returns.
func (s *session) run(ctx context.Context, c *agent.Client) (int, error) {
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)

	cmd := agent.Command{
		Args: s.args, Dir: s.dir, Env: s.env, Stdin: s.streams.in, Stdout: s.streams.out, Stderr: s.streams.err,
	}
	var size lab.Size
	if s.tty {
		size = terminalSize(s.streams.out)
		cmd.TTY, cmd.Rows, cmd.Columns = true, size.Rows, size.Columns
	}
	if s.tty && isTerminal(s.streams.in) {
		restore, err := rawTerminal(s.streams.in)
		if err != nil {
			return 0, err
		}
		defer restore()
		cmd.Stdin = &escapeReader{r: s.streams.in, leave: func() { leave(errLeft) }}
	}

	stop := s.signals.during(leaveAtSignal(leave))
	p, err := c.Start(ctx, cmd)
	stop()
	var start *agent.StartError
	if errors.As(err, &start) {
		fprintf(s.streams.err, "kvmlet: %v\n", start)
		return start.Status().Code, nil
	}
	if err != nil {
		return 0, cause(ctx, err)
	}
	if s.tty && terminalSize(s.streams.out) != size {
		s.resize(p) // it changed while there was nobody to tell
	}
	defer s.signals.during(func(sig os.Signal) { s.relay(p, sig, leave) })()

	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = p.Wait()
	}()
	select {
	case <-ended:
		var status agent.ExitStatus
		var output *agent.OutputError
		if status, err = p.Wait(); err == nil || errors.As(err, &output) {
			return status.Code, err
		}
	case <-ctx.Done(): // a guest may be past ending a command
	}
	if s.tty {
		fprintf(s.streams.out, "\r\n") // off the guest's line
	}
	return 0, cause(ctx, err)
}

// target takes what relay passes on, without making it wait; it is an *agent.Process.
type target interface {
	Signal(syscall.Signal) error
	Resize(rows, columns uint16) error
}

// relay passes a signal on, or leaves if it means kvmlet.
func (s *session) relay(p target, sig os.Signal, leave context.CancelCauseFunc) {
	if sig == syscall.SIGWINCH {
		if s.tty {
			s.resize(p)
		}
		return
	}
	// On a terminal Ctrl-C comes as a byte; a signal is somebody else's word to end.
	if s.signals.exhausted(sig) || s.tty && (sig == syscall.SIGTERM || sig == syscall.SIGHUP) {
		leave(errLeft)
		return
	}
	_ = p.Signal(sig.(syscall.Signal)) // a command that is gone needs no signal
}

func (s *session) resize(p target) {
	size := terminalSize(s.streams.out)
	_ = p.Resize(size.Rows, size.Columns) // a command that is gone needs no size
}

// cause prefers the reason why ctx ended over the error that followed from it.
func cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil {
		return c
	}
	return err
}

// isTerminal reports whether f is a terminal.
func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// rawTerminal puts a terminal into raw mode and returns what undoes it.
func rawTerminal(f *os.File) (restore func(), err error) {
	old, err := term.MakeRaw(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("set the terminal to raw mode: %w", err)
	}
	return func() { _ = term.Restore(int(f.Fd()), old) }, nil
}
