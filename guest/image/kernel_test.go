package image

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestKernel(t *testing.T) {
	s := testStore(t)
	path, err := s.Kernel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got, err := hashFile(path)
	if err != nil || got != KernelSHA256 {
		t.Errorf("sha256 %s, %v; want %s", got, err, KernelSHA256)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// The boot protocol's signature (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").
	if string(b[0x202:0x206]) != "HdrS" {
		t.Error("the kernel is no bzImage")
	}

	// Later calls need neither Go nor the module cache.
	t.Setenv("PATH", "")
	t.Setenv("HOME", "/nonexistent")
	t.Setenv("GOPATH", "")
	t.Setenv("GOMODCACHE", "/nonexistent")
	if again, err := s.Kernel(t.Context()); err != nil || again != path {
		t.Errorf("second call: %s, %v", again, err)
	}
	empty := testStore(t)
	if _, err := empty.Kernel(t.Context()); !errors.Is(err, ErrSetup) || !strings.Contains(err.Error(), "make setup") {
		t.Errorf("no module cache: %v; want the remedy named", err)
	}

	// A kernel with another content is not taken.
	cache := t.TempDir()
	t.Setenv("GOMODCACHE", cache)
	dir := filepath.Join(cache, KernelModule+"@"+KernelVersion)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, kernelFile), b[:1000], 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := empty.Kernel(t.Context()); err == nil || !strings.Contains(err.Error(), "go clean -modcache") {
		t.Errorf("a damaged kernel: %v; want the remedy named", err)
	}
}

// The constants say what go.mod says.
func TestKernelPinned(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Version}}", KernelModule).Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(out)); got != KernelVersion {
		t.Errorf("go.mod has version %s, the code %s", got, KernelVersion)
	}
}
