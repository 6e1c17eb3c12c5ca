package pci

import "sync"

// Bits of the ISR status (virtio 1.2, 4.1.4.5).
const (
	isrQueue  = 1 << 0
	isrConfig = 1 << 1
)

// line is the interrupt line and the ISR status that drives it.
type line struct {
	set func(asserted bool) error

	mu     sync.Mutex
	isr    uint8
	masked bool // MSI-X is enabled, or the command register disables the line
	level  bool // as last set
}

// raise sets bits of the ISR status.
func (l *line) raise(bits uint8) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.isr |= bits
	return l.drive()
}

// read returns the ISR status and clears it, which deasserts the line (virtio 1.2, 4.1.4.5.1).
func (l *line) read() uint8 {
	l.mu.Lock()
	defer l.mu.Unlock()
	isr := l.isr
	l.isr = 0
	_ = l.drive()
	return isr
}

// clear is read for a reset.
func (l *line) clear() { l.read() }

// mask takes the line down, or lets the ISR status drive it again.
func (l *line) mask(masked bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.masked = masked
	_ = l.drive()
}

// pending reports whether the ISR status asks for an interrupt.
func (l *line) pending() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.isr != 0
}

// drive sets the line as the ISR status wants it. The caller holds mu, so that levels arrive in order. After an error
// the next change tries again.
func (l *line) drive() error {
	level := l.isr != 0 && !l.masked
	if level == l.level {
		return nil
	}
	if err := l.set(level); err != nil {
		return err
	}
	l.level = level
	return nil
}
