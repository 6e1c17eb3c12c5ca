package legacy

import (
	"fmt"
	"sync/atomic"
)

// The places of the two reset registers.
const (
	// ResetPort is the chipset's reset control register. It lies within PCI's configuration address register (0xcf8 to
	// 0xcfb), which only answers to accesses of 4 bytes; this one only to single bytes.
	ResetPort = 0xcf9
	// FastPort is system control port A: A20 and the fast reset.
	FastPort = 0x92
)

// Bits of the two registers (Intel ICH9 data sheet, 13.7.3 RST_CNT and 13.7.2 PORT92).
const (
	resetFull   = 0x08 // power-cycles the machine
	resetSystem = 0x02 // the reset is a hard one
	resetCPU    = 0x04 // starts it
	fastReset   = 0x01
	fastA20     = 0x02
)

// ResetValue written to ResetPort resets the machine, for the FADT.
const ResetValue = resetCPU | resetSystem

// Reset is the two registers. Every kind of reset they know ends in the same callback. A20 is always on.
type Reset struct {
	reset   func()
	control atomic.Uint32 // ResetPort's other bits
}

// NewReset returns the registers. onReset is called for each reset that the guest asks for.
func NewReset(onReset func()) *Reset { return &Reset{reset: onReset} }

// ReadPort implements the bus's reads.
func (r *Reset) ReadPort(port uint16, p []byte) {
	for i := range p {
		switch port + uint16(i) {
		case ResetPort:
			p[i] = byte(r.control.Load())
		case FastPort:
			p[i] = fastA20
		default:
			p[i] = floating
		}
	}
}

// WritePort implements the bus's writes.
func (r *Reset) WritePort(port uint16, p []byte) {
	reset := false
	for i, b := range p {
		switch port + uint16(i) {
		case ResetPort:
			r.control.Store(uint32(b & (resetSystem | resetFull)))
			reset = reset || b&resetCPU != 0
		case FastPort:
			reset = reset || b&fastReset != 0
		}
	}
	if reset {
		r.reset()
	}
}

// State returns ResetPort's value. The vCPUs are paused.
func (r *Reset) State() byte { return byte(r.control.Load()) }

// Restore sets ResetPort's value without resetting anything.
func (r *Reset) Restore(control byte) error {
	if control&^byte(resetSystem|resetFull) != 0 {
		return fmt.Errorf("%w: reset control %#x", ErrBadState, control)
	}
	r.control.Store(uint32(control))
	return nil
}
