package image

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"
)

// cpioEntry is what readArchive found.
type cpioEntry struct {
	mode         uint32
	ino, nlink   uint32
	mtime        uint32
	major, minor uint32
	data         []byte
}

// readArchive takes archives apart as the kernel does (init/initramfs.c): several may follow one another, with zeros
// between.
func readArchive(t *testing.T, b []byte) map[string]cpioEntry {
	t.Helper()
	entries := map[string]cpioEntry{}
	last := ""
	for off := 0; off < len(b); {
		if b[off] == 0 {
			off++
			continue
		}
		if off%4 != 0 || len(b)-off < 110 || string(b[off:off+6]) != "070701" {
			t.Fatalf("no header at %#x", off)
		}
		var f [13]uint32
		for i := range f {
			v, err := strconv.ParseUint(string(b[off+6+8*i:off+14+8*i]), 16, 32)
			if err != nil {
				t.Fatalf("header at %#x: %v", off, err)
			}
			f[i] = uint32(v)
		}
		name := string(b[off+110 : off+110+int(f[11])-1])
		if b[off+110+len(name)] != 0 {
			t.Fatalf("%q is not terminated", name)
		}
		start := (off + 110 + int(f[11]) + 3) &^ 3
		end := start + int(f[6])
		if name == cpioTrailer {
			last = ""
			off = end
			continue
		}
		if name <= last {
			t.Errorf("%q comes after %q", name, last)
		}
		last = name
		if dir := filepath.Dir(name); dir != "." && entries[dir].mode&modeType != modeDir {
			t.Errorf("%q comes before its folder", name)
		}
		if f[2] != 0 || f[3] != 0 {
			t.Errorf("%q belongs to %d:%d", name, f[2], f[3])
		}
		entries[name] = cpioEntry{ino: f[0], mode: f[1], nlink: f[4], mtime: f[5], major: f[9], minor: f[10], data: b[start:end]}
		off = (end + 3) &^ 3
	}
	return entries
}

