package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/kvmlet/kvmlet/guest/agent"
)

// forwarded are the signals that go to the guest's command.
var forwarded = []os.Signal{
	syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2,
}

// patience is how many interrupts may pass without an end before they mean kvmlet itself, as with docker run.
const patience = 3

// errLeft is the cause of a session's end by Ctrl-A x, or by a signal that meant kvmlet.
var errLeft = errors.New("the VM was stopped")

// signals are what comes to this process while it has a VM. One part of its life after the other handles them; in between
// they wait, so that none has its default action, which would leave the terminal raw and the guest's disks as they are.
type signals struct {
	ch         chan os.Signal
	interrupts int // so far; touched by handlers only
}

// takeSignals takes the process's signals from their default actions until release.
func takeSignals() *signals {
	s := &signals{ch: make(chan os.Signal, 16)}
	signal.Notify(s.ch, syscall.SIGWINCH)
	signal.Notify(s.ch, forwarded...)
	return s
}

func (s *signals) release() { signal.Stop(s.ch) }

// during calls handle with each signal, from one goroutine, until stop, which returns when no call is under way. Only one
// handler may be there at a time, and it must not wait for anything.
func (s *signals) during(handle func(os.Signal)) (stop func()) {
	stopped, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stopped:
				return
			case sig := <-s.ch:
				handle(sig)
			}
		}
	}()
	return func() {
		close(stopped)
		<-done
	}
}

// exhausted counts sig and reports whether the user's patience is at its end.
func (s *signals) exhausted(sig os.Signal) bool {
	if sig == syscall.SIGINT || sig == syscall.SIGTERM {
		s.interrupts++
		return s.interrupts >= patience
	}
	return false
}

// wantsEnd reports whether sig asks a process without a guest's command to end.
func wantsEnd(sig os.Signal) bool {
	switch sig {
	case syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT:
		return true
	}
	return false
}

// leaveAtSignal handles signals for which there is no command in the guest yet.
func leaveAtSignal(leave context.CancelCauseFunc) func(os.Signal) {
	return func(sig os.Signal) {
		if wantsEnd(sig) {
			leave(errLeft)
		}
	}
}

// outliveReaders lets this process live on when the reader of its output is gone. By default Go ends it by SIGPIPE when it
// writes to standard output or error then; once anybody asks for that signal, such writes fail with EPIPE as all others do
// (os/signal, "SIGPIPE"). It is not undone: what is left to say is said without a VM, but need not end by a signal.
func outliveReaders() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }

// readerGone reports whether err is how a command ended of whose output nobody reads any more. It has learned of that, and
// its status says what it made of it.
func readerGone(err error) bool {
	var output *agent.OutputError
	return errors.As(err, &output) && errors.Is(output, syscall.EPIPE)
}

// ifRead writes to w as long as somebody reads there, and drops what comes later.
type ifRead struct {
	w    io.Writer
	gone func() // called once, when nobody reads any more; may be nil
	once sync.Once
}

func (r *ifRead) Write(p []byte) (int, error) {
	n, err := r.w.Write(p)
	if errors.Is(err, syscall.EPIPE) {
		if r.gone != nil {
			r.once.Do(r.gone)
		}
		return len(p), nil
	}
	return n, err
}
