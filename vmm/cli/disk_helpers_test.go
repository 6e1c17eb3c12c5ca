package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// QEMU's tools, looked for before testMain leaves nothing in PATH.
var (
	qemuImg, errQemuImg = exec.LookPath("qemu-img")
	qemuIO, errQemuIO   = exec.LookPath("qemu-io")
)

// qemu runs one of QEMU's tools and returns what it printed and its exit status.
func qemu(t *testing.T, tool string, args ...string) (string, int) {
	t.Helper()
	if err := errors.Join(errQemuImg, errQemuIO); err != nil {
		if os.Getenv("KVMLET_REQUIRE") == "all" {
			t.Fatalf("%v: apt-get install qemu-utils", err)
		}
		t.Skipf("%v: apt-get install qemu-utils", err)
	}
	out, err := exec.Command(tool, args...).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return string(out), exit.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(out), 0
}

// qemuOK is qemu for what must go well.
func qemuOK(t *testing.T, tool string, args ...string) string {
	t.Helper()
	out, status := qemu(t, tool, args...)
	if status != 0 {
		t.Fatalf("%s %q: status %d: %s", tool, args, status, out)
	}
	return out
}

// ok runs a command that must succeed without a word on standard error, and returns its output.
func ok(t *testing.T, args ...string) string {
	t.Helper()
	r := runCommand(t, args...)
	if r.status != statusOK || r.err != "" {
		t.Fatalf("%q: status %d, errors %q", args, r.status, r.err)
	}
	return r.out
}

// diskFiles is a folder for disks.
type diskFiles struct {
	t   *testing.T
	dir string
}

func newDiskFiles(t *testing.T) diskFiles { return diskFiles{t, t.TempDir()} }

func (f diskFiles) path(name string) string { return filepath.Join(f.dir, name) }

// data makes a raw file of n bytes, none of them zero.
func (f diskFiles) data(name string, n int) string {
	f.t.Helper()
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>9)%255 + 1
	}
	if err := os.WriteFile(f.path(name), b, 0o644); err != nil {
		f.t.Fatal(err)
	}
	return f.path(name)
}

// process is kvmlet in a process of its own.
type process struct {
	*exec.Cmd
	t   *testing.T
	out *os.File // what it prints; to be read
	err *bytes.Buffer
}

// startCommand runs a command line in another process, which is killed at the end of the test if it has not ended.
func startCommand(t *testing.T, args ...string) *process {
	t.Helper()
	words, err := json.Marshal(args)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	p := &process{Cmd: exec.CommandContext(ctx, "/proc/self/exe"), t: t, out: r, err: new(bytes.Buffer)}
	p.Env = append(os.Environ(), asCommand+"="+string(words), "GOCOVERDIR="+t.TempDir())
	p.Stdout, p.Stderr = w, p.err
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close() // the process has it
	t.Cleanup(func() {
		cancel()
		_ = p.Wait()
		_ = r.Close()
	})
	return p
}

// line reads one line of output.
func (p *process) line() string {
	p.t.Helper()
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(p.out, b); err != nil {
			_ = p.Wait()
			p.t.Fatalf("the process ends after %q: %v, %s", line, p.ProcessState, p.err)
		}
		if b[0] == '\n' {
			return string(line)
		}
		line = append(line, b[0])
	}
}

// end waits for the process and returns how it ended.
func (p *process) end() result {
	p.t.Helper()
	out, err := io.ReadAll(p.out)
	if err != nil {
		p.t.Fatal(err)
	}
	_ = p.Wait()
	return result{p.ProcessState.ExitCode(), string(out), p.err.String()}
}
