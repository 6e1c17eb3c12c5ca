package queuetest

import (
	"os"
	"runtime"
	"testing"
	"time"
)

// Leaks counts the goroutines and open files of this process and returns a function that fails the test if there are
// more of them. It is for tests that do not run beside others.
func Leaks(tb testing.TB) (check func()) {
	tb.Helper()
	// With the first file that can be waited for, the runtime opens two of its own for good.
	r, w, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	r.Close()
	w.Close()
	goroutines, files := runtime.NumGoroutine(), openFiles(tb)
	return func() {
		tb.Helper()
		for deadline := time.Now().Add(Timeout); runtime.NumGoroutine() > goroutines; runtime.Gosched() {
			if time.Now().After(deadline) {
				tb.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), goroutines)
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
