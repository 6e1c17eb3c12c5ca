package legacy

import (
	"bytes"
	"testing"
)

func newTestSerial(t testing.TB) (*Serial, *pin) {
	irq := &pin{t: t}
	return NewSerial(COM1Port, nil, irq.set), irq
}

func (s *Serial) get(reg uint16) byte    { return in(s, s.base+reg) }
func (s *Serial) put(reg uint16, b byte) { out(s, s.base+reg, b) }

// selfSend loops text through the port into its own receiver.
func (s *Serial) selfSend(text string) {
	s.put(regMCR, s.get(regMCR)|mcrLoop)
	for _, b := range []byte(text) {
		s.put(regData, b)
	}
}

func TestSerialAtReset(t *testing.T) {
	t.Parallel()
	s, irq := newTestSerial(t)
	for reg, want := range []byte{regData: 0, regIER: 0, regIIR: 1, regLCR: 0, regMCR: 0, regLSR: 0x60, regMSR: 0xb0, regSCR: 0} {
		wantByte(t, string(rune('0'+reg)), s.get(uint16(reg)), want)
	}
	irq.want(false, 0)
}

func TestSerialRegisters(t *testing.T) {
	t.Parallel()
	s, _ := newTestSerial(t)
	for _, r := range []struct {
		reg  uint16
		mask byte
	}{{regIER, 0x0f}, {regLCR, 0xff}, {regMCR, 0x1f}, {regSCR, 0xff}} {
		for _, v := range []byte{0xff, 0xaa, 0x55, 0} {
			s.put(regLCR, 0)
			s.put(r.reg, v)
			wantByte(t, "register", s.get(r.reg), v&r.mask)
		}
	}
	s.get(regMSR)
	for _, reg := range []uint16{regLSR, regMSR} {
		before := s.get(reg)
		s.put(reg, ^before)
		wantByte(t, "read-only register", s.get(reg), before)
	}

	s.put(regIER, 5)
	s.put(regLCR, lcrDLAB|3)
	s.put(regData, 0x34)
	s.put(regIER, 0x12)
	wantByte(t, "DLL", s.get(regData), 0x34)
	wantByte(t, "DLM", s.get(regIER), 0x12)
	s.put(regLCR, 3)
	wantByte(t, "IER behind DLM", s.get(regIER), 5)
	wantByte(t, "RBR behind DLL", s.get(regData), 0)
}

func TestSerialWideAccess(t *testing.T) {
	t.Parallel()
	s, _ := newTestSerial(t)
	s.WritePort(COM1Port+regLCR, []byte{3, 8})
	wantByte(t, "LCR", s.get(regLCR), 3)
	wantByte(t, "MCR", s.get(regMCR), 8)
	p := make([]byte, 4)
	s.ReadPort(COM1Port+regLCR, p)
	if want := []byte{3, 8, 0x60, 0xb0}; !bytes.Equal(p, want) {
		t.Errorf("read %x, want %x", p, want)
	}
	s.WritePort(COM1Port+regSCR, []byte{7, 1, 1, 1}) // three bytes beyond the port
	s.ReadPort(COM1Port+regSCR, p)
	if want := []byte{7, 0xff, 0xff, 0xff}; !bytes.Equal(p, want) {
		t.Errorf("read %x, want %x", p, want)
	}
	s.ReadPort(COM1Port-1, p[:2])
	if want := []byte{0xff, 0}; !bytes.Equal(p[:2], want) {
		t.Errorf("read %x, want %x", p[:2], want)
	}
}

