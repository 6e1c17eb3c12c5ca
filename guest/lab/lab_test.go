package lab_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/lab"
	"github.com/kvmlet/kvmlet/guest/lab/labtest"
)

func config(t *testing.T, args ...string) lab.Config {
	return lab.Unqueued(lab.Config{Args: args, Init: labtest.Init, Progress: func(line string) { t.Log(line) }})
}

// children lists the processes that this one has started and that still are there.
func children(t *testing.T) []string {
	t.Helper()
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, list := range lists {
		b, err := os.ReadFile(list)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
		all = append(all, strings.Fields(string(b))...)
	}
	return all
}

// One lab shows most: starts take seconds, and a host runs few labs at a time.
func TestLab(t *testing.T) {
	share, sharedFile := t.TempDir(), filepath.Join(t.TempDir(), "one file")
	if err := os.WriteFile(sharedFile, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	elsewhere := t.TempDir()
	script := `
		set -e
		printf 'out\0\377\r\n'; printf 'err\0\376\r\n' >&2
		cat > "$1/from stdin"
		printf new > "$2"
		echo lost > "$3/lost"; test -s "$3/lost"
		mkdir "$1/dir"; echo moved > "$1/dir/a"; mv "$1/dir" "$1/renamed"; sync "$1/renamed/a"
		ln -s a "$1/renamed/link"; chmod 751 "$1/renamed"
		test -c /dev/kvm; test -c /dev/net/tun; grep -qw svm /proc/cpuinfo
		test "$(nproc)" = "$4"; test "$(id -u)" = 0; test "$X" = "y z"; test "$PWD" = "$1"
		test "$(awk '/MemTotal/{print ($2 > 5500000)}' /proc/meminfo)" = 1
		for d in /tmp /run /dev/shm "$HOME"; do mktemp -p "$d" >&3; done 3>/dev/null; test -s /etc/passwd
		date +%s > "$1/time"
		exit 42`
	cfg := config(t, "sh", "-c", script, "sh", share, sharedFile, elsewhere, strconv.Itoa(lab.DefaultCPUs))
	cfg.Shares, cfg.Dir = []string{share, sharedFile}, share
	cfg.Env = append(os.Environ(), "X=y z")
	var out, errOut bytes.Buffer
	input := bytes.Repeat([]byte("\x00\xff in \r\n"), 100000)
	cfg.Stdin, cfg.Stdout, cfg.Stderr = bytes.NewReader(input), &out, &errOut
	before := time.Now()
	status, err := lab.Run(t.Context(), cfg)
	if err != nil || status != (agent.ExitStatus{Code: 42}) {
		t.Fatalf("status %+v, %v; stdout %q, stderr %q", status, err, out.String(), errOut.String())
	}
	if out.String() != "out\x00\xff\r\n" || errOut.String() != "err\x00\xfe\r\n" {
		t.Errorf("stdout %q, stderr %q", out.String(), errOut.String())
	}
	for name, want := range map[string]string{
		filepath.Join(share, "from stdin"): string(input), filepath.Join(share, "renamed", "link"): "moved\n",
		sharedFile: "new",
	} {
		if got, err := os.ReadFile(name); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, want %d, %v", name, len(got), len(want), err)
		}
	}
	if info, err := os.Stat(filepath.Join(share, "renamed")); err != nil || info.Mode().Perm() != 0o751 {
		t.Errorf("mode of a shared directory: %v, %v", info, err)
	}
	if _, err := os.Stat(filepath.Join(elsewhere, "lost")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file outside of the shares came through: %v", err)
	}
	clock, err := os.ReadFile(filepath.Join(share, "time"))
	if err != nil {
		t.Fatal(err)
	}
	seconds, err := strconv.ParseInt(strings.TrimSpace(string(clock)), 10, 64)
	const slack = 2 * time.Second
	if now := time.Unix(seconds, 0); err != nil || now.Before(before.Add(-slack)) || now.After(time.Now().Add(slack)) {
		t.Errorf("the lab's clock gave %s between %s and %s (%v)", now, before, time.Now(), err)
	}
	if left := children(t); len(left) != 0 {
		t.Errorf("processes %v are left", left)
	}
}

