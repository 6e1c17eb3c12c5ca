package labtest

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/kvmlet/kvmlet/guest/lab"
)

// MainWhere is Main for tests that need something else of their host than KVM, such as rights: possible tries it and says
// what is missing. With a nil error the tests run in this process, and otherwise in a lab, which has everything.
func MainWhere(m *testing.M, possible func() error) {
	if !flag.Parsed() {
		flag.Parse()
	}
	if value("test.list") != "" {
		os.Exit(m.Run())
	}
	missing := possible()
	if missing == nil || lab.Inside() { // there the tests themselves say what is wrong
		os.Exit(m.Run())
	}
	fmt.Fprintf(os.Stderr, "lab: the tests run in a lab, as this host lacks what they need: %v\n", missing)
	code, err := runInLab()
	if err != nil {
		fmt.Fprintf(os.Stderr, "run the tests in a lab: %v\n", err)
		code = max(code, 1)
	}
	os.Exit(code)
}
