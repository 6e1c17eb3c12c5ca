package disk_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/blk/fault"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// The tests in this file have QEMU's tools drive our block layer over NBD, through the patterns of QEMU's own tests of its
// block layer, whose numbers they carry. Those of throttling (093) are in package blk, in virtual time.

// export serves d on a unix socket until the test ends and returns its URI.
func export(t *testing.T, d *blk.Device) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &nbd.Server{Exports: []nbd.Export{{Disk: d}}}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(ln)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-served
	})
	return "nbd+unix:///?socket=" + socket
}

// device returns a Device over b that is closed with the test.
func device(t *testing.T, b blk.Backend, o blk.Options) *blk.Device {
	t.Helper()
	d, err := blk.New(b, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// memory returns a Backend over memory with faults in front.
func memory(t *testing.T, size int64, o fault.Options) *fault.Disk {
	t.Helper()
	m, err := mem.New(size, mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return fault.New(m, o)
}

// qemuIO has qemu-io carry out commands on what args name. All must go well, which includes patterns that are read.
func qemuIO(t *testing.T, args []string, commands ...string) {
	t.Helper()
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := exec.Command(hosttest.Tool(t, "qemu-io"), args...).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("failed")) || bytes.Contains(out, []byte("rror")) {
		t.Fatalf("qemu-io %q: %v\n%s", args, err, out)
	}
}

func run(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command(hosttest.Tool(t, name), args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, &stderr)
	}
	return out
}

// 033: zeroes that begin and end anywhere, at several alignments.
func TestQEMUWritesZeroes(t *testing.T) {
	t.Parallel()
	for _, align := range []int{1, 512, 4096, 65536} {
		t.Run(fmt.Sprint(align), func(t *testing.T) {
			t.Parallel()
			uri := export(t, device(t, memory(t, 128<<20, fault.Options{Limits: blk.Limits{RequestAlign: align}}), blk.Options{}))
			for _, zero := range []string{"write -z", "write -z -u", "aio_write -z"} {
				qemuIO(t, []string{"-f", "raw", uri},
					"write -P 0xa 0x200 0x400", "write -P 0xa 0x20000 0x600", zero+" 0x400 0x20000", "aio_flush",
					"read -P 0xa 0x200 0x200", "read -P 0 0x400 0x20000", "read -P 0xa 0x20400 0x200",
					"write -P 0xb 0x10000 0x10000", zero+" 0x10000 0x10000", "aio_flush",
					"read -P 0 0x400 0x20000",
					"write -P 0xc 0x40000 0x1000", zero+" 0x40200 0x200", "aio_flush",
					"read -P 0xc 0x40000 0x200", "read -P 0 0x40200 0x200", "read -P 0xc 0x40400 0xc00",
					"write -P 0xd 0x7fffe00 0x200", zero+" 0x7fffe00 0x200", "aio_flush", // the last sector
					"read -P 0 0x7fffe00 0x200", "write -P 0 0x200 0x200", "write -P 0 0x20400 0x200", "write -P 0 0x40000 0x1000",
				)
			}
		})
	}
}

// session is a qemu-io that is told what to do line by line.
type session struct {
	t    *testing.T
	in   io.WriteCloser
	out  *bufio.Reader
	disk *fault.Disk
	ctx  context.Context
}

func newSession(t *testing.T, uri string, disk *fault.Disk) *session {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // t.Context ends before the clean-up
	cmd := exec.CommandContext(ctx, hosttest.Tool(t, "qemu-io"), "-f", "raw", uri)
	in, out := hosttest.Start(t, cmd)
	s := &session{t: t, in: in, out: bufio.NewReader(out), disk: disk, ctx: ctx}
	t.Cleanup(func() {
		_ = in.Close()
		rest, _ := io.ReadAll(s.out)
		if err := cmd.Wait(); err != nil || bytes.Contains(rest, []byte("failed")) {
			t.Errorf("qemu-io: %v\n%s", err, rest)
		}
		cancel()
	})
	s.prompt()
	return s
}

// prompt reads what qemu-io says up to its next prompt.
func (s *session) prompt() {
	s.t.Helper()
	var said []byte
	for !bytes.HasSuffix(said, []byte("qemu-io> ")) {
		b, err := s.out.ReadByte()
		if err != nil {
			s.t.Fatalf("qemu-io ended early: %v\n%s", err, said)
		}
		said = append(said, b)
	}
	if bytes.Contains(said, []byte("failed")) {
		s.t.Fatalf("qemu-io: %s", said)
	}
}

// do sends commands one by one, and returns when a read behind them has been answered: the server has taken them up then.
func (s *session) do(commands ...string) {
	s.t.Helper()
	for _, c := range append(commands, "read 127M 512") {
		if _, err := fmt.Fprintln(s.in, c); err != nil {
			s.t.Fatal(err)
		}
		s.prompt()
	}
}

// until waits for a request to stop at the breakpoint of this tag.
func (s *session) until(tag string) {
	s.t.Helper()
	if err := s.disk.Wait(s.ctx, tag); err != nil {
		s.t.Fatalf("breakpoint %s: %v", tag, err)
	}
}

// write begins a write that it does not wait for.
func (s *session) write(pattern int, off, n int64) {
	s.t.Helper()
	s.do(fmt.Sprintf("aio_write -P %d %#x %#x", pattern, off, n))
}

// 077: requests that are widened meet in the same blocks, stopped at the worst moments.
func TestQEMUWritesConcurrently(t *testing.T) {
	t.Parallel()
	disk := memory(t, 128<<20, fault.Options{Limits: blk.Limits{RequestAlign: 4096}, Observe: true})
	uri := export(t, device(t, disk, blk.Options{}))
	s := newSession(t, uri, disk)

	s.write(10, 0x200, 0x200)
	s.do("aio_flush")

	// One after the other in the same block.
	for i, e := range []blk.Event{blk.EventPaddedHead, blk.EventPaddedAfterHead} {
		off := int64(i+1) * 0x1000
		disk.Break(e, "A")
		s.write(10, off+0x200, 0x200)
		s.until("A")
		s.write(11, off+0x400, 0x200)
		disk.Resume("A")
		s.do("aio_flush")
	}

	// A chain of them.
	disk.Break(blk.EventPaddedAfterTail, "A")
	s.write(10, 0x5000, 0x200)
	s.until("A")
	for i := range int64(7) {
		s.write(11+int(i), 0x5200+i*0x200, 0x200)
	}
	disk.Resume("A")
	s.do("aio_flush")

	// One that overlaps two others, which it came behind or between, and which end in this order or the other.
	for i, late := range []bool{false, false, true, true} {
		base := int64(0x6000 + i*0x2000)
		disk.Break(blk.EventPaddedAfterTail, "A")
		s.write(10, base, 0x200)
		s.until("A")
		if late {
			s.write(11, base+0x800, 0x1000)
		}
		if !late {
			disk.Break(blk.EventPaddedAfterHead, "B")
			s.write(10, base+0x1e00, 0x200)
			s.until("B")
			s.write(11, base+0x800, 0x1000)
		} else {
			s.write(10, base+0x1e00, 0x200) // waits behind the one in the middle
		}
		first, second := "A", "B"
		if i%2 == 1 {
			first, second = second, first
		}
		disk.Resume(first)
		disk.Resume(second)
		s.do("aio_flush")
		disk.Remove("B")
	}

	// Only the tail is padded.
	disk.Break(blk.EventPaddedAfterTail, "A")
	s.write(10, 0xe000, 0x1800)
	s.until("A")
	s.write(11, 0xf000, 0xc00)
	disk.Resume("A")
	s.do("aio_flush")

	disk.Break(blk.EventWrite, "A")
	s.write(10, 0x10000, 0x800)
	s.until("A")
	disk.Break(blk.EventPaddedAfterTail, "B")
	s.write(11, 0x10000, 0x400)
	if disk.Stopped("B") {
		t.Error("the second write reads its block before the first has written it")
	}
	disk.Break(blk.EventWriteDone, "C")
	disk.Resume("A")
	s.until("C")
	disk.Resume("C")
	s.until("B")
	disk.Resume("B")
	s.do("aio_flush")

	disk.Break(blk.EventWrite, "A")
	s.write(10, 0x11000, 0x800)
	s.until("A")
	s.write(11, 0x11000, 0x1000)
	disk.Resume("A")
	s.do("aio_flush")

	verify := []string{
		"read -P 0 0 0x200", "read -P 10 0x200 0x200", "read -P 0 0x400 0xc00",
		"read -P 10 0x10400 0x400", "read -P 11 0x10000 0x400", "read -P 11 0x11800 0x800",
		"read -P 10 0xe000 0x1000", "read -P 11 0xf800 0x400", "read -P 0 0xfc00 0x400",
	}
	for _, off := range []int{0x1000, 0x2000} {
		verify = append(verify, fmt.Sprintf("read -P 0 %#x 0x200", off), fmt.Sprintf("read -P 10 %#x 0x200", off+0x200),
			fmt.Sprintf("read -P 11 %#x 0x200", off+0x400), fmt.Sprintf("read -P 0 %#x 0xa00", off+0x600))
	}
	for i := range 8 {
		verify = append(verify, fmt.Sprintf("read -P %d %#x 0x200", 10+i, 0x5000+i*0x200))
	}
	for off := 0x6000; off < 0xe000; off += 0x2000 {
		verify = append(verify, fmt.Sprintf("read -P 10 %#x 0x200", off), fmt.Sprintf("read -P 0 %#x 0x600", off+0x200),
			fmt.Sprintf("read -P 11 %#x 0x1000", off+0x800), fmt.Sprintf("read -P 0 %#x 0x600", off+0x1800),
			fmt.Sprintf("read -P 10 %#x 0x200", off+0x1e00))
	}
	s.do(verify...)
}

// pair makes an image of 4 KiB clusters over a base of 512-byte clusters, both by qemu-img, and returns their paths.
func pair(t *testing.T, dir string, size int64) (base, top string) {
	t.Helper()
	base, top = filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", base, fmt.Sprint(size))
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", base, "-F", "qcow2", top)
	return base, top
}

// extents is what qemu-img map says of an image, without where in the file it lies.
func extents(t *testing.T, path string) string {
	t.Helper()
	var all []map[string]any
	if err := json.Unmarshal(run(t, "qemu-img", "map", "--output=json", "-f", "qcow2", path), &all); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range all {
		fmt.Fprintln(&b, e["start"], e["length"], e["depth"], e["zero"], e["data"])
	}
	return b.String()
}

// 154: zeroes over parts of clusters with a backing file. Which clusters are allocated, and how, must be as with QEMU.
func TestQEMUWritesZeroesOverBacking(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		base, top []string
		end       int64 // bytes beyond 128 MiB
	}{
		"over zeroes": {nil, []string{"write -z 0 2k", "write -z 10k 2k", "write -z 17k 2k", "write -z 27k 2k"}, 0},
		"data before": {
			[]string{"write -P 0x11 32k 1k", "write -P 0x11 65k 1k"}, []string{"write -z 34k 1k", "write -z 66k 1k"}, 0,
		},
		"data after": {
			[]string{"write -P 0x11 34k 1k", "write -P 0x11 43k 1k"}, []string{"write -z 33k 1k", "write -z 41k 1k"}, 0,
		},
		"over data": {
			[]string{"write -P 0x11 5k 1k", "write -P 0x11 14k 1k", "write -P 0x11 21k 2k", "write -P 0x11 30208 1k"},
			[]string{"write -z 5k 2k", "write -z 13k 2k", "write -z 21k 2k", "write -z 29k 2k"}, 0,
		},
		"two clusters, data before": {
			[]string{"write -P 0x11 32k 1k", "write -P 0x11 49k 1k", "write -P 0x11 66k 1k"},
			[]string{"write -z 35k 2k", "write -z 51k 2k", "write -z 67k 2k"}, 0,
		},
		"two clusters, data after": {
			[]string{"write -P 0x11 37k 1k", "write -P 0x11 54k 1k", "write -P 0x11 71k 1k"},
			[]string{"write -z 35k 2k", "write -z 51k 2k", "write -z 67k 2k"}, 0,
		},
		"two clusters, over data":      {[]string{"write -P 0x11 2k 4k"}, []string{"write -z 3k 2k"}, 0},
		"many clusters, first data":    {[]string{"write -P 0x11 64k 2k"}, []string{"write -z 66k 7k"}, 0},
		"many clusters, data within":   {[]string{"write -P 0x11 69k 2k"}, []string{"write -z 66k 7k"}, 0},
		"many clusters, last data":     {[]string{"write -P 0x11 74k 2k"}, []string{"write -z 66k 7k"}, 0},
		"many clusters, over data":     {[]string{"write -P 0x11 65k 10k"}, []string{"write -z 66k 7k"}, 0},
		"last cluster, its front":      {nil, []string{"write -z 128M 512"}, 2048},
		"last cluster, its back":       {nil, []string{"write -z 134219264 512"}, 2048},
		"last cluster, its middle":     {nil, []string{"write -z 134218240 1k"}, 2048},
		"last cluster, all of it":      {nil, []string{"write -z 128M 2k"}, 2048},
		"last cluster over zeroes":     {[]string{"write -z 128M 512"}, []string{"write -z 134218240 1k"}, 2048},
		"last cluster over data":       {[]string{"write -P 0x11 128M 512"}, []string{"write -z 134218240 1k"}, 2048},
		"last cluster over data, back": {[]string{"write -P 0x11 128M 512"}, []string{"write -z 134219264 512"}, 2048},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			size := 128<<20 + tc.end
			var tops [2]string
			for i := range tops {
				base, top := pair(t, t.TempDir(), size)
				if len(tc.base) > 0 {
					qemuIO(t, []string{"-f", "qcow2", base}, tc.base...)
				}
				tops[i] = top
			}
			qemuIO(t, []string{"-f", "qcow2", tops[0]}, tc.top...)
			d, err := disk.Open(t.Context(), disk.Spec{Path: tops[1], Format: disk.QCOW2, Backing: disk.BackingOn})
			if err != nil {
				t.Fatal(err)
			}
			t.Run("export", func(t *testing.T) { qemuIO(t, []string{"-f", "raw", export(t, d)}, tc.top...) })
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			run(t, "qemu-img", "check", "-q", "-f", "qcow2", tops[1])
			run(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", tops[0], tops[1])
			if ours, theirs := extents(t, tops[1]), extents(t, tops[0]); ours != theirs {
				t.Errorf("start, length, depth, zero, data: ours\n%stheirs\n%s", ours, theirs)
			}
		})
	}
}

