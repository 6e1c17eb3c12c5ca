package guesttest_test

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/guest/guesttest"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/vmm"
)

// TestDisk has Linux find out what virtio-blk offers, and use it: queues, limits and topology, discards, zeroes, the mode
// of the cache, and a disk that grows while it is open.
func TestDisk(t *testing.T) {
	const size, grown = 16 << 20, 24 << 20
	backend, err := mem.New(size, mem.Options{
		MaxSize: grown,
		Limits:  blk.Limits{PhysicalBlock: 4096, OptimalTransfer: 128 << 10, DiscardAlign: 64 << 10},
	})
	if err != nil {
		t.Fatal(err)
	}
	disk, err := blk.New(backend, blk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	content := bytes.Repeat([]byte{0xab}, size)
	if _, err := disk.WriteVecAt(iov.Of(content), 0); err != nil {
		t.Fatal(err)
	}
	g := guesttest.Run(t, guesttest.Config{
		CPUs: 2, Memory: smallMemory, Bare: true, Disks: []vmm.Disk{{ID: "memory-0", Device: disk}},
	})

	var files, want []string
	for _, f := range []struct{ file, want string }{
		{"size", "32768"}, // in sectors
		{"serial", "memory-0"},
		{"cache_type", "write back"},
		{"queue/logical_block_size", "512"},
		{"queue/physical_block_size", "4096"},
		{"queue/minimum_io_size", "4096"},
		{"queue/optimal_io_size", "131072"},
		{"queue/max_segments", "254"},
		{"queue/max_segment_size", "4194304"},
		{"queue/discard_granularity", "65536"},
		{"queue/discard_max_hw_bytes", "2147483648"},
		{"queue/write_zeroes_max_bytes", "2147483648"},
		{"mq/0/cpu_list", "0 or 1"}, // as the kernel likes
		{"mq/1/cpu_list", "0 or 1"},
	} {
		files = append(files, "/sys/block/vda/"+f.file)
		want = append(want, f.want)
	}
	out := run(t, g, append([]string{"/init", helperArg, "files"}, files...)...)
	got := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(got) != len(want) {
		t.Fatalf("not as many lines as files:\n%s", out)
	}
	queues := got[len(got)-2:]
	if slices.Sort(queues); queues[0] == "0" && queues[1] == "1" {
		queues[0], queues[1] = "0 or 1", "0 or 1"
	}
	for i, w := range want {
		if got[i] != w {
			t.Errorf("%s: %q, want %q", files[i], got[i], w)
		}
	}

	if got := helperOutput(t, g, "ranges"); got != "done" {
		t.Errorf("discards and zeroes: %s", got)
	}
	s := disk.Stats()
	if s.Discard.Ops == 0 || s.Discard.Bytes != 4<<20 || s.WriteZeroes.Bytes != 2<<20 || s.Discard.Errors+s.WriteZeroes.Errors != 0 {
		t.Errorf("discards %+v, zeroes %+v", s.Discard, s.WriteZeroes)
	}
	checkDisk(t, disk, 0, 1<<20, 0xab)
	checkDisk(t, disk, 1<<20, 4<<20, 0) // what mem makes of a discard
	checkDisk(t, disk, 5<<20, 3<<20, 0xab)
	checkDisk(t, disk, 8<<20, 2<<20, 0)
	checkDisk(t, disk, 10<<20, 6<<20, 0xab)

	if err := disk.Truncate(t.Context(), grown); err != nil {
		t.Fatal(err)
	}
	run(t, g, "/init", helperArg, "await", "/sys/block/vda/size", "49152")

	// The mode of the cache is in the configuration, which the kernel reads again.
	run(t, g, "/init", helperArg, "await", "/sys/block/vda/cache_type", "write through", "set")
	before := disk.Stats().Flush.Ops
	if got := helperOutput(t, g, "disk"); got != "64 blocks" {
		t.Errorf("writethrough: %s", got)
	}
	if n := disk.Stats().Flush.Ops; n != before {
		t.Errorf("%d flushes of a guest that was told that there is no cache", n-before)
	}
	powerOff(t, g)
}

// checkDisk wants n bytes of the value b on the disk.
func checkDisk(t *testing.T, disk *blk.Device, off int64, n int, b byte) {
	t.Helper()
	got := make([]byte, n)
	if _, err := disk.ReadVecAt(iov.Of(got), off); err != nil {
		t.Fatal(err)
	}
	if bytes.Count(got, []byte{b}) != n {
		t.Errorf("%d bytes at %d MiB are not all %#x", n, off>>20, b)
	}
}

// files prints the files that its arguments name, a line for each.
func files() error {
	for _, path := range os.Args[3:] {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		fmt.Println(strings.TrimSpace(string(b)))
	}
	return nil
}

// await waits until the file that is its first argument has the content that is the second, which it writes there if
// there is a third.
func await() error {
	path, content := os.Args[3], os.Args[4]
	if len(os.Args) > 5 {
		if err := os.WriteFile(path, []byte(content), 0); err != nil {
			return err
		}
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) { // sysfs tells nobody
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(b)) == content {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s holds %q, want %q", path, b, content)
		}
	}
}

// ranges discards a part of the disk and writes zeroes over another.
func ranges() error {
	f, err := os.OpenFile("/dev/vda", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, r := range []struct {
		request uintptr
		span    [2]uint64 // offset and length
	}{
		{unix.BLKDISCARD, [2]uint64{1 << 20, 4 << 20}},
		{unix.BLKZEROOUT, [2]uint64{8 << 20, 2 << 20}},
	} {
		if err := ioctlRange(f.Fd(), r.request, &r.span); err != nil {
			return fmt.Errorf("ioctl %#x: %w", r.request, err)
		}
	}
	fmt.Println("done")
	return nil
}
