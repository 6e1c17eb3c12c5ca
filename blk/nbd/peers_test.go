package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// program runs a server until the test ends or stop is called.
type program struct {
	cmd  *exec.Cmd
	out  bytes.Buffer
	done chan struct{}
}

func start(tb testing.TB, socket, name string, args ...string) *program {
	tb.Helper()
	p := &program{cmd: exec.Command(name, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	p.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	_ = os.Remove(socket)
	if err := p.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	tb.Cleanup(p.kill)
	for deadline := time.Now().Add(timeout); ; {
		if nc, err := net.Dial("unix", socket); err == nil {
			nc.Close()
			return p
		}
		select {
		case <-p.done:
			tb.Fatalf("%s ended: %s", name, &p.out)
		case <-time.After(5 * time.Millisecond): // there is nothing to wait on
		}
		if time.Now().After(deadline) {
			tb.Fatalf("%s does not listen", name)
		}
	}
}

func (p *program) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// nbdkit starts nbdkit.
func nbdkit(tb testing.TB, args ...string) nbd.Options {
	tb.Helper()
	path := hosttest.Tool(tb, "nbdkit")
	socket := filepath.Join(tb.TempDir(), "nbdkit.sock")
	start(tb, socket, path, append([]string{"-f", "-U", socket}, args...)...)
	return nbd.Options{Network: "unix", Address: socket}
}

// qemuNBD returns what starts qemu-nbd on a file.
func qemuNBD(tb testing.TB, size int64, args ...string) (launch func() *program, file string, o nbd.Options) {
	tb.Helper()
	path := hosttest.Tool(tb, "qemu-nbd")
	dir := tb.TempDir()
	file, socket := filepath.Join(dir, "file"), filepath.Join(dir, "qemu.sock")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		tb.Fatal(err)
	}
	args = append([]string{"-f", "raw", "-k", socket, "-t", "-e", "4", "--discard=unmap", file}, args...)
	return func() *program { return start(tb, socket, path, args...) }, file, nbd.Options{Network: "unix", Address: socket}
}

// exercise uses a Device over a client as the rest of the world would, on a disk of 1 MiB that is empty at first.
func exercise(t *testing.T, c *nbd.Client) {
	t.Helper()
	d, err := blk.New(c, blk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, d.Size())
	put := func(off, n int, seed uint64) {
		p := noise(n, seed)
		copy(want[off:], p)
		if k, err := d.WriteVecAt(iov.Of(p[:n/3], p[n/3:]), int64(off)); k != n || err != nil {
			t.Fatalf("write of %d bytes at %d: %v", n, off, err)
		}
	}
	put(0, 1<<20, 1)
	put(1, 1, 2)
	put(4097, 70_001, 3)
	put(1<<20-513, 513, 4)
	ctx := testContext(t)
	zero := func(off, n int64, f blk.Flags) {
		clear(want[off : off+n])
		if err := d.WriteZeroes(ctx, off, n, f); err != nil {
			t.Fatalf("zeroes: %v", err)
		}
	}
	zero(100_000, 50_001, 0)
	zero(200_000, 80_000, blk.MayUnmap|blk.FUA)
	if err := d.Do(ctx, &blk.Request{Op: blk.OpWrite, Flags: blk.FUA, Off: 512, Vec: iov.Of(want[512:1024])}); err != nil {
		t.Error(err)
	}
	if err := d.Discard(ctx, 768<<10, 128<<10); err != nil {
		t.Errorf("discard: %v", err)
	}
	put(768<<10, 128<<10, 5)
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
	mustRead(t, d, want, 0)
	mustRead(t, d, want[77:100_077], 77)
	for off := int64(0); off < d.Size(); {
		st, run, err := d.BlockStatus(ctx, off, d.Size()-off)
		if err != nil || run <= 0 {
			t.Fatalf("status at %d: %d, %v", off, run, err)
		}
		if st.Flags&blk.StatusZero != 0 && !bytes.Equal(want[off:off+run], make([]byte, run)) {
			t.Fatalf("%d bytes at %d are said to be zero", run, off)
		}
		off += run
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestAgainstQEMU(t *testing.T) {
	t.Parallel()
	launch, file, o := qemuNBD(t, 1<<20, "-x", "name", "-D", "described")
	launch()
	if _, err := nbd.Dial(testContext(t), o); err == nil {
		t.Error("no export of that name, but it was found")
	}
	o.Export = "name"
	c := dial(t, o)
	if st, n, err := c.BlockStatus(0, 1<<20); err != nil || n != 1<<20 || st.Flags&blk.StatusZero == 0 || st.Flags&blk.StatusData != 0 {
		t.Errorf("status of an empty file: %+v, %d, %v", st, n, err)
	}
	exercise(t, dial(t, o))
	mustRead(t, c, contents(t, file), 0)
}

func TestAgainstQEMUOverTLS(t *testing.T) {
	t.Parallel()
	c := newCerts(t)
	launch, _, o := qemuNBD(t, 1<<20, "--tls-creds=tls0", "--object=tls-creds-x509,id=tls0,endpoint=server,verify-peer=on,dir="+c.dir)
	launch()
	if _, err := nbd.Dial(testContext(t), o); !errors.Is(err, nbd.ErrTLS) {
		t.Errorf("without TLS: %v", err)
	}
	var err error
	if o.TLS, err = nbd.ClientTLS(c.dir, "disks.example"); err != nil {
		t.Fatal(err)
	}
	exercise(t, dial(t, o))
	plain, _, o2 := qemuNBD(t, 1<<20)
	plain()
	o2.TLS = o.TLS
	if _, err := nbd.Dial(testContext(t), o2); !errors.Is(err, nbd.ErrTLS) {
		t.Errorf("a server without TLS: %v", err)
	}
}

func TestAgainstNbdkit(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"memory":         {"memory", "1M"},
		"simple replies": {"--no-sr", "memory", "1M"},
		"no extents":     {"--filter=noextents", "memory", "1M"},
		"no zeroes":      {"--filter=nozero", "memory", "1M"},
		"newstyle":       {"--mask-handshake=0", "memory", "1M"},
		"no zeroes flag": {"--mask-handshake=1", "memory", "1M"},
		"blocks": {"--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=4096", "blocksize-preferred=8192",
			"blocksize-maximum=64k", "blocksize-error-policy=error"},
		"delays":      {"--filter=delay", "memory", "1M", "delay-read=5ms", "delay-write=5ms", "delay-zero=5ms"},
		"forced fua":  {"--filter=fua", "memory", "1M", "fuamode=force"},
		"no parallel": {"--filter=noparallel", "memory", "1M", "serialize=all-requests"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, nbdkit(t, args...))
			if name == "blocks" {
				l := c.Limits()
				if l.RequestAlign != 4096 || l.OptimalTransfer != 8192 || l.MaxTransfer != 64<<10 || l.MaxZero != 64<<10 {
					t.Errorf("limits %+v", l)
				}
			}
			exercise(t, c)
		})
	}
}

