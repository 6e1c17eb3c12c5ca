package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/vmm"
)

// limit bounds what should take no time.
const limit = 30 * time.Second

// pipe returns both ends of a pipe.
func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close(); _ = w.Close() })
	return r, w
}

// path is what PATH is for commands: TestMain leaves this process none.
var path = []string{"PATH=/usr/bin:/bin"}

func shell(script string) []string { return []string{"/bin/sh", "-c", script} }

// guest is an agent in this process that can be made to read nothing any more, as a guest that hangs.
type guest struct {
	net.Conn
	hung   chan struct{} // closed: it hangs
	closed chan struct{}
}

func (g *guest) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	select {
	case <-g.hung:
		<-g.closed
		return 0, io.ErrClosedPipe
	default:
		return n, err
	}
}

func newGuest(t *testing.T) (*guest, *agent.Client) {
	t.Helper()
	host, end := net.Pipe()
	g := &guest{Conn: end, hung: make(chan struct{}), closed: make(chan struct{})}
	served := make(chan error, 1)
	go func() { served <- agent.Serve(g) }()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	c, err := agent.Connect(ctx, host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Close()
		close(g.closed)
		_ = end.Close()
		<-served // which kills what it ran
	})
	return g, c
}

// TestInterruptsEndASessionWithAHungGuest has a guest that reads nothing any more, while input waits to be sent to it. The
// first interrupt cannot be sent either; the last one ends the session all the same.
func TestInterruptsEndASessionWithAHungGuest(t *testing.T) {
	t.Parallel()
	g, c := newGuest(t)
	in, input := pipe(t)
	output, out := pipe(t)
	s := &session{
		streams: streams{in: in, out: out, err: out}, signals: &signals{ch: make(chan os.Signal)},
		args: shell("echo up; exec sleep 1000"), env: path,
	}
	ended := make(chan error, 1)
	go func() {
		_, err := s.run(t.Context(), c)
		ended <- err
	}()
	if _, err := io.ReadFull(output, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	close(g.hung)
	// The pipe holds 64 KiB of this and a frame not quite 32. So a second frame is made of it, and the guest takes one.
	if err := input.SetWriteDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	if _, err := input.Write(make([]byte, 96<<10)); err != nil {
		t.Fatal(err)
	}
	for range patience {
		select {
		case s.signals.ch <- syscall.SIGINT:
		case err := <-ended:
			t.Fatalf("ended too soon, with %v", err)
		case <-time.After(limit):
			t.Fatal("an interrupt is not taken")
		}
	}
	select {
	case err := <-ended:
		if !errors.Is(err, errLeft) {
			t.Errorf("ended with %v", err)
		}
	case <-time.After(limit):
		t.Error("the last interrupt does not end the session")
	}
}

// TestReaderOfOutputGone has nobody read a session's output: the command learns of it, and its status is the session's.
func TestReaderOfOutputGone(t *testing.T) {
	t.Parallel()
	_, c := newGuest(t)
	in, input := pipe(t)
	_ = input.Close()
	output, out := pipe(t)
	_ = output.Close()
	for name, k := range map[string]struct {
		tty    bool
		script string
		want   int
	}{
		"killed":      {false, "exec cat /dev/zero", 128 + int(syscall.SIGPIPE)},
		"told":        {false, "trap '' PIPE; while echo x; do :; done 2>&-; exit 3", 3},
		"terminal":    {true, "exec cat /dev/zero", 128 + int(syscall.SIGHUP)},
		"unconcerned": {true, "trap '' HUP; echo x; while test -w /dev/tty && echo x; do :; done; exit 4", 4},
	} {
		s := &session{
			streams: streams{in: in, out: out, err: out}, signals: &signals{ch: make(chan os.Signal)}, tty: k.tty,
			args: shell(k.script), env: path,
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		status, err := s.run(ctx, c)
		cancel()
		var o *agent.OutputError
		if status != k.want || !errors.As(err, &o) || !errors.Is(err, syscall.EPIPE) {
			t.Errorf("%s: status %d, %v; want %d, for EPIPE", name, status, err, k.want)
		}
	}
}

func TestReaderGone(t *testing.T) {
	t.Parallel()
	gone := &os.PathError{Op: "write", Path: "|1", Err: syscall.EPIPE}
	for _, c := range []struct {
		err  error
		want bool
	}{
		{fmt.Errorf("lab: %w", &agent.OutputError{Name: "stdout", Err: errors.Join(gone)}), true},
		{&agent.OutputError{Name: "stderr", Err: syscall.ENOSPC}, false},
		{gone, false}, // something else's
		{nil, false},
	} {
		if got := readerGone(c.err); got != c.want {
			t.Errorf("%v: %t, want %t", c.err, got, c.want)
		}
	}
}

// fakeEnd is a guest to be powered off.
type fakeEnd struct {
	refused error
	end     vmm.End
	never   bool
	waiting func() // called when its end is waited for
}

func (f *fakeEnd) Poweroff(context.Context) error { return f.refused }

func (f *fakeEnd) Wait(ctx context.Context) (vmm.End, error) {
	if f.waiting != nil {
		f.waiting()
	}
	if f.never {
		<-ctx.Done()
		return vmm.End{}, ctx.Err()
	}
	return f.end, nil
}

func TestPowerOff(t *testing.T) {
	t.Parallel()
	off := vmm.End{Outcome: vmm.PowerOff}
	for name, c := range map[string]struct {
		guest  fakeEnd
		status int
		want   int
		text   string
	}{
		"well":                {fakeEnd{end: off}, 7, 7, ""},
		"on its own":          {fakeEnd{end: off, refused: agent.ErrDisconnected}, 143, 0, ""},
		"late":                {fakeEnd{never: true}, 7, statusError, "did not power off"},
		"late, status told":   {fakeEnd{never: true}, 7, statusError, "status was 7"},
		"cannot be asked":     {fakeEnd{never: true, refused: agent.ErrDisconnected}, 0, statusError, "did not power off"},
		"panic":               {fakeEnd{end: vmm.End{Outcome: vmm.Panic}}, 0, statusPanic, "panicked"},
		"reboot":              {fakeEnd{end: vmm.End{Outcome: vmm.Reboot}}, 0, statusReboot, "rebooted"},
		"reboot on its own":   {fakeEnd{end: vmm.End{Outcome: vmm.Reboot}, refused: agent.ErrDisconnected}, 0, statusReboot, "rebooted"},
		"triple fault":        {fakeEnd{end: vmm.End{Outcome: vmm.TripleFault}}, 0, statusTripleFault, "triple fault"},
		"the monitor's error": {fakeEnd{end: vmm.End{Outcome: vmm.Failed, Err: io.ErrNoProgress}}, 0, statusError, io.ErrNoProgress.Error()},
	} {
		e := ending{agent: &c.guest, vm: &c.guest, signals: &signals{ch: make(chan os.Signal)}, err: io.Discard, grace: time.Millisecond}
		status, err := e.powerOff(t.Context(), c.status)
		text := ""
		var ee *exitError
		if errors.As(err, &ee) {
			status, text = ee.status, ee.Error()
		} else if err != nil {
			t.Errorf("%s: %v has no status", name, err)
		}
		if status != c.want || !strings.Contains(text, c.text) || c.text == "" && text != "" {
			t.Errorf("%s: status %d, %q; want %d with %q", name, status, text, c.want, c.text)
		}
	}
}

// TestInterruptedPowerOff interrupts a power-off: signals are counted from the session on, and the first is answered.
func TestInterruptedPowerOff(t *testing.T) {
	t.Parallel()
	var said bytes.Buffer
	signals := &signals{ch: make(chan os.Signal, 2), interrupts: 1}
	g := &fakeEnd{never: true, waiting: func() {
		for _, sig := range []os.Signal{syscall.SIGUSR1, syscall.SIGTERM, syscall.SIGWINCH, syscall.SIGHUP, syscall.SIGINT} {
			signals.ch <- sig
		}
	}}
	e := ending{agent: g, vm: g, signals: signals, err: &said, grace: limit}
	_, err := e.powerOff(t.Context(), 0)
	var ee *exitError
	if !errors.As(err, &ee) || ee.status != statusStopped {
		t.Errorf("ended with %v", err)
	}
	if got := said.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "powering off") {
		t.Errorf("it said %q", got)
	}
}

// TestSignalsWait has a signal come while nobody handles any: the next to do so gets it.
func TestSignalsWait(t *testing.T) {
	// Not parallel: the signal is this process's.
	s := takeSignals()
	defer s.release()
	s.during(func(os.Signal) {})()
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	got := make(chan os.Signal, 1)
	defer s.during(func(sig os.Signal) { got <- sig })()
	select {
	case sig := <-got:
		if sig != syscall.SIGTERM {
			t.Errorf("got %v", sig)
		}
	case <-time.After(limit):
		t.Error("it is lost")
	}
}

// button is the power button of a VM.
type button struct{ heard bool }

func (b *button) PressPowerButton() bool { return b.heard }

func TestUnreadConsole(t *testing.T) {
	t.Parallel()
	for name, b := range map[string]*button{"deaf": {false}, "slow": {true}} {
		grace := limit
		if b.heard {
			grace = time.Millisecond
		}
		ctx, leave := context.WithCancelCause(t.Context())
		calls := 0
		output, out := pipe(t)
		w := &ifRead{w: out, gone: func() { calls++; unread(b, leave, grace) }}
		if n, err := w.Write([]byte("read")); n != 4 || err != nil {
			t.Errorf("%s: wrote %d, %v", name, n, err)
		}
		_ = output.Close()
		for range 3 {
			if n, err := w.Write([]byte("unread")); n != 6 || err != nil {
				t.Errorf("%s: wrote %d, %v", name, n, err)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(limit):
			t.Errorf("%s: the VM goes on", name)
		}
		if !errors.Is(context.Cause(ctx), errLeft) || calls != 1 {
			t.Errorf("%s: left by %v, told %d times", name, context.Cause(ctx), calls)
		}
	}
}