// unpack writes entries below root, but for devices, which need rights.
func unpack(t *testing.T, entries map[string]cpioEntry, root string) {
	t.Helper()
	tr := tree{}
	for name := range entries {
		tr[name] = node{}
	}
	for _, name := range tr.names() {
		e := entries[name]
		path := filepath.Join(root, name)
		var err error
		switch e.mode & modeType {
		case modeDir:
			err = os.Mkdir(path, os.FileMode(e.mode&0o777))
		case modeLink:
			err = os.Symlink(string(e.data), path)
		case modeFile:
			err = os.WriteFile(path, e.data, os.FileMode(e.mode&0o777))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestArchive(t *testing.T) {
	t.Parallel()
	src := filepath.Join(t.TempDir(), "src")
	if err := os.WriteFile(src, bytes.Repeat([]byte("x"), 5001), 0o600); err != nil {
		t.Fatal(err)
	}
	build := func() []byte {
		tr := newTree()
		if err := errors.Join(
			tr.addFile("usr/share/deep/file", src, 0o640),
			tr.addData("/bin/tool", []byte("abc"), 0o755),
			tr.addData("etc/empty", nil, 0o644),
			tr.addLink("sbin/other", "tool"),
			tr.addFile("/usr/share/deep/file", src, 0o640), // the same again is no conflict
		); err != nil {
			t.Fatal(err)
		}
		a, err := newArchive(tr)
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		var b bytes.Buffer
		if n, err := a.WriteTo(&b); err != nil || n != a.Size() || int64(b.Len()) != n {
			t.Fatalf("WriteTo: %d, %v; the size is %d", n, err, a.Size())
		}
		if a.Size()%4096 != 0 {
			t.Errorf("the size %d is no multiple of 4096", a.Size())
		}
		if err := iotest.TestReader(io.NewSectionReader(a, 0, a.Size()), b.Bytes()); err != nil {
			t.Error(err)
		}
		return b.Bytes()
	}
	b := build()
	if !bytes.Equal(b, build()) {
		t.Error("the same tree gives two archives")
	}
	// Two archives one behind the other are one initramfs.
	entries := readArchive(t, append(bytes.Clone(b), b...))
	for name, want := range map[string]struct {
		mode uint32
		size int
	}{
		"usr/share/deep":      {0o040755, 0},
		"usr/share/deep/file": {0o100640, 5001},
		"usr/bin/tool":        {0o100755, 3},
		"usr/bin/other":       {0o120777, 4},
		"etc/empty":           {0o100644, 0},
		"tmp":                 {0o041777, 0},
		"dev/console":         {0o020600, 0},
		"bin":                 {0o120777, 7},
	} {
		e, ok := entries[name]
		if !ok || e.mode != want.mode || len(e.data) != want.size {
			t.Errorf("%s: there: %v, mode %o, %d bytes; want mode %o, %d bytes", name, ok, e.mode, len(e.data), want.mode, want.size)
		}
		if e.mtime != 0 {
			t.Errorf("%s: time %d", name, e.mtime)
		}
	}
	if e := entries["dev/console"]; e.major != 5 || e.minor != 1 {
		t.Errorf("/dev/console is %d:%d", e.major, e.minor)
	}
	inodes := map[uint32]string{}
	for name, e := range entries {
		if other, ok := inodes[e.ino]; ok {
			t.Errorf("%s and %s share inode %d", name, other, e.ino)
		}
		inodes[e.ino] = name
	}
}

func TestArchiveFileShrinks(t *testing.T) {
	t.Parallel()
	src := filepath.Join(t.TempDir(), "src")
	if err := os.WriteFile(src, make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	tr := tree{}
	if err := tr.addFile("f", src, 0o644); err != nil {
		t.Fatal(err)
	}
	a, err := newArchive(tr)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := os.Truncate(src, 10); err != nil {
		t.Fatal(err)
	}
	if _, err := a.WriteTo(io.Discard); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("reading a file that shrank: %v", err)
	}
}

// TestOpenRegular has nobody write to the pipe, which must not be waited for.
func TestOpenRegular(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, pipe := filepath.Join(dir, "file"), filepath.Join(dir, "pipe")
	if err := os.WriteFile(file, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	refused := make(chan error, 3)
	go func() {
		for _, path := range []string{pipe, dir, filepath.Join(dir, "none")} {
			f, _, err := OpenRegular(path)
			if err == nil {
				f.Close()
			}
			refused <- err
		}
	}()
	for _, want := range []string{"pipe: not a regular file", dir + ": not a regular file", "no such file"} {
		select {
		case err := <-refused:
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("it waits for a writer")
		}
	}
	f, size, err := OpenRegular(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err := io.ReadAll(f); err != nil || size != 3 || string(b) != "abc" {
		t.Errorf("%d bytes, %q, %v", size, b, err)
	}
}

func TestTreeConflicts(t *testing.T) {
	t.Parallel()
	tr := newTree()
	if err := tr.addData("usr/bin/x", []byte("1"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, want string
	}{
		{"bin/x", "twice"},
		{"usr/bin/x/y", "no folder"},
		{"/", "no file name"},
		{"", "no file name"},
	} {
		if err := tr.addData(c.name, []byte("2"), 0o755); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("add %q: %v; want an error with %q", c.name, err, c.want)
		}
	}
	if err := tr.addData("../../outside", nil, 0o644); err != nil || tr["outside"].mode == 0 {
		t.Errorf("a path above the root should stay in it: %v", err)
	}
	if _, err := newArchive(tree{"f": {mode: modeFile, source: "/nonexistent"}}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing source: %v", err)
	}
	if _, err := newArchive(tree{"f": {mode: modeFile, source: "/dev/null"}}); err == nil {
		t.Error("a device was taken as a file")
	}
}

func TestUnpackedSize(t *testing.T) {
	t.Parallel()
	archive := func(sizes map[string]int) []byte {
		tr := newTree()
		for name, size := range sizes {
			if err := tr.addData(name, make([]byte, size), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if err := tr.addLink("usr/bin/link", "target"); err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := tr.writeArchive(&b); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	a := archive(map[string]int{"init": 3 * 4096, "empty": 0, "one": 1})
	b := archive(map[string]int{"init": 4097})
	broken := bytes.Clone(a)
	copy(broken[cpioHeaderSize-8*2:], "x") // the length of a name
	for name, c := range map[string]struct {
		archives [][]byte
		pages    uint64
		ok       bool
	}{
		"nothing":      {nil, 0, true},
		"one":          {[][]byte{a}, 4, true},
		"last counts":  {[][]byte{a, b}, 3, true},
		"other order":  {[][]byte{b, a}, 4, true},
		"compressed":   {[][]byte{a, {0x1F, 0x8B, 8}}, 0, false},
		"cut short":    {[][]byte{a[:len(a)-archiveAlign]}, 0, false},
		"broken":       {[][]byte{broken}, 0, false},
		"cut in names": {[][]byte{a[:cpioHeaderSize+1]}, 0, false},
		"empty":        {[][]byte{{}}, 0, false},
	} {
		var list []io.ReaderAt
		for _, b := range c.archives {
			list = append(list, bytes.NewReader(b))
		}
		if n, ok := UnpackedSize(list...); n != c.pages*4096 || ok != c.ok {
			t.Errorf("%s: %d bytes, %t; want %d pages, %t", name, n, ok, c.pages, c.ok)
		}
	}
}