func TestAgainstNbdkitOverTLS(t *testing.T) {
	t.Parallel()
	c := newCerts(t)
	o := nbdkit(t, "--tls=require", "--tls-certificates="+c.dir, "--tls-verify-peer", "memory", "1M")
	if _, err := nbd.Dial(testContext(t), o); !errors.Is(err, nbd.ErrTLS) {
		t.Errorf("without TLS: %v", err)
	}
	var err error
	uri := "nbds+unix:///?tls-hostname=disks.example&socket=" + url.QueryEscape(o.Address) + "&tls-certificates=" + url.QueryEscape(c.dir)
	if o, err = nbd.ParseURI(uri); err != nil {
		t.Fatal(err)
	}
	exercise(t, dial(t, o))
}

func TestNbdkitErrors(t *testing.T) {
	t.Parallel()
	c := dial(t, nbdkit(t, "--filter=error", "memory", "1M", "error-pread=EPERM", "error-pread-rate=100%",
		"error-pwrite=ENOSPC", "error-pwrite-rate=100%", "error-trim=EINVAL", "error-trim-rate=100%",
		"error-zero=EIO", "error-zero-rate=100%", "error-extents=EIO", "error-extents-rate=100%"))
	v := iov.Of(make([]byte, 4096))
	for range 3 {
		_, rerr := c.ReadVecAt(v, 0)
		_, werr := c.WriteVecAt(v, 0)
		_, _, serr := c.BlockStatus(0, 4096)
		for _, tc := range []struct {
			what      string
			err, want error
		}{
			{"read", rerr, unix.EPERM}, {"write", werr, unix.ENOSPC}, {"status", serr, unix.EIO},
			{"discard", c.Discard(0, 4096), unix.EINVAL}, {"zeroes", c.WriteZeroes(0, 4096, false), unix.EIO},
		} {
			if !errors.Is(tc.err, tc.want) {
				t.Errorf("%s: %v", tc.what, tc.err)
			}
		}
	}
	if err := c.Flush(); err != nil {
		t.Error(err)
	}
}

func TestReadOnlyAndOldPeers(t *testing.T) {
	t.Parallel()
	c := dial(t, nbdkit(t, "pattern", "1M"))
	if _, err := c.WriteVecAt(iov.Of(make([]byte, 512)), 0); !c.ReadOnly() || !errors.Is(err, blk.ErrReadOnly) {
		t.Errorf("read-only: %v", err)
	}
	if err := c.Flush(); err != nil {
		t.Error(err)
	}
	if _, err := nbd.Dial(testContext(t), nbdkit(t, "--oldstyle", "memory", "1M")); !errors.Is(err, nbd.ErrProtocol) {
		t.Errorf("oldstyle: %v", err)
	}
}

