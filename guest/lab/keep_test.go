package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
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
		"memory": {Kernel: kernel, Memory: 1 << 30}, "CPUs": {Kernel: kernel, CPUs: 1}, "icount": {Kernel: kernel, Icount: true},
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
	if want := []string{".lock", "a", "b", "e"}; !slices.Equal(left, want) {
		t.Errorf("left %q, want %q", left, want)
	}
}

// What cannot be restored is replaced.
func TestDamagedStateIsReplaced(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	var told []string
	cfg := Config{
		Args: []string{"sh", "-c", "test -c /dev/kvm && exit 3"}, Memory: 512 << 20, Init: buildInit(t),
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

func TestTailKeepsTheEnd(t *testing.T) {
	t.Parallel()
	tail := newTail()
	for i := range 2000 {
		fmt.Fprintln(tail, i)
	}
	if s := tail.String(); len(s) > tailSize || !strings.HasSuffix(s, "1998\n1999") {
		t.Errorf("%d bytes, ending in %q", len(s), s[len(s)-20:])
	}
}
