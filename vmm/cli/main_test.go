package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/guest/hosttest"
)

// Environment variables that make the test binary something else.
const (
	asCommand = "KVMLET_TEST_COMMAND" // JSON of the arguments: this is kvmlet
	asLocker  = "KVMLET_TEST_LOCK"    // a path: this holds that disk until its standard input ends
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	if s := os.Getenv(asCommand); s != "" {
		var args []string
		if err := json.Unmarshal([]byte(s), &args); err != nil {
			panic(err)
		}
		return Main(context.Background(), args)
	}
	if path := os.Getenv(asLocker); path != "" {
		f, err := raw.Open(path, raw.Options{})
		if err != nil {
			panic(err)
		}
		defer f.Close()
		fmt.Println("locked")
		_, _ = io.Copy(io.Discard, os.Stdin)
		return 0
	}
	// Nothing here may get as far as QEMU, or to what the user has cached.
	dir, err := os.MkdirTemp("", "kvmlet-cli-test-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	for name, value := range map[string]string{"PATH": dir, "XDG_CACHE_HOME": dir} {
		if err := os.Setenv(name, value); err != nil {
			panic(err)
		}
	}
	return m.Run()
}

// result is what a command line came to.
type result struct {
	status   int
	out, err string
}

// runCommand runs a command line in this process, with an empty standard input.
func runCommand(t *testing.T, args ...string) result {
	t.Helper()
	dir := t.TempDir()
	var s streams
	var err error
	if s.in, err = os.Open(os.DevNull); err != nil {
		t.Fatal(err)
	}
	defer s.in.Close()
	for name, f := range map[string]**os.File{"out": &s.out, "err": &s.err} {
		if *f, err = os.Create(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		defer (*f).Close()
	}
	r := result{status: run(t.Context(), args, s)}
	r.out, r.err = readBack(t, s.out), readBack(t, s.err)
	return r
}

// runFull is runCommand with streams to a device that has no space, except for keep, which is "out" or "err".
func runFull(t *testing.T, keep string, args ...string) result {
	t.Helper()
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	kept, err := os.Create(filepath.Join(t.TempDir(), keep))
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	if keep == "out" {
		return result{status: run(t.Context(), args, streams{in: full, out: kept, err: full}), out: readBack(t, kept)}
	}
	return result{status: run(t.Context(), args, streams{in: full, out: full, err: kept}), err: readBack(t, kept)}
}

func readBack(t *testing.T, f *os.File) string {
	t.Helper()
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// lockElsewhere makes another process use the disk at path, until the test ends.
func lockElsewhere(t *testing.T, path string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asLocker+"="+path)
	cmd.Stderr = os.Stderr
	stdin, stdout := hosttest.Start(t, cmd)
	t.Cleanup(func() {
		_ = stdin.Close() // which ends it
		if err := cmd.Wait(); err != nil {
			t.Errorf("the process that held %s: %v", path, err)
		}
	})
	if _, err := io.ReadFull(stdout, make([]byte, len("locked\n"))); err != nil {
		t.Fatal(err)
	}
}

// runUnprivileged runs a command line in a process that has no rights beyond those of any user.
func runUnprivileged(t *testing.T, args ...string) result {
	t.Helper()
	words, err := json.Marshal(args)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe") // by a path that every user may take
	cmd.Env = append(os.Environ(), asCommand+"="+string(words))
	// With -cover the process reports what it covered, and says so where it may not.
	coverage := t.TempDir()
	if err := errors.Join(os.Chmod(filepath.Dir(coverage), 0o755), os.Chmod(coverage, 0o777)); err != nil {
		t.Fatal(err)
	}
	cmd.Env = append(cmd.Env, "GOCOVERDIR="+coverage)
	cmd.Dir = "/"
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = asNobody()
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

func asNobody() *syscall.SysProcAttr {
	const nobody = 65534
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
}
