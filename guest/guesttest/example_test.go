package guesttest_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/kvmlet/kvmlet/guest/guesttest"
	"github.com/kvmlet/kvmlet/vmm"
)

// A test boots a guest, runs commands in it, and looks at what is left when it has powered off.
func Example() {
	var t *testing.T // the test's

	g := guesttest.Run(t, guesttest.Config{CPUs: 2, Disks: []vmm.Disk{{Path: "disk.img"}}})

	out, err := g.Command("nproc").Output()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("%s CPUs", out)

	var exit *guesttest.ExitError
	if err := g.Command("sh", "-c", "exit 3").Run(); errors.As(err, &exit) {
		fmt.Println("exit status", exit.Code)
	}

	if err := g.Poweroff(); err != nil { // only if the test goes on after the guest's end
		t.Fatal(err)
	}
}
