package tap

import (
	"testing"

	"github.com/kvmlet/kvmlet/guest/lab/labtest"
	"github.com/kvmlet/kvmlet/net/tap/taptest"
)

// TestMain runs the tests in a lab where this host does not let them have a network of their own.
func TestMain(m *testing.M) { labtest.MainWhere(m, taptest.Possible) }
