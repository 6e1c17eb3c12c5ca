package kvm

import (
	"errors"
	"fmt"
)

// CheckHardware says why this host's KVM cannot run a stock Linux kernel, or nil if it can, as it does on a CPU's
// virtualization and in a lab. It is the one definition of that: what runs where KVM is hardware and in the lab elsewhere
// asks here. It tries, which takes about 20 ms, and 150 where KVM is software.
func CheckHardware() error {
	sys, err := Open()
	if err != nil {
		return errors.New("no KVM here")
	}
	defer sys.Close()
	return judge(sys.Missing(), sys.GuestSpeed)
}

// judge decides by what KVM lacks and how fast a guest is on it.
func judge(missing []string, measure func() (float64, error)) error {
	if len(missing) > 0 {
		return fmt.Errorf("this host's KVM lacks %s", missing[0])
	}
	speed, err := measure()
	switch {
	case err != nil:
		return errors.New("this host's KVM failed its self-test")
	case speed < SoftwareLimit:
		return errors.New("this host's KVM is software")
	default:
		return nil
	}
}
