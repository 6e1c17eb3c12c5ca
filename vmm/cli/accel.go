package cli

import (
	"fmt"

	"github.com/kvmlet/kvmlet/vmm/kvm"
)

// The values of --accel.
const (
	accelAuto = "auto"
	accelKVM  = "kvm"
	accelLab  = "lab"
)

// chooseAccel decides where VMs run. For auto it tries this host's KVM, and when that will not do, why says so.
func chooseAccel(accel string) (chosen, why string, err error) {
	switch accel {
	case accelKVM, accelLab:
		return accel, "", nil
	case accelAuto:
		if why := unfit(); why != "" {
			return accelLab, why, nil
		}
		return accelKVM, "", nil
	default:
		return "", "", fmt.Errorf("--accel %s: want auto, kvm or lab", accel)
	}
}

// haveKVM reports why there is no KVM here.
func haveKVM() error {
	sys, err := kvm.Open()
	if err != nil {
		return err
	}
	return sys.Close()
}

// unfit says why this host's KVM cannot run a stock Linux kernel, or nothing if it can.
func unfit() string {
	sys, err := kvm.Open()
	if err != nil {
		return "no KVM here"
	}
	defer sys.Close()
	if m := sys.Missing(); len(m) > 0 {
		return fmt.Sprintf("this host's KVM lacks %s", m[0])
	}
	speed, err := sys.GuestSpeed()
	switch {
	case err != nil:
		return "this host's KVM failed its self-test"
	case speed < kvm.SoftwareLimit:
		return "this host's KVM is software"
	default:
		return ""
	}
}
