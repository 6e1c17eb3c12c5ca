package blktest

import (
	"os"
	"runtime"
	"testing"
	"time"
)

// patience is how long goroutines that are about to end may take. Tests of broken drivers have less.
var patience = defaultPatience

const defaultPatience = 10 * time.Second

// countLeaks counts the goroutines and open files of this process and returns a function that fails the test if there
// are more of them.
func countLeaks(tb testing.TB) (check func()) {
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
		if n := openFiles(tb); n > files {
			tb.Errorf("%d open files, %d before", n, files)
		}
	}
}

func openFiles(tb testing.TB) int {
	tb.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(entries)
}