// TestSerialLinuxProbe goes through what Linux's 8250 driver asks of a port before it calls it a plain 16550A.
func TestSerialLinuxProbe(t *testing.T) {
	t.Parallel()
	s, irq := newTestSerial(t)
	d := &Debug{}

	// Presence: the low half of IER is there, the high half is not; port 0x80 in between.
	s.put(regIER, 0)
	out(d, DebugPort, 0xff)
	wantByte(t, "IER cleared", s.get(regIER)&0x0f, 0)
	s.put(regIER, 0x0f)
	out(d, DebugPort, 0)
	wantByte(t, "IER set", s.get(regIER), 0x0f)
	s.put(regIER, 0)

	// Loopback: RTS and OUT2 come back as CTS and DCD.
	s.put(regMCR, mcrLoop|mcrOut2|mcrRTS)
	wantByte(t, "MSR in loopback", s.get(regMSR)&0xf0, 0x90)
	s.put(regMCR, 0)

	// Kind: a FIFO that works, and no scratch of a 16650 or later.
	s.put(regIIR, fcrEnable)
	wantByte(t, "FIFO bits", s.get(regIIR)>>6, 3)
	for _, lcr := range []byte{0x80, 0xbf, 0xe0} {
		s.put(regLCR, lcr)
		if s.get(regIIR) == 0 {
			t.Errorf("LCR %#x: register 2 reads like an EFR", lcr)
		}
	}
	s.put(regLCR, 0)
	s.put(regIIR, fcrEnable|0x20)
	wantByte(t, "no 64-byte FIFO", s.get(regIIR)>>5, 6)
	s.put(regIER, 0x40)
	wantByte(t, "no XScale unit enable", s.get(regIER), 0)

	// Start-up: the transmitter's interrupt comes back each time it is enabled.
	s.put(regIIR, 0)
	irq.want(false, 1) // the first is the 0x0f in IER above
	for i := range int32(2) {
		s.put(regIER, ierTHRE)
		irq.want(true, 2+i)
		wantByte(t, "IIR", s.get(regIIR), iirTHRE)
		irq.want(false, 2+i)
		wantByte(t, "IIR again", s.get(regIIR), iirNone)
		s.put(regIER, 0)
	}
}

func TestSerialTransmitInterrupt(t *testing.T) {
	t.Parallel()
	s, irq := newTestSerial(t)
	s.put(regData, 'a') // disabled: nothing
	irq.want(false, 0)
	s.put(regIER, ierTHRE)
	irq.want(true, 1)
	s.put(regIER, ierTHRE) // no change, no event
	irq.want(true, 1)
	wantByte(t, "LSR", s.get(regLSR), lsrEmpty) // reading LSR acknowledges nothing
	irq.want(true, 1)
	wantByte(t, "IIR", s.get(regIIR), iirTHRE)
	irq.want(false, 1)
	s.put(regData, 'b')
	irq.want(true, 2)
	s.put(regData, 'c') // a handler that does not read IIR gets an edge too
	irq.want(true, 3)
	s.put(regIER, 0)
	irq.want(false, 3)
	wantByte(t, "IIR disabled", s.get(regIIR), iirNone)

	// A cause of higher priority hides this one, and reading IIR then leaves it alone.
	s.put(regIER, ierTHRE|ierModem|ierData)
	s.selfSend("x")
	s.get(regMSR)
	wantByte(t, "IIR", s.get(regIIR), iirData)
	wantByte(t, "IIR", s.get(regIIR), iirData)
	wantByte(t, "RBR", s.get(regData), 'x')
	wantByte(t, "IIR", s.get(regIIR), iirTHRE)
	wantByte(t, "IIR", s.get(regIIR), iirNone)
}