// limited opens a qcow2 image with other limits forced on it.
func limited(t *testing.T, path string, l blk.Limits) *blk.Device {
	t.Helper()
	image, err := disk.Open(t.Context(), disk.Spec{Path: path, Format: disk.QCOW2, Backing: disk.BackingOn})
	if err != nil {
		t.Fatal(err)
	}
	return device(t, fault.New(image.Backend(), fault.Options{Limits: l}), blk.Options{})
}

// 177: geometries that no disk has, over qcow2 with a backing file.
func TestQEMUUnusualGeometry(t *testing.T) {
	t.Parallel()
	const size = 128 << 20
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=1M", base, fmt.Sprint(size))
	qemuIO(t, []string{"-f", "qcow2", base}, fmt.Sprintf("write -P 11 0 %d", size))
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=1M", "-b", base, "-F", "qcow2", top)
	qemuIO(t, []string{"-f", "qcow2", top}, fmt.Sprintf("write -P 22 0 %d", size))

	for i, step := range []struct {
		limits  blk.Limits
		command []string
	}{
		{
			blk.Limits{RequestAlign: 4096, MaxTransfer: 64 << 10, ZeroAlign: 1 << 20, DiscardAlign: 1 << 20},
			[]string{"write -P 33 1000 128k", "read -P 33 1000 128k"},
		},
		{
			blk.Limits{RequestAlign: 512, MaxTransfer: 64 << 10, ZeroAlign: 1 << 20},
			[]string{"write -z 8003584 2093056"},
		},
		{
			blk.Limits{RequestAlign: 512, ZeroAlign: 15 << 20, MaxZero: 15 << 20, DiscardAlign: 15 << 20, MaxDiscard: 15 << 20},
			[]string{"write -z 32M 32M"},
		},
		{
			blk.Limits{RequestAlign: 512, ZeroAlign: 15 << 20, MaxZero: 15 << 20, DiscardAlign: 15 << 20, MaxDiscard: 15 << 20},
			[]string{"discard 80000001 30M"},
		},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			qemuIO(t, []string{"-f", "raw", export(t, limited(t, top, step.limits))}, step.command...)
		})
	}
	qemuIO(t, []string{"-r", "-f", "qcow2", top},
		"read -P 22 0 1000", "read -P 33 1000 128k", "read -P 22 132072 7871512", "read -P 0 8003584 2093056",
		"read -P 22 10096640 23457792", "read -P 0 32M 32M", "read -P 22 64M 13M", "read -P 0 77M 29M", "read -P 22 106M 22M")
	run(t, "qemu-img", "check", "-q", "-f", "qcow2", top)
}

