package legacy

import (
	"io"
	"sync"
)

// The places of the PC's first two serial ports: COM1 and COM2.
const (
	COM1Port = 0x3f8
	COM1IRQ  = 4
	COM2Port = 0x2f8
	COM2IRQ  = 3
	// SerialPorts is the number of ports a Serial takes.
	SerialPorts = 8
)

// Register offsets (PC16550D data sheet, table II).
const (
	regData = 0 // RBR on reads, THR on writes; divisor's low byte while DLAB is set
	regIER  = 1 // divisor's high byte while DLAB is set
	regIIR  = 2 // FCR on writes
	regLCR  = 3
	regMCR  = 4
	regLSR  = 5
	regMSR  = 6
	regSCR  = 7
)

// Register bits (PC16550D data sheet, section 8).
const (
	ierData   = 0x01 // received data
	ierTHRE   = 0x02 // transmitter empty
	ierLine   = 0x04 // receiver line status
	ierModem  = 0x08
	ierMask   = 0x0f
	iirNone   = 0x01
	iirModem  = 0x00
	iirTHRE   = 0x02
	iirData   = 0x04
	iirLine   = 0x06
	iirIdle   = 0x0c // data below the trigger level, and no more coming
	iirFIFO   = 0xc0
	fcrEnable = 0x01
	fcrReset  = 0x02 // receiver
	fcrDMA    = 0x08
	fcrLevel  = 0xc0
	lcrDLAB   = 0x80
	mcrDTR    = 0x01
	mcrRTS    = 0x02
	mcrOut1   = 0x04
	mcrOut2   = 0x08
	mcrLoop   = 0x10
	mcrMask   = 0x1f
	lsrData   = 0x01
	lsrOver   = 0x02 // overrun
	lsrEmpty  = 0x60 // THRE and TEMT
	msrTERI   = 0x04 // ring indicator fell
	msrDelta  = 0x0f
	msrCTS    = 0x10
	msrDSR    = 0x20
	msrRI     = 0x40
	msrDCD    = 0x80
)

const fifoSize = 16

// Serial is a 16550A UART (PC16550D data sheet) that moves bytes at once, whatever the divisor says.
//
// What the guest transmits goes to an io.Writer through a bounded buffer and a goroutine, so a vCPU never waits for the
// host. While the buffer is full the transmitter is not empty (LSR), as with a slow line: a driver that heeds that loses
// nothing; what is written all the same is dropped and counted.
//
// What the host sends with Write waits until the guest raises RTS and its FIFO has room. A driver raises RTS when it is
// ready to listen, so bytes sent to a booting guest are not lost in its driver's first reset of the FIFO.
//
// The interrupt line follows IIR whatever MCR's OUT2 says.
type Serial struct {
	base uint16
	irq  Line

	mu    sync.Mutex
	st    SerialState
	line  bool // level last given to irq
	empty bool // THRE: the output buffer takes a full FIFO
	host  serialHost
}

// NewSerial returns a serial port at base that transmits to w. With a nil w what the guest sends vanishes. A port with a
// writer has a goroutine, which Close ends.
func NewSerial(base uint16, w io.Writer, irq Line) *Serial {
	s := &Serial{base: base, irq: irq, empty: true}
	s.st.DLL = 12 // 9600 baud, what PC firmware leaves
	s.host.room.L = &s.mu
	if w != nil {
		s.startOutput(w)
	}
	return s
}

// ReadPort implements the bus's reads.
func (s *Serial) ReadPort(port uint16, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range p {
		p[i] = s.read(port + uint16(i) - s.base)
	}
	s.update()
}

// WritePort implements the bus's writes.
func (s *Serial) WritePort(port uint16, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, b := range p {
		s.write(port+uint16(i)-s.base, b)
	}
	s.update()
}

func (s *Serial) read(reg uint16) byte {
	dlab := s.st.LCR&lcrDLAB != 0
	switch reg {
	case regData:
		if dlab {
			return s.st.DLL
		}
		return s.receive()
	case regIER:
		if dlab {
			return s.st.DLM
		}
		return s.st.IER
	case regIIR:
		id := s.source()
		if id == iirTHRE {
			s.st.THREPending = false // reading the cause acknowledges this one cause
		}
		if s.st.FCR&fcrEnable != 0 {
			id |= iirFIFO
		}
		return id
	case regLCR:
		return s.st.LCR
	case regMCR:
		return s.st.MCR
	case regLSR:
		v := s.st.LSR
		s.st.LSR = 0
		if s.st.RXLen > 0 {
			v |= lsrData
		}
		if s.empty {
			v |= lsrEmpty
		}
		return v
	case regMSR:
		v := s.st.MSR | s.modemLines()
		s.st.MSR = 0
		return v
	case regSCR:
		return s.st.SCR
	}
	return floating
}

