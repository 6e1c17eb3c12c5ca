package guesttest

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/agent"
)

// TestLeftoversAreFound leaves one of each kind behind.
func TestLeftoversAreFound(t *testing.T) {
	before := count()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	kvm, err := os.Open("/dev/kvm")
	if err != nil {
		t.Fatal(err)
	}
	defer kvm.Close()
	ours, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	connected := make(chan error)
	go func() {
		_, err := agent.Connect(t.Context(), pipe{ours})
		connected <- err
	}()
	left := count().beyond(before)
	for len(left) < 4 { // its two goroutines have not started yet
		left = count().beyond(before)
	}
	theirs.Close()
	if err := <-connected; err == nil {
		t.Error("an agent answered")
	}
	for _, want := range []string{"eventfd", "/dev/kvm", "agent.Connect"} {
		if !slices.ContainsFunc(left, func(s string) bool { return strings.Contains(s, want) }) {
			t.Errorf("%s is not among %q", want, left)
		}
	}
}

// pipe is a connection of which the other end can only be closed.
type pipe struct{ r *os.File }

func (p pipe) Read(b []byte) (int, error)  { return p.r.Read(b) }
func (p pipe) Write(b []byte) (int, error) { return len(b), nil }
func (p pipe) Close() error                { return p.r.Close() }
