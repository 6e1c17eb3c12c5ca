package memory

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// pages returns n pages, each full of its number, counted from 1.
func pages(n int) []byte {
	var b []byte
	for i := range n {
		b = append(b, bytes.Repeat([]byte{byte(i + 1)}, PageSize)...)
	}
	return b
}

func fileOf(t *testing.T, b []byte) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestMapFile maps the middle of a file into both regions and writes to it.
func TestMapFile(t *testing.T) {
	t.Parallel()
	m, err := New(HoleStart + 16*PageSize)
	if err != nil {
		t.Fatal(err)
	}
	content := pages(4)
	f := fileOf(t, content)
	for _, addr := range []uint64{0, 5 * PageSize, HoleStart - 2*PageSize, HoleEnd, HoleEnd + 14*PageSize} {
		if _, err := m.WriteAt([]byte("before"), int64(addr)); err != nil {
			t.Fatal(err)
		}
		if err := m.MapFile(addr, 2*PageSize, f, PageSize); err != nil {
			t.Fatal(err)
		}
		b, err := m.Bytes(addr, 2*PageSize)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, content[PageSize:3*PageSize]) {
			t.Errorf("%#x does not hold the file", addr)
		}
		b[1] = 99
		if again, err := m.Bytes(addr, 2); err != nil || again[1] != 99 {
			t.Errorf("what was written at %#x reads as %v, %v", addr, again, err)
		}
	}
	for _, addr := range []uint64{2 * PageSize, 4 * PageSize, 7 * PageSize, HoleEnd + 2*PageSize} {
		if b, err := m.Bytes(addr, PageSize); err != nil || !bytes.Equal(b, make([]byte, PageSize)) {
			t.Errorf("the page at %#x, beside a file's, is not zero (%v)", addr, err)
		}
	}
	if b, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(b, content) {
		t.Errorf("the file was written to (%v)", err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

func TestMapFileRefuses(t *testing.T) {
	t.Parallel()
	m, err := New(16 * PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	f := fileOf(t, pages(2)[:PageSize+1])
	for _, c := range []struct {
		name    string
		addr, n uint64
		off     int64
		want    error
	}{
		{"no RAM", 16 * PageSize, PageSize, 0, ErrUnmapped},
		{"more than there is RAM", 15 * PageSize, 2 * PageSize, 0, ErrUnmapped},
		{"address within a page", 1, PageSize, 0, ErrSize},
		{"half a page", 0, PageSize / 2, 0, ErrSize},
		{"nothing", 0, 0, 0, ErrSize},
		{"offset within a page", 0, PageSize, 1, ErrSize},
		{"negative offset", 0, PageSize, -PageSize, ErrSize},
		{"a page that ends behind the file", 0, PageSize, PageSize, io.ErrUnexpectedEOF},
		{"a page behind the file", 0, PageSize, 2 * PageSize, io.ErrUnexpectedEOF},
	} {
		if err := m.MapFile(c.addr, c.n, f, c.off); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if b, err := m.Bytes(0, PageSize); err != nil || !bytes.Equal(b, make([]byte, PageSize)) {
		t.Errorf("a refused mapping changed memory (%v)", err)
	}
}
