package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	tracefs = "/sys/kernel/tracing"

	execEvent  = "events/sched/sched_process_exec/enable"
	entryEvent = "events/kvm/kvm_entry/enable"

	switchEvent  = "events/sched/sched_switch/enable"
	switchFilter = "events/sched/sched_switch/filter"
)

// trace is an instance of the kernel's tracer: a buffer and a choice of events of our own.
type trace struct {
	dir    string
	busy   bool // times leave out when the machine's one CPU is idle
	pipe   *os.File
	events chan event

	idle, idleSince time.Duration // since begin; when it became idle, or 0 while it is not
}

// event is a line of the trace.
type event struct {
	at   time.Duration // CLOCK_MONOTONIC
	tid  int           // the thread that it happened on
	name string
	text string
}

// openTrace makes an instance that records nothing yet. It needs root. With busy, times leave out when the CPU, which
// must be the only one, has nothing to do.
func openTrace(busy bool) (_ *trace, err error) {
	if _, err := os.Stat(filepath.Join(tracefs, "instances")); errors.Is(err, os.ErrNotExist) {
		if err := unix.Mount("tracefs", tracefs, "tracefs", 0, ""); err != nil {
			return nil, fmt.Errorf("mount tracefs on %s: %w (run as root, or measure in the lab with -lab)", tracefs, err)
		}
	}
	t := &trace{busy: busy, events: make(chan event, 4096)}
	if t.dir, err = os.MkdirTemp(filepath.Join(tracefs, "instances"), "kvmlet-bench-"); err != nil {
		return nil, fmt.Errorf("make a trace instance: %w (run as root, or measure in the lab with -lab)", err)
	}
	err = t.set("trace_clock", "mono")
	if err == nil && busy {
		err = t.set(switchFilter, "prev_pid == 0 || next_pid == 0")
	}
	if err == nil {
		t.pipe, err = os.Open(filepath.Join(t.dir, "trace_pipe"))
	}
	if err != nil {
		return nil, errors.Join(err, os.Remove(t.dir))
	}
	go t.read()
	return t, nil
}

// close removes the instance.
func (t *trace) close() error {
	err := t.pipe.Close()
	for range t.events { // until the reader has let go of the pipe
	}
	return errors.Join(err, os.Remove(t.dir))
}

func (t *trace) set(file, value string) error {
	return os.WriteFile(filepath.Join(t.dir, file), []byte(value), 0)
}

// line matches " CPU 0/KVM-1234  [001] d..1.  12.345678: kvm_entry: vcpu 0, rip 0xfff0".
var line = regexp.MustCompile(`-(\d+) +\[\d+\] \S+ +(\d+)\.(\d{6}): (\w+): (.*)$`)

// parseEvent reads a line of the trace. Lines about lost events and the like are not events.
func parseEvent(s string) (event, bool) {
	m := line.FindStringSubmatch(s)
	if m == nil {
		return event{}, false
	}
	tid, err1 := strconv.Atoi(m[1])
	sec, err2 := strconv.ParseInt(m[2], 10, 32)
	usec, err3 := strconv.ParseInt(m[3], 10, 32)
	at := time.Duration(sec)*time.Second + time.Duration(usec)*time.Microsecond
	return event{at: at, tid: tid, name: m[4], text: m[5]}, err1 == nil && err2 == nil && err3 == nil
}

func (t *trace) read() {
	defer close(t.events)
	for s := bufio.NewScanner(t.pipe); s.Scan(); {
		if e, ok := parseEvent(s.Text()); ok {
			t.events <- e
		}
	}
}

// begin records programs' starts, the entries into guests and, where times leave it out, when the CPU has nothing to do,
// after it has forgotten what came before.
func (t *trace) begin() error {
	for len(t.events) > 0 {
		<-t.events
	}
	t.idle, t.idleSince = 0, 0
	err := errors.Join(t.set("trace", ""), t.set(entryEvent, "1"), t.set(execEvent, "1"))
	if t.busy {
		err = errors.Join(err, t.set(switchEvent, "1"))
	}
	return err
}

// end ends the recording.
func (t *trace) end() error {
	return errors.Join(t.set(entryEvent, "0"), t.set(execEvent, "0"), t.set(switchEvent, "0"))
}

// next returns the next event, with the time that its CPU had something to do where the trace is one of such times.
func (t *trace) next(deadline *time.Timer) (event, error) {
	select {
	case e, ok := <-t.events:
		if !ok {
			return e, fmt.Errorf("the trace: %w", io.ErrUnexpectedEOF)
		}
		if e.name == "sched_switch" {
			if strings.Contains(e.text, "next_pid=0 ") {
				t.idleSince = e.at
			} else if t.idleSince != 0 {
				t.idle, t.idleSince = t.idle+e.at-t.idleSince, 0
			}
		}
		return e, nil
	case <-deadline.C:
		return event{}, os.ErrDeadlineExceeded
	}
}

// first waits until process pid enters a guest and records no more entries then. It returns the time of the process's
// exec and all events of the process from there to the entry.
func (t *trace) first(pid int, patience time.Duration) (start time.Duration, events []event, err error) {
	defer func() { err = errors.Join(err, t.set(entryEvent, "0"), t.set(execEvent, "0")) }()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	execed := fmt.Sprintf(" pid=%d ", pid)
	for {
		e, err := t.next(deadline)
		if err != nil {
			return 0, nil, fmt.Errorf("wait %v for process %d to enter a guest: %w", patience, pid, err)
		}
		e.at -= t.idle
		switch {
		case e.name == "sched_process_exec":
			if strings.Contains(e.text, execed) {
				start = e.at
			}
		case start != 0 && e.name != "sched_switch" && isThread(pid, e.tid):
			events = append(events, e)
			if e.name == "kvm_entry" {
				return start, events, nil
			}
		}
	}
}

// without takes from a moment later than the last event the time in which the CPU had nothing to do before. The CPU must
// become idle afterwards.
func (t *trace) without(at, patience time.Duration) (time.Duration, error) {
	if !t.busy {
		return at, nil
	}
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for {
		idle := t.idle
		e, err := t.next(deadline)
		if err != nil {
			return 0, fmt.Errorf("wait %v for an idle CPU: %w", patience, err)
		}
		if e.at >= at {
			return at - idle, nil
		}
	}
}

// isThread reports whether thread tid belongs to process pid, which lives.
func isThread(pid, tid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", pid, tid))
	return err == nil
}

// now is the time by the trace's clock.
func now() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return time.Duration(ts.Nano()), nil
}
