package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// A command whose output nobody takes stops in its write, and holds up nothing else.
func TestStalledOutputBlocksNobodyElse(t *testing.T) {
	t.Parallel()
	c := connect(t)
	stalled, writer := io.Pipe()
	p, err := c.Start(testContext(t), Command{Args: []string{"cat", "/dev/zero"}, Stdout: writer})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if out, _, _ := run(t, c, Command{Args: sh("head -c 1000000 /dev/zero | tr '\\0' x")}); len(out) != 1000000 {
			t.Errorf("%d bytes beside a stalled command", len(out))
		}
	}
	p.in[stdout].mu.Lock()
	held := len(p.in[stdout].ring)
	p.in[stdout].mu.Unlock()
	if held > Window {
		t.Errorf("%d bytes held for a stalled output", held)
	}
	p.Signal(syscall.SIGKILL)
	go io.Copy(io.Discard, stalled)
	if status, err := p.Wait(); err != nil || status.Signal != syscall.SIGKILL {
		t.Errorf("status %+v, %v", status, err)
	}
}

func TestManyCommandsAtOnce(t *testing.T) {
	t.Parallel()
	c := connect(t)
	data := strings.Repeat("0123456789abcdef", 20000)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			number := strconv.Itoa(i)
			out, errOut, status := run(t, c, Command{
				Args: append(sh("cat; echo $0 >&2; exit $0"), number), Stdin: strings.NewReader(data),
			})
			if out != data || errOut != number+"\n" || status.Code != i {
				t.Errorf("%s: %d bytes, %q, %+v", number, len(out), errOut, status)
			}
		})
	}
	wg.Wait()
}

// The end of the command counts, not that of what it left in the background; but no output of its own is lost.
func TestBackgroundProcessDoesNotHoldTheExit(t *testing.T) {
	t.Parallel()
	c := connect(t)
	for name, script := range map[string]string{
		"quiet":   "sleep 1000 & echo $! >&2; head -c 50000 /dev/zero; exit 4",
		"chatter": "cat /dev/zero & echo $! >&2; exit 4",
	} {
		out, errOut, status := run(t, c, Command{Args: sh(script)})
		if status.Code != 4 || name == "quiet" && len(out) != 50000 {
			t.Errorf("%s: %d bytes, status %+v", name, len(out), status)
		}
		kill(t, errOut)
	}
}

