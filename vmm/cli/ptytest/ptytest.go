// Package ptytest gives tests a terminal.
package ptytest

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Open returns both sides of a terminal, which has no size yet.
func Open(tb testing.TB) (master, slave *os.File) {
	tb.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = master.Close() })
	fd := int(master.Fd())
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err = errors.Join(err, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)); err != nil {
		tb.Fatal(err)
	}
	if slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = slave.Close() })
	return master, slave
}

// Attributes returns what is set on the terminal f.
func Attributes(tb testing.TB, f *os.File) unix.Termios {
	tb.Helper()
	a, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		tb.Fatal(err)
	}
	return *a
}