// 197: copy on read into qcow2, of more than 2 GiB at once too, keeps what is there and takes what is not.
func TestQEMUCopyOnRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "4G")
	qemuIO(t, []string{"-f", "qcow2", base}, "write -P 55 3G 1k")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
	qemuIO(t, []string{"-f", "qcow2", top}, "write -z -u 1M 64k")

	open := func() (*blk.Device, *fault.Disk) {
		image, err := disk.Open(t.Context(), disk.Spec{Path: top, Format: disk.QCOW2, Backing: disk.BackingOn})
		if err != nil {
			t.Fatal(err)
		}
		f := fault.New(image.Backend(), fault.Options{})
		d, err := blk.New(f, blk.Options{CopyOnRead: true})
		if err != nil {
			t.Fatal(err)
		}
		return d, f
	}
	d, f := open()
	// The cluster at 1 MiB is this image's own: it is not written again.
	for _, op := range []fault.Op{fault.OpWrite, fault.OpZero} {
		f.Add(fault.Rule{Op: op, Off: 1 << 20, Len: 64 << 10, Err: errors.New("written again")})
	}
	t.Run("export", func(t *testing.T) {
		qemuIO(t, []string{"-f", "raw", export(t, d)}, "read -P 0 1M 128k", "read 0 0", "read -P 0 3221226496 1k")
	})
	// One request of 2 GiB less a sector, over the same MiB of memory again and again.
	buf := bytes.Repeat([]byte{1}, 1<<20)
	v := make(iov.Vec, 0, 2048)
	for range 2047 {
		v = v.Append(buf)
	}
	v = v.Append(buf[512:])
	if n, err := d.ReadVecAt(v, 1024); n != 2<<30-512 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if !v.IsZero() {
		t.Error("the zeroes of the base are not read as such")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Open(t.Context(), disk.Spec{Path: top, Format: disk.QCOW2, Backing: disk.BackingOn, ReadOnly: true,
		CopyOnRead: true}); err == nil {
		t.Error("copy on read into a disk that is read-only")
	}
	// Without its base it holds the same.
	run(t, "qemu-img", "rebase", "-u", "-b", "", "-f", "qcow2", top)
	run(t, "qemu-img", "check", "-q", "-f", "qcow2", top)
	run(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", base, top)
	if got := string(run(t, "qemu-io", "-r", "-f", "qcow2", "-c", "map", top)); !strings.Contains(got, "not allocated") {
		t.Errorf("all of it was copied: %s", got)
	}

	// A last cluster that the disk ends within.
	small := filepath.Join(dir, "small.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", small, "1024")
	e, err := disk.Open(t.Context(), disk.Spec{Path: small, Format: disk.QCOW2, CopyOnRead: true})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := e.ReadVecAt(iov.Of(make([]byte, 1024)), 0); n != 1024 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	run(t, "qemu-img", "check", "-q", "-f", "qcow2", small)
}

// iov-padding: requests of 1,024 elements, aligned or not at either end, on a file with a block of 4 KiB. The vectors go
// to our Device, since NBD has none; QEMU reads what comes of it. qemu-io before 8.1 refuses three of the four.
func TestVectorsOfIOVMaxPadded(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	for _, start := range []int64{4096, 512} {
		for _, last := range []int64{512, 4096} {
			path := filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(path, bytes.Repeat([]byte{1}, size), 0o600); err != nil {
				t.Fatal(err)
			}
			file, err := raw.Open(path, raw.Options{})
			if err != nil {
				t.Fatal(err)
			}
			limits := blk.Limits{RequestAlign: 4096, MaxVec: iov.MaxElems}
			d := device(t, fault.New(file, fault.Options{Limits: limits}), blk.Options{})
			n := 1023*512 + last
			data := bytes.Repeat([]byte{2}, int(n))
			var v iov.Vec
			for i := range int64(1023) {
				v = v.Append(data[i*512 : (i+1)*512])
			}
			v = v.Append(data[1023*512:])
			if put, err := d.WriteVecAt(v, start); int64(put) != n || err != nil {
				t.Fatalf("offset %d, length %d: wrote %d, %v", start, n, put, err)
			}
			clear(data)
			if got, err := d.ReadVecAt(v, start); int64(got) != n || err != nil || !bytes.Equal(data, bytes.Repeat([]byte{2}, int(n))) {
				t.Fatalf("offset %d, length %d: read %d, %v", start, n, got, err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			qemuIO(t, []string{"-r", "-f", "raw", path}, fmt.Sprintf("read -P 1 0 %d", start),
				fmt.Sprintf("read -P 2 %d %d", start, n), fmt.Sprintf("read -P 1 %d %d", start+n, size-start-n))
		}
	}
}
