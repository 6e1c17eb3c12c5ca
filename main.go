// Command kvmlet is a virtual machine monitor on KVM; see package vmm/cli and `kvmlet help`.
package main

import (
	"context"
	"os"
	"runtime"

	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/vmm/cli"
)

// minProcs is how many threads run Go code at a time, at least.
const minProcs = 8

func main() {
	if agent.IsInit() { // in a guest this same program is /init
		agent.Main()
	}
	if os.Getenv("GOMAXPROCS") == "" {
		// A thread in a system call, or in the guest, keeps one of these until the runtime takes it back, tens of
		// microseconds later: with few, disks and CPUs would wait for each other.
		runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), minProcs))
	}
	os.Exit(cli.Main(context.Background(), os.Args[1:]))
}
