package kvm

import "fmt"

const nrGetEvents = 0x9f

// Events is struct kvm_vcpu_events: what is on its way to the guest's interrupt table, and what waits.
type Events struct {
	Exception struct { // 0
		Injected, Number, HasErrorCode, Pending uint8
		ErrorCode                               uint32
	}
	Interrupt  struct{ Injected, Number, Soft, Shadow uint8 }       // 8
	NMI        struct{ Injected, Pending, Masked, _ uint8 }         // 12
	SIPIVector uint32                                               // 16
	Flags      uint32                                               // 20
	SMI        struct{ SMM, Pending, InsideNMI, LatchedInit uint8 } // 24

	TripleFault         uint8     // 28: pending
	_                   [26]uint8 // 29
	ExceptionHasPayload uint8     // 55
	ExceptionPayload    uint64    // 56
}

// Injected reports whether the delivery of an event began and is to be completed at the next Run.
func (e *Events) Injected() bool {
	return e.Exception.Injected|e.Interrupt.Injected|e.NMI.Injected != 0
}

// Events returns the pending events (api.rst, 4.31).
func (v *VCPU) Events() (e Events, err error) {
	if err = ioctlPtr(v.fd, ior[Events](nrGetEvents), &e); err != nil {
		err = fmt.Errorf("KVM_GET_VCPU_EVENTS: %w", err)
	}
	return e, err
}
