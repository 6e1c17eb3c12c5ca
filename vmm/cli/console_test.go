package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/vmm"
)

// TestConsoleIsNoFileOfTheVM refuses to write a console over what the VM lives from, under whatever name.
func TestConsoleIsNoFileOfTheVM(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	p := &plan{o: &runOptions{kernel: file("kernel"), initrd: file("initrd")}}
	p.cfg.Disks = []vmm.Disk{{Path: file("disk")}, {Path: filepath.Join(dir, "missing")}}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("disk", link); err != nil {
		t.Fatal(err)
	}
	for _, own := range []string{p.o.kernel, p.o.initrd, p.cfg.Disks[0].Path, link} {
		p.o.console = own
		if _, err := p.createConsole(); err == nil || !strings.Contains(err.Error(), "would be overwritten") {
			t.Errorf("console %s: %v", own, err)
		}
		if b, err := os.ReadFile(own); err != nil || string(b) != "precious" {
			t.Errorf("%s holds %q now (%v)", own, b, err)
		}
	}
	for _, name := range []string{file("old"), filepath.Join(dir, "new")} {
		p.o.console = name
		f, err := p.createConsole()
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		if b, err := os.ReadFile(name); err != nil || len(b) > 0 {
			t.Errorf("%s begins with %q (%v)", name, b, err)
		}
	}
	p.o.console = dir
	if _, err := p.createConsole(); err == nil || !strings.HasPrefix(err.Error(), "--console: ") {
		t.Errorf("a directory: %v", err)
	}
}

func TestExcerpt(t *testing.T) {
	t.Parallel()
	var lines []string
	for i := range 100 {
		lines = append(lines, fmt.Sprintf("line %d", i))
	}
	if got := excerpt(lines[:3]); !slices.Equal(got, lines[:3]) {
		t.Errorf("of three lines: %q", got)
	}
	if got := excerpt(lines); !slices.Equal(got, lines[75:]) {
		t.Errorf("of many lines: %q", got)
	}
	lines[40] = "[ 1.0] Kernel panic - not syncing: sysrq triggered crash"
	lines[90] = "---[ end Kernel panic - not syncing: sysrq triggered crash ]---"
	if got := excerpt(lines); !slices.Equal(got, lines[40:65]) {
		t.Errorf("of a panic: %q", got)
	}
}

// TestTimeoutWhilePreparing ends as a time-out what is called off before there is a VM.
func TestTimeoutWhilePreparing(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errTimeout)
	signals := takeSignals()
	defer signals.release()
	p := &plan{o: &runOptions{}, agent: true}
	defer p.close()
	err := p.prepare(ctx, signals, newProgress(os.Stderr))
	var ee *exitError
	if !errors.As(err, &ee) || ee.status != statusTimeout {
		t.Errorf("%v", err)
	}
}
