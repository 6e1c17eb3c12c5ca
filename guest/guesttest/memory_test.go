package guesttest_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/guesttest"
	"github.com/kvmlet/kvmlet/guest/memory"
)

// Holes are ranges that a guest's kernel is told to keep off (memmap= in admin-guide/kernel-parameters.txt), so that a
// program there may write to them by their physical address. They leave it 576 MiB at the start, for the kernel and its
// initrd, and the last 256 MiB. A page in each step bytes is written to.
//
// To write to all of 5 GiB would take minutes in a lab: its kernel has no huge pages, and a page's first use takes some
// 160 us of an emulated CPU. With these steps that is about 20 s.
const (
	fiveGiBSize = 5 << 30
	lowStep     = 2 << 20
	highStep    = 16 << 10
	holeParam   = "memmap="
)

type hole struct{ addr, end, step uint64 }

var holes = []hole{
	{576 << 20, memory.HoleStart, lowStep},
	{memory.HoleEnd, memory.HoleEnd + (fiveGiBSize - memory.HoleStart) - 256<<20, highStep},
}

// fiveGiB reaches beyond 4 GiB.
func fiveGiB(_ *testing.T, c *guesttest.Config) {
	c.Memory = fiveGiBSize
	var list []string
	for _, h := range holes {
		list = append(list, fmt.Sprintf("%#x$%#x", h.end-h.addr, h.addr))
	}
	c.Cmdline = holeParam + strings.Join(list, ",")
}

// usesFiveGiB finds that the guest's kernel has all of it but the holes, that the pages in these hold what was written to
// them, and that a program gets pages above 4 GiB.
func usesFiveGiB(t *testing.T, g *guesttest.Guest) {
	info, err := g.Agent().Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := uint64(fiveGiBSize)
	for _, h := range holes {
		want -= h.end - h.addr
	}
	if info.Memory > want || info.Memory < want-192<<20 { // the kernel itself, and what it keeps of all pages
		t.Errorf("the guest has %d MiB, want nearly %d", info.Memory>>20, want>>20)
	}
	began := time.Now()
	if got, want := helperOutput(t, g, "markholes"), "all marks are there"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	t.Logf("marked the holes in %v", time.Since(began))
	var high, all int
	out := helperOutput(t, g, "highpages")
	if _, err := fmt.Sscanf(out, "%d of %d pages", &high, &all); err != nil || all == 0 || high < all/2 {
		t.Errorf("above 4 GiB are %s (%v)", out, err)
	}
}

// markholes writes its address into each page of the holes that is looked at and, when that is done, finds all there.
func markholes() error {
	f, err := os.OpenFile("/dev/mem", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	maps := make([][]byte, len(holes))
	for i, h := range holes {
		maps[i], err = unix.Mmap(int(f.Fd()), int64(h.addr), int(h.end-h.addr), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return fmt.Errorf("map %#x: %w", h.addr, err)
		}
	}
	for i, h := range holes {
		for at := h.addr; at < h.end; at += h.step {
			binary.NativeEndian.PutUint64(maps[i][at-h.addr:], at)
		}
	}
	for i, h := range holes {
		for at := h.addr; at < h.end; at += h.step {
			if got := binary.NativeEndian.Uint64(maps[i][at-h.addr:]); got != at {
				return fmt.Errorf("at %#x is %#x", at, got)
			}
		}
	}
	fmt.Println("all marks are there")
	return nil
}

// highpages marks pages of its own, finds the marks again, and tells how many of the pages are above 4 GiB.
func highpages() error {
	const size = 64 << 20
	page := os.Getpagesize()
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	for off := 0; off < size; off += page {
		binary.NativeEndian.PutUint64(b[off:], uint64(off)|1)
	}
	for off := 0; off < size; off += page {
		if got := binary.NativeEndian.Uint64(b[off:]); got != uint64(off)|1 {
			return fmt.Errorf("page %d holds %#x", off/page, got)
		}
	}
	frames, err := frames(b)
	if err != nil {
		return err
	}
	high := 0
	for _, f := range frames {
		if f*uint64(page) >= memory.HoleEnd {
			high++
		}
	}
	fmt.Printf("%d of %d pages\n", high, len(frames))
	return nil
}
