// Package measure is what the benchmarks of scripts have in common.
package measure

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// Median returns the middle one of values, the lower of two, and zero if there are none.
func Median[T cmp.Ordered](values []T) (m T) {
	if len(values) == 0 {
		return m
	}
	s := slices.Sorted(slices.Values(values))
	return s[(len(s)-1)/2]
}

// Load returns the host's load averages over 1, 5 and 15 minutes as /proc has them.
func Load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}

// Build builds kvmlet as it is released, without debugging data, into the file program.
func Build(ctx context.Context, program string) error {
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "github.com/kvmlet/kvmlet")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("build kvmlet: %w", err)
	}
	return nil
}
