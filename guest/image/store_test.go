package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/hosttest"
)

const (
	helperEnv   = "KVMLET_IMAGE_TEST_STORE" // the store's folder: the process is a builder for TestStoreProcesses
	helperParts = 200
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(helperEnv); dir != "" {
		os.Exit(builderProcess(dir))
	}
	if os.Getenv(runnerEnv) != "" {
		os.Exit(runnerProcess())
	}
	os.Exit(m.Run())
}

// builderProcess builds one entry when its standard input ends and says what it did.
func builderProcess(dir string) int {
	s, err := OpenStore(dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("ready")
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return 1
	}
	built := false
	path, err := s.Build(context.Background(), "test", KeyOf("shared"), func(w io.Writer) error {
		built = true
		for i := range helperParts {
			if _, err := fmt.Fprintf(w, "%d of process %d\n", i, os.Getpid()); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	b, err := os.ReadFile(path)
	if err != nil || bytes.Count(b, []byte("\n")) != helperParts {
		fmt.Fprintf(os.Stderr, "%v, %d lines\n", err, bytes.Count(b, []byte("\n")))
		return 1
	}
	fmt.Println(built)
	return 0
}

func TestStoreProcesses(t *testing.T) {
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	const processes = 4
	var start []io.Closer
	var outs []*bufio.Reader
	var cmds []*exec.Cmd
	for range processes {
		cmd := exec.CommandContext(t.Context(), exe)
		cmd.Env = append(os.Environ(), helperEnv+"="+dir)
		cmd.Stderr = os.Stderr
		in, out := hosttest.Start(t, cmd)
		r := bufio.NewReader(out)
		if line, err := r.ReadString('\n'); err != nil || line != "ready\n" {
			t.Fatalf("builder said %q, %v", line, err)
		}
		start, outs, cmds = append(start, in), append(outs, r), append(cmds, cmd)
	}
	for _, c := range start {
		c.Close()
	}
	built := 0
	for i, r := range outs {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Error(err)
		}
		if line == "true\n" {
			built++
		}
		if err := cmds[i].Wait(); err != nil {
			t.Error(err)
		}
	}
	if built != 1 {
		t.Errorf("%d of %d processes built the entry, want 1", built, processes)
	}
	checkNoLeftovers(t, dir)
}

func checkNoLeftovers(t *testing.T, dir string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(dir, "*", tempPrefix+"*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func testStore(t *testing.T) *Store {
	t.Helper()
	s, err := OpenStore(filepath.Join(t.TempDir(), "made", "on demand"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s *Store, key Key, text string) (path string, built bool) {
	t.Helper()
	path, err := s.Build(t.Context(), "test", key, func(w io.Writer) error {
		built = true
		_, err := io.WriteString(w, text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != text {
		t.Fatalf("the entry holds %q, %v; want %q", got, err, text)
	}
	return path, built
}

func TestStoreGoroutines(t *testing.T) {
	t.Parallel()
	s := testStore(t)
	var builds atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			_, err := s.Derived(t.Context(), KeyOf("k"), func(w io.Writer) error {
				builds.Add(1)
				_, err := w.Write([]byte("x"))
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := builds.Load(); n != 1 {
		t.Errorf("built %d times", n)
	}
}

func TestStoreDamage(t *testing.T) {
	t.Parallel()
	const text = "what was built"
	for name, damage := range map[string]func(path string) error{
		"truncated":        func(p string) error { return os.Truncate(p, 3) },
		"emptied":          func(p string) error { return os.Truncate(p, 0) },
		"grown":            func(p string) error { return os.Truncate(p, 1000) },
		"changed":          func(p string) error { return os.WriteFile(p, []byte("WHAT WAS BUILT"), 0o600) },
		"removed":          os.Remove,
		"replaced by link": func(p string) error { return errors.Join(os.Remove(p), os.Symlink("/dev/zero", p)) },
		"no checksum":      func(p string) error { return os.Remove(p + sumSuffix) },
		"garbled checksum": func(p string) error { return os.WriteFile(p+sumSuffix, []byte("sha256 zz\nsize x\n"), 0o600) },
		"empty checksum":   func(p string) error { return os.Truncate(p+sumSuffix, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := testStore(t)
			key := KeyOf("a", "b")
			path, built := put(t, s, key, text)
			if !built {
				t.Fatal("an empty store had the entry")
			}
			if _, built := put(t, s, key, text); built {
				t.Fatal("built a second time")
			}
			if err := damage(path); err != nil {
				t.Fatal(err)
			}
			if got, ok := s.Lookup("test", key); ok {
				t.Errorf("Lookup found %s", got)
			}
			if _, built := put(t, s, key, text); !built {
				t.Error("the damaged entry was handed out")
			}
			checkNoLeftovers(t, s.Dir())
		})
	}
}

// A cache that was copied elsewhere has other times but the same content.
func TestStoreCopied(t *testing.T) {
	t.Parallel()
	s := testStore(t)
	path, _ := put(t, s, KeyOf("a"), "text")
	if err := os.Chtimes(path, time.Now(), time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, built := put(t, s, KeyOf("a"), "text"); built {
			t.Error("a sound entry with another time was built again")
		}
	}
	sum, err := readSum(path + sumSuffix)
	if err != nil || sum.mtime != time.Unix(1, 0).UnixNano() {
		t.Errorf("the new time was not noted: %+v, %v", sum, err)
	}
}

func TestStoreBuildFails(t *testing.T) {
	t.Parallel()
	s := testStore(t)
	failure := errors.New("no more")
	_, err := s.Build(t.Context(), "test", KeyOf("a"), func(w io.Writer) error {
		if _, err := w.Write(make([]byte, 1<<16)); err != nil {
			return err
		}
		return failure
	})
	if !errors.Is(err, failure) {
		t.Errorf("Build returned %v", err)
	}
	if _, ok := s.Lookup("test", KeyOf("a")); ok {
		t.Error("half an entry was kept")
	}
	checkNoLeftovers(t, s.Dir())
	if _, built := put(t, s, KeyOf("a"), "whole"); !built {
		t.Error("the next build did not run")
	}
}

func TestStoreWaitEnds(t *testing.T) {
	t.Parallel()
	s := testStore(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("no time left")
	_, err := s.Build(t.Context(), "test", KeyOf("a"), func(io.Writer) error {
		cancel(cause) // another builder gives up while this one holds the lock
		_, err := s.Build(ctx, "test", KeyOf("b"), func(io.Writer) error { return nil })
		if !errors.Is(err, cause) {
			t.Errorf("the waiting Build returned %v, want the cause of its context's end", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, KeyOf("b"), "the lock is free again")
}

func TestStorePrune(t *testing.T) {
	t.Parallel()
	s := testStore(t)
	now := time.Now()
	ages := []time.Duration{0, time.Minute, 2 * time.Hour, 3 * time.Hour, 4 * time.Hour, 5 * time.Hour, 40 * 24 * time.Hour}
	var paths []string
	for i := range ages {
		path, _ := put(t, s, KeyOf(fmt.Sprint(i)), "x")
		paths = append(paths, path)
	}
	for i, age := range ages {
		used := now.Add(-age)
		if err := os.Chtimes(paths[i]+sumSuffix, used, used); err != nil {
			t.Fatal(err)
		}
	}
	dir := filepath.Dir(paths[0])
	old := filepath.Join(dir, tempPrefix+"old")
	if err := errors.Join(os.WriteFile(old, nil, 0o600), os.Chtimes(old, now.Add(-2*graceTime), now.Add(-2*graceTime))); err != nil {
		t.Fatal(err)
	}
	scratch, err := s.scratch("test")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(scratch, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	prune(dir, paths[0], now)
	for i, path := range paths {
		_, err := os.Stat(path)
		if kept := err == nil; kept != (i < keepNewest) {
			t.Errorf("entry last used %v ago: kept is %v", ages[i], kept)
		}
	}
	if _, err := os.Stat(old); err == nil {
		t.Error("the leftover of a dead build was kept")
	}
	if _, err := os.Stat(scratch); err == nil {
		t.Error("the folder of a dead build was kept")
	}
	prune(dir, paths[1], now) // everything young, whatever the number
	if _, err := os.Stat(paths[0]); err != nil {
		t.Error(err)
	}
}

func TestOpenStoreErrors(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenStore(filepath.Join(file, "below")); err == nil || !strings.Contains(err.Error(), "XDG_CACHE_HOME") {
		t.Errorf("a store below a file: %v; want the remedy named", err)
	}
}

// A store that cannot be written serves what it has. What it would have to write fails with the remedy named.
func TestStoreReadOnly(t *testing.T) {
	t.Parallel()
	build := func(io.Writer) error { return errors.New("built") }
	for name, spoil := range map[string]func(s *Store) error{ // a mode would not stop root
		"no folder": func(s *Store) error { return os.WriteFile(filepath.Join(s.Dir(), "test"), nil, 0o600) },
		"no lock":   func(s *Store) error { return os.MkdirAll(filepath.Join(s.Dir(), "test", lockName), 0o700) },
	} {
		s := testStore(t)
		if err := spoil(s); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Build(t.Context(), "test", KeyOf("a"), build); err == nil || !strings.Contains(err.Error(), cacheRemedy) {
			t.Errorf("%s: %v; want the remedy named", name, err)
		}
	}
	s := testStore(t)
	path, _ := put(t, s, KeyOf("a"), "text")
	lock := filepath.Join(filepath.Dir(path), lockName)
	if err := errors.Join(os.Remove(lock), os.Mkdir(lock, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, built := put(t, s, KeyOf("a"), "text"); built {
		t.Error("an entry that was there was built again")
	}
}

func TestKeys(t *testing.T) {
	t.Parallel()
	if KeyOf("ab", "c") == KeyOf("a", "bc") || KeyOf("a") == KeyOf("a", "") || KeyOf() == KeyOf("") {
		t.Error("borders of parts do not count")
	}
	k := KeyOf("x")
	if got, err := parseKey(k.String()); err != nil || got != k {
		t.Errorf("parseKey: %v, %v", got, err)
	}
	for _, s := range []string{"", "00", strings.Repeat("z", 64), strings.Repeat("0", 66)} {
		if _, err := parseKey(s); err == nil {
			t.Errorf("parseKey(%q) succeeded", s)
		}
	}
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	one, err := StatKey(file)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := StatKey(file); again != one {
		t.Error("an unchanged file has another key")
	}
	if err := os.WriteFile(file, []byte("12"), 0o600); err != nil {
		t.Fatal(err)
	}
	if two, _ := StatKey(file); two == one {
		t.Error("a changed file has the same key")
	}
	if _, err := StatKey(file + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}