// The lab has its own /dev and /run, in which files of the host are only if they are named.
func TestFilesInTreesOfTheLab(t *testing.T) {
	var shares, inputs []string
	for _, tree := range []string{"/dev/shm", "/run"} {
		dir := filepath.Join(tree, fmt.Sprintf("kvmlet-test-%d", os.Getpid()))
		err := os.Mkdir(dir, 0o755)
		switch {
		case errors.Is(err, os.ErrPermission) && tree == "/run":
			continue // root's
		case err != nil:
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		for _, name := range []string{"share", "input", "hidden", "folder/inner"} {
			path := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte("the host's "+name), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		shares = append(shares, filepath.Join(dir, "share"), filepath.Join(dir, "folder"))
		inputs = append(inputs, filepath.Join(dir, "input"))
	}
	// A file elsewhere needs no mention; and one may be named by a link, and twice.
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.Symlink(inputs[0], elsewhere); err != nil {
		t.Fatal(err)
	}
	cfg := config(t, append([]string{"sh", "-ec", `
		for share; do
			dir=$(dirname "$share")
			test "$(cat "$share" "$dir/input")" = "the host's sharethe host's input"
			test ! -e "$dir/hidden"
			printf changed >"$share"
			! echo >"$dir/input" 2>&-
			printf new >"$dir/folder/new"; test -s "$dir/folder/inner"
		done
		test -c /dev/kvm; test -c /dev/null; test -d /proc/$$`, "sh"}, everyOther(shares)...)...)
	cfg.Shares, cfg.Inputs = shares, append(inputs, elsewhere, "/etc/passwd")
	var out bytes.Buffer
	cfg.Stdout, cfg.Stderr = &out, &out
	if status, err := lab.Run(t.Context(), cfg); err != nil || status.Code != 0 {
		t.Fatalf("status %+v, %v; it says %q", status, err, out.String())
	}
	for _, share := range everyOther(shares) {
		dir := filepath.Dir(share)
		for path, want := range map[string]string{
			share: "changed", filepath.Join(dir, "input"): "the host's input", filepath.Join(dir, "folder", "new"): "new",
		} {
			if got, err := os.ReadFile(path); err != nil || string(got) != want {
				t.Errorf("%s: %q, %v; want %q", path, got, err, want)
			}
		}
	}
}

// everyOther returns list[0], list[2] and so on.
func everyOther(list []string) (half []string) {
	for i := 0; i < len(list); i += 2 {
		half = append(half, list[i])
	}
	return half
}

// The first signal is the command's, the second ends the lab; so does the context.
func TestSignals(t *testing.T) {
	signals := make(chan os.Signal, 2)
	out, writer := io.Pipe()
	go func() {
		lines := make([]byte, 3)
		for _, want := range []string{"up\n", "t1\n"} {
			if _, err := io.ReadFull(out, lines); err != nil || string(lines) != want {
				t.Errorf("output %q, %v; want %q", lines, err, want)
			}
			signals <- syscall.SIGTERM
		}
		io.Copy(io.Discard, out)
	}()
	script := "trap 'echo t1' TERM; sh -c 'trap : TERM; echo up; while :; do sleep 1; done' & wait; wait; wait"
	cfg := config(t, "sh", "-c", script)
	cfg.Stdout, cfg.Signals = writer, signals
	if _, err := lab.Run(t.Context(), cfg); !errors.Is(err, lab.ErrInterrupted) {
		t.Errorf("after two signals: %v", err)
	}
	if left := children(t); len(left) != 0 {
		t.Errorf("processes %v are left", left)
	}
}

func TestCommandKilledBySignalAndTerminal(t *testing.T) {
	var out bytes.Buffer
	cfg := config(t, "sh", "-c", "stty size; tty; kill -USR1 $$")
	cfg.TTY, cfg.Size, cfg.Stdout = true, lab.Size{Rows: 12, Columns: 34}, &out
	status, err := lab.Run(t.Context(), cfg)
	want := agent.ExitStatus{Code: 138, Signal: syscall.SIGUSR1}
	if err != nil || status != want || out.String() != "12 34\r\n/dev/pts/0\r\n" {
		t.Errorf("status %+v, %v, output %q", status, err, out.String())
	}
}

// A process that is killed takes its lab with it.
func TestLabDiesWithItsOwner(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	owner := exec.CommandContext(t.Context(), exe)
	owner.Env = append(os.Environ(), ownerVariable+"=1")
	owner.Stderr = os.Stderr
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	qemu := 0
	if _, err := fmt.Fscan(out, &qemu); err != nil {
		t.Fatal(err)
	}
	handle, err := unix.PidfdOpen(qemu, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(handle)
	owner.Process.Kill()
	owner.Wait()
	poll := []unix.PollFd{{Fd: int32(handle), Events: unix.POLLIN}} // readable once the process has ended
	for n := 0; n == 0; {
		if n, err = unix.Poll(poll, 30000); n == 0 || err != nil && err != unix.EINTR {
			t.Fatalf("QEMU, process %d, is still there: %v", qemu, err)
		}
	}
}

const ownerVariable = "KVMLET_LAB_TEST_OWNER"

func TestMain(m *testing.M) {
	if os.Getenv(ownerVariable) == "" {
		os.Exit(m.Run())
	}
	// The owner prints its QEMU's number once the lab is up, and then waits to be killed.
	_, err := lab.Run(context.Background(), lab.Unqueued(lab.Config{
		Args: []string{"sh", "-c", "echo up; exec sleep 1000"}, Init: labtest.Init,
		Stdout: writerFunc(func(p []byte) (int, error) {
			lists, _ := filepath.Glob("/proc/self/task/*/children")
			for _, list := range lists {
				b, _ := os.ReadFile(list)
				os.Stdout.Write(b)
			}
			return len(p), nil
		}),
	}))
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestNoQEMU(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := lab.Run(t.Context(), config(t, "true"))
	if !errors.Is(err, lab.ErrNoQEMU) || !strings.Contains(err.Error(), "apt-get") {
		t.Errorf("without QEMU: %v", err)
	}
}

func TestFailedStartsSayWhy(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	junk := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(junk, []byte("no kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	cfg := config(t, "true")
	cfg.Kernel, cfg.Memory = junk, 512<<20
	if _, err := lab.Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "last words of QEMU:\n") {
		t.Errorf("with a file that is no kernel: %v", err)
	}
	cfg.Kernel = ""
	cfg.Init = func(context.Context) (string, error) { return "/bin/true", nil }
	_, err := lab.Run(t.Context(), cfg)
	if err == nil || !strings.Contains(err.Error(), "Attempted to kill init") {
		t.Errorf("with an init that ends: %v", err)
	}
}

func TestBadConfigurations(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		cfg  lab.Config
		text string
	}{
		"no command":    {lab.Config{}, "no command"},
		"missing share": {lab.Config{Args: []string{"x"}, Shares: []string{"/no/such"}}, "share /no/such"},
		"missing input": {lab.Config{Args: []string{"x"}, Inputs: []string{"/no/such"}}, "input /no/such"},
		"device":        {lab.Config{Args: []string{"x"}, Shares: []string{"/dev/null"}}, "share /dev/null: not to be had in the lab"},
		"input device":  {lab.Config{Args: []string{"x"}, Inputs: []string{"/dev/null"}}, "input /dev/null: not to be had in the lab"},
		"procfs":        {lab.Config{Args: []string{"x"}, Inputs: []string{"/proc/version"}}, "a /proc of its own"},
		"little memory": {lab.Config{Args: []string{"x"}, Memory: 1 << 20}, "memory"},
		"odd memory":    {lab.Config{Args: []string{"x"}, Memory: 1<<30 + 1}, "memory"},
		"CPUs":          {lab.Config{Args: []string{"x"}, CPUs: 65}, "CPUs"},
	} {
		if _, err := lab.Run(t.Context(), tc.cfg); err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lab.Run(ctx, config(t, "true")); !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: %v", err)
	}
}
