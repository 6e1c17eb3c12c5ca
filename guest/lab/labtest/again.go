package labtest

import (
	"regexp"
	"strings"

	"github.com/kvmlet/kvmlet/guest/agent"
)

// attempts is how often a package's tests are run at most; failures that all come from hung guests excuse another
// attempt (see Hung).
const attempts = 2

const (
	// Hung in the log of every failed test has a package's tests run once more, if this is a lab. Log it where a guest was
	// found to spin in its kernel with interrupts off: QEMU's emulation of SVM now and then gives a nested guest an
	// interrupt twice, once of them while its interrupts are off, and the handler waits for a lock that the interrupted
	// code holds (see lab.DefaultCPUs). No VMM can help that. All other failures count, and so does this where KVM is
	// hardware.
	Hung = "labtest: a guest of the lab hung with its interrupts off"

	// NoTime is to be logged by a test that failed because its time, which is the whole package's, is over. If it was a hung
	// guest that took the time, nothing is held against the tests that got none.
	NoTime = "the test's time is over"
)

// timedOut begins the testing package's last words when the time is over, on standard error.
const timedOut = "panic: test timed out after "

// again decides whether the tests are run once more after the attempt that ended so. Every failure must come from a hung
// guest.
func again(status agent.ExitStatus, err error, stdout, stderr string) bool {
	if err != nil || status.Signal != 0 {
		return false
	}
	tests := readFailures(stdout)
	tookTime := false
	for _, t := range tests {
		tookTime = tookTime || t.hung && t.noTime
	}
	for name, t := range tests {
		if !t.failed || t.excused(tookTime) {
			continue
		}
		// The guest may be that of a test around this one; and one that only says that tests in it failed, has not itself.
		if !around(tests, name, tookTime) && (t.spoke || !hasFailedInside(tests, name)) {
			return false
		}
	}
	const testsFailed, panicked = 1, 2 // as the testing package exits
	switch status.Code {
	case testsFailed:
		return hasFailedInside(tests, "")
	case panicked:
		return tookTime && (strings.HasPrefix(stderr, timedOut) || strings.Contains(stderr, "\n"+timedOut))
	default:
		return false
	}
}

// result is what a test's output tells of it.
type result struct {
	failed bool
	spoke  bool // it logged something itself, whether that was a failure or not
	hung   bool // with Hung among that
	noTime bool // with NoTime
}

func (r *result) excused(tookTime bool) bool { return r.hung || tookTime && r.noTime }

// around reports whether a test that the named one is a part of is excused.
func around(tests map[string]*result, name string, tookTime bool) bool {
	for outer, t := range tests {
		if strings.HasPrefix(name, outer+"/") && t.failed && t.excused(tookTime) {
			return true
		}
	}
	return false
}

// hasFailedInside reports whether a part of the named test failed, or with no name whether any did.
func hasFailedInside(tests map[string]*result, name string) bool {
	for inner, t := range tests {
		if t.failed && (name == "" || strings.HasPrefix(inner, name+"/")) {
			return true
		}
	}
	return false
}

var (
	// Which test speaks, in the output of -test.v and -test.v=test2json.
	speaker = regexp.MustCompile(`^=== (?:RUN|CONT|NAME|PAUSE) +(\S*)$`)
	// How a test ended. The ones inside another are indented.
	outcome = regexp.MustCompile(`^( *)--- (FAIL|PASS|SKIP|BENCH): (\S+)`)
	// The first line of what a test logs.
	logged = regexp.MustCompile(`^( *)\S+\.go:\d+: (.*)$`)
)

// readFailures reads the output of a test binary: with -test.v and -test.v=test2json a test's log comes before its
// outcome, under a line that says whose it is; without, behind its outcome and indented further.
func readFailures(output string) map[string]*result {
	type open struct {
		indent int
		name   string
	}
	var (
		tests     = make(map[string]*result)
		verbose   bool
		speaking  string // while verbose
		reporting []open // else: the tests whose outcome is above, each inside the one before
	)
	get := func(name string) *result {
		if tests[name] == nil {
			tests[name] = &result{}
		}
		return tests[name]
	}
	for line := range strings.Lines(output) {
		line = strings.TrimLeft(strings.TrimRight(line, "\r\n"), "\x16") // test2json's mark
		if m := speaker.FindStringSubmatch(line); m != nil {
			verbose, speaking = true, m[1]
			continue
		}
		if m := outcome.FindStringSubmatch(line); m != nil {
			t := get(m[3])
			t.failed = t.failed || m[2] == "FAIL"
			for len(reporting) > 0 && reporting[len(reporting)-1].indent >= len(m[1]) {
				reporting = reporting[:len(reporting)-1]
			}
			reporting, speaking = append(reporting, open{len(m[1]), m[3]}), m[3]
			continue
		}
		m := logged.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		name := speaking
		if !verbose {
			for len(reporting) > 0 && reporting[len(reporting)-1].indent >= len(m[1]) {
				reporting = reporting[:len(reporting)-1]
			}
			name = ""
			if len(reporting) > 0 {
				name = reporting[len(reporting)-1].name
			}
		}
		if name != "" {
			t := get(name)
			t.spoke = true
			t.hung, t.noTime = t.hung || m[2] == Hung, t.noTime || m[2] == NoTime
		}
	}
	return tests
}
