package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const runnerEnv = "KVMLET_IMAGE_TEST_RUNNER" // a go command: the process runs it for TestRunnerDies

// fakeGo is a go command that starts processes, as go starts compilers, and never ends. It tells the numbers of all.
const fakeGo = `#!/bin/sh
sleep 600 &
echo $! >&2
sh -c 'echo $$ >&2; exec sleep 600' &
echo $$ >&2
wait
`

// runnerProcess runs a go command and passes on what it says.
func runnerProcess() int {
	t := &toolchain{path: os.Getenv(runnerEnv)}
	_, err := t.run(context.Background(), "", nil, func(line string) { fmt.Println(line) }, "build")
	fmt.Fprintln(os.Stderr, err)
	return 1
}

func writeFakeGo(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "go")
	if err := os.WriteFile(path, []byte(fakeGo), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// openProcess returns a file descriptor of the process whose number is in line; it outlives the process.
func openProcess(t *testing.T, line string) int {
	t.Helper()
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) // if it should still be there
		unix.Close(fd)
	})
	return fd
}

// checkEnds wants the process to end soon.
func checkEnds(t *testing.T, fd int) {
	t.Helper()
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int((10 * time.Second).Milliseconds()))
	if n != 1 && !errors.Is(err, unix.EINTR) {
		t.Errorf("a process that go started still runs (%v)", err)
	}
}

// TestRunnerDies kills a process that runs go, which cannot clean up then.
func TestRunnerDies(t *testing.T) {
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), runnerEnv+"="+writeFakeGo(t))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var fds []int
	r := bufio.NewReader(out)
	for range 3 {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, openProcess(t, line))
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for _, fd := range fds {
		checkEnds(t, fd)
	}
}

// TestRunEnds ends go's context: the error tells why, and nothing that go started is left.
func TestRunEnds(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("no time left")
	tool := &toolchain{path: writeFakeGo(t)}
	var fds []int
	_, err := tool.run(ctx, "", nil, func(line string) {
		if fds = append(fds, openProcess(t, line)); len(fds) == 3 {
			cancel(cause)
		}
	}, "build")
	if !errors.Is(err, cause) {
		t.Errorf("run returned %v, want the cause of its context's end", err)
	}
	for _, fd := range fds {
		checkEnds(t, fd)
	}
}
