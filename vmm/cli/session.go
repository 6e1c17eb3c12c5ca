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
var errLeft = errors.New("left the VM")

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
		restore, err := rawTerminal(s.streams.in)
		if err != nil {
			return 0, err
		}
		defer restore()
		cmd.TTY = true
		cmd.Stdin = &escapeReader{r: s.streams.in, leave: func() { leave(errLeft) }}
		if w, h, err := term.GetSize(int(s.streams.out.Fd())); err == nil {
			cmd.Rows, cmd.Columns = uint16(h), uint16(w)
		}
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

	status, err := p.Wait()
	if err != nil {
		return 0, cause(ctx, err)
	}
	return status.Code, nil
}

// relay passes signals on until stop is closed.
func (s *session) relay(p *agent.Process, signals <-chan os.Signal, stop <-chan struct{}, leave func(error)) {
	interrupts := 0
	for {
		select {
		case <-stop:
			return
		case sig := <-signals:
			if sig == syscall.SIGWINCH {
				if w, h, err := term.GetSize(int(s.streams.out.Fd())); err == nil && s.tty {
					_ = p.Resize(uint16(h), uint16(w)) // a command that is gone needs no size
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
