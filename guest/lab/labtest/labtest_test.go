package labtest

import (
	"os"
	"testing"

	"github.com/kvmlet/kvmlet/guest/lab"
	"github.com/kvmlet/kvmlet/vmm/kvm"
)

func TestMain(m *testing.M) { Main(m) }

func TestRunsWhereKVMIsHardware(t *testing.T) {
	if err := kvm.CheckHardware(); err != nil {
		t.Error(err)
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(wd + "/labtest_test.go"); err != nil {
		t.Errorf("the package's folder is not the working directory: %v", err)
	}
	t.Logf("in a lab: %t", lab.Inside())
}
