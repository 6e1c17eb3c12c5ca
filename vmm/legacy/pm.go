package legacy

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync"
	"time"
)

// The place of the power-management registers and, relative to it, of each block.
const (
	PMPort = 0x600
	PMIRQ  = 9
	// PMPorts is the number of ports a PM takes.
	PMPorts   = 12
	PMEvent   = 0 // PM1a_EVT_BLK, 4 bytes
	PMControl = 4 // PM1a_CNT_BLK, 2 bytes
	PMTimer   = 8 // PM_TMR_BLK, 4 bytes
)

// SleepOff is the sleep type that powers off: what the ACPI tables put into \_S5.
const SleepOff = 5

// PMFrequency is the power-management timer's, in Hz (ACPI 6.4, 4.8.3.3).
const PMFrequency = 3579545

// Bits of the fixed hardware (ACPI 6.4, tables 4.11 to 4.13).
const (
	pmTimer   = 1 << 0 // status and enable
	pmGlobal  = 1 << 5
	pmButton  = 1 << 8
	pmRTC     = 1 << 10                       // the alarm can be enabled; it comes by the RTC's own interrupt
	pmEvents  = pmTimer | pmButton            // what can happen here
	pmEnables = pmEvents | pmGlobal | pmRTC   // what can be enabled
	pmSCI     = 1 << 0                        // control: the machine is in ACPI mode
	pmKept    = 1<<1 | pmSleepType<<pmTypeBit // control: BM_RLD and SLP_TYP
	pmSleep   = 1 << 13                       // control: enter the sleep state now
	pmTypeBit = 10

	pmSleepType = 7
)

// PM is ACPI's fixed hardware: events and control of PM1a, and a 32-bit timer. The machine is always in ACPI mode, so
// SCI_EN reads 1 and there is no command to switch; no interrupt comes before the guest enables an event. There are no
// general-purpose events.
type PM struct {
	base  uint16
	irq   Line
	off   func()
	clock func() time.Time
	start time.Time

	mu     sync.Mutex
	st     PMState // Ticks: at start
	seen   uint64  // the count up to which the status tells of the timer
	line   bool
	timer  *time.Timer // runs while the guest wants the timer's interrupt; nil until first needed
	closed bool
}

// PMState is what a guest can know of a PM.
type PMState struct {
	Status  uint16
	Enable  uint16
	Control uint16 // without SCI_EN and SLP_EN
	// Ticks is the timer's count, of which the guest sees 32 bits. It stands still while a state is kept.
	Ticks uint64
}

// NewPM returns the registers at base. onPowerOff is called when the guest enters S5. clock gives the host's time, which
// should be monotonic; nil means time.Now.
func NewPM(base uint16, clock func() time.Time, irq Line, onPowerOff func()) *PM {
	if clock == nil {
		clock = time.Now
	}
	return &PM{base: base, irq: irq, off: onPowerOff, clock: clock, start: clock()}
}

// ReadPort implements the bus's reads.
func (m *PM) ReadPort(port uint16, p []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.advance() {
		m.update()
	}
	var regs [PMPorts]byte
	binary.LittleEndian.PutUint16(regs[PMEvent:], m.st.Status)
	binary.LittleEndian.PutUint16(regs[PMEvent+2:], m.st.Enable)
	binary.LittleEndian.PutUint16(regs[PMControl:], m.st.Control|pmSCI)
	binary.LittleEndian.PutUint32(regs[PMTimer:], uint32(m.seen))
	for i := range p {
		p[i] = floating
		if reg := int(port + uint16(i) - m.base); reg < len(regs) {
			p[i] = regs[reg]
		}
	}
}

// WritePort implements the bus's writes.
func (m *PM) WritePort(port uint16, p []byte) {
	m.mu.Lock()
	m.advance()
	off := false
	for i, b := range p {
		v := uint16(b)
		switch port + uint16(i) - m.base {
		case PMEvent:
			m.st.Status &^= v // a 1 clears
		case PMEvent + 1:
			m.st.Status &^= v << 8
		case PMEvent + 2:
			m.st.Enable = m.st.Enable&0xff00 | v&pmEnables
		case PMEvent + 3:
			m.st.Enable = m.st.Enable&0x00ff | v<<8&pmEnables
		case PMControl:
			m.st.Control = m.st.Control&0xff00 | v&pmKept
		case PMControl + 1:
			v <<= 8
			m.st.Control = m.st.Control&0x00ff | v&pmKept
			// Other sleep states are not announced, so asking for one means nothing.
			off = off || v&pmSleep != 0 && v>>pmTypeBit&pmSleepType == SleepOff
		}
	}
	m.update()
	m.mu.Unlock()
	if off {
		m.off()
	}
}

// PressPowerButton reports a press of the power button to the guest, and whether the guest listens for it. Any goroutine
// may call it; after Close nobody listens.
func (m *PM) PressPowerButton() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false
	}
	m.st.Status |= pmButton
	m.update()
	return m.st.Enable&pmButton != 0
}

// ticks returns the timer's count now.
func (m *PM) ticks() uint64 {
	d := max(m.clock().Sub(m.start), 0)
	hi, lo := bits.Mul64(uint64(d), PMFrequency)
	n, _ := bits.Div64(hi, lo, uint64(time.Second))
	return m.st.Ticks + n
}

// advance notes the timer's event, a change of its highest bit, and says whether there was one since it was last called.
func (m *PM) advance() bool {
	was := m.seen
	m.seen = m.ticks()
	if was>>31 == m.seen>>31 {
		return false
	}
	m.st.Status |= pmTimer
	return true
}

// update brings the interrupt line up to date, and the timer to the count's next event. After Close it does neither.
func (m *PM) update() {
	if m.closed {
		return
	}
	if level := m.st.Status&m.st.Enable&pmEvents != 0; level != m.line {
		m.line = level
		m.irq.set(level)
	}
	if m.timer != nil {
		m.timer.Stop()
	}
	if m.st.Enable&pmTimer == 0 || m.line {
		return
	}
	left := 1<<31 - m.seen&(1<<31-1)
	wait := time.Duration(left*uint64(time.Second)/PMFrequency + 1)
	if m.timer == nil {
		m.timer = time.AfterFunc(wait, m.expire)
	} else {
		m.timer.Reset(wait)
	}
}

// expire is the timer's function.
func (m *PM) expire() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.advance()
	m.update()
}

// State returns the registers. The vCPUs are paused.
func (m *PM) State() PMState {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.advance()
	m.update()
	st := m.st
	st.Ticks = m.seen
	return st
}

// Restore sets the registers; the timer goes on from where it stood. The vCPUs are paused, and the interrupt controller
// is restored already: the line is lowered and, if an event is pending, raised again.
func (m *PM) Restore(st PMState) error {
	if st.Status&^pmEvents != 0 || st.Enable&^pmEnables != 0 || st.Control&^pmKept != 0 {
		return fmt.Errorf("%w: PM status %#x, enable %#x, control %#x", ErrBadState, st.Status, st.Enable, st.Control)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.st, m.seen = st, st.Ticks
	m.start = m.clock()
	m.line = false
	m.irq.set(false)
	m.update()
	return nil
}

// Close stops the timer for good. The registers keep answering the guest; the interrupt line stays as it is.
func (m *PM) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	if m.timer != nil {
		m.timer.Stop() // one that has expired finds the PM closed
	}
	return nil
}
