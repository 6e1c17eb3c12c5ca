package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patience bounds what should take no time.
const patience = 30 * time.Second

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// connect gives a client of an agent that runs in this process, at the other end of a pipe.
func connect(t testing.TB) *Client {
	t.Helper()
	host, guest := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- Serve(guest) }()
	c, err := Connect(testContext(t), host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		guest.Close()
		<-served
	})
	return c
}

func run(t testing.TB, c *Client, cmd Command) (out, errOut string, status ExitStatus) {
	t.Helper()
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	status, err := c.Run(testContext(t), cmd)
	if err != nil {
		t.Fatalf("%q: %v", cmd.Args, err)
	}
	return o.String(), e.String(), status
}

func sh(script string) []string { return []string{"/bin/sh", "-c", script} }

func TestOutputsAreSeparateAndStatusComesOut(t *testing.T) {
	t.Parallel()
	c := connect(t)
	out, errOut, status := run(t, c, Command{Args: sh("echo to out; echo to err >&2; exit 7")})
	if out != "to out\n" || errOut != "to err\n" || status != (ExitStatus{Code: 7}) {
		t.Errorf("stdout %q, stderr %q, status %+v", out, errOut, status)
	}
}

func TestStdinIsForwardedWithItsEnd(t *testing.T) {
	t.Parallel()
	c := connect(t)
	data := make([]byte, 3<<20)
	src := rand.NewChaCha8([32]byte{1})
	src.Read(data)
	out, _, status := run(t, c, Command{Args: []string{"cat"}, Stdin: bytes.NewReader(data)})
	if out != string(data) || status.Code != 0 {
		t.Errorf("%d bytes of %d came back, equal %t, status %+v", len(out), len(data), out == string(data), status)
	}
}

func TestEnvironmentDirectoryAndArguments(t *testing.T) {
	t.Parallel()
	c := connect(t)
	odd := "a b\xff\n'\""
	out, _, _ := run(t, c, Command{
		Args: []string{"sh", "-c", `printf '%s|%s|%s' "$1" "$X" "$PWD"`, "sh", odd},
		Env:  []string{"PATH=/nowhere:/usr/bin:/bin", "X=" + odd}, Dir: "/usr",
	})
	if want := odd + "|" + odd + "|/usr"; out != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

func TestSignalReachesTheProcessGroup(t *testing.T) {
	t.Parallel()
	c := connect(t)
	in, inWriter := io.Pipe()
	defer inWriter.Close()
	out, outWriter := io.Pipe()
	// The signal must reach the child too, for which the shell waits.
	script := "trap 'echo trapped' TERM; sh -c 'echo ready; exec sleep 100' & " +
		"while kill -0 $! 2>&-; do wait $!; done; exit 3"
	p, err := c.Start(testContext(t), Command{Args: sh(script), Stdin: in, Stdout: outWriter})
	if err != nil {
		t.Fatal(err)
	}
	expect := func(want string) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(out, got); err != nil || string(got) != want {
			t.Fatalf("output %q, %v; want %q", got, err, want)
		}
	}
	expect("ready\n")
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	expect("trapped\n")
	if status, err := p.Wait(); err != nil || status.Code != 3 {
		t.Errorf("status %+v, %v", status, err)
	}
	if err := p.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal after the end: %v", err)
	}
}

func TestKilledBySignal(t *testing.T) {
	t.Parallel()
	c := connect(t)
	if _, _, status := run(t, c, Command{Args: sh("kill -SEGV $$")}); status != (ExitStatus{139, syscall.SIGSEGV}) {
		t.Errorf("status %+v", status)
	}
}

func TestCommandsThatCannotStart(t *testing.T) {
	t.Parallel()
	c := connect(t)
	dir := t.TempDir()
	plain := dir + "/plain"
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		cmd  Command
		code int
		text string
	}{
		{Command{Args: []string{"no-such-command"}}, 127, "no-such-command: no such file or directory in PATH"},
		{Command{Args: []string{""}}, 127, "a command without a name"},
		{Command{Args: []string{"/no/such"}}, 127, "/no/such: no such file"},
		{Command{Args: []string{plain}}, 126, "permission denied"},
		{Command{Args: []string{dir}}, 126, "permission denied"},
		{Command{Args: []string{"plain"}, Env: []string{"PATH=" + dir}}, 126, "permission denied in PATH"},
		{Command{Args: []string{"true"}, Dir: "/no/such"}, 126, "working directory /no/such"},
		{Command{Args: []string{"true"}, Root: "/no/such"}, 126, "root /no/such"},
	} {
		status, err := c.Run(testContext(t), tc.cmd)
		if status.Code != tc.code || err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%q: status %+v, %v; want code %d, %q", tc.cmd.Args, status, err, tc.code, tc.text)
		}
	}
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	c := connect(t)
	out, outWriter := io.Pipe()
	in, inWriter := io.Pipe()
	p, err := c.Start(testContext(t), Command{
		Args: sh("stty -echo; stty size; read line; echo got $line; stty size; tty >/dev/null && echo tty; exec cat"),
		TTY:  true, Rows: 11, Columns: 22, Stdin: in, Stdout: outWriter,
	})
	if err != nil {
		t.Fatal(err)
	}
	expect := func(want string) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(out, got); err != nil || string(got) != want {
			t.Fatalf("output %q, %v; want %q", got, err, want)
		}
	}
	expect("11 22\r\n")
	if err := p.Resize(33, 44); err != nil {
		t.Fatal(err)
	}
	io.WriteString(inWriter, "hello\n")
	expect("got hello\r\n33 44\r\ntty\r\n")
	inWriter.Close()
	if status, err := p.Wait(); err != nil || status.Code != 0 {
		t.Errorf("status %+v, %v", status, err)
	}
}

// TestNudge sends bytes that mean nothing before, between and inside a conversation.
func TestNudge(t *testing.T) {
	t.Parallel()
	c := connect(t)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				c.Nudge()
			}
		}
	}()
	in := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
	var out bytes.Buffer
	status, err := c.Run(testContext(t), Command{Args: []string{"cat"}, Stdin: bytes.NewReader(in), Stdout: &out})
	close(stop)
	<-done
	if err != nil || status.Code != 0 || !bytes.Equal(out.Bytes(), in) {
		t.Errorf("status %d, %v, %d of %d bytes", status.Code, err, out.Len(), len(in))
	}
}
