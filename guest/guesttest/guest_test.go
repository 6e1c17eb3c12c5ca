package guesttest_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	image "github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/guesttest"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/net/tap/taptest"
	"github.com/kvmlet/kvmlet/vmm"
)

// The two links of TestGuest, one for each card. The agent sets up eth0; the test, eth1.
var links = [2]struct{ host, guest, mac string }{
	{"192.168.77.1", "192.168.77.2", "02:00:00:00:77:02"},
	{"192.168.78.1", "192.168.78.2", "02:00:00:00:78:02"},
}

// TestGuest looks at most of what a guest can do, in one: boots are dear where the CPU is emulated.
func TestGuest(t *testing.T) {
	taptest.Namespace(t) // this goroutine's, and that of the programs it starts
	dir := t.TempDir()
	disks := []vmm.Disk{
		{Path: filepath.Join(dir, "data"), ID: "first"},
		{Path: filepath.Join(dir, "fixed"), ReadOnly: true},
		imageDisk(t, dir),
	}
	if err := os.WriteFile(disks[0].Path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disks[0].Path, 64<<20); err != nil {
		t.Fatal(err)
	}
	fixed := random(1, 1<<20)
	if err := os.WriteFile(disks[1].Path, fixed, 0o600); err != nil {
		t.Fatal(err)
	}
	g := guesttest.Run(t, guesttest.Config{
		CPUs: 2, Memory: 512 << 20, Disks: disks, Nets: nets(t),
		Cmdline: fmt.Sprintf("kvmlet.ip=%s/24 kvmlet.hostname=tested", links[0].guest),
	})

	t.Run("machine", func(t *testing.T) { testMachine(t, g) })
	t.Run("status", func(t *testing.T) { testStatus(t, g) })
	t.Run("streams", func(t *testing.T) { testStreams(t, g) })
	t.Run("signals", func(t *testing.T) { testSignals(t, g) })
	t.Run("terminal", func(t *testing.T) { testTerminal(t, g) })
	t.Run("disks", func(t *testing.T) { testDisks(t, g, fixed) })
	t.Run("image disk", func(t *testing.T) { useImageDisk(t, g) })
	testPing(t, g)
	testIperf(t, g)

	sum := testFileSystem(t, g)
	if err := g.Poweroff(); err != nil {
		t.Fatal(err)
	}
	t.Run("image", func(t *testing.T) { testImage(t, disks[0].Path, sum) })
	if now, err := os.ReadFile(disks[1].Path); err != nil || !bytes.Equal(now, fixed) {
		t.Errorf("the read-only disk's file has changed (%v)", err)
	}
	checkImageDisk(t, disks[2])
}

// baseContent is what the backing file of the image disk holds.
var baseContent = random(2, 1<<20)

