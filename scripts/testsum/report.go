package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// slow is how long a test takes that is worth a line although it passed.
const slow = 2 * time.Second

// event is one line of cmd/test2json.
type event struct {
	Action      string
	Package     string
	ImportPath  string // in build events
	Test        string
	Output      string
	Elapsed     float64 // seconds
	FailedBuild string  // of a package that could not be built: the ImportPath of the build events
}

// testID names a test. An empty test means the package itself.
type testID struct{ pkg, test string }

func (id testID) String() string {
	if id.test == "" {
		return id.pkg
	}
	return id.pkg + " " + id.test
}

// report counts tests and shows them.
type report struct {
	w                       io.Writer
	passed, failed, skipped int
	output                  map[testID]*bytes.Buffer // what unfinished tests said
	running                 map[testID]time.Time
	counts                  map[string]*counts // by package
	failures                []failure
	skips                   []string  // a line each
	last                    time.Time // when something was shown
}

type counts struct{ passed, failed, skipped int }

type failure struct {
	id     testID
	output string
}

func newReport(w io.Writer) *report {
	return &report{
		w:       w,
		output:  map[testID]*bytes.Buffer{},
		running: map[testID]time.Time{},
		counts:  map[string]*counts{},
		last:    time.Now(),
	}
}

func (r *report) show(format string, args ...any) {
	fmt.Fprintf(r.w, format, args...)
	r.last = time.Now()
}

// line takes a line of a command's output.
func (r *report) line(line []byte, now time.Time) {
	var e event
	if !bytes.HasPrefix(line, []byte("{")) || json.Unmarshal(line, &e) != nil || e.Action == "" {
		r.show("%s\n", bytes.TrimRight(line, "\n"))
		return
	}
	id := testID{e.Package, e.Test}
	switch e.Action {
	case "start", "run":
		r.running[id] = now
	case "build-output":
		r.add(testID{pkg: e.ImportPath}, e.Output)
	case "output":
		r.add(id, e.Output)
	case "pass", "fail", "skip":
		delete(r.running, id)
		if e.Test == "" {
			r.endPackage(e)
		} else {
			r.endTest(id, e)
		}
	}
}

func (r *report) add(id testID, text string) {
	b := r.output[id]
	if b == nil {
		b = &bytes.Buffer{}
		r.output[id] = b
	}
	b.WriteString(text)
}

// take returns and forgets what a test said.
func (r *report) take(id testID) string {
	b := r.output[id]
	delete(r.output, id)
	if b == nil {
		return ""
	}
	return b.String()
}

func (r *report) count(pkg string) *counts {
	c := r.counts[pkg]
	if c == nil {
		c = &counts{}
		r.counts[pkg] = c
	}
	return c
}

func (r *report) endTest(id testID, e event) {
	out := r.take(id)
	c := r.count(id.pkg)
	took := time.Duration(e.Elapsed * float64(time.Second))
	switch e.Action {
	case "pass":
		c.passed++
		if took >= slow && !strings.Contains(id.test, "/") {
			r.show("      %s %s (%.1fs)\n", short(id.pkg), id.test, e.Elapsed)
		}
	case "skip":
		c.skipped++
		line := fmt.Sprintf("skip  %s %s: %s\n", short(id.pkg), id.test, reason(out))
		r.skips = append(r.skips, line)
		r.show("%s", line)
	case "fail":
		c.failed++
		r.fail(id, out)
	}
}

func (r *report) endPackage(e event) {
	id := testID{pkg: e.Package}
	out := r.take(id)
	if e.FailedBuild != "" {
		out = r.take(testID{pkg: e.FailedBuild}) + out
	}
	c := r.count(e.Package)
	if e.Action == "fail" {
		// What a test said that never ended, as when the process crashed, belongs to the failure.
		for _, t := range r.unfinished(e.Package) {
			out += r.take(t)
			delete(r.running, t)
		}
		if c.failed == 0 {
			c.failed++
			r.fail(id, out)
		}
	}
	r.passed, r.failed, r.skipped = r.passed+c.passed, r.failed+c.failed, r.skipped+c.skipped
	delete(r.counts, e.Package)
	switch {
	case e.Action == "fail":
		r.show("FAIL  %s (%.1fs): %s\n", short(e.Package), e.Elapsed, tally(c.passed, c.failed, c.skipped))
	case c.passed+c.skipped > 0:
		r.show("ok    %s (%.1fs): %s\n", short(e.Package), e.Elapsed, tally(c.passed, c.failed, c.skipped))
	}
}

// unfinished returns the tests of pkg that have said something and not ended, in order.
func (r *report) unfinished(pkg string) []testID {
	var ids []testID
	for id := range r.output {
		if id.pkg == pkg && id.test != "" {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b testID) int { return strings.Compare(a.test, b.test) })
	return ids
}

func (r *report) fail(id testID, out string) {
	r.failures = append(r.failures, failure{id, out})
	r.show("FAIL  %s\n%s", id, indent(out))
}

// idle names the running tests if nothing was shown for a while.
func (r *report) idle(now time.Time) {
	if now.Sub(r.last) < quiet {
		return
	}
	type entry struct {
		id    testID
		since time.Time
	}
	var list []entry
	for id, since := range r.running {
		if id.test != "" && !strings.Contains(id.test, "/") {
			list = append(list, entry{id, since})
		}
	}
	slices.SortFunc(list, func(a, b entry) int { return a.since.Compare(b.since) })
	for _, e := range list[:min(len(list), 4)] {
		r.show("      %s %s is running for %.0fs\n", short(e.id.pkg), e.id.test, now.Sub(e.since).Seconds())
	}
	r.last = now
}

// close shows what was skipped and what failed once more, and the closing line. It says whether the whole must count as failed.
func (r *report) close() bool {
	for _, c := range r.counts { // packages that never ended: the command died
		r.passed, r.failed, r.skipped = r.passed+c.passed, r.failed+c.failed, r.skipped+c.skipped
	}
	if len(r.skips) > 0 {
		fmt.Fprintf(r.w, "\nSkipped:\n%s", strings.Join(r.skips, ""))
	}
	if len(r.failures) > 0 {
		fmt.Fprint(r.w, "\nFailures:\n")
		for _, f := range r.failures {
			fmt.Fprintf(r.w, "FAIL  %s\n%s", f.id, indent(f.output))
		}
	}
	fmt.Fprintf(r.w, "%s\n", tally(r.passed, r.failed, r.skipped))
	return r.failed > 0 || r.passed == 0
}

func tally(passed, failed, skipped int) string {
	s := fmt.Sprintf("%d passed, %d failed", passed, failed)
	if skipped > 0 {
		s += fmt.Sprintf(", %d skipped", skipped)
	}
	return s
}

// reason finds what a skipped test gave as its reason: the last line that test2json did not make itself.
func reason(out string) string {
	why := "no reason given"
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "===") && !strings.HasPrefix(line, "---") {
			why = line
		}
	}
	return why
}

// indent indents text and drops the lines about the start of tests.
func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "=== ") {
			continue
		}
		b.WriteString("      " + strings.TrimRight(line, "\n") + "\n")
	}
	return b.String()
}

// short drops the module's path.
func short(pkg string) string { return strings.TrimPrefix(pkg, "github.com/kvmlet/kvmlet/") }
