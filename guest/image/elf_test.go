package image

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func names(libs []library) []string {
	var list []string
	for _, l := range libs {
		list = append(list, filepath.Base(l.name))
	}
	return list
}

// The closure is what the host's loader would load.
func TestClosure(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"bash", "fio", "iperf3", "lsblk", "mke2fs"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := Program{Name: name}
			file, err := p.find()
			if err != nil {
				t.Fatal(err)
			}
			l := newLinker()
			got, err := l.load(file, nil)
			if err != nil {
				t.Fatal(err)
			}
			interp := got.libs[0].path
			out, err := exec.CommandContext(t.Context(), interp, "--list", file).Output()
			if err != nil {
				t.Fatalf("%s --list %s: %v", interp, file, err)
			}
			want := map[string]string{}
			for line := range strings.Lines(string(out)) {
				// "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)"
				f := strings.Fields(line)
				if len(f) < 3 || f[1] != "=>" {
					continue
				}
				target, err := filepath.EvalSymlinks(f[2])
				if err != nil {
					t.Fatal(err)
				}
				want[filepath.Base(f[0])] = target
			}
			want[filepath.Base(got.libs[0].name)] = interp
			if len(got.libs) != len(want) {
				t.Errorf("%d libraries, the loader takes %d: %v", len(got.libs), len(want), names(got.libs))
			}
			for _, lib := range got.libs {
				if want[filepath.Base(lib.name)] != lib.path {
					t.Errorf("%s is %s, the loader takes %q", lib.name, lib.path, want[filepath.Base(lib.name)])
				}
			}
		})
	}
}

func TestThinFio(t *testing.T) {
	t.Parallel()
	p := Program{Name: "fio"}
	file, err := p.find()
	if err != nil {
		t.Fatal(err)
	}
	full, err := newLinker().load(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	thin, err := newLinker().load(file, fioWithout)
	if err != nil {
		t.Fatal(err)
	}
	if len(thin.libs) > 8 || len(full.libs) < 2*len(thin.libs) {
		t.Errorf("%d libraries of %d remain: %v", len(thin.libs), len(full.libs), names(thin.libs))
	}
	original, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(thin.image) != len(original) {
		t.Fatalf("the size went from %d to %d", len(original), len(thin.image))
	}
	f, err := elf.NewFile(bytes.NewReader(thin.image))
	if err != nil {
		t.Fatal(err)
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(needed, func(n string) bool { return slices.Contains(fioWithout, n) }); i >= 0 {
		t.Errorf("%s is still needed", needed[i])
	}
	before, err := elf.NewFile(bytes.NewReader(original))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range before.Sections {
		old, err := s.Data()
		if err != nil || s.Type == elf.SHT_NOBITS {
			continue
		}
		now, err := f.Section(s.Name).Data()
		if err != nil {
			t.Fatal(err)
		}
		changed := !bytes.Equal(old, now)
		if may := slices.Contains([]string{".dynamic", ".dynsym", ".gnu.version", ".gnu.version_r"}, s.Name); changed != may {
			t.Errorf("section %s: changed is %v", s.Name, changed)
		}
	}
}

func TestLoadErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	arm := filepath.Join(dir, "arm")
	h := make([]byte, 64) // Elf64_Ehdr: e_machine is at 18
	copy(h, "\x7fELF\x02\x01\x01")
	binary.LittleEndian.PutUint16(h[16:], uint16(elf.ET_EXEC))
	binary.LittleEndian.PutUint16(h[18:], uint16(elf.EM_AARCH64))
	binary.LittleEndian.PutUint32(h[20:], 1)
	if err := os.WriteFile(arm, h, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		want error
	}{
		{filepath.Join(dir, "missing"), os.ErrNotExist},
		{text, errELF},
		{arm, errELF},
	} {
		if _, err := newLinker().load(c.path, nil); !errors.Is(err, c.want) {
			t.Errorf("load %s: %v, want %v", c.path, err, c.want)
		}
	}

	// A library that is not there is named, with who needs it.
	bash := Program{Name: "bash"}
	file, err := bash.find()
	if err != nil {
		t.Fatal(err)
	}
	l := newLinker()
	l.dirs = nil
	if _, err := l.load(file, nil); err == nil || !strings.Contains(err.Error(), "libtinfo") {
		t.Errorf("no library folders: %v", err)
	}

	err = addPrograms(newTree(), []Program{{Name: "no-such-a", Package: "pkg-a"}, {Name: "no-such-b", Package: "pkg-b"}})
	if !errors.Is(err, ErrSetup) || !strings.Contains(err.Error(), "pkg-a") || !strings.Contains(err.Error(), "pkg-b") {
		t.Errorf("missing programs: %v; want both packages named", err)
	}
}

func TestConfDirs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"ld.so.conf":      "include conf.d/*.conf\n/last # a comment\nrelative\ninclude ld.so.conf\n",
		"conf.d/a.conf":   "/one/\n\n# nothing\n/two",
		"conf.d/b.conf":   "/three\n",
		"conf.d/c.ignore": "/four\n",
	} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	got := confDirs(filepath.Join(dir, "ld.so.conf"), 0)
	if want := []string{"/one", "/two", "/three", "/last"}; len(got) < 4 || !slices.Equal(got[:4], want) {
		t.Errorf("%q, want %q first", got, want)
	}
	if slices.Contains(got, "relative") || slices.Contains(got, "/four") {
		t.Errorf("%q", got)
	}
}

func FuzzThin(f *testing.F) {
	f.Add(make([]byte, 64), make([]byte, 64))
	f.Fuzz(func(t *testing.T, verneed, dynamic []byte) {
		if len(verneed) > 1<<12 || len(dynamic) > 1<<12 {
			return
		}
		first, kept, err := dropVersions(verneed, func(v uint32) bool { return v%2 == 0 })
		if err == nil && (first < 0 || first+16 > len(verneed) || kept < 1) {
			t.Errorf("first %d, kept %d of %d bytes", first, kept, len(verneed))
		}
		_ = dropNeeded(dynamic, uint64(first), uint64(kept), func(v uint64) bool { return v%2 == 0 })
	})
}
