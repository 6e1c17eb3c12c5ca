package guesttest_test

import (
	"os"
	"testing"

	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/guesttest"
)

func TestMain(m *testing.M) {
	if !agent.IsInit() && len(os.Args) > 2 && os.Args[1] == helperArg {
		helper(os.Args[2])
	}
	guesttest.Main(m)
}
