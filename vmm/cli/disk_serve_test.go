package cli

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/vmm/cli/ptytest"
)

// TestDiskServe has QEMU's tools use a disk that kvmlet exports, and stops it in every way.
func TestDiskServe(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	image := f.path("image")
	ok(t, "disk", "create", "-f", "qcow2", image, "8M")
	socket := filepath.Join(t.TempDir(), "a b&c")
	args := []string{"disk", "serve", "-f", "qcow2", "--socket", socket, "--export", "my disk", "--detect-zeroes", "unmap", image}
	for round, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGINT} {
		p := startCommand(t, args...)
		uri := p.line()
		if want := "nbd+unix:///my%20disk?socket=" + strings.NewReplacer(" ", "%20", "&", "%26").Replace(socket); uri != want {
			t.Errorf("URI %s, want %s", uri, want)
		}
		if info, err := os.Stat(socket); err != nil || info.Mode() != fs.ModeSocket|0o600 {
			t.Errorf("the socket is %v, %v", info, err)
		}
		ok(t, "disk", "convert", f.data("in", 1<<20), uri)
		if r := runCommand(t, "disk", "compare", f.path("in"), uri); round == 0 && r.status != 0 {
			t.Errorf("what was copied there: %+v", r)
		}
		pattern := "write -P " + string(rune('1'+round)) + " 1023 100001"
		qemuOK(t, qemuIO, "-f", "raw", "-c", pattern, "-c", strings.Replace(pattern, "write", "read", 1), "-c", "flush", uri)
		if out := ok(t, "disk", "info", uri); !strings.Contains(out, "(8388608 bytes)") {
			t.Error(out)
		}
		other := strings.Replace(uri, "/my%20disk", "/none", 1)
		expectOneLine(t, runCommand(t, "disk", "info", other), `: the server has no export "none"`)
		expectOneLine(t, runCommand(t, "disk", "resize", uri, "+1M"), "an NBD export can't be resized")
		expectOneLine(t, runCommand(t, "disk", "serve", "--socket", socket, f.data("other", 4096)), "somebody listens there")
		expectOneLine(t, runCommand(t, "disk", "info", "-f", "qcow2", image), "in use")
		if err := p.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		r := p.end()
		_, err := os.Stat(socket)
		switch {
		case signal == syscall.SIGKILL:
			if err != nil {
				t.Errorf("the socket of a killed server: %v", err)
			}
		case r.status != statusOK || r.err != "" || r.out != "" || !errors.Is(err, fs.ErrNotExist):
			t.Errorf("after %v: %+v, and the socket: %v", signal, r, err)
		}
		qemuOK(t, qemuImg, "check", image)
		qemuOK(t, qemuIO, "-f", "qcow2", "-c", strings.Replace(pattern, "write", "read", 1), image)
	}
}

// TestDiskServeReadOnly serves over TCP to readers.
func TestDiskServeReadOnly(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	raw := f.data("raw", 1<<20)
	p := startCommand(t, "disk", "serve", "--read-only", "--listen", "127.0.0.1:0", "--throttle", "bps-total=1G", "--aio", "threads", raw)
	uri := p.line()
	if !strings.HasPrefix(uri, "nbd://127.0.0.1:") || !strings.HasSuffix(uri, "/") {
		t.Errorf("URI %s", uri)
	}
	ok(t, "disk", "compare", uri, raw) // readers share it
	target := f.path("copy")
	ok(t, "disk", "convert", "-O", "qcow2", uri, target)
	ok(t, "disk", "compare", "-F", "qcow2", raw, target)
	expectOneLine(t, runCommand(t, "disk", "bench", "-w", uri), "read-only")
	expectOneLine(t, runCommand(t, "disk", "convert", raw, uri), "read-only")
	if err := p.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if r := p.end(); r.status != statusOK || r.err != "" {
		t.Errorf("%+v", r)
	}
}

// TestDiskServeTLS lets in who trusts the server, and no others.
func TestDiskServeTLS(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	raw, server, client := f.data("raw", 1<<20), f.path("server"), f.path("client")
	selfSigned(t, server, client)
	p := startCommand(t, "disk", "serve", "--listen", "127.0.0.1:0", "--tls", server, "-x", "d", raw)
	uri := p.line()
	plain, ok1 := strings.CutPrefix(uri, "nbds://")
	if !ok1 {
		t.Fatalf("URI %s", uri)
	}
	ok(t, "disk", "info", uri+"?tls-certificates="+client)
	expectOneLine(t, runCommand(t, "disk", "info", uri), "certificate")
	expectOneLine(t, runCommand(t, "disk", "info", "nbd://"+plain), "TLS")
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if r := p.end(); r.status != statusOK || !strings.Contains(r.err, "was disconnected") { // it tells of those it refused
		t.Errorf("%+v", r)
	}
}

