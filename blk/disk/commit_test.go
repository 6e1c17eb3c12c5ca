package disk

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/blk/qcow2"
	"github.com/kvmlet/kvmlet/blk/raw"
)

// TestCommit wants the backing file to read as the image did, and the image to read as before.
func TestCommit(t *testing.T) {
	leaks(t)
	for seed := range uint64(4) {
		dir := t.TempDir()
		top := chain(t, dir, rand.New(rand.NewPCG(seed, 3)))
		s := Spec{Path: top, Format: QCOW2, Backing: BackingOn, ReadOnly: true}
		d := open(t, s)
		want := contents(t, d)
		must(t, d.Close())
		base, err := Commit(t.Context(), s, CommitOptions{})
		must(t, err)
		if base != filepath.Join(dir, "middle") {
			t.Errorf("it went to %s", base)
		}
		for _, path := range []string{base, top} {
			s.Path = path
			d = open(t, s)
			if !bytes.Equal(contents(t, d), want) {
				t.Errorf("seed %d: %s reads otherwise", seed, path)
			}
			must(t, d.Close())
			qemuOK(t, "qemu-img", "check", path)
		}
	}
}

// TestCommitErrors wants backing files that may not be written to stay as they are.
func TestCommitErrors(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.WriteFile(at("base"), pattern(1<<20, 1), 0o644))
	create(t, CreateSpec{Path: at("top"), Format: QCOW2, BackingFile: "base", BackingFormat: Raw})
	create(t, CreateSpec{Path: at("alone"), Format: QCOW2, Size: 1 << 20})
	d := open(t, Spec{Path: at("top"), Format: QCOW2, Backing: BackingOn})
	write(t, d, 5000, pattern(5000, 2))
	for name, c := range map[string]struct {
		s    Spec
		want error
		text string
	}{
		"in use":           {Spec{Path: at("top"), Format: QCOW2, Backing: BackingOn}, raw.ErrLocked, "top"},
		"no backing file":  {Spec{Path: at("alone"), Format: QCOW2, Backing: BackingOn}, nil, "no backing file"},
		"raw":              {Spec{Path: at("base"), Backing: BackingOn}, nil, "no backing file"},
		"not allowed":      {Spec{Path: at("top"), Format: QCOW2, ForceShare: true}, qcow2.ErrBacking, "backing option"},
		"not allowed here": {Spec{Path: at("top"), Format: QCOW2, ForceShare: true, Backing: BackingBelow("/usr")}, qcow2.ErrBacking, "/usr"},
		"base in use":      {Spec{Path: at("top"), Format: QCOW2, ForceShare: true, Backing: BackingOn}, raw.ErrLocked, "base"},
	} {
		if _, err := Commit(t.Context(), c.s, CommitOptions{}); err == nil || c.want != nil && !errors.Is(err, c.want) ||
			!strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %v with %q", name, err, c.want, c.text)
		}
	}
	must(t, d.Close())
	got, err := os.ReadFile(at("base"))
	must(t, err)
	if !bytes.Equal(got, pattern(1<<20, 1)) {
		t.Error("the backing file was changed")
	}
}
