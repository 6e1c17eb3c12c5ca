// Package legacy holds the PC devices that live on I/O ports: serial port, CMOS clock, keyboard controller, reset and
// power-management registers, the panic and the debug port.
//
// Every device has ReadPort and WritePort. The bus calls them with the absolute port and a slice of 1, 2 or 4 bytes, one
// call for each element of a string instruction, from any vCPU's goroutine; devices lock for themselves. An access wider
// than a register is taken as byte accesses to ascending ports, the way a PC's chipset splits it. A port or a byte that
// belongs to no register reads as 0xff and ignores writes, as an undriven bus would.
//
// Callbacks for events (reset, power-off, panic) run on the goroutine of the vCPU that caused them, with no lock held.
// They must return soon: the guest's instruction is not finished before.
//
// Device states can be exported and restored. A state is exported while the vCPUs are paused, and Restore checks what it
// is given as it would check guest input: a bad state changes nothing and answers ErrBadState.
package legacy

import "errors"

// ErrBadState reports a device state that no device of this package can have produced.
var ErrBadState = errors.New("legacy: invalid device state")

// Line sets the level of an interrupt line: true asserts it. A device calls it only when the level changes (and once or
// twice in Restore), in order, from any goroutine and with the device's lock held, so a Line must not call the device
// back. A nil Line is an unconnected pin.
type Line func(level bool)

func (l Line) set(level bool) {
	if l != nil {
		l(level)
	}
}

// floating is what a byte reads as where nothing drives the bus.
const floating = 0xff

// Debug is the POST code port, 0x80. Firmware and kernels write to it to mark progress or to waste a microsecond.
type Debug struct {
	// OnWrite, if not nil, sees each byte written: a cheap way for a guest to stamp its progress.
	OnWrite func(code byte)
}

// DebugPort is the port of Debug.
const DebugPort = 0x80

// ReadPort implements the bus's reads.
func (d *Debug) ReadPort(_ uint16, p []byte) {
	for i := range p {
		p[i] = floating
	}
}

// WritePort implements the bus's writes.
func (d *Debug) WritePort(port uint16, p []byte) {
	if d.OnWrite != nil && port == DebugPort && len(p) > 0 {
		d.OnWrite(p[0])
	}
}