// selfSigned makes a certificate for 127.0.0.1 and puts it where a server and its client want it.
func selfSigned(t *testing.T, server, client string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kvmlet test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for path, b := range map[string][]byte{
		filepath.Join(server, "server-cert.pem"): certPEM, filepath.Join(client, "ca-cert.pem"): certPEM,
		filepath.Join(server, "server-key.pem"): pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
}

// sevens is a disk of sevens.
type sevens int64

func (s sevens) ReadVecAt(dst iov.Vec, _ int64) (int, error) {
	return dst.Size(), dst.Fill(0, dst.Size(), 7)
}
func (s sevens) WriteVecAt(iov.Vec, int64) (int, error) { return 0, blk.ErrReadOnly }
func (s sevens) Flush() error                           { return nil }
func (s sevens) Size() int64                            { return int64(s) }
func (s sevens) Limits() blk.Limits                     { return blk.Limits{} }
func (s sevens) Close() error                           { return nil }

// slowDisk exports a large disk that gives so many MiB each second, and returns its URI.
func slowDisk(t *testing.T, size int64, mib int64) string {
	t.Helper()
	g, err := blk.NewThrottleGroup(blk.Throttle{BPSRead: blk.Rate{Avg: mib << 20}})
	if err != nil {
		t.Fatal(err)
	}
	return serveDisk(t, sevens(size), blk.Options{ReadOnly: true, Throttle: g})
}

// serveDisk exports a disk, and returns its URI.
func serveDisk(t *testing.T, b blk.Backend, o blk.Options) string {
	t.Helper()
	d, err := blk.New(b, o)
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &nbd.Server{Exports: []nbd.Export{{Disk: d}}}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ln) }()
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), d.Close()); err != nil {
			t.Error(err)
		}
		<-ended
	})
	return "nbd+unix:///?socket=" + socket
}

// TestDiskInterrupted stops long work by signals.
func TestDiskInterrupted(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	uri := slowDisk(t, 64<<30, 32)
	for name, c := range map[string]struct {
		args  []string
		begun func() bool
		want  string
	}{
		"convert": {[]string{"convert", "-O", "qcow2", uri, f.path("target")}, func() bool {
			info, err := os.Stat(f.path("target"))
			return err == nil && info.Size() > 1<<20
		}, "kvmlet: stopped by a signal (" + f.path("target") + " is incomplete)\n"},
		"compare": {[]string{"compare", uri, uri}, nil, "kvmlet: stopped by a signal\n"},
		"bench":   {[]string{"bench", "-s", "64K", "-c", "1000000", uri}, nil, "kvmlet: stopped by a signal\n"},
		"create": {[]string{"create", "--preallocation", "full", f.path("full"), "2G"}, func() bool {
			info, err := os.Stat(f.path("full"))
			return err == nil && info.Sys().(*syscall.Stat_t).Blocks > 0
		}, "kvmlet: stopped by a signal: " + f.path("full") + " was not made\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := startCommand(t, append([]string{"disk"}, c.args...)...)
			for begun := c.begun; begun != nil && !begun(); runtime.Gosched() {
			}
			if c.begun == nil {
				untilConnected(t, p.Process.Pid)
			}
			if err := p.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			if r := p.end(); r.status != statusStopped || r.out != "" || r.err != c.want {
				t.Errorf("%+v, want status %d and %q", r, statusStopped, c.want)
			}
		})
	}
	t.Cleanup(func() {
		if _, err := os.Stat(f.path("full")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("what was not made is there: %v", err)
		}
	})
}

// untilConnected waits until a process has a socket. It handles signals before.
func untilConnected(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); runtime.Gosched() {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(fds, func(fd string) bool {
			target, err := os.Readlink(fd)
			return err == nil && strings.HasPrefix(target, "socket:")
		}) {
			return
		}
	}
	t.Fatal("the process does not connect")
}

