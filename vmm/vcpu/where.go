package vcpu

import (
	"fmt"

	"github.com/kvmlet/kvmlet/vmm/kvm"
)

// Where is where a vCPU stood when somebody looked.
type Where struct {
	RIP    uint64
	RFLAGS uint64
	CPL    uint8       // current privilege level
	Waits  kvm.MPState // for what, if it was not running
}

// flagIF is RFLAGS.IF: interrupts are on (Intel SDM volume 1, 3.4.3.3).
const flagIF = 1 << 9

// Deaf reports whether the vCPU ran in its kernel and took no interrupts.
func (w Where) Deaf() bool { return w.Waits == kvm.MPRunnable && w.CPL == 0 && w.RFLAGS&flagIF == 0 }

func (w Where) String() string {
	does := fmt.Sprintf("waits (state %d)", w.Waits)
	switch w.Waits {
	case kvm.MPRunnable:
		does = "runs"
	case kvm.MPUninitialized, kvm.MPInitReceived:
		return "has not been started"
	case kvm.MPHalted:
		does = "is halted"
	}
	return fmt.Sprintf("%s at RIP %#x, RFLAGS %#x, CPL %d", does, w.RIP, w.RFLAGS, w.CPL)
}

// Where tells where the vCPU stands. It must be paused.
func (v *VCPU) Where() (w Where, err error) {
	regs, err := v.kvm.Regs()
	if err != nil {
		return w, err
	}
	sregs, err := v.kvm.SRegs()
	if err != nil {
		return w, err
	}
	// The DPL of SS is the CPL (Intel SDM volume 3C, 24.4.1); that of CS need not be, in a conforming segment.
	w = Where{RIP: regs.RIP, RFLAGS: regs.RFLAGS, CPL: sregs.SS.DPL}
	w.Waits, err = v.kvm.MPState()
	return w, err
}
