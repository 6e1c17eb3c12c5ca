package guesttest

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

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
	var left []string
	for deadline := time.Now().Add(10 * time.Second); len(left) < 5 && time.Now().Before(deadline); {
		left = count().beyond(before) // goroutines start when they like
	}
	theirs.Close()
	if err := <-connected; err == nil {
		t.Error("an agent answered")
	}
	for _, want := range []string{"eventfd", "/dev/kvm", "agent.Connect.func1", "agent.Connect.func2"} {
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
