package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// The default guest kernel: a Go module, so that go.mod pins it and go.sum holds its checksum. It is a bzImage of Linux
// 7.1 for x86-64.
const (
	KernelModule  = "github.com/gokrazy/kernel.amd64"
	KernelVersion = "v0.0.0-20260705070735-de680abf072b"
	KernelSHA256  = "276e5c6eefee7d955d3b6808d214b535561ce426789e3b4f53bd899474612525"

	kernelFile = "vmlinuz"
)

// ErrSetup is wrapped by errors about something that "make setup" installs.
var ErrSetup = errors.New(`run "make setup" in kvmlet's source folder`)

// Kernel returns the path of the default guest kernel in the default store. The first call copies it there from Go's
// module cache and checks it; later ones need neither Go nor the module cache.
func Kernel(ctx context.Context) (string, error) {
	s, err := OpenStore("")
	if err != nil {
		return "", err
	}
	return s.Kernel(ctx)
}

// Kernel is the function Kernel on this store.
func (s *Store) Kernel(ctx context.Context) (string, error) {
	return s.Build(ctx, "kernel", KernelKey(), func(w io.Writer) error {
		src, err := findKernel(ctx)
		if err != nil {
			return err
		}
		f, err := os.Open(src)
		if err != nil {
			return err
		}
		defer f.Close()
		sum := newSum(w)
		if _, err := io.Copy(sum, f); err != nil {
			return fmt.Errorf("copy the guest kernel %s: %w", src, err)
		}
		if got := sum.hex(); got != KernelSHA256 {
			return fmt.Errorf("guest kernel %s: sha256 is %s, not %s (run \"go clean -modcache\", then \"make setup\")",
				src, got, KernelSHA256)
		}
		return nil
	})
}

// KernelKey returns the key of the default kernel's content, for what is derived from it.
func KernelKey() Key { return KeyOf(KernelModule, KernelVersion, KernelSHA256) }

// findKernel looks for the kernel in the places where Go keeps modules. The go command is asked last: it takes a while.
func findKernel(ctx context.Context) (string, error) {
	tried := map[string]bool{}
	for _, dir := range moduleCaches() {
		tried[dir] = true
		if path := kernelIn(dir); path != "" {
			return path, nil
		}
	}
	out, err := exec.CommandContext(ctx, "go", "env", "GOMODCACHE").Output()
	if dir := strings.TrimSpace(string(out)); err == nil && dir != "" && !tried[dir] {
		tried[dir] = true
		if path := kernelIn(dir); path != "" {
			return path, nil
		}
	}
	dirs := make([]string, 0, len(tried))
	for d := range tried {
		dirs = append(dirs, d)
	}
	return "", fmt.Errorf("guest kernel %s@%s is not in Go's module cache (%s): %w",
		KernelModule, KernelVersion, strings.Join(dirs, ", "), ErrSetup)
}

func kernelIn(dir string) string {
	path := filepath.Join(dir, filepath.FromSlash(KernelModule)+"@"+KernelVersion, kernelFile)
	if fi, err := os.Stat(path); err != nil || !fi.Mode().IsRegular() {
		return ""
	}
	return path
}

// moduleCaches lists where the module cache is without asking the go command (cmd/go, "GOPATH and Modules").
func moduleCaches() []string {
	var dirs []string
	if d := os.Getenv("GOMODCACHE"); d != "" {
		dirs = append(dirs, d)
	}
	for _, d := range filepath.SplitList(os.Getenv("GOPATH")) {
		dirs = append(dirs, filepath.Join(d, "pkg", "mod"))
	}
	if home, err := os.UserHomeDir(); err == nil {
		dirs = append(dirs, filepath.Join(home, "go", "pkg", "mod"))
	}
	return dirs
}
