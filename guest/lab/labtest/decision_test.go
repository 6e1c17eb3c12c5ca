package labtest

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/agent"
)

// TestOnlyHungGuestsAreTriedAgain reads outputs in the three forms of the testing package: HUNG stands for Hung, NOTIME for
// NoTime, and ^ for test2json's mark.
func TestOnlyHungGuestsAreTriedAgain(t *testing.T) {
	const (
		plain    = "--- FAIL: TestGuest (9.00s)\n    guest_test.go:7: no\n        of two lines\n    x.go:1: HUNG\nFAIL\n"
		verbose  = "=== RUN   TestGuest\n    guest_test.go:7: no\n    x.go:1: HUNG\n--- FAIL: TestGuest (9.00s)\nFAIL\n"
		json     = "^=== RUN   TestGuest\n    guest_test.go:7: no\n    x.go:1: HUNG\n^--- FAIL: TestGuest (9.00s)\n^=== NAME  \n^FAIL\n"
		tookTime = "--- FAIL: TestGuest (9.00s)\n    x.go:1: HUNG\n    x.go:2: NOTIME\n"
		late     = "--- FAIL: TestLate (0.00s)\n    x.go:3: boot a guest: no\n    x.go:2: NOTIME\n"
		timedOut = "panic: test timed out after 1m0s\n\trunning tests:\n"
	)
	failed, panicked := agent.ExitStatus{Code: 1}, agent.ExitStatus{Code: 2}
	for name, c := range map[string]struct {
		status         agent.ExitStatus
		err            error
		stdout, stderr string
		want           bool
	}{
		"hung":          {failed, nil, plain, "", true},
		"hung, verbose": {failed, nil, verbose, "", true},
		"hung, json":    {failed, nil, json, "", true},

		"another failed before":         {failed, nil, "--- FAIL: TestOther (0.00s)\n    a_test.go:1: no\n" + plain, "", false},
		"another failed behind":         {failed, nil, plain + "--- FAIL: TestOther (0.00s)\n    a_test.go:1: no\n", "", false},
		"another failed without a word": {failed, nil, plain + "--- FAIL: TestOther (0.00s)\n", "", false},
		"another failed, verbose":       {failed, nil, verbose + "=== RUN   TestOther\n    a_test.go:1: no\n--- FAIL: TestOther (0.00s)\n", "", false},
		"another failed, json":          {failed, nil, json + "^=== RUN   TestOther\n    a_test.go:1: no\n^--- FAIL: TestOther (0.00s)\n", "", false},
		"another failed beside it, json": {
			failed, nil, "^=== CONT  TestGuest\n^=== NAME  TestOther\n    a_test.go:1: no\n^=== NAME  TestGuest\n    x.go:1: HUNG\n" +
				"^--- FAIL: TestOther (0.00s)\n^=== NAME  TestGuest\n^--- FAIL: TestGuest (1.00s)\n", "", false,
		},
		"another passed": {failed, nil, plain + "=== RUN   TestOther\n    a_test.go:1: fine\n--- PASS: TestOther (0.00s)\n", "", true},
		"only a passed one hung": {
			failed, nil, "=== RUN   A\n    x.go:1: HUNG\n--- PASS: A (0.00s)\n=== RUN   B\n    b_test.go:1: no\n--- FAIL: B (0.00s)\n", "", false,
		},
		"the words in another text": {failed, nil, "--- FAIL: TestGuest (9.00s)\n    x.go:1: \"...\\nHUNG\\n\"\n", "", false},

		"in a part": {failed, nil, "--- FAIL: A (9.00s)\n    --- FAIL: A/b (9.00s)\n        x.go:1: HUNG\n", "", true},
		"in a part, verbose": {
			failed, nil, "=== RUN   A\n=== RUN   A/b\n    x.go:1: HUNG\n--- FAIL: A (9.00s)\n    --- FAIL: A/b (9.00s)\n", "", true,
		},
		"in a part, json": {
			failed, nil, "^=== RUN   A\n^=== RUN   A/b\n    x.go:1: HUNG\n^--- FAIL: A/b (9.00s)\n^=== NAME  A\n^--- FAIL: A (9.00s)\n", "", true,
		},
		"in a part of one that failed too": {
			failed, nil, "--- FAIL: A (9.00s)\n    --- FAIL: A/b (9.00s)\n        x.go:1: HUNG\n    a_test.go:1: no\n", "", false,
		},
		"in a part of one that failed too, json": {
			failed, nil, "^=== RUN   A\n^=== RUN   A/b\n    x.go:1: HUNG\n^--- FAIL: A/b (9.00s)\n^=== NAME  A\n    a_test.go:1: no\n^--- FAIL: A (9.00s)\n",
			"", false,
		},
		"in one part of two": {
			failed, nil, "--- FAIL: A (9.00s)\n    --- FAIL: A/b (9.00s)\n        x.go:1: HUNG\n    --- FAIL: A/c (9.00s)\n        c_test.go:1: no\n",
			"", false,
		},
		"around a part": {
			failed, nil, "--- FAIL: A (9.00s)\n    --- FAIL: A/b (9.00s)\n        b_test.go:1: no answer\n    x.go:1: HUNG\n", "", true,
		},

		"later ones got no time":             {failed, nil, tookTime + late, "", true},
		"later ones got no time, and killed": {panicked, nil, tookTime + late, "x\n" + timedOut, true},
		"no time, but that was not it":       {failed, nil, plain + late, "", false},
		"no time and nobody hung":            {failed, nil, late, "", false},
		"killed, but that was not it":        {panicked, nil, plain, timedOut, false},
		"panicked":                           {panicked, nil, tookTime, "panic: no\n", false},
		"panicked at once":                   {panicked, nil, "", "panic: no\n", false},
		"failed":                             {failed, nil, "--- FAIL: TestGuest\n", "", false},
		"failed outside of tests":            {failed, nil, "", "no image\n", false},
		"passed":                             {agent.ExitStatus{}, nil, plain, "", false},
		"stopped by us":                      {agent.ExitStatus{Code: 130, Signal: syscall.SIGINT}, nil, plain, "", false},
		"no lab":                             {failed, errors.New("QEMU ended"), plain, "", false},
	} {
		out := strings.NewReplacer("HUNG", Hung, "NOTIME", NoTime, "^", "\x16").Replace(c.stdout)
		if got := again(c.status, c.err, out, c.stderr); got != c.want {
			t.Errorf("%s: %t, want %t, for\n%s", name, got, c.want, out)
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