// imageDisk is a qcow2 image over a raw backing file, with all that is between an image and a guest: a limit, copies on
// read, and an eye for zeroes.
func imageDisk(t *testing.T, dir string) vmm.Disk {
	t.Helper()
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, baseContent, 0o600); err != nil {
		t.Fatal(err)
	}
	d := vmm.Disk{
		Path: filepath.Join(dir, "overlay"), Format: image.QCOW2, Backing: image.BackingBelow(dir), CopyOnRead: true,
		DetectZeroes: blk.DetectUnmap, Throttle: blk.Throttle{IOPSTotal: blk.Rate{Avg: 2000}}, Queues: 2,
	}
	err := image.Create(t.Context(), image.CreateSpec{
		Path: d.Path, Format: image.QCOW2, BackingFile: "base", BackingFormat: image.Raw, Size: 4 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// useImageDisk reads the backing file's bytes, writes over some of them, and writes zeroes.
func useImageDisk(t *testing.T, g *guesttest.Guest) {
	sum := sha256.Sum256(baseContent)
	if got := shell(t, g, "head -c 1M /dev/vdc | sha256sum"); !strings.HasPrefix(got, hex.EncodeToString(sum[:])) {
		t.Errorf("the backing file's content is another: %s", got)
	}
	shell(t, g, `yes kvmlet | head -c 100000 | dd of=/dev/vdc bs=4096 seek=100 conv=fsync 2>&1
		dd if=/dev/zero of=/dev/vdc bs=64K seek=32 count=16 oflag=direct 2>&1; sync`)
}

// checkImageDisk looks at what came of it, from outside.
func checkImageDisk(t *testing.T, d vmm.Disk) {
	t.Helper()
	// The VM has it open until the end of the test; its guest has flushed it and is gone.
	spec := image.Spec{Path: d.Path, Format: d.Format, Backing: d.Backing, ReadOnly: true, ForceShare: true}
	dev, err := image.Open(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dev.Close() }()
	want := make([]byte, 4<<20)
	copy(want, baseContent)
	for i := range 100000 {
		want[100*4096+i] = "kvmlet\n"[i%7]
	}
	got := make([]byte, len(want))
	if _, err := dev.ReadVecAt(iov.Of(got), 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the image holds something else (%v)", err)
	}
	s, _, err := dev.BlockStatus(t.Context(), 2<<20, 1<<20)
	if err != nil || s.Flags&blk.StatusZero == 0 {
		t.Errorf("zeroes are stored as data: %+v, %v", s, err)
	}
	if s, n, err := dev.BlockStatus(t.Context(), 0, 1<<20); err != nil || s.Flags&blk.StatusAllocated == 0 || n < 64<<10 {
		t.Errorf("what was read was not copied: %+v for %d, %v", s, n, err)
	}
}

// nets gives the guest a card on each of the links.
func nets(t *testing.T) (list []vmm.Net) {
	for i, l := range links {
		spec, err := net.ParseSpec(fmt.Sprintf("tap=vm%d,hostip=%s/24", i, l.host))
		if err != nil {
			t.Fatal(err)
		}
		mac, err := net.ParseMAC(l.mac)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, vmm.Net{Spec: spec, MAC: mac})
	}
	return list
}

// random returns n bytes that are always the same.
func random(seed byte, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{seed})
	_, _ = r.Read(b) // never fails
	return b
}

func testMachine(t *testing.T, g *guesttest.Guest) {
	for _, c := range []struct{ script, want string }{
		{"nproc", "2"},
		{"grep -c ^processor /proc/cpuinfo", "2"},
		{"uname -n", "tested"},
		{"cat /sys/class/misc/hw_random/rng_current", "virtio_rng.0"},
		{"dd if=/dev/hwrng bs=64 count=1 status=none | wc -c", "64"},
		{"cat /sys/class/block/vda/size /sys/class/block/vdb/size", "131072\n2048"},
		{"for d in vda vdb; do cat /sys/class/block/$d/serial; echo; done", "first\ndisk1"},
		{"cat /sys/class/net/eth0/address /sys/class/net/eth1/address", links[0].mac + "\n" + links[1].mac},
	} {
		if got := strings.TrimSpace(shell(t, g, c.script)); got != c.want {
			t.Errorf("%s: %q, want %q", c.script, got, c.want)
		}
	}
	info, err := g.Agent().Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s; init after %v, agent after %v", info.Kernel, info.InitStarted, info.AgentReady)
	if info.CPUs != 2 || info.Memory > 512<<20 || info.Memory < 448<<20 {
		t.Errorf("%d CPUs, %d KiB of memory", info.CPUs, info.Memory>>10)
	}
	if a, b := shell(t, g, "dd if=/dev/hwrng bs=64 count=1 status=none"),
		shell(t, g, "dd if=/dev/hwrng bs=64 count=1 status=none"); a == b {
		t.Errorf("the entropy device repeats itself: %x", a)
	}
}