func (s *Serial) write(reg uint16, b byte) {
	dlab := s.st.LCR&lcrDLAB != 0
	switch reg {
	case regData:
		if dlab {
			s.st.DLL = b
			return
		}
		s.transmit(b)
	case regIER:
		if dlab {
			s.st.DLM = b
			return
		}
		// Enabling the transmitter's interrupt while it is empty raises it, each time: drivers kick off output this way.
		if (b^s.st.IER)&ierTHRE != 0 {
			s.st.THREPending = b&ierTHRE != 0 && s.empty
		}
		s.st.IER = b & ierMask
	case regIIR:
		s.writeFCR(b)
	case regLCR:
		s.st.LCR = b
	case regMCR:
		s.writeMCR(b)
	case regSCR:
		s.st.SCR = b
	}
}

// source returns the pending cause of highest priority, as IIR shows it.
func (s *Serial) source() byte {
	switch {
	case s.st.IER&ierLine != 0 && s.st.LSR != 0:
		return iirLine
	case s.st.IER&ierData != 0 && s.st.RXLen >= s.trigger():
		return iirData
	case s.st.IER&ierData != 0 && s.st.RXLen > 0:
		return iirIdle // the line is infinitely fast, so its idle time is over at once
	case s.st.IER&ierTHRE != 0 && s.st.THREPending:
		return iirTHRE
	case s.st.IER&ierModem != 0 && s.st.MSR != 0:
		return iirModem
	}
	return iirNone
}

// update brings the interrupt line to the level that the causes ask for.
func (s *Serial) update() {
	if level := s.source() != iirNone; level != s.line {
		s.line = level
		s.irq.set(level)
	}
}

// trigger is the number of received bytes that raise the data interrupt proper.
func (s *Serial) trigger() uint8 {
	if s.st.FCR&fcrEnable == 0 {
		return 1
	}
	return [4]uint8{1, 4, 8, 14}[s.st.FCR>>6]
}

// capacity is the number of bytes the receiver holds.
func (s *Serial) capacity() uint8 {
	if s.st.FCR&fcrEnable == 0 {
		return 1
	}
	return fifoSize
}

func (s *Serial) writeFCR(b byte) {
	if (b^s.st.FCR)&fcrEnable != 0 || b&(fcrEnable|fcrReset) == fcrEnable|fcrReset {
		s.st.RX, s.st.RXLen = [fifoSize]byte{}, 0 // changing the mode empties the FIFOs too
		s.host.room.Broadcast()
	}
	// The transmitter's FIFO has nothing to reset: bytes leave it as they come. Without the enable bit no other is taken.
	s.st.FCR = 0
	if b&fcrEnable != 0 {
		s.st.FCR = b & (fcrEnable | fcrDMA | fcrLevel)
	}
}

func (s *Serial) writeMCR(b byte) {
	before := s.modemLines()
	s.st.MCR = b & mcrMask
	after := s.modemLines()
	s.st.MSR |= (before ^ after) >> 4 &^ msrTERI & msrDelta
	if before&msrRI != 0 && after&msrRI == 0 {
		s.st.MSR |= msrTERI
	}
	s.host.room.Broadcast() // RTS may have risen
}

// modemLines returns the upper half of MSR: a peer that is always ready, or the port's own outputs in loopback.
func (s *Serial) modemLines() byte {
	if s.st.MCR&mcrLoop == 0 {
		return msrCTS | msrDSR | msrDCD
	}
	var v byte
	for _, l := range [...]struct{ out, in byte }{{mcrRTS, msrCTS}, {mcrDTR, msrDSR}, {mcrOut1, msrRI}, {mcrOut2, msrDCD}} {
		if s.st.MCR&l.out != 0 {
			v |= l.in
		}
	}
	return v
}

// receive takes the oldest byte out of the FIFO.
func (s *Serial) receive() byte {
	if s.st.RXLen == 0 {
		return 0
	}
	b := s.st.RX[0]
	copy(s.st.RX[:], s.st.RX[1:s.st.RXLen])
	s.st.RXLen--
	s.st.RX[s.st.RXLen] = 0
	if s.st.RXLen == 0 {
		// Not earlier: the guest's handler gets to an end between two fills, as it would on a line with a speed.
		s.host.room.Broadcast()
	}
	return b
}

func (s *Serial) transmit(b byte) {
	// The line falls before it rises again, so that a handler that only writes the next byte gets its next edge.
	s.st.THREPending = false
	s.update()
	if s.st.MCR&mcrLoop != 0 {
		s.loop(b)
	} else {
		s.output(b)
	}
	s.st.THREPending = s.empty
}

// loop receives a byte that the port sent to itself.
func (s *Serial) loop(b byte) {
	switch n := s.capacity(); {
	case s.st.RXLen < n:
		s.st.RX[s.st.RXLen] = b
		s.st.RXLen++
	case n == 1: // without FIFO the newer byte replaces the older
		s.st.RX[0] = b
		s.st.LSR |= lsrOver
	default:
		s.st.LSR |= lsrOver
	}
}
