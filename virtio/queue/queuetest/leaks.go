package queuetest

import (
	"testing"

	"github.com/kvmlet/kvmlet/guest/hosttest"
)

// Leaks is hosttest.Leaks with the patience that all waiting here has.
func Leaks(tb testing.TB) (check func()) {
	tb.Helper()
	return hosttest.Leaks(tb, Timeout)
}
