package labtest

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/agent"
)

func TestOnlyHungGuestsAreTriedAgain(t *testing.T) {
	failed := agent.ExitStatus{Code: 1}
	hung := fmt.Sprintf("--- FAIL: TestGuest (9.00s)\n    guest_test.go:7: the test's time is over\n    x.go:1: %s\nFAIL\n", Hung)
	for name, c := range map[string]struct {
		status agent.ExitStatus
		err    error
		output string
		want   bool
	}{
		"hung":              {failed, nil, hung, true},
		"hung, then killed": {agent.ExitStatus{Code: 2}, nil, hung + "panic: test timed out", true},
		"failed":            {failed, nil, "--- FAIL: TestGuest\n", false},
		"panicked":          {agent.ExitStatus{Code: 2}, nil, "panic: no\n", false},
		"passed":            {agent.ExitStatus{}, nil, hung, false},
		"stopped by us":     {agent.ExitStatus{Code: 130, Signal: syscall.SIGINT}, nil, hung, false},
		"no lab":            {failed, errors.New("QEMU ended"), hung, false},
	} {
		if got := again(c.status, c.err, c.output); got != c.want {
			t.Errorf("%s: %t, want %t", name, got, c.want)
		}
	}
}

func TestShareOfTime(t *testing.T) {
	for limit, want := range map[time.Duration]time.Duration{
		30 * time.Minute: 14 * time.Minute,
		10 * time.Minute: 4*time.Minute + 30*time.Second,
		40 * time.Second: 18 * time.Second,
	} {
		if got := share(limit); got != want {
			t.Errorf("of %v an attempt gets %v, want %v", limit, got, want)
		}
	}
}