// An export that does not end with a sector is a disk whose last sector ends with zeroes.
func TestOddSizes(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		size int // of the export
		args []string
	}{
		"odd":            {1_000_001, nil},
		"simple replies": {1_000_001, []string{"--no-sr"}},
		"no block sizes": {1_000_001, []string{"--mask-handshake=0"}},
		"tiny":           {1, nil},
		"blocks of 4":    {1_000_004, []string{"--filter=blocksize-policy", "blocksize-minimum=4", "blocksize-error-policy=error"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := nbdkit(t, append([]string{"memory", strconv.Itoa(tc.size)}, tc.args...)...)
			c := dial(t, o)
			sectors := (int64(tc.size) + 511) &^ 511
			if c.Size() != sectors {
				t.Errorf("size %d, want %d", c.Size(), sectors)
			}
			exerciseEnd(t, dial(t, o), tc.size)
			// The same through a server of ours, which offers the disk.
			s := serve(t, nbd.Export{Disk: newDevice(t, c, blk.Options{})})
			exerciseEnd(t, dial(t, s.options()), tc.size)
			uri := s.uri("")
			if out := strings.TrimSpace(run(t, hosttest.Tool(t, "nbdinfo"), "--size", uri)); out != fmt.Sprint(sectors) {
				t.Errorf("nbdinfo: %s", out)
			}
			file := filepath.Join(t.TempDir(), "file")
			run(t, hosttest.Tool(t, "nbdcopy"), uri, file)
			mustRead(t, c, contents(t, file)[:tc.size], 0)
			run(t, hosttest.Tool(t, "nbdcopy"), file, uri)
			run(t, hosttest.Tool(t, "qemu-img"), "compare", "-f", "raw", "-F", "raw", uri, file)
		})
	}
	_, err := nbd.Dial(testContext(t), nbdkit(t, "memory", "1000001", "--filter=blocksize-policy", "blocksize-minimum=512"))
	if err == nil || !strings.Contains(err.Error(), "can't be reached") {
		t.Errorf("an export whose last bytes nobody can have: %v", err)
	}
}

// exerciseEnd uses the last sectors of a disk of whole sectors of which size bytes are stored.
func exerciseEnd(t *testing.T, c *nbd.Client, size int) {
	t.Helper()
	d := newDevice(t, c, blk.Options{DetectZeroes: blk.DetectOff})
	ctx := testContext(t)
	from := int64(max(size-2000, 0)) &^ 511
	want := make([]byte, d.Size()-from)
	stored := want[:int64(size)-from]
	check := func() {
		t.Helper()
		mustRead(t, d, want, from)
		mustRead(t, d, want[len(want)-1:], d.Size()-1)
	}
	copy(stored, noise(len(stored), 1))
	mustWrite(t, d, want, from) // zeroes behind the end
	check()
	copy(stored, noise(len(stored), 2))
	if err := d.Do(ctx, &blk.Request{Op: blk.OpWrite, Flags: blk.FUA, Off: from, Vec: iov.Of(want[:1], want[1:])}); err != nil {
		t.Errorf("FUA: %v", err)
	}
	check()
	stored[len(stored)-1] ^= 0xff
	mustWrite(t, d, stored[len(stored)-1:], int64(size)-1)
	mustWrite(t, d, want[len(stored):], int64(size)) // nothing but zeroes
	check()
	bad := noise(len(want), 3)
	if _, err := d.WriteVecAt(iov.Of(bad), from); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("data behind the end: %v", err)
	}
	check()
	for off := from; off < d.Size(); {
		st, run, err := d.BlockStatus(ctx, off, d.Size()-off)
		if err != nil || run <= 0 || off >= int64(size) && st.Flags&blk.StatusZero == 0 {
			t.Fatalf("status at %d: %+v, %d, %v", off, st, run, err)
		}
		off += run
	}
	if err := errors.Join(d.WriteZeroes(ctx, from, d.Size()-from, blk.MayUnmap), d.Discard(ctx, from, d.Size()-from), d.Flush()); err != nil {
		t.Error(err)
	}
	clear(want)
	check()
	copy(stored, noise(len(stored), 4))
	mustWrite(t, d, want, from)
}

// A server that is killed and comes back, on the same file.
func TestQEMUIsKilled(t *testing.T) {
	t.Parallel()
	launch, _, o := qemuNBD(t, 1<<20)
	p := launch()
	o.ReconnectDelay, o.WritesSurvive = timeout, true
	c := dial(t, o)
	want := noise(65536, 1)
	mustWrite(t, c, want, 0)
	for i := range 3 {
		p.kill()
		ctx, cancel := context.WithCancel(context.Background())
		go func() {
			defer cancel()
			_, err := c.WriteVecAt(iov.Of(want[:1000]), int64(65536+i*1000))
			if err != nil {
				t.Error(err)
			}
		}()
		p = launch()
		<-ctx.Done()
		mustRead(t, c, want, 0)
		mustRead(t, c, want[:1000], int64(65536+i*1000))
		if err := c.Flush(); err != nil {
			t.Error(err)
		}
	}
}
