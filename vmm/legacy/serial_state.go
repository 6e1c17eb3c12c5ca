package legacy

import "fmt"

// SerialState is what a guest can know of a Serial. Bytes under way on the host's side do not belong to it: call Flush
// before saving.
type SerialState struct {
	IER, FCR, LCR, MCR, SCR byte
	DLL, DLM                byte
	LSR                     byte // error bits not read yet; the others follow from the rest
	MSR                     byte // delta bits not read yet
	RX                      [fifoSize]byte
	RXLen                   uint8 // bytes in RX; at most 1 while the FIFO is off
	THREPending             bool  // the transmitter's interrupt was raised and not acknowledged
}

// State returns the registers. The vCPUs are paused.
func (s *Serial) State() SerialState {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.st
	// A transmitter that waits for the host starts empty where the state is restored, and that is an event.
	st.THREPending = st.THREPending || !s.empty
	return st
}

// Restore sets the registers. The vCPUs are paused, and the interrupt controller is restored already: the line is
// lowered and, if a cause is pending, raised again, so that an edge cannot get lost between the two.
func (s *Serial) Restore(st SerialState) error {
	if err := st.check(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.st = st
	clear(s.st.RX[st.RXLen:])
	s.line = false
	s.irq.set(false)
	s.update()
	s.host.room.Broadcast()
	return nil
}

func (st *SerialState) check() error {
	size := uint8(1)
	if st.FCR&fcrEnable != 0 {
		size = fifoSize
	}
	switch {
	case st.IER&^byte(ierMask) != 0:
		return fmt.Errorf("%w: serial IER %#x", ErrBadState, st.IER)
	case st.FCR&^byte(fcrEnable|fcrDMA|fcrLevel) != 0 || st.FCR != 0 && st.FCR&fcrEnable == 0:
		return fmt.Errorf("%w: serial FCR %#x", ErrBadState, st.FCR)
	case st.MCR&^byte(mcrMask) != 0:
		return fmt.Errorf("%w: serial MCR %#x", ErrBadState, st.MCR)
	case st.LSR&^byte(lsrOver) != 0:
		return fmt.Errorf("%w: serial line errors %#x", ErrBadState, st.LSR)
	case st.MSR&^byte(msrDelta) != 0:
		return fmt.Errorf("%w: serial modem changes %#x", ErrBadState, st.MSR)
	case st.RXLen > size:
		return fmt.Errorf("%w: serial holds %d received bytes, its size is %d", ErrBadState, st.RXLen, size)
	}
	return nil
}
