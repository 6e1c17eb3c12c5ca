// Command kvmlet is a virtual machine monitor on KVM; see package vmm/cli and `kvmlet help`.
package main

import (
	"context"
	"os"

	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/vmm/cli"
)

func main() {
	if agent.IsInit() { // in a guest this same program is /init
		agent.Main()
	}
	os.Exit(cli.Main(context.Background(), os.Args[1:]))
}