// kill ends the process whose number a command printed.
func kill(t *testing.T, number string) {
	t.Helper()
	pid, err := strconv.Atoi(strings.TrimSpace(number))
	if err != nil || pid < 2 {
		t.Fatalf("no process number: %q", number)
	}
	syscall.Kill(pid, syscall.SIGKILL) // may be gone: a closed pipe ends the chatter
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// A failing Stdout reaches the command as a closed pipe would.
func TestFailingStdoutStopsTheCommand(t *testing.T) {
	t.Parallel()
	c := connect(t)
	full := errors.New("disk full")
	p, err := c.Start(testContext(t), Command{Args: []string{"cat", "/dev/zero"}, Stdout: failingWriter{full}})
	if err != nil {
		t.Fatal(err)
	}
	if status, err := p.Wait(); !errors.Is(err, full) || status.Signal != syscall.SIGPIPE {
		t.Errorf("status %+v, %v", status, err)
	}
	// Also when it writes nothing after that.
	p, err = c.Start(testContext(t), Command{Args: sh("echo x; exec sleep 1000"), Stdout: failingWriter{full}})
	if err != nil {
		t.Fatal(err)
	}
	p.Signal(syscall.SIGTERM)
	if status, _ := p.Wait(); status.Signal != syscall.SIGTERM {
		t.Errorf("status %+v", status)
	}
}

// A command that does not read its stdin ends all the same, and so does one that closes it.
func TestUnreadStdin(t *testing.T) {
	t.Parallel()
	c := connect(t)
	endless := readerFunc(func(p []byte) (int, error) { return len(p), nil })
	for _, script := range []string{"exit 5", "exec <&-; exit 5", "head -c 300000 >/dev/null; exit 5"} {
		if _, _, status := run(t, c, Command{Args: sh(script), Stdin: endless}); status.Code != 5 {
			t.Errorf("%s: %+v", script, status)
		}
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestContextKillsTheCommand(t *testing.T) {
	t.Parallel()
	c := connect(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("enough")
	out, writer := io.Pipe()
	p, err := c.Start(ctx, Command{Args: sh("echo up; sleep 1000"), Stdout: writer})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	cancel(reason)
	if status, err := p.Wait(); !errors.Is(err, reason) || status != (ExitStatus{137, syscall.SIGKILL}) {
		t.Errorf("status %+v, %v", status, err)
	}
	if _, err := c.Start(ctx, Command{Args: []string{"true"}}); err != nil && !errors.Is(err, reason) {
		t.Errorf("start with an ended context: %v", err)
	}
	if err := c.Sync(ctx); err != nil && !errors.Is(err, reason) {
		t.Errorf("request with an ended context: %v", err)
	}
}

func TestCloseEndsCommandsAndWaiters(t *testing.T) {
	t.Parallel()
	c := connect(t)
	out, writer := io.Pipe()
	p, err := c.Start(testContext(t), Command{Args: sh("echo up; sleep 1000"), Stdout: writer})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := p.Wait(); !errors.Is(err, ErrClosed) {
		t.Errorf("wait: %v", err)
	}
	if _, err := c.Start(testContext(t), Command{Args: []string{"true"}}); !errors.Is(err, ErrClosed) {
		t.Errorf("start: %v", err)
	}
}

func TestChangedRootAndUser(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		// Then the agent has no right to either, and says so.
		c := connect(t)
		if _, err := c.Run(testContext(t), Command{Args: sh("true"), Root: "/usr"}); !errors.Is(err, os.ErrPermission) {
			t.Errorf("chroot without rights: %v", err)
		}
		return
	}
	c := connect(t)
	// A merged /usr works as a root of its own.
	out, _, status := run(t, c, Command{Args: sh("test ! -e /usr/bin && echo $PWD"), Root: "/usr", Dir: "/bin"})
	if status.Code != 0 || out != "/bin\n" {
		t.Errorf("in a root of its own: %q, %+v", out, status)
	}
	user := &User{UID: 1234, GID: 2345, Groups: []uint32{3456}}
	out, _, _ = run(t, c, Command{Args: sh("id -u; id -g; id -G"), User: user})
	if out != "1234\n2345\n2345 3456\n" {
		t.Errorf("as another user: %q", out)
	}
}

func TestLongArguments(t *testing.T) {
	t.Parallel()
	c := connect(t)
	args := append(sh("echo $#"), "sh")
	for range 200 {
		args = append(args, strings.Repeat("x", 5000)) // a million bytes, of Linux's two
	}
	if out, _, _ := run(t, c, Command{Args: args}); out != "200\n" {
		t.Errorf("got %q", out)
	}
	args = append(args, strings.Repeat("x", maxMessage))
	if _, err := c.Start(testContext(t), Command{Args: args}); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("too long: %v", err)
	}
	if _, err := c.Start(testContext(t), Command{}); err == nil {
		t.Error("no arguments: no error")
	}
}

// Connections come and go without leaving anything behind.
func TestNoLeaks(t *testing.T) {
	// With the first file that can be waited for, the runtime opens two of its own for good.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
	before, fdsBefore := runtime.NumGoroutine(), openFiles(t)
	for range 5 {
		t.Run("", func(t *testing.T) {
			c := connect(t)
			run(t, c, Command{Args: sh("cat; echo x >&2"), Stdin: bytes.NewReader(make([]byte, 1000))})
			stays := Command{Args: sh("sleep 1000"), TTY: true, Rows: 1, Columns: 1, Stdout: io.Discard}
			if _, err := c.Start(t.Context(), stays); err != nil {
				t.Error(err)
			}
		})
	}
	for deadline := testContext(t); runtime.NumGoroutine() > before || openFiles(t) > fdsBefore; runtime.Gosched() {
		if deadline.Err() != nil {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines after %d, %d files after %d\n%s", runtime.NumGoroutine(), before, openFiles(t), fdsBefore,
				buf[:runtime.Stack(buf, true)])
		}
	}
}

func openFiles(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func BenchmarkOutput(b *testing.B) {
	c := connect(b)
	b.SetBytes(64 << 20)
	cmd := Command{Args: []string{"head", "-c", "67108864", "/dev/zero"}, Stdout: io.Discard}
	for b.Loop() {
		if _, err := c.Run(b.Context(), cmd); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCommand(b *testing.B) {
	c := connect(b)
	cmd := Command{Args: []string{"/bin/true"}, Stdout: io.Discard, Stderr: io.Discard}
	for b.Loop() {
		if _, err := c.Run(b.Context(), cmd); err != nil {
			b.Fatal(err)
		}
	}
}
