package main

import (
	"go/parser"
	"go/token"
	"slices"
	"strings"
	"testing"
)

func TestCheckFile(t *testing.T) {
	t.Parallel()
	const good = `package p

import "unsafe"

// f converts.
func f(b []byte) *byte {
	return unsafe.SliceData(b) // a slice's first byte
}

func g(b []byte) *byte {
	// The slice's first byte.
	return unsafe.SliceData(b)
}

func size() uintptr { return unsafe.Sizeof(0) }

type s struct {
	p unsafe.Pointer // kept by the kernel
}

func h(b []byte) {
	call(
		unsafe.SliceData(b), // a slice's first byte
		1,
	)
}
`
	for _, c := range []struct {
		name, path, src string
		want            []string
	}{
		{"good", "x/f_unsafe.go", good, nil},
		{"good test", "x/f_unsafe_test.go", good, nil},
		{"name", "x/f.go", good, []string{"x/f.go: imports unsafe"}},
		{"test's name", "x/f_test.go", good, []string{"x/f_test.go: imports unsafe"}},
		{"no unsafe", "x/f.go", "package p\n", nil},
		{
			"no reasons", "x/f_unsafe.go",
			"package p\n\nimport \"unsafe\"\n\n// f has a comment, its statements have none.\nfunc f(b []byte) {\n\n\tx := unsafe.SliceData(b)\n\tif unsafe.Slice(x, 1) == nil {\n\t\t// inside\n\t}\n}\n",
			[]string{"x/f_unsafe.go:8:7", "x/f_unsafe.go:9:5"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, c.path, c.src, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			got := checkFile(fset, f, c.path)
			if len(got) != len(c.want) || !slices.EqualFunc(got, c.want, strings.HasPrefix) {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}
