package guesttest_test

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// checkUsage fails the test if the process holds more than before.
func checkUsage(t *testing.T, before used) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		runtime.GC() // the heap is not what is looked for
		now := usage(t)
		if now.goroutines <= before.goroutines && now.files <= before.files && now.mappings <= before.mappings &&
			now.large <= before.large {
			t.Logf("before: %v; now: %v", before, now)
			return
		}
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("before: %v; now: %v\n%s", before, now, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// used is what a process holds. Anonymous mappings come and go with Go's own threads and heap, so that of those only the
// ones as large as a guest's memory count.
type used struct {
	goroutines, files int
	mappings          int // of files and the kernel's objects
	large             int // rows of writable mappings, of a guest's size: files are mapped into guest memory
}

func (u used) String() string {
	return fmt.Sprintf("%d goroutines, %d files, %d mappings, %d large ones", u.goroutines, u.files, u.mappings, u.large)
}

func usage(t *testing.T) used {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	u := used{goroutines: runtime.NumGoroutine(), files: len(files)}
	var row, end uint64 // size and end of the row of writable mappings so far
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line)
		if len(fields) > 4 && fields[4] != "0" { // the inode
			u.mappings++
		}
		var first, last uint64
		if _, err := fmt.Sscanf(line, "%x-%x rw", &first, &last); err != nil {
			continue
		}
		if first != end {
			row = 0
		}
		if row < smallMemory && row+last-first >= smallMemory {
			u.large++
		}
		row, end = row+last-first, last
	}
	return u
}
