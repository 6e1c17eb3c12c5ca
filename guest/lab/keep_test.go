package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/agent"
)

// buildInit is labtest.Init, which a test inside this package cannot import.
func buildInit(t *testing.T) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		exe := filepath.Join(t.TempDir(), "pid1")
		build := exec.CommandContext(ctx, "go", "build", "-o", exe, "./labtest/pid1")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		out, err := build.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return exe, err
	}
}

func testKeep(t *testing.T, cfg Config) *keep {
	t.Helper()
	cfg.Args = []string{"true"}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	k, err := newKeep(t.Context(), &cfg)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// A saved lab is only good for the machine it was saved from.
func TestKeyHoldsWhatMatters(t *testing.T) {
	t.Parallel()
	kernel := filepath.Join(t.TempDir(), "kernel")
	write := func(text string) {
		if err := os.WriteFile(kernel, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("one")
	base := testKeep(t, Config{Kernel: kernel}).key
	if testKeep(t, Config{Kernel: kernel}).key != base {
		t.Error("two keys for one lab")
	}
	for name, cfg := range map[string]Config{
		"memory": {Kernel: kernel, Memory: 1 << 30},
		"CPUs":   {Kernel: kernel, CPUs: DefaultCPUs + 1},
		"icount": {Kernel: kernel, Icount: true},
		"kernel": {},
	} {
		if testKeep(t, cfg).key == base {
			t.Errorf("one key for labs of different %s", name)
		}
	}
	write("other")
	if testKeep(t, Config{Kernel: kernel}).key == base {
		t.Error("one key for different contents of the kernel's file")
	}
}

func TestPruneKeepsTheNewest(t *testing.T) {
	t.Parallel()
	k := &keep{dir: t.TempDir()}
	now := time.Now()
	for i, name := range []string{"a", "b", "c", "d", "e", tempPrefix + "x"} {
		path := filepath.Join(k.dir, name)
		if err := os.MkdirAll(filepath.Join(path, "in"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, now, now.Add(-time.Duration(i)*time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(k.dir, ".lock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k.use(filepath.Join(k.dir, "e"))
	k.prune()
	entries, err := os.ReadDir(k.dir)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if want := []string{".lock", "a", "e"}; !slices.Equal(left, want) {
		t.Errorf("left %q, want %q", left, want)
	}
}

// What cannot be restored is replaced.
func TestDamagedStateIsReplaced(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	var told []string
	cfg := Config{
		Args: []string{"sh", "-c", "test -c /dev/kvm && exit 3"}, Memory: 512 << 20, Init: buildInit(t), unqueued: true,
		Progress: func(line string) { told = append(told, line) },
	}
	k := testKeep(t, cfg)
	path := filepath.Join(k.dir, k.key.String()[:32])
	for _, name := range []string{ramFile, stateFile} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(path, name), []byte("damaged"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	status, err := Run(t.Context(), cfg)
	if err != nil || status.Code != 3 || len(told) < 2 || !strings.Contains(told[0], "of no use") {
		t.Errorf("status %+v, %v, told %q", status, err, told)
	}
	told = nil
	if status, err = Run(t.Context(), cfg); err != nil || status.Code != 3 || len(told) != 0 {
		t.Errorf("the second time: status %+v, %v, told %q", status, err, told)
	}
}

// PID 1 powers the machine off when the host asks, against a command that ignores requests to end, and writes back first.
func TestPoweroff(t *testing.T) {
	share := t.TempDir()
	cfg := Config{Args: []string{"true"}, Init: buildInit(t), Shares: []string{share}}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	m, err := start(t.Context(), &cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	if err := m.enter(t.Context(), &cfg); err != nil {
		t.Fatal(err)
	}
	info, err := m.agent.Info(t.Context())
	if err != nil || info.Hostname != "lab" || info.CPUs != DefaultCPUs || info.InitStarted <= 0 ||
		info.AgentReady < info.InitStarted || info.Uptime < info.AgentReady {
		t.Errorf("info %+v, %v", info, err)
	}
	out, writer := io.Pipe()
	script := "trap '' TERM HUP; echo data > file; echo up; while :; do sleep 1; done"
	p, err := m.agent.Start(t.Context(), agent.Command{Args: []string{"sh", "-c", script}, Dir: share, Stdout: writer})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	if err := m.agent.Poweroff(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-m.exited
	if _, err := p.Wait(); err != nil && !errors.Is(err, agent.ErrDisconnected) {
		t.Errorf("the command: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(share, "file")); err != nil || string(b) != "data\n" {
		t.Errorf("file of the share: %q, %v", b, err)
	}
	if console := m.console.String(); strings.Contains(console, "kvmlet init:") {
		t.Errorf("PID 1 complained: %s", console)
	}
}

// A machine that never comes up ends with the reason.
func TestStuckStartTimesOut(t *testing.T) {
	k := testKeep(t, Config{Memory: 256 << 20})
	reason := errors.New("took too long")
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, reason)
	defer cancel()
	m, err := launch(ctx, &k.hw, "memory-backend-ram") // no kernel, no disk
	if err == nil {
		err = m.connect(ctx)
	}
	if !errors.Is(err, reason) {
		t.Errorf("connect: %v", err)
	}
	if m != nil {
		<-m.exited
	}
}

func TestLocks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	paths := []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}
	first, err := lockAny(t.Context(), paths, func() {})
	if err != nil {
		t.Fatal(err)
	}
	second, err := lockAny(t.Context(), paths, func() {})
	if err != nil {
		t.Fatal(err)
	}
	reason := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	if _, err := lockAny(ctx, paths, func() { cancel(reason) }); !errors.Is(err, reason) {
		t.Errorf("the third: %v", err)
	}
	done := make(chan error)
	go func() {
		third, err := lockAny(t.Context(), paths, func() {})
		if err == nil {
			third()
		}
		done <- err
	}()
	second()
	if err := <-done; err != nil {
		t.Error(err)
	}
	first()
}
