package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestReport(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		lines  string
		want   []string // in this order
		last   string
		failed bool
	}{
		{
			name: "pass and skip",
			lines: `{"Action":"start","Package":"p"}
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"chatter\n"}
{"Action":"pass","Package":"p","Test":"TestA","Elapsed":3.5}
{"Action":"pass","Package":"p","Test":"TestB","Elapsed":0}
{"Action":"output","Package":"p","Test":"TestC","Output":"    c_test.go:3: no network here\n"}
{"Action":"output","Package":"p","Test":"TestC","Output":"--- SKIP: TestC (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestC"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"pass","Package":"p","Elapsed":4}`,
			want: []string{"p TestA (3.5s)", "skip  p TestC: c_test.go:3: no network here", "ok    p (4.0s): 2 passed, 0 failed, 1 skipped", "Skipped:\nskip  p TestC: c_test.go:3: no network here\n"},
			last: "2 passed, 0 failed, 1 skipped",
		},
		{
			name: "subtest fails",
			lines: `{"Action":"output","Package":"p","Test":"TestA/x","Output":"    a_test.go:9: wrong\n"}
{"Action":"fail","Package":"p","Test":"TestA/x"}
{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"fail","Package":"p","Elapsed":1}`,
			want:   []string{"FAIL  p TestA/x", "a_test.go:9: wrong", "FAIL  p (1.0s): 0 passed, 2 failed", "Failures:", "a_test.go:9: wrong"},
			last:   "0 passed, 2 failed",
			failed: true,
		},
		{
			name: "build fails",
			lines: `{"ImportPath":"p [p.test]","Action":"build-output","Output":"p.go:1: syntax error\n"}
{"ImportPath":"p [p.test]","Action":"build-fail"}
{"Action":"start","Package":"p"}
{"Action":"fail","Package":"p","Elapsed":0,"FailedBuild":"p [p.test]"}
{"Action":"pass","Package":"q","Test":"TestB"}
{"Action":"pass","Package":"q"}`,
			want:   []string{"FAIL  p\n", "p.go:1: syntax error", "Failures:", "p.go:1: syntax error"},
			last:   "1 passed, 1 failed",
			failed: true,
		},
		{
			name: "process crashes",
			lines: `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"panic: oh\n"}
{"Action":"output","Package":"p","Output":"exit status 2\n"}
{"Action":"fail","Package":"p","Elapsed":1}`,
			want:   []string{"exit status 2", "panic: oh"},
			last:   "0 passed, 1 failed",
			failed: true,
		},
		{
			name:  "other lines",
			lines: "go: downloading something\n{\"a\":1}\n{\"Action\":\"pass\",\"Package\":\"p\",\"Test\":\"T\"}\n{\"Action\":\"pass\",\"Package\":\"p\"}",
			want:  []string{"go: downloading something\n", "{\"a\":1}\n"},
			last:  "1 passed, 0 failed",
		},
		{
			name:   "nothing ran",
			lines:  `{"Action":"skip","Package":"p"}`,
			last:   "0 passed, 0 failed",
			failed: true,
		},
		{
			name:   "the command dies",
			lines:  `{"Action":"pass","Package":"p","Test":"TestA"}`,
			last:   "1 passed, 0 failed",
			failed: false, // its exit status tells
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			r := newReport(&out)
			if err := feed(r, strings.NewReader(c.lines)); err != nil {
				t.Fatal(err)
			}
			if got := r.close(); got != c.failed {
				t.Errorf("failed is %v", got)
			}
			text := out.String()
			for _, want := range c.want {
				_, rest, ok := strings.Cut(text, want)
				if !ok {
					t.Fatalf("%q is missing in\n%s", want, out.String())
				}
				text = rest
			}
			if !strings.HasSuffix(out.String(), "\n"+c.last+"\n") && out.String() != c.last+"\n" {
				t.Errorf("the last line is not %q:\n%s", c.last, out.String())
			}
		})
	}
}

func TestIdle(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	r := newReport(&out)
	start := time.Now()
	r.line([]byte(`{"Action":"run","Package":"p","Test":"TestLong"}`), start)
	r.idle(start.Add(quiet / 2))
	if out.Len() > 0 {
		t.Errorf("too early: %q", out.String())
	}
	r.idle(start.Add(2 * quiet))
	if !strings.Contains(out.String(), "p TestLong is running for 60s") {
		t.Errorf("%q", out.String())
	}
}

func TestRunStatus(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"true"}, 0},
		{[]string{"sh", "-c", "exit 7"}, 7},
		{[]string{"sh", "-c", "kill -9 $$"}, 1},
		{[]string{"no-such-command-here"}, 127},
		{nil, 2},
	} {
		if got, _ := run(t.Context(), newReport(&bytes.Buffer{}), c.args); got != c.want {
			t.Errorf("%q: status %d, want %d", c.args, got, c.want)
		}
	}
}
