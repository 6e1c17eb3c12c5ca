package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestFind(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"a/a_test.go":            "package a\nimport \"testing\"\nfunc FuzzB(f *testing.F) {}\nfunc FuzzA(f *testing.F) {}\nfunc FuzzNot(n int) {}\n",
		"a/a.go":                 "package a\nfunc FuzzC(f *testing.F) {}\n",
		"b/b_test.go":            "package b\nimport \"testing\"\nfunc (x T) FuzzD(f *testing.F) {}\nfunc TestE(t *testing.T) {}\n",
		"a/testdata/x_test.go":   "not Go at all",
		"other/go.mod":           "module other\n",
		"other/other_test.go":    "package other\nimport \"testing\"\nfunc FuzzF(f *testing.F) {}\n",
		".hidden/hidden_test.go": "package hidden\nimport \"testing\"\nfunc FuzzG(f *testing.F) {}\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := find(dir)
	if err != nil {
		t.Fatal(err)
	}
	a := filepath.Join(dir, "a")
	if want := []target{{a, "FuzzA"}, {a, "FuzzB"}}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestOutOfTime(t *testing.T) {
	t.Parallel()
	const over = `{"Action":"output","Output":"        context deadline exceeded\n"}` + "\n"
	for name, c := range map[string]struct {
		out  string
		want bool
	}{
		"time is over":          {`{"Output":"    --- FAIL: FuzzX (3.08s)\n"}` + "\n" + over, true},
		"a failing input":       {over + `{"Output":"    Failing input written to testdata/fuzz/FuzzX/1\n"}`, false},
		"does not even compile": {`{"Output":"x.go:1:1: expected 'package'\n"}`, false},
	} {
		if got := outOfTime([]byte(c.out)); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