func TestSerialPriorities(t *testing.T) {
	t.Parallel()
	s, irq := newTestSerial(t)
	s.put(regIER, ierMask)
	s.put(regMCR, mcrOut1) // a ring in loopback below ends as this goes away
	s.selfSend("12")       // without FIFO the second overruns the first
	s.put(regMCR, mcrLoop) // RI falls
	wantByte(t, "IIR", s.get(regIIR), iirLine)
	wantByte(t, "LSR", s.get(regLSR), lsrEmpty|lsrData|lsrOver)
	wantByte(t, "LSR again", s.get(regLSR), lsrEmpty|lsrData)
	wantByte(t, "IIR", s.get(regIIR), iirData)
	wantByte(t, "RBR", s.get(regData), '2')
	wantByte(t, "IIR", s.get(regIIR), iirTHRE)
	wantByte(t, "IIR", s.get(regIIR), iirModem)
	// CTS, DSR and DCD fell as loopback cut the peer off, and RI fell after it had risen.
	wantByte(t, "MSR", s.get(regMSR), 0x0f)
	irq.want(false, irq.rises.Load())
	wantByte(t, "IIR", s.get(regIIR), iirNone)
	wantByte(t, "MSR", s.get(regMSR), 0)
	s.put(regMCR, 0)
	wantByte(t, "IIR", s.get(regIIR), iirModem)
	wantByte(t, "MSR", s.get(regMSR), 0xbb)
	irq.want(false, irq.rises.Load())
}

func TestSerialTriggerLevels(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		fcr     byte
		trigger int
	}{{0x00, 1}, {0x01, 1}, {0x41, 4}, {0x81, 8}, {0xc1, 14}} {
		s, irq := newTestSerial(t)
		s.put(regIIR, tc.fcr)
		s.put(regIER, ierData)
		fifo := byte(0)
		if tc.fcr != 0 {
			fifo = iirFIFO
		}
		for n := 1; n <= tc.trigger; n++ {
			s.selfSend("x")
			want := byte(iirIdle)
			if n == tc.trigger {
				want = iirData
			}
			wantByte(t, "IIR", s.get(regIIR), fifo|want)
			irq.want(true, 1)
		}
		for range tc.trigger {
			irq.want(true, 1)
			s.get(regData)
		}
		irq.want(false, 1)
		wantByte(t, "IIR", s.get(regIIR), fifo|iirNone)
	}
}

func TestSerialFIFO(t *testing.T) {
	t.Parallel()
	s, _ := newTestSerial(t)
	drain := func() string {
		var b []byte
		for s.get(regLSR)&lsrData != 0 {
			b = append(b, s.get(regData))
		}
		return string(b)
	}
	s.put(regIIR, fcrEnable)
	s.selfSend("0123456789abcdefXY")
	wantByte(t, "LSR", s.get(regLSR), lsrEmpty|lsrData|lsrOver)
	if got := drain(); got != "0123456789abcdef" {
		t.Errorf("received %q", got)
	}

	// What empties it: the reset bit, and a change of mode; not the reset bit without enable, nor a repeated enable.
	for _, tc := range []struct {
		from, to byte
		want     string
	}{
		{fcrEnable, fcrEnable | fcrReset, ""},
		{fcrEnable, 0, ""},
		{0, fcrEnable, ""},
		{0, fcrReset, "x"},
		{fcrEnable, fcrEnable | 0xc0, "x"},
		{fcrEnable, fcrEnable | 4, "x"}, // the transmitter's
	} {
		s.put(regIIR, tc.from)
		s.selfSend("x")
		s.put(regIIR, tc.to)
		if got := drain(); got != tc.want {
			t.Errorf("FCR %#x to %#x: left %q, want %q", tc.from, tc.to, got, tc.want)
		}
	}
	wantByte(t, "RBR when empty", s.get(regData), 0)
}

func TestSerialModemLoopback(t *testing.T) {
	t.Parallel()
	s, _ := newTestSerial(t)
	s.put(regMCR, mcrLoop)
	s.get(regMSR)
	for _, tc := range []struct{ mcr, msr byte }{
		{mcrRTS, msrCTS | 1},
		{mcrRTS, msrCTS},
		{mcrDTR, msrDSR | 1 | 2},
		{mcrOut1, msrRI | 2}, // a ring that begins is no event
		{mcrOut2, msrDCD | 8 | 4},
		{0, 8},
	} {
		s.put(regMCR, mcrLoop|tc.mcr)
		wantByte(t, "MSR", s.get(regMSR), tc.msr)
	}
}