func testStatus(t *testing.T, g *guesttest.Guest) {
	if err := g.Command("true").Run(); err != nil {
		t.Error(err)
	}
	_, err := g.Command("sh", "-c", "echo why >&2; exit 42").Output()
	var exit *guesttest.ExitError
	if !errors.As(err, &exit) || exit.Code != 42 || exit.Signal != 0 || string(exit.Stderr) != "why\n" {
		t.Errorf("exit 42: %v", err)
	}
	var start *agent.StartError
	if err = g.Command("no-such-program").Run(); !errors.As(err, &start) || start.Status().Code != 127 {
		t.Errorf("a program that there is not: %v", err)
	}
	stop := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cmd := g.CommandContext(ctx, "sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cancel(stop)
	if err := cmd.Wait(); !errors.Is(err, stop) {
		t.Errorf("a command whose context ended: %v", err)
	}
}

func testStreams(t *testing.T, g *guesttest.Guest) {
	in := random(2, 1<<20)
	var stdout, stderr bytes.Buffer
	cmd := g.Command("/init", helperArg, "mirror")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(stdout.Bytes(), in) {
		t.Errorf("stdout: %d bytes that differ from the %d of stdin", stdout.Len(), len(in))
	}
	slices.Reverse(in)
	if !bytes.Equal(stderr.Bytes(), in) {
		t.Errorf("stderr: %d bytes that differ from the %d of stdin", stderr.Len(), len(in))
	}
}

// lines starts cmd and returns a scanner on its output, which has to be read to its end, and a function that waits for
// its end.
func lines(t *testing.T, cmd *guesttest.Cmd) (*bufio.Scanner, func() error) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		w.Close()
		ended <- err
	}()
	return bufio.NewScanner(r), func() error { return <-ended }
}

func testSignals(t *testing.T, g *guesttest.Guest) {
	cmd := g.Command("sh", "-c", `trap 'echo caught; kill $!; exit 7' USR1; sleep 1000 & echo ready; wait`)
	out, wait := lines(t, cmd)
	if !out.Scan() || out.Text() != "ready" {
		t.Fatalf("the command said %q, %v", out.Text(), out.Err())
	}
	if err := cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if !out.Scan() || out.Text() != "caught" {
		t.Errorf("the command said %q, %v", out.Text(), out.Err())
	}
	var exit *guesttest.ExitError
	if err := wait(); !errors.As(err, &exit) || exit.Code != 7 {
		t.Errorf("a command that catches SIGUSR1: %v", err)
	}
	if err := cmd.Process.Signal(syscall.SIGUSR1); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("a signal to a command that has ended: %v", err)
	}

	cmd = g.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Code != 128+9 || exit.Signal != syscall.SIGKILL {
		t.Errorf("a command that was killed: %v", err)
	}
}

