package nbd_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/guest/hosttest"
)

var record = flag.Bool("record", false, "record the seeds of the fuzz tests from servers and clients that are installed here")

// recorded is a connection that keeps a script of what the server says.
type recorded struct {
	net.Conn
	mu     sync.Mutex
	script script
}

func (r *recorded) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	last := len(r.script) - 1
	r.script[last] = append(r.script[last], p[:n]...)
	return n, err
}

func (r *recorded) Write(p []byte) (int, error) {
	r.mu.Lock()
	if bytes.HasPrefix(p, requestMagic) {
		r.script = append(r.script, nil)
	}
	r.mu.Unlock()
	return r.Conn.Write(p)
}

// A client that is told again what a server said gets the same results. With -record that becomes a seed of FuzzClient.
func TestRecordedServers(t *testing.T) {
	t.Parallel()
	ours, _ := serveMemory(t, 8192)
	launch, _, qemu := qemuNBD(t, 8192)
	launch()
	for name, o := range map[string]nbd.Options{
		"ours": ours.options(), "qemu": qemu, "nbdkit": nbdkit(t, "memory", "8192"), "nbdkit-simple": nbdkit(t, "--no-sr", "memory", "8192"),
		"nbdkit-newstyle": nbdkit(t, "--mask-handshake=0", "memory", "8192"),
	} {
		var r *recorded
		c, err := nbd.Dial(t.Context(), nbd.Options{Dial: func(context.Context) (net.Conn, error) {
			nc, err := net.Dial("unix", o.Address)
			r = &recorded{Conn: nc, script: script{nil}}
			return r, err
		}})
		if err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprint(drive(c))
		c.Close()
		errs, err := play(t, r.script, timeout)
		if got := fmt.Sprint(errs); err != nil || got != want {
			t.Errorf("%s: %v, then %v, %s", name, want, err, got)
		}
		seed(t, "FuzzClient", name, r.script.encode())
	}
}

// seed keeps a seed of a fuzz test.
func seed(t *testing.T, target, name string, p []byte) {
	t.Helper()
	if !*record {
		return
	}
	dir := filepath.Join("testdata", "fuzz", target)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), fmt.Appendf(nil, "go test fuzz v1\n[]byte(%q)\n", p), 0o644); err != nil {
		t.Fatal(err)
	}
}

// What clients say passes through a relay. With -record that becomes a seed of FuzzServer.
func TestRecordedClients(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"qemu-io": {hosttest.Tool(t, "qemu-io"), "-f", "raw", "-c", "write -P 1 0 1k", "-c", "read -P 1 1 700", "-c", "write -z 0 4k",
			"-c", "discard 0 8k", "-c", "flush"},
		"qemu-map":  {hosttest.Tool(t, "qemu-img"), "map", "-f", "raw"},
		"nbdinfo":   {hosttest.Tool(t, "nbdinfo"), "--list"},
		"nbdinfo-1": {hosttest.Tool(t, "nbdinfo"), "--map"},
	} {
		s, _ := serveMemory(t, 8192)
		ln := listenUnix(t)
		var mu sync.Mutex
		var first []byte
		go func() {
			for i := 0; ; i++ {
				in, err := ln.Accept()
				if err != nil {
					return
				}
				out, err := net.Dial("unix", s.socket)
				if err != nil {
					t.Error(err)
					return
				}
				go func() {
					io.Copy(in, out)
					in.Close()
				}()
				go func() {
					buf := make([]byte, 64<<10)
					for {
						n, err := in.Read(buf)
						if i == 0 {
							mu.Lock()
							first = append(first, buf[:n]...)
							mu.Unlock()
						}
						if err != nil {
							out.Close()
							return
						}
						out.Write(buf[:n])
					}
				}()
			}
		}()
		run(t, args[0], append(args[1:], "nbd+unix:///disk?socket="+ln.Addr().String())...)
		mu.Lock()
		seed(t, "FuzzServer", name, first)
		mu.Unlock()
	}
}
