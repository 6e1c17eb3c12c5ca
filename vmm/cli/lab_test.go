package cli

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The lab must be told what a VM reads, since it has no other files of the host's /dev and /run.
func TestLabInputs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	files := make(map[string]string)
	for _, name := range []string{"disk", "fixed", "kernel", "initrd"} {
		files[name] = filepath.Join(dir, name)
		if err := os.WriteFile(files[name], nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(files["kernel"], link); err != nil {
		t.Fatal(err)
	}
	p := parsePlan(t, []string{
		"--disk", "path=" + files["disk"], "--disk", "path=" + files["fixed"] + ",readonly", "--kernel", link, "--initrd", files["initrd"],
	})
	got, err := p.labInputs()
	if want := []string{files["fixed"], files["kernel"], files["initrd"]}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

// A device would be another one in the lab, so it is refused before anything is made. /dev/null stands for all.
func TestNoDevicesInLab(t *testing.T) {
	t.Parallel()
	r := runCommand(t, "run", "--accel", "lab", "--disk", "path="+os.DevNull)
	if r.status != statusError || strings.Count(r.err, "\n") != 1 || !strings.Contains(r.err, "copy it to a file, or use a host whose KVM") {
		t.Errorf("status %d, %q", r.status, r.err)
	}
	args, shares, err := parsePlan(t, []string{"--console", os.DevNull}).labCommand("kvmlet")
	if err != nil || len(shares) != 0 || !slices.Contains(args, os.DevNull) {
		t.Errorf("with the console nowhere: %q, shares %q, %v", args, shares, err)
	}
}
