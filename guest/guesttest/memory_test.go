package guesttest_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/guesttest"
	"github.com/kvmlet/kvmlet/guest/memory"
)

// Holes are pages that a guest's kernel is told to keep off (memmap= in admin-guide/kernel-parameters.txt), so that a
// program there may write to them by their physical address. There is one for each holeStep from holeFirst on, which
// leaves the kernel and its initrd alone.
const (
	holeFirst = 576 << 20
	holeStep  = 128 << 20
	holeParam = "memmap="
)

// fiveGiB reaches beyond 4 GiB. To write to all of it would take minutes in a lab.
func fiveGiB(_ *testing.T, c *guesttest.Config) {
	c.Memory = 5 << 30
	c.Cmdline = holeParam + strings.Join(holes(c.Memory), ",")
}

func holes(size uint64) (list []string) {
	for addr := uint64(holeFirst); addr < size+memory.HoleEnd-memory.HoleStart; addr += holeStep {
		if addr < memory.HoleStart || addr >= memory.HoleEnd {
			list = append(list, fmt.Sprintf("4K$%#x", addr))
		}
	}
	return list
}

// usesFiveGiB finds that the guest's kernel has all of it, that pages everywhere in it hold what was written to them,
// and that a program gets pages above 4 GiB.
func usesFiveGiB(t *testing.T, g *guesttest.Guest) {
	const size = 5 << 30
	info, err := g.Agent().Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.Memory > size || info.Memory < size-256<<20 {
		t.Errorf("the guest has %d MiB, want nearly %d", info.Memory>>20, size>>20)
	}
	if got, want := helperOutput(t, g, "markholes"), fmt.Sprintf("%d holes", len(holes(size))); got != want {
		t.Errorf("marked %s, want %s", got, want)
	}
	var high, all int
	out := helperOutput(t, g, "highpages")
	if _, err := fmt.Sscanf(out, "%d of %d pages", &high, &all); err != nil || all == 0 || high < all/2 {
		t.Errorf("above 4 GiB are %s (%v)", out, err)
	}
}

// markholes writes each hole's address into it and, when that is done, finds it there.
func markholes() error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	f, err := os.OpenFile("/dev/mem", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, list, _ := strings.Cut(string(cmdline), holeParam)
	list, _, _ = strings.Cut(strings.TrimSpace(list), " ")
	type hole struct {
		addr uint64
		page []byte
	}
	var holes []hole
	for _, s := range strings.Split(list, ",") {
		var h hole
		if _, err := fmt.Sscanf(s, "4K$%v", &h.addr); err != nil {
			return fmt.Errorf("%q: %w", s, err)
		}
		h.page, err = unix.Mmap(int(f.Fd()), int64(h.addr), os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return fmt.Errorf("map %#x: %w", h.addr, err)
		}
		binary.NativeEndian.PutUint64(h.page, h.addr)
		holes = append(holes, h)
	}
	for _, h := range holes {
		if got := binary.NativeEndian.Uint64(h.page); got != h.addr {
			return fmt.Errorf("at %#x is %#x", h.addr, got)
		}
	}
	fmt.Println(len(holes), "holes")
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
