package image

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestAgentSegment(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	static := filepath.Join(dir, "static")
	src := filepath.Join(dir, "main.go")
	if err := os.WriteFile(src, []byte("package main\n\nfunc main() { println(\"up\") }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", static, src)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	bash := Program{Name: "bash"}
	dynamic, err := bash.find()
	if err != nil {
		t.Fatal(err)
	}
	s := testStore(t)
	for name, c := range map[string]struct {
		exe  string
		args []string
	}{
		"static":  {static, []string{"/init"}},
		"dynamic": {dynamic, []string{"/init", "-c", "echo up >&2"}},
	} {
		a, err := AgentSegment(c.exe)
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		b, err := io.ReadAll(io.NewSectionReader(a, 0, a.Size()))
		if err != nil {
			t.Fatal(err)
		}
		entries := readArchive(t, b)
		want, err := os.ReadFile(c.exe)
		if err != nil {
			t.Fatal(err)
		}
		if e := entries["init"]; e.mode != modeFile|0o755 || !bytes.Equal(e.data, want) {
			t.Errorf("%s: /init has mode %o and %d bytes", name, e.mode, len(e.data))
		}
		root := filepath.Join(dir, name+"-root")
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		unpack(t, entries, root)
		if _, errs, code := chroot(t, root, "", c.args...); code != 0 || errs != "up\n" {
			t.Errorf("%s: /init said %q, status %d", name, errs, code)
		}

		path, err := s.Init(t.Context(), c.exe)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%s: the cached archive differs (%v)", name, err)
		}
		if again, err := s.Init(t.Context(), c.exe); err != nil || again != path {
			t.Errorf("%s: second call: %s, %v", name, again, err)
		}
	}
	if _, err := AgentSegment(filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing executable: %v", err)
	}
	if _, err := AgentSegment(src); !errors.Is(err, errELF) {
		t.Errorf("source text as an executable: %v", err)
	}
}
