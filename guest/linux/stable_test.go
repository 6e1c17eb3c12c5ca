package linux

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/kvmlet/kvmlet/guest/memory"
)

func stable(t *testing.T, content []byte) *StableFile {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return NewStableFile(f, int64(len(content)))
}

// TestLoadStable loads the same kernel and initrd from files that are mapped and from readers that are copied.
func TestLoadStable(t *testing.T) {
	t.Parallel()
	program := testELF{}.build(t)
	parts := [][]byte{bytes.Repeat([]byte("one"), 5000), []byte("two"), bytes.Repeat([]byte{3}, 2*memory.PageSize)}
	load := func(blob func([]byte) Blob) *memory.Memory {
		k := parse(t, testBz{payload: pack(t, "gzip", program)}.build(t))
		if err := k.SetUnpacked(blob(program), int64(len(program))); err != nil {
			t.Fatal(err)
		}
		var initrd []Blob
		for _, p := range parts {
			initrd = append(initrd, blob(p))
		}
		mem := newMemory(t, 64<<20)
		if _, err := Load(mem, k, Options{Cmdline: "quiet", Initrd: initrd}); err != nil {
			t.Fatal(err)
		}
		return mem
	}
	mapped := load(func(b []byte) Blob { return stable(t, b) })
	checkProgram(t, mapped)
	copied := load(func(b []byte) Blob { return bytes.NewReader(b) })
	if !bytes.Equal(mapped.Regions()[0].Bytes, copied.Regions()[0].Bytes) {
		t.Error("a mapped kernel or initrd differs from a copied one")
	}
}

// TestStableTruncated checks that a file which has become shorter is an error and not a signal later on.
func TestStableTruncated(t *testing.T) {
	t.Parallel()
	f := stable(t, make([]byte, 3*memory.PageSize))
	if err := os.Truncate(f.Name(), memory.PageSize); err != nil {
		t.Fatal(err)
	}
	_, err := Load(newMemory(t, 64<<20), parse(t, testELF{}.build(t)), Options{Initrd: []Blob{f}})
	if err == nil {
		t.Error("no error")
	}
}
