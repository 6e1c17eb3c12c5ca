// Command pid1 is a guest's init and nothing else: what a test's lab boots from.
package main

import (
	"log"

	"github.com/kvmlet/kvmlet/guest/agent"
)

func main() {
	if !agent.IsInit() {
		log.Fatal("pid1 is a guest's init, not a command to be run")
	}
	agent.Main()
}
