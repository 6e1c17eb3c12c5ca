package guesttest_test

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/guesttest"
)

// TestMemoryAbove4GiB has a guest of 5 GiB use nearly all of it. A program there marks each page that it gets, finds all
// marks again, and tells where the pages are.
func TestMemoryAbove4GiB(t *testing.T) {
	const size = 5 << 30
	g := guesttest.Run(t, guesttest.Config{CPUs: 2, Memory: size, Bare: true})
	info, err := g.Agent().Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.Memory > size || info.Memory < size-256<<20 {
		t.Errorf("the guest has %d MiB, want nearly %d", info.Memory>>20, size>>20)
	}
	out := helperOutput(t, g, "touch")
	t.Log(out)
	var low, high int
	if _, err := fmt.Sscanf(out, "%d MiB below 4 GiB, %d MiB above", &low, &high); err != nil {
		t.Fatal(err)
	}
	if low < 2600 || high < 1700 {
		t.Errorf("too little of the memory was used")
	}
}

// touch marks a word in each page of nearly all free memory, checks all marks, and prints how much of it was below and
// above 4 GiB.
func touch() error {
	began := time.Now()
	free, err := freeMemory()
	if err != nil {
		return err
	}
	page := os.Getpagesize()
	size := (free - 128<<20) &^ (2<<20 - 1)
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	parts := runtime.NumCPU()
	var wg sync.WaitGroup
	for part := range parts {
		wg.Go(func() {
			for off := part * page; off < size; off += parts * page {
				binary.NativeEndian.PutUint64(b[off:], uint64(off)|1)
			}
		})
	}
	wg.Wait()
	for off := 0; off < size; off += page {
		if got := binary.NativeEndian.Uint64(b[off:]); got != uint64(off)|1 {
			return fmt.Errorf("page %d holds %#x", off/page, got)
		}
	}
	fmt.Fprintln(os.Stderr, time.Since(began))
	frames, err := frames(b)
	if err != nil {
		return err
	}
	high := 0
	for _, f := range frames {
		if f >= 4<<30/uint64(page) {
			high++
		}
	}
	fmt.Printf("%d MiB below 4 GiB, %d MiB above, after %v\n", (len(frames)-high)*page>>20, high*page>>20, time.Since(began))
	return nil
}

// freeMemory returns MemAvailable of /proc/meminfo in bytes.
func freeMemory() (int, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if fields := strings.Fields(s.Text()); len(fields) > 1 && fields[0] == "MemAvailable:" {
			n, err := strconv.Atoi(fields[1])
			return n << 10, err
		}
	}
	return 0, errors.New("no MemAvailable in /proc/meminfo")
}
