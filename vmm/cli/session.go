package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/term"

	"github.com/kvmlet/kvmlet/guest/agent"
)

// forwarded are the signals that go to the guest's command.
var forwarded = []os.Signal{
	syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2,
}

// patience is how many interrupts a command may ignore before they mean kvmlet itself, as with docker run.
const patience = 3

// errLeft is the cause of a session's end by Ctrl-A x, or by a signal that meant kvmlet.
var errLeft = errors.New("the VM was stopped")

// session is one command in a guest, connected to our own streams.
type session struct {
	streams streams
	args    []string
	dir     string
	env     []string
	tty     bool
}

// run starts the command and passes input, output, signals and window sizes until it ends. The status is the
// command's, as a shell has it. The terminal, if there is one, is as before when run returns.
func (s *session) run(ctx context.Context, c *agent.Client) (int, error) {
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)

	cmd := agent.Command{
		Args: s.args, Dir: s.dir, Env: s.env, Stdin: s.streams.in, Stdout: s.streams.out, Stderr: s.streams.err,
	}
	if s.tty {
		size := terminalSize(s.streams.out)
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

	signals := make(chan os.Signal, 16)
	signal.Notify(signals, append(forwarded, syscall.SIGWINCH)...)
	defer signal.Stop(signals)

	p, err := c.Start(ctx, cmd)
	var start *agent.StartError
	if errors.As(err, &start) {
		fprintf(s.streams.err, "kvmlet: %v\n", start)
		return start.Status().Code, nil
	}
	if err != nil {
		return 0, cause(ctx, err)
	}
	stop := make(chan struct{})
	defer close(stop)
	go s.relay(p, signals, stop, leave)

	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = p.Wait()
	}()
	select {
	case <-ended:
		var status agent.ExitStatus
		if status, err = p.Wait(); err == nil {
			return status.Code, nil
		}
	case <-ctx.Done(): // a guest may be past ending a command
	}
	if s.tty {
		fprintf(s.streams.out, "\r\n") // off the guest's line
	}
	return 0, cause(ctx, err)
}

// target takes what relay passes on; it is an *agent.Process.
type target interface {
	Signal(syscall.Signal) error
	Resize(rows, columns uint16) error
}

// relay passes signals on until stop is closed.
func (s *session) relay(p target, signals <-chan os.Signal, stop <-chan struct{}, leave func(error)) {
	interrupts := 0
	for {
		select {
		case <-stop:
			return
		case sig := <-signals:
			if sig == syscall.SIGWINCH {
				if s.tty {
					size := terminalSize(s.streams.out)
					_ = p.Resize(size.Rows, size.Columns) // a command that is gone needs no size
				}
				continue
			}
			if sig == syscall.SIGINT || sig == syscall.SIGTERM {
				interrupts++
			}
			// On a terminal Ctrl-C comes as a byte; a signal is somebody else's word to end.
			if interrupts >= patience || s.tty && (sig == syscall.SIGTERM || sig == syscall.SIGHUP) {
				leave(errLeft)
				return
			}
			_ = p.Signal(sig.(syscall.Signal)) // a command that is gone needs no signal
		}
	}
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