func testTerminal(t *testing.T, g *guesttest.Guest) {
	cmd := g.Command("sh", "-c", `trap 'stty size; kill $!; exit 0' WINCH; test -t 0 -a -t 1 -a -t 2; echo $?; stty size; sleep 1000 & wait`)
	cmd.TTY, cmd.Rows, cmd.Columns = true, 33, 99
	out, wait := lines(t, cmd)
	for i, want := range []string{"0", "33 99", "50 132"} {
		if !out.Scan() || strings.TrimSpace(out.Text()) != want {
			t.Fatalf("the terminal's command said %q, want %q (%v)", out.Text(), want, out.Err())
		}
		if i == 1 {
			if err := cmd.Process.Resize(50, 132); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := wait(); err != nil {
		t.Error(err)
	}
}

func testDisks(t *testing.T, g *guesttest.Guest, fixed []byte) {
	sum := sha256.Sum256(fixed)
	if got := shell(t, g, "sha256sum < /dev/vdb"); !strings.HasPrefix(got, hex.EncodeToString(sum[:])) {
		t.Errorf("the read-only disk's content is another: %s", got)
	}
	if got := shell(t, g, "blockdev --getro /dev/vda /dev/vdb"); got != "0\n1\n" {
		t.Errorf("read-only: %q", got)
	}
	if out, err := g.Command("dd", "if=/dev/zero", "of=/dev/vdb", "bs=4096", "count=1", "oflag=direct").Output(); err == nil {
		t.Errorf("a write to the read-only disk succeeded: %s", out)
	}
}

// testPing has host and guest ping each other, on both links.
func testPing(t *testing.T, g *guesttest.Guest) {
	shell(t, g, fmt.Sprintf("ip addr add %s/24 dev eth1; ip link set dev eth1 up", links[1].guest))
	for _, l := range links {
		if out, err := g.Command("ping", "-c", "2", l.host).Output(); err != nil || !strings.Contains(string(out), "bytes from "+l.host) {
			t.Errorf("guest to host: %s %v", out, err)
		}
		out, err := exec.CommandContext(t.Context(), "ping", "-c", "2", "-i", "0.2", "-W", "10", l.guest).CombinedOutput()
		if err != nil || !strings.Contains(string(out), " 0% packet loss") {
			t.Errorf("host to guest: %s %v", out, err)
		}
	}
}

// iperfReport is the part of iperf3's JSON output that is looked at.
type iperfReport struct {
	Error string
	End   struct {
		Sent     iperfSum `json:"sum_sent"`
		Received iperfSum `json:"sum_received"`
	}
}

type iperfSum struct {
	Bytes         int64
	BitsPerSecond float64 `json:"bits_per_second"`
}

// testIperf sends TCP streams both ways; the server is on the host.
func testIperf(t *testing.T, g *guesttest.Guest) {
	ctx, cancel := context.WithCancel(t.Context())
	server := exec.CommandContext(ctx, "iperf3", "-s", "-B", links[0].host, "--forceflush")
	said, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = server.Wait() // killed
	}()
	for out := bufio.NewScanner(said); ; {
		if !out.Scan() {
			t.Fatalf("the iperf3 server ended: %v", out.Err())
		}
		if strings.Contains(out.Text(), "listening") {
			break
		}
	}
	const size = 8 << 20
	for _, way := range []struct{ name, flag string }{{"guest to host", ""}, {"host to guest", "--reverse"}} {
		out := shell(t, g, fmt.Sprintf("iperf3 -c %s -n %d -C cubic -J %s", links[0].host, size, way.flag))
		var r iperfReport
		if err := json.Unmarshal([]byte(out), &r); err != nil || r.Error != "" {
			t.Fatalf("iperf3 %s: %v %s\n%s", way.name, err, r.Error, out)
		}
		// A sender counts what it wrote; the last of that may be under way when the test ends.
		if r.End.Sent.Bytes < size || r.End.Received.Bytes < size/2 {
			t.Errorf("iperf3 %s: %d bytes sent, %d received, want %d", way.name, r.End.Sent.Bytes, r.End.Received.Bytes, size)
		}
		t.Logf("iperf3 %s: %.0f Mbit/s", way.name, r.End.Received.BitsPerSecond/1e6)
	}
}

const fileOfFio = "verified.0.0"

// testFileSystem has fio write a file and check it, and returns the file's SHA-256.
func testFileSystem(t *testing.T, g *guesttest.Guest) string {
	shell(t, g, "mkfs.ext4 -q /dev/vda; mkdir /mnt; mount -t ext4 /dev/vda /mnt")
	run(t, g, "fio", "--name=verified", "--directory=/mnt", "--size=16M", "--rw=randwrite", "--bsrange=4k-64k",
		"--ioengine=libaio", "--iodepth=8", "--direct=1", "--verify=crc32c", "--verify_fatal=1", "--randseed=1")
	sum, _, _ := strings.Cut(run(t, g, "sha256sum", "/mnt/"+fileOfFio), " ")
	run(t, g, "sync")
	return sum
}

// testImage looks at the file system from outside, after the guest's end.
func testImage(t *testing.T, path, sum string) {
	if out, err := exec.CommandContext(t.Context(), "e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	content, err := exec.CommandContext(t.Context(), "debugfs", "-R", "cat /"+fileOfFio, path).Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := sha256.Sum256(content); hex.EncodeToString(got[:]) != sum || len(content) != 16<<20 {
		t.Errorf("the file has %d bytes with SHA-256 %x, and had %s in the guest", len(content), got, sum)
	}
}
