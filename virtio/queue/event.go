package queue

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Event is an eventfd: one side signals it, the other waits for it. KVM signals it as an ioeventfd or waits for it as
// an irqfd; in this process a goroutine waits in the runtime's poller and holds no thread.
//
// Signal may be called from any goroutine, Wait from one at a time, Close from any, once.
type Event struct {
	file *os.File
	fd   int
	buf  [8]byte // what Wait reads into; kept here so that no call allocates
}

// one is what Signal adds to the counter, as the 64-bit host integer that an eventfd wants (eventfd(2)).
var one = [8]byte{1}

// NewEvent returns an Event that is not signalled.
func NewEvent() (*Event, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("create an eventfd: %w", err)
	}
	return &Event{file: os.NewFile(uintptr(fd), "eventfd"), fd: fd}, nil
}

// FD returns the descriptor, to be handed to KVM. It stays the Event's own and is valid until Close.
func (e *Event) FD() int { return e.fd }

// Signal wakes the waiter, or lets its next Wait return at once. Signals that nobody has waited for yet count as one.
// After Close it returns os.ErrClosed.
func (e *Event) Signal() error {
	_, err := e.file.Write(one[:])
	return closed(err)
}

// Wait blocks until the Event has been signalled since the last Wait. After Close, also by another goroutine meanwhile,
// it returns os.ErrClosed.
func (e *Event) Wait() error {
	_, err := e.file.Read(e.buf[:])
	return closed(err)
}

// Close releases the descriptor and wakes the waiter.
func (e *Event) Close() error { return closed(e.file.Close()) }

// closed strips the path error off os.ErrClosed.
func closed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return os.ErrClosed
	}
	return err
}
