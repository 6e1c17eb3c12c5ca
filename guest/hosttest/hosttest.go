// Package hosttest is what tests of every package ask of their own process and its host: whether something is left behind,
// where a program is, and whether the race detector watches. It imports nothing of the project, so any test may use it.
package hosttest

import (
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"
	"time"
)

// Leaks counts the goroutines and open files of this process and returns a function that fails the test if there are more
// of them, and goroutines that are about to end have not ended within patience. It is for tests that do not run beside
// others.
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
		for deadline := time.Now().Add(patience); runtime.NumGoroutine() > goroutines; runtime.Gosched() {
			if time.Now().After(deadline) {
				buf := make([]byte, 1<<20)
				tb.Fatalf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), goroutines, buf[:runtime.Stack(buf, true)])
			}
		}
		if now := openFiles(tb); len(now) > len(files) {
			tb.Errorf("open files %q, before %q", now, files)
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
