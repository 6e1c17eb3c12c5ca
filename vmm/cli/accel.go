package cli

import (
	"fmt"

	"github.com/kvmlet/kvmlet/guest/lab"
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
	case accelKVM:
		return accelKVM, "", nil
	case accelLab:
		if lab.Inside() {
			return "", "", fmt.Errorf("--accel lab: %w", errNested)
		}
		return accelLab, "", nil
	case accelAuto:
		if err := kvm.CheckHardware(); err != nil {
			return accelLab, err.Error(), nil
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
