// Package clitest runs the kvmlet program with guests, as its users do. It has tests only.
package clitest

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/guesttest"
	"github.com/kvmlet/kvmlet/guest/lab"
	"github.com/kvmlet/kvmlet/guest/lab/labtest"
	"github.com/kvmlet/kvmlet/vmm/cli/ptytest"
)

// binary is the environment variable with kvmlet's path, once it is built: in a lab that would take too long.
const binary = "KVMLET_TEST_BINARY"

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(binary) == "" && flag.Lookup("test.list").Value.String() == "" {
		if err := build(); err != nil {
			fmt.Fprintln(os.Stderr, "build kvmlet for the tests:", err)
			os.Exit(1)
		}
	}
	guesttest.Main(m)
}

// build makes kvmlet as "make build" does, beside the test's own executable, so that "go test" removes both.
func build() error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	path := exe + ".kvmlet"
	cmd := exec.Command("go", "build", "-trimpath", "-o", path, "github.com/kvmlet/kvmlet")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return os.Setenv(binary, path)
}

// limit ends a VM that does not get anywhere.
const limit = "150s"

// kvmlet returns a command that runs kvmlet with a small guest and more arguments. It ends with the test.
func kvmlet(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, os.Getenv(binary),
		append([]string{"run", "--accel", "kvm", "--memory", "256M", "--timeout", limit}, args...)...)
}

// expectStatus waits for a kvmlet that wrote its errors to stderr.
func expectStatus(t *testing.T, cmd *exec.Cmd, want int, stderr fmt.Stringer) {
	t.Helper()
	err := cmd.Wait()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		t.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != want {
		t.Errorf("%v, want status %d; errors:\n%s", cmd.ProcessState, want, stderr)
		if lab.Inside() && strings.Contains(stderr.String(), "hangs") {
			t.Log(labtest.Hung)
		}
	}
}

// TestPipes has a guest's streams connected to pipes, which carry all bytes as they are, and ends its command by a signal.
func TestPipes(t *testing.T) {
	console := filepath.Join(t.TempDir(), "console")
	cmd := kvmlet(t.Context(), "--console", console, "--append", "quiet", "--", "sh", "-c",
		`cat >/tmp/b; cat /tmp/b; cat /tmp/b /tmp/b >&2; echo from the guest >/dev/ttyS0
		trap 'exit 7' TERM; echo up; sleep 1000 & wait`)
	bytes256 := make([]byte, 256)
	for i := range bytes256 {
		bytes256[i] = byte(i)
	}
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(bytes256), &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	want := append(slices.Clone(bytes256), "up\n"...)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(stdout, got); err == nil {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	rest, err := io.ReadAll(stdout)
	if !bytes.Equal(got, want) || len(rest) != 0 || err != nil {
		t.Errorf("output %q and %q, %v; want %q", got, rest, err, want)
	}
	expectStatus(t, cmd, 7, &stderr)
	if want := string(bytes256) + string(bytes256); stderr.String() != want {
		t.Errorf("errors %q, want %q", &stderr, want)
	}
	if said, err := os.ReadFile(console); !strings.Contains(string(said), "from the guest\r\n") {
		t.Errorf("the console's file has %q, %v", said, err)
	}
}

// TestReaderGone closes the reading end of a guest's output, as head does: the command ends by SIGPIPE, and the guest writes
// back what it had not yet written to its disk.
func TestReaderGone(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	const kept = "kept\n"
	cmd := kvmlet(t.Context(), "--disk", "path="+disk, "--", "sh", "-c", "echo kept >/dev/vda; exec cat /dev/zero")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stdout, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	if err := stdout.Close(); err != nil {
		t.Fatal(err)
	}
	expectStatus(t, cmd, 128+int(syscall.SIGPIPE), &stderr)
	if stderr.Len() != 0 {
		t.Errorf("kvmlet says %q", &stderr)
	}
	if b, err := os.ReadFile(disk); err != nil || !bytes.HasPrefix(b, []byte(kept)) {
		t.Errorf("the disk begins with %q, %v; want %q", b[:min(len(b), 8)], err, kept)
	}
}

// TestTerminal gives a guest's command a terminal, and leaves it by Ctrl-A x.
func TestTerminal(t *testing.T) {
	master, slave := ptytest.Open(t)
	if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 40, Col: 100}); err != nil {
		t.Fatal(err)
	}
	before := ptytest.Attributes(t, slave)
	cmd := kvmlet(t.Context(), "-t", "--", "sh", "-c", "stty size; tty; exec cat")
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	shown := make(chan string, 1)
	go func() { // also ends by the terminal's end, when kvmlet and the test have closed it
		var all []byte
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			all = append(all, b[:n]...)
			if err != nil || bytes.Contains(all, []byte("/dev/pts/")) {
				shown <- string(all)
				_, _ = io.Copy(io.Discard, master)
				return
			}
		}
	}()
	go func() {
		defer close(ended)
		expectStatus(t, cmd, 123, &stderr)
	}()
	select {
	case s := <-shown:
		if !strings.Contains(s, "40 100\r\n") {
			t.Errorf("the terminal shows %q", s)
		}
		if a := ptytest.Attributes(t, slave); a.Lflag&(unix.ICANON|unix.ECHO|unix.ISIG) != 0 {
			t.Error("the terminal is not raw")
		}
		if _, err := master.WriteString("some\x01x"); err != nil {
			t.Error(err)
		}
	case <-ended:
	}
	<-ended
	if ptytest.Attributes(t, slave) != before {
		t.Error("the terminal is not as before")
	}
	if s := stderr.String(); !strings.Contains(s, "kvmlet: the VM was stopped\n") {
		t.Errorf("kvmlet says %q", s)
	}
}

// TestPanic has a guest's kernel panic, whose last words are shown.
func TestPanic(t *testing.T) {
	cmd := kvmlet(t.Context(), "--", "sh", "-c", "echo c >/proc/sysrq-trigger")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	expectStatus(t, cmd, 122, &stderr)
	s := stderr.String()
	_, last, _ := strings.Cut(s, "kvmlet: the guest's console ended with\n")
	if !strings.Contains(last, "  | ") || !strings.Contains(last, "sysrq_handle_crash") ||
		!strings.HasSuffix(s, "kvmlet: the guest's kernel panicked\n") {
		t.Errorf("kvmlet says %q", s)
	}
}

// TestTimeout ends a guest that takes too long.
func TestTimeout(t *testing.T) {
	cmd := kvmlet(t.Context(), "--timeout", "2s", "--", "sleep", "1000") // the later of two counts
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	expectStatus(t, cmd, 124, &stderr)
	if took := time.Since(began); took < 2*time.Second || !strings.Contains(stderr.String(), "vCPU 0") {
		t.Errorf("after %v kvmlet says %q", took, &stderr)
	}
}
