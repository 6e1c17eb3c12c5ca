package guesttest_test

import (
	"fmt"
	"io"
	"os"
	"slices"
	"testing"

	"github.com/kvmlet/kvmlet/guest/guesttest"
)

// helperArg makes this executable, which is /init in guests, a program for the tests there: /init helper NAME.
const helperArg = "helper"

// helpers are those programs.
var helpers = map[string]func() error{
	"mirror":     mirror,
	"writer":     writer,
	"crash":      crash,
	"acpi":       acpi,
	"disk":       disk,
	"ranges":     ranges,
	"files":      files,
	"await":      await,
	"echo":       echo,
	"interrupts": interrupts,
	"cpuflags":   cpuflags,
	"markholes":  markholes,
	"highpages":  highpages,
}

func helper(name string) {
	err := fmt.Errorf("no helper %q", name)
	if f := helpers[name]; f != nil {
		err = f()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run runs a command in the guest and returns its output. The test ends if the command fails.
func run(t testing.TB, g *guesttest.Guest, args ...string) string {
	t.Helper()
	out, err := g.Command(args...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// shell is run with a script.
func shell(t testing.TB, g *guesttest.Guest, script string) string {
	t.Helper()
	return run(t, g, "sh", "-ec", script)
}

// mirror copies its input to stdout and, backwards, to stderr, both at once.
func mirror() error {
	b, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	done := make(chan error)
	go func() {
		_, err := os.Stdout.Write(b)
		done <- err
	}()
	r := slices.Clone(b)
	slices.Reverse(r)
	if _, err := os.Stderr.Write(r); err != nil {
		return err
	}
	return <-done
}

// writer tells when the first write is done and goes on writing to the disk for ever.
func writer() error {
	f, err := os.OpenFile("/dev/vda", os.O_WRONLY|os.O_SYNC, 0)
	if err != nil {
		return err
	}
	b := make([]byte, 64<<10)
	for n := 0; ; n++ {
		if _, err := f.WriteAt(b, int64(n%16*len(b))); err != nil {
			return err
		}
		if n == 0 {
			fmt.Println("writing")
		}
	}
}

// crash makes the guest's kernel panic.
func crash() error { return os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0) }
