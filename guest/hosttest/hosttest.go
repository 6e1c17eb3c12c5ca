// Package hosttest is what tests of every package ask of their own process and its host: whether something is left behind,
// where a program is, and whether the race detector watches. It imports nothing of the project, so any test may use it.
package hosttest

import (
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// Leaks counts the goroutines and open files of this process and returns a function that fails the test if there are more
// of them after patience: some may be about to end. It is for tests that do not run beside others.
func Leaks(tb testing.TB, patience time.Duration) (check func()) {
	tb.Helper()
	// With the first file that can be waited for, the runtime opens two of its own for good.
	r, w, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	_, _ = r.Close(), w.Close()
	goroutines, files := runtime.NumGoroutine(), openFiles(tb)
	return func() {
		tb.Helper()
		for deadline := time.Now().Add(patience); ; runtime.Gosched() {
			now := openFiles(tb)
			if runtime.NumGoroutine() <= goroutines && len(now) <= len(files) {
				return
			}
			if time.Now().After(deadline) {
				tb.Fatalf("%d goroutines, %d before; open files %q, before %q\n%s",
					runtime.NumGoroutine(), goroutines, now, files, stacks(tb))
			}
		}
	}
}

// Ended waits until no goroutine of this process is in function, a name as stacks have it or a part of one, and fails the
// test after patience. What a sync.WaitGroup has waited for may be there yet: between Done and its last instruction.
func Ended(tb testing.TB, function string, patience time.Duration) {
	tb.Helper()
	for deadline := time.Now().Add(patience); Running(tb, function) > 0; runtime.Gosched() {
		if time.Now().After(deadline) {
			tb.Fatalf("%d goroutines in %s\n%s", Running(tb, function), function, stacks(tb))
		}
	}
}

// Running returns how often function, a name as stacks have it or a part of one, is in the stacks of this process.
func Running(tb testing.TB, function string) int {
	tb.Helper()
	return strings.Count(stacks(tb), function)
}

// stacks returns those of all goroutines, whole.
func stacks(tb testing.TB) string {
	tb.Helper()
	for size := 1 << 20; ; size *= 2 {
		buf := make([]byte, size)
		if n := runtime.Stack(buf, true); n < size {
			return string(buf[:n])
		}
	}
}

// openFiles returns what the descriptors of this process lead to, sorted.
func openFiles(tb testing.TB) (files []string) {
	tb.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil { // not that of ReadDir itself
			files = append(files, target)
		}
	}
	slices.Sort(files)
	return files
}

// Start starts cmd with pipes to its standard input and from its standard output. To close in and to wait for the end is
// the caller's.
func Start(tb testing.TB, cmd *exec.Cmd) (in io.WriteCloser, out io.Reader) {
	tb.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if out, err = cmd.StdoutPipe(); err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	return in, out
}

// Tool returns the path of a program. Without it the test is skipped, or fails if KVMLET_REQUIRE is "all".
func Tool(tb testing.TB, name string) string {
	tb.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	if os.Getenv("KVMLET_REQUIRE") == "all" {
		tb.Fatalf("%v (install it with scripts/setup)", err)
	}
	tb.Skipf("%v (install it with scripts/setup)", err)
	return ""
}
