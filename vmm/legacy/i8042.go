package legacy

import (
	"fmt"
	"sync"
)

// The place of the keyboard controller: one port for data, one for commands and status, and what lies between them is
// not its own (0x61 is the timer's and the speaker's).
const (
	I8042DataPort    = 0x60
	I8042CommandPort = 0x64
	I8042IRQ         = 1
)

// Bits and codes of the controller (IBM PS/2 Hardware Interface Technical Reference, "Keyboard and auxiliary device
// controller").
const (
	kbdFull      = 0x01 // status: the output buffer holds a byte
	kbdSystem    = 0x04 // status and configuration: the self-test passed
	kbdCommand   = 0x08 // status: the last write was a command
	kbdUnlocked  = 0x10 // status
	kbdTimeout   = 0x40 // status: the keyboard did not answer
	kbdInterrupt = 0x01 // configuration
	kbdOff       = 0x10 // configuration: keyboard disabled
	kbdAuxOff    = 0x20 // configuration: mouse disabled
	kbdTranslate = 0x40 // configuration

	kbdTestPassed = 0x55
	kbdNoMouse    = 0x02 // answer to the test of the mouse's interface: its clock line is stuck
	kbdResend     = 0xfe // what the controller puts in a missing device's mouth

	kbdReadConfig  = 0x20
	kbdWriteConfig = 0x60
	kbdMouseOff    = 0xa7
	kbdMouseOn     = 0xa8
	kbdMouseTest   = 0xa9
	kbdSelfTest    = 0xaa
	kbdTest        = 0xab
	kbdDisable     = 0xad
	kbdEnable      = 0xae
	kbdReadInput   = 0xc0
	kbdReadOutput  = 0xd0
	kbdWriteOutput = 0xd1
	kbdEcho        = 0xd2
	kbdMouseEcho   = 0xd3
	kbdMouseWrite  = 0xd4
	kbdPulse       = 0xf0 // to 0xff: the low bits that are clear name the output lines to pulse

	kbdOutputReset = 0x01 // output port, active low
	kbdOutputA20   = 0x02
)

// I8042 is a keyboard controller without keyboard or mouse. It answers the probes of kernels that look for it, so that
// none waits for a time-out, and it resets the machine. The ACPI tables do not announce it: kernels with ACPI do not
// probe at all, and still find the reset.
type I8042 struct {
	irq   Line
	reset func()

	mu   sync.Mutex
	st   I8042State
	line bool
}

// I8042State is what a guest can know of an I8042.
type I8042State struct {
	Config  byte
	Status  byte
	Output  byte // the byte that waits to be read, while Status says so
	Command byte // the command that waits for its data byte, or 0
}

// NewI8042 returns a controller. onReset is called for each reset that the guest asks for.
func NewI8042(irq Line, onReset func()) *I8042 {
	return &I8042{irq: irq, reset: onReset, st: I8042State{
		Config: kbdSystem | kbdOff | kbdAuxOff | kbdTranslate,
		Status: kbdSystem | kbdUnlocked,
	}}
}

// ReadPort implements the bus's reads.
func (k *I8042) ReadPort(port uint16, p []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := range p {
		switch port + uint16(i) {
		case I8042DataPort:
			k.st.Status &^= kbdFull | kbdTimeout
			p[i] = k.st.Output
		case I8042CommandPort:
			p[i] = k.st.Status
		default:
			p[i] = floating
		}
	}
	k.update()
}

// WritePort implements the bus's writes.
func (k *I8042) WritePort(port uint16, p []byte) {
	k.mu.Lock()
	reset := false
	for i, b := range p {
		switch port + uint16(i) {
		case I8042DataPort:
			reset = k.data(b) || reset
		case I8042CommandPort:
			reset = k.command(b) || reset
		}
	}
	k.update()
	k.mu.Unlock()
	if reset {
		k.reset()
	}
}

// command and data execute one write and say whether it resets the machine.
func (k *I8042) command(b byte) (reset bool) {
	k.st.Status |= kbdCommand
	k.st.Command = 0
	switch b {
	case kbdReadConfig:
		k.answer(k.st.Config)
	case kbdWriteConfig, kbdWriteOutput, kbdEcho, kbdMouseEcho, kbdMouseWrite:
		k.st.Command = b
	case kbdMouseOff:
		k.st.Config |= kbdAuxOff
	case kbdMouseOn:
		k.st.Config &^= kbdAuxOff
	case kbdMouseTest:
		k.answer(kbdNoMouse)
	case kbdSelfTest:
		k.st.Config |= kbdSystem
		k.st.Status |= kbdSystem
		k.answer(kbdTestPassed)
	case kbdTest:
		k.answer(0)
	case kbdDisable:
		k.st.Config |= kbdOff
	case kbdEnable:
		k.st.Config &^= kbdOff
	case kbdReadInput:
		k.answer(0)
	case kbdReadOutput:
		k.answer(kbdOutputReset | kbdOutputA20)
	default:
		return b >= kbdPulse && b&kbdOutputReset == 0
	}
	return false
}

func (k *I8042) data(b byte) (reset bool) {
	k.st.Status &^= kbdCommand
	cmd := k.st.Command
	k.st.Command = 0
	switch cmd {
	case kbdWriteConfig:
		k.st.Config = b
		k.st.Status = k.st.Status&^kbdSystem | b&kbdSystem
	case kbdWriteOutput:
		return b&kbdOutputReset == 0 // A20 is always on
	case kbdEcho, kbdMouseEcho: // both come back as the keyboard's, which tells a probe that there is no mouse
		k.answer(b)
	default: // for the keyboard or the mouse
		k.answer(kbdResend)
		k.st.Status |= kbdTimeout
	}
	return false
}

func (k *I8042) answer(b byte) {
	k.st.Output = b
	k.st.Status = k.st.Status&^kbdTimeout | kbdFull
}

func (k *I8042) update() {
	if level := k.st.Status&kbdFull != 0 && k.st.Config&kbdInterrupt != 0; level != k.line {
		k.line = level
		k.irq.set(level)
	}
}

// State returns the registers. The vCPUs are paused.
func (k *I8042) State() I8042State {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.st
}

// Restore sets the registers. The vCPUs are paused, and the interrupt controller is restored already: the line is
// lowered and, if a byte waits, raised again.
func (k *I8042) Restore(st I8042State) error {
	if st.Status&^byte(kbdFull|kbdSystem|kbdCommand|kbdTimeout) != kbdUnlocked {
		return fmt.Errorf("%w: i8042 status %#x", ErrBadState, st.Status)
	}
	switch st.Command {
	case 0, kbdWriteConfig, kbdWriteOutput, kbdEcho, kbdMouseEcho, kbdMouseWrite:
	default:
		return fmt.Errorf("%w: i8042 command %#x takes no data", ErrBadState, st.Command)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.st = st
	k.line = false
	k.irq.set(false)
	k.update()
	return nil
}
