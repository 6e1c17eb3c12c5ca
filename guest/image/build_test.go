package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// chroot runs a program of the guest image unpacked in root, on this machine's kernel. It needs root's rights or user
// namespaces.
func chroot(t *testing.T, root, stdin string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/bin", "HOME=/root"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%q: %v", args, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// TestInitramfs builds the real image, or takes it from the user's cache as kvmlet does, and runs what is in it.
func TestInitramfs(t *testing.T) {
	t.Parallel()
	start := time.Now()
	path, err := Initramfs(t.Context(), Options{}, func(p Progress) {
		if p.Done == 0 {
			t.Logf("%6.2fs step %d of %d: %s", time.Since(start).Seconds(), p.Step, p.Steps, p.Text)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%.1f MiB in %v", float64(fi.Size())/(1<<20), took.Round(time.Millisecond))
	if fi.Size() > 48<<20 {
		t.Errorf("the image is %d bytes; a guest of 128 MiB should be able to unpack it", fi.Size())
	}

	again, err := Initramfs(t.Context(), Options{}, func(p Progress) { t.Errorf("built again: %v", p) })
	if err != nil || again != path {
		t.Errorf("second call: %s, %v; want %s", again, err, path)
	}

	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	entries := readArchive(t, b)
	if _, ok := entries["init"]; ok {
		t.Error("the image holds an /init; that is the agent's segment to bring")
	}
	root := t.TempDir()
	unpack(t, entries, root)
	checkClosure(t, root)

	sum := fmt.Sprintf("%x", sha256.Sum256([]byte("kvmlet\n")))
	for _, c := range []struct {
		stdin string
		args  string
		want  string // standard output contains it
		code  int
	}{
		{"", "/bin/sh -c exit\\ 3", "", 3},
		{"", "/bin/sh -ec echo\\ $2 sh one two", "two", 0},
		{"kvmlet\n", "sha256sum", sum, 0},
		{"", "nproc", "", 0},
		{"", "false", "", 1},
		{"", "test -d /tmp", "", 0},
		{"", "sh -c seq\\ 3\\ |\\ sort\\ -r\\ |\\ head\\ -n\\ 1", "3", 0},
		{"", "sh -c echo\\ abc\\ |\\ grep\\ -c\\ b", "1", 0},
		{"1\n2\n", "head -1", "1", 0},
		{"1\n2\n", "grep -E 2|3", "2", 0},
		{"2 b\n10 a\n", "sort -rnk1", "10 a\n2 b", 0},
		{"", "ls -1A /etc", "mke2fs.conf\npasswd", 0},
		{"abc\n", "hexdump", "61 62 63", 0},
		{"", "lsblk --version", "util-linux", 0},
		{"", "iperf3 --version", "iperf 3", 0},
		{"", "fio --version", "fio-", 0},
		{"", "fio --enghelp", "io_uring", 0},
		{"", "dd if=/usr/bin/bb of=/tmp/disk bs=1M count=8 conv=fsync status=none", "", 0},
		{"", "mkfs.ext4 -q -F /tmp/disk", "", 0},
		{"", "e2fsck -fn /tmp/disk", "/tmp/disk: 11/", 0},
		{"", "fio --name=f --filename=/tmp/f --size=256k --rw=randwrite --bs=4k --verify=crc32c --ioengine=psync --thread", "err= 0", 0},
		{"", "ls -l /usr/bin/bb", "bb", 0},
		{"", "find /etc -name passwd", "/etc/passwd", 0},
		{"", "uname -m", "x86_64", 0},
		{"", "cat /etc/passwd", "root:x:0:0", 0},
		{"", "timeout 5 true", "", 0},
		{"", "stat -c %s /etc/hostname", "7", 0},
		{"", "bash -c kill\\ -TERM\\ $$", "", -1},
	} {
		args := splitArgs(c.args)
		args[0] = guestProgram(t, root, args[0])
		out, errs, code := chroot(t, root, c.stdin, args...)
		if code != c.code || !strings.Contains(out, c.want) {
			t.Errorf("%s: status %d, output %q, errors %q; want status %d, output with %q", c.args, code, out, errs, c.code, c.want)
		}
	}
}

// splitArgs splits at spaces; a backslash keeps the space behind it.
func splitArgs(s string) []string {
	list := strings.Split(strings.ReplaceAll(s, "\\ ", "\x00"), " ")
	for i := range list {
		list[i] = strings.ReplaceAll(list[i], "\x00", " ")
	}
	return list
}

func guestProgram(t *testing.T, root, name string) string {
	t.Helper()
	if strings.HasPrefix(name, "/") {
		return name
	}
	if _, err := os.Lstat(filepath.Join(root, "usr/bin", name)); err != nil {
		t.Errorf("the guest has no %s", name)
	}
	return "/usr/bin/" + name
}

// checkClosure asks the guest's own loader whether every dynamic program finds its libraries and symbols.
func checkClosure(t *testing.T, root string) {
	t.Helper()
	l := newLinker()
	files, err := filepath.Glob(filepath.Join(root, "usr/bin/*"))
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, file := range files {
		fi, err := os.Lstat(file)
		if err != nil {
			t.Fatal(err)
		}
		if !fi.Mode().IsRegular() {
			continue
		}
		o, err := l.object(file)
		if err != nil || o.interp == "" {
			continue // a script or a static program
		}
		name := "/usr/bin/" + filepath.Base(file)
		out, errs, code := chroot(t, root, "", o.interp, "--list", name)
		if code != 0 || strings.Contains(out+errs, "not found") {
			t.Errorf("%s: status %d: %s%s", name, code, out, errs)
		}
		checked++
	}
	if checked < 10 {
		t.Errorf("only %d dynamic programs in the image", checked)
	}
}

// TestInitramfsInputs builds a small image and changes what it was made from.
func TestInitramfsInputs(t *testing.T) {
	t.Parallel()
	s, err := OpenStore("") // shares the busybox with TestInitramfs; the program list gives it an image of its own
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Store: s, Programs: []Program{{Name: "nproc", Package: "coreutils"}}}
	path, err := Initramfs(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	recipe, err := recipeKey(o.Programs)
	if err != nil {
		t.Fatal(err)
	}
	note := filepath.Join(s.dir, kindInitramfs, recipe.String()[:40]+inputsSuffix)
	b, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	private := testStore(t)
	if err := os.Mkdir(filepath.Join(private.Dir(), kindInitramfs), 0o755); err != nil {
		t.Fatal(err)
	}
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	key := noteImage(t, b)
	if _, err := private.Build(t.Context(), kindInitramfs, key, func(w io.Writer) error {
		_, err := w.Write(image)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	// That the image is current cannot be noted, but nothing is missing.
	if err := os.MkdirAll(filepath.Join(private.Dir(), kindInitramfs, filepath.Base(note)), 0o755); err != nil {
		t.Fatal(err)
	}
	o.Store = private
	if path, err := Initramfs(t.Context(), o, nil); err != nil || filepath.Dir(path) != filepath.Join(private.Dir(), kindInitramfs) {
		t.Errorf("an image that is there, without its note: %s, %v", path, err)
	}
	file := filepath.Join(t.TempDir(), "input")
	if err := os.WriteFile(file, []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	in, err := newInput(file)
	if err != nil {
		t.Fatal(err)
	}
	note = filepath.Join(private.Dir(), kindInitramfs, "x"+inputsSuffix)
	if err := writeInputs(note, inputsNote{Image: key.String(), Inputs: []input{in, in, {Path: "/nonexistent"}}}); err != nil {
		t.Fatal(err)
	}
	if _, ok := private.current(note); !ok {
		t.Error("an unchanged image is not current")
	}
	if err := os.WriteFile(file, []byte("12"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, ok := private.current(note); ok {
		t.Error("the image is current although an input has changed")
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, ok := private.current(note); !ok {
		t.Error("the image is not current although its input is only gone")
	}
	for _, text := range []string{"", "{", `{"Image":"zz"}`, `{"Image":"` + KeyOf("other").String() + `"}`} {
		if err := os.WriteFile(note, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, ok := private.current(note); ok {
			t.Errorf("note %q gives %s", text, got)
		}
	}
}

func noteImage(t *testing.T, b []byte) Key {
	t.Helper()
	var n inputsNote
	if err := json.Unmarshal(b, &n); err != nil {
		t.Fatal(err)
	}
	key, err := parseKey(n.Image)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Errors of a machine that is not set up name the remedy.
func TestInitramfsMissing(t *testing.T) {
	o := Options{Store: testStore(t), Programs: []Program{}}
	t.Setenv("GOMODCACHE", t.TempDir())
	if _, err := Initramfs(t.Context(), o, nil); !errors.Is(err, ErrSetup) {
		t.Errorf("no u-root in the module cache: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Initramfs(ctx, o, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled build: %v", err)
	}
	o.Programs = []Program{{Name: "no-such-program", Package: "nothing"}}
	if _, err := Initramfs(t.Context(), o, nil); !errors.Is(err, ErrSetup) {
		t.Errorf("no such program: %v", err)
	}
}