// TestSerialRestorePending saves ports with each kind of interrupt pending and expects it on a new one, once.
func TestSerialRestorePending(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		prepare func(s *Serial)
		id      byte
	}{
		{"transmitter", func(s *Serial) { s.put(regIER, ierTHRE); s.put(regData, 'x') }, iirTHRE},
		{"transmitter acknowledged", func(s *Serial) { s.put(regIER, ierTHRE); s.get(regIIR) }, iirNone},
		{"data", func(s *Serial) { s.put(regIER, ierData); s.selfSend("x") }, iirData},
		{"idle data", func(s *Serial) { s.put(regIER, ierData); s.put(regIIR, 0xc1); s.selfSend("xyz") }, iirIdle | iirFIFO},
		{"overrun", func(s *Serial) { s.put(regIER, ierLine); s.selfSend("xy") }, iirLine},
		{"modem", func(s *Serial) { s.put(regIER, ierModem); s.put(regMCR, mcrLoop) }, iirModem},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s, first := newTestSerial(t)
			tc.prepare(s)
			st := s.State()
			s2, irq := newTestSerial(t)
			if err := s2.Restore(st); err != nil {
				t.Fatal(err)
			}
			if got := s2.State(); got != st {
				t.Errorf("restored %+v, saved %+v", got, st)
			}
			if tc.id == iirNone {
				irq.want(false, 0)
			} else {
				irq.want(true, 1)
			}
			wantByte(t, "IIR", s2.get(regIIR), tc.id)

			// On a port whose line is high already the edge comes again.
			before := first.rises.Load()
			if err := s.Restore(st); err != nil {
				t.Fatal(err)
			}
			if first.level.Load() {
				before++
			}
			first.want(tc.id != iirNone, before)
		})
	}
}

func TestSerialRestoreRejects(t *testing.T) {
	t.Parallel()
	s, _ := newTestSerial(t)
	before := s.State()
	for name, st := range map[string]SerialState{
		"IER":            {IER: 0x10},
		"FCR bits":       {FCR: 0x03},
		"FCR off":        {FCR: 0xc0},
		"MCR":            {MCR: 0x20},
		"LSR":            {LSR: lsrData},
		"MSR":            {MSR: msrCTS},
		"RX without":     {RXLen: 2},
		"RX beyond FIFO": {FCR: fcrEnable, RXLen: 17},
	} {
		wantBadState(t, name, s.Restore(st))
	}
	if s.State() != before {
		t.Error("a bad state changed the port")
	}
	if err := s.Restore(SerialState{FCR: fcrEnable, RXLen: 16}); err != nil {
		t.Error(err)
	}
	s.selfSend("x") // finds no room
	wantByte(t, "LSR", s.get(regLSR), lsrEmpty|lsrData|lsrOver)
}

func TestSerialNoAllocations(t *testing.T) {
	s := NewSerial(COM1Port, discard{}, func(bool) {})
	defer s.Close(t.Context())
	s.put(regIER, ierTHRE|ierData)
	p := []byte{'x'}
	if n := testing.AllocsPerRun(5000, func() {
		s.WritePort(COM1Port, p)
		s.ReadPort(COM1Port+regIIR, p)
		s.ReadPort(COM1Port+regLSR, p)
		s.ReadPort(COM1Port+regMSR, p)
	}); n != 0 {
		t.Errorf("%v allocations for each byte sent", n)
	}
	s.put(regMCR, mcrRTS)
	s.put(regIIR, fcrEnable)
	text := []byte("sixteen bytes in")
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := s.Write(text); err != nil {
			t.Error(err)
		}
		for range text {
			s.ReadPort(COM1Port, p)
		}
	}); n != 0 {
		t.Errorf("%v allocations for 16 bytes received", n)
	}
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

func BenchmarkSerialTransmit(b *testing.B) {
	s := NewSerial(COM1Port, discard{}, func(bool) {})
	defer s.Close(b.Context())
	p := []byte{'x'}
	for b.Loop() {
		s.WritePort(COM1Port, p)
	}
}