// TestDiskProgress looks at the bar on a terminal.
func TestDiskProgress(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	uri := slowDisk(t, 16<<20, 32)
	for _, quiet := range []bool{false, true} {
		master, slave := ptytest.Open(t)
		out, err := os.Create(f.path("out"))
		if err != nil {
			t.Fatal(err)
		}
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		args := []string{"disk", "convert", "--force", uri, f.path("target")}
		if quiet {
			args = append(args, "--quiet")
		}
		if status := run(t.Context(), args, streams{in: null, out: out, err: slave}); status != 0 {
			t.Errorf("status %d", status)
		}
		if _, err := slave.WriteString("END"); err != nil {
			t.Fatal(err)
		}
		var shown []byte
		for b := make([]byte, 4096); !bytes.HasSuffix(shown, []byte("END")); {
			n, err := master.Read(b)
			if err != nil {
				t.Fatal(err)
			}
			shown = append(shown, b[:n]...)
		}
		bar := bytes.Contains(shown, []byte("Converting")) && bytes.Contains(shown, []byte("%"))
		if bar == quiet || quiet && string(shown) != "END" {
			t.Errorf("quiet %t: the terminal shows %q", quiet, shown)
		}
		if err := errors.Join(out.Close(), null.Close()); err != nil {
			t.Error(err)
		}
	}
}

// TestDiskBench measures in every way.
func TestDiskBench(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	image := f.path("image")
	ok(t, "disk", "convert", "-O", "qcow2", f.data("raw", 4<<20), image)
	for name, args := range map[string]string{
		"plain":     "-f qcow2 -c 1000 IMAGE",
		"random":    "-c 1000 --pattern random RAW",
		"writes":    "-c 1000 -w --flush-interval 10 RAW",
		"few":       "-c 3 -d 64 -w --flush-interval 1 RAW",
		"unaligned": "-c 500 -s 1000 -S 700 --offset 77 -w -d 5 RAW",
		"one":       "-c 500 -d 1 --aio threads RAW",
		"large":     "-c 50 -s 4M -d 2 RAW",
		"direct":    "-c 500 --cache none RAW",
		"limited":   "-c 20 --throttle iops-total=1000 RAW",
	} {
		t.Run(name, func(t *testing.T) { // one after the other: the disk is locked
			words := strings.Fields(strings.NewReplacer("IMAGE", image, "RAW", f.path("raw")).Replace(args))
			var b benchResult
			if err := json.Unmarshal([]byte(ok(t, append([]string{"disk", "bench", "--json"}, words...)...)), &b); err != nil {
				t.Fatal(err)
			}
			if b.IOPS <= 0 || b.Bytes != b.IOPS*float64(b.Size) && b.Bytes/b.IOPS/float64(b.Size) < 0.999 || b.Latency["p50"] <= 0 ||
				b.Latency["p50"] > b.Latency["max"] || b.Write != strings.Contains(args, "-w") {
				t.Errorf("%+v", b)
			}
			if name == "writes" && b.Flushes != 100 || name == "few" && b.Flushes != 3 || !b.Write && b.Flushes != 0 {
				t.Errorf("%d flushes", b.Flushes)
			}
			if out := ok(t, append([]string{"disk", "bench"}, words...)...); strings.Count(out, "\n") != 3 || !strings.Contains(out, "p99 ") {
				t.Error(out)
			}
		})
	}
}

// TestDiskBenchAllocates wants nothing to be allocated while requests are under way.
func TestDiskBenchAllocates(t *testing.T) {
	f := newDiskFiles(t)
	o := benchOptions{depth: 16, count: 20000, size: 4096, pattern: patternRandom}
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	for _, write := range []bool{false, true} {
		o.write = write
		d, err := disk.Open(t.Context(), disk.Spec{Path: f.data("raw", 4<<20)})
		if err != nil {
			t.Fatal(err)
		}
		least := ^uint64(0)
		for range 3 { // what is pooled may have been freed the first time
			b, err := o.bench(d)
			if err != nil {
				t.Fatal(err)
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err = b.run(t.Context(), nil)
			runtime.ReadMemStats(&after)
			b.buffers.Close()
			if err != nil {
				t.Fatal(err)
			}
			least = min(least, after.Mallocs-before.Mallocs)
		}
		if most := uint64(o.count / 50); least > most && !hosttest.Race {
			t.Errorf("writes %t: %d requests allocate %d times", write, o.count, least)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}
