package legacy

import (
	"errors"
	"sync/atomic"
	"testing"
)

// device is what the bus sees of every device here.
type device interface {
	ReadPort(port uint16, p []byte)
	WritePort(port uint16, p []byte)
}

var _ = []device{(*Serial)(nil), (*RTC)(nil), (*I8042)(nil), (*Reset)(nil), (*PM)(nil), (*Pvpanic)(nil), (*Debug)(nil)}

func in(d device, port uint16) byte {
	var p [1]byte
	d.ReadPort(port, p[:])
	return p[0]
}

func out(d device, port uint16, b byte) { d.WritePort(port, []byte{b}) }

// pin is the far end of a Line. It counts edges. Only Restore may lower a line that is low.
type pin struct {
	t     testing.TB
	level atomic.Bool
	rises atomic.Int32
}

func (p *pin) set(level bool) {
	if old := p.level.Swap(level); old && level {
		p.t.Error("line raised twice")
	}
	if level {
		p.rises.Add(1)
	}
}

func (p *pin) want(level bool, rises int32) {
	p.t.Helper()
	if p.level.Load() != level || p.rises.Load() != rises {
		p.t.Errorf("line is %v after %d rises, want %v after %d", p.level.Load(), p.rises.Load(), level, rises)
	}
}

func wantByte(t testing.TB, what string, got, want byte) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %#02x, want %#02x", what, got, want)
	}
}

func wantBadState(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, ErrBadState) {
		t.Errorf("%s: error %v, want ErrBadState", what, err)
	}
}

func TestNilLine(t *testing.T) {
	t.Parallel()
	s := NewSerial(COM1Port, nil, nil)
	out(s, COM1Port+regIER, ierTHRE)
	wantByte(t, "IIR", in(s, COM1Port+regIIR), iirTHRE)
}

func TestDebugPort(t *testing.T) {
	t.Parallel()
	var codes []byte
	d := &Debug{OnWrite: func(b byte) { codes = append(codes, b) }}
	out(d, DebugPort, 0x40)
	d.WritePort(DebugPort, []byte{0x41, 1, 2, 3})
	d.WritePort(DebugPort, nil)
	out(d, DebugPort+1, 9)
	if string(codes) != "\x40\x41" {
		t.Errorf("codes %x", codes)
	}
	wantByte(t, "read", in(d, DebugPort), 0xff)
	out(&Debug{}, DebugPort, 1)
}

func TestReset(t *testing.T) {
	t.Parallel()
	n := 0
	r := NewReset(func() { n++ })
	for _, step := range []struct {
		port   uint16
		p      []byte
		resets int
	}{
		{ResetPort, []byte{resetSystem}, 0}, // names the kind, does not start it
		{ResetPort, []byte{ResetValue}, 1},
		{ResetPort, []byte{resetCPU}, 1},
		{ResetPort, []byte{resetCPU | resetSystem | resetFull}, 1},
		{ResetPort, []byte{0xf1}, 0},
		{FastPort, []byte{fastA20}, 0},
		{FastPort, []byte{fastA20 | fastReset}, 1},
		{FastPort - 1, []byte{0, fastReset}, 1},
		{ResetPort - 1, []byte{0, ResetValue, 0, 0}, 1},
		{ResetPort + 1, []byte{0xff}, 0},
	} {
		n = 0
		r.WritePort(step.port, step.p)
		if n != step.resets {
			t.Errorf("write %#x to %#x: %d resets, want %d", step.p, step.port, n, step.resets)
		}
	}
	out(r, ResetPort, 0xfb)
	wantByte(t, "control", in(r, ResetPort), resetSystem|resetFull)
	wantByte(t, "port A", in(r, FastPort), fastA20)
	wantByte(t, "neighbour", in(r, ResetPort+1), 0xff)

	other := NewReset(func() { t.Error("restore resets") })
	if err := other.Restore(r.State()); err != nil || other.State() != resetSystem|resetFull {
		t.Errorf("restored %#x, %v", other.State(), err)
	}
	wantBadState(t, "control", other.Restore(resetCPU))
}

func TestPvpanic(t *testing.T) {
	t.Parallel()
	var got []PanicEvent
	d := NewPvpanic(PvpanicPort, func(e PanicEvent) { got = append(got, e) })
	wantByte(t, "events", in(d, PvpanicPort), 3)
	wantByte(t, "neighbour", in(d, PvpanicPort+1), 0xff)
	out(d, PvpanicPort, byte(GuestPanicked))
	out(d, PvpanicPort, byte(GuestCrashLoaded)|0xf0)
	out(d, PvpanicPort, 0xfc)
	out(d, PvpanicPort+1, 1)
	if len(got) != 2 || got[0] != GuestPanicked || got[1] != GuestCrashLoaded {
		t.Errorf("events %v", got)
	}
}

func TestI8042(t *testing.T) {
	t.Parallel()
	irq := &pin{t: t}
	resets := 0
	k := NewI8042(irq.set, func() { resets++ })
	cmd := func(b byte) { out(k, I8042CommandPort, b) }
	data := func(b byte) { out(k, I8042DataPort, b) }
	status := func() byte { return in(k, I8042CommandPort) }
	answer := func(what string, want byte) {
		t.Helper()
		if status()&kbdFull == 0 {
			t.Errorf("%s: no answer", what)
		}
		wantByte(t, what, in(k, I8042DataPort), want)
		if status()&kbdFull != 0 {
			t.Errorf("%s: more than one byte", what)
		}
	}

	wantByte(t, "status at start", status(), kbdSystem|kbdUnlocked)
	cmd(kbdSelfTest)
	wantByte(t, "status after a command", status(), kbdSystem|kbdUnlocked|kbdCommand|kbdFull)
	answer("self-test", 0x55)
	cmd(kbdTest)
	answer("keyboard interface test", 0)
	cmd(kbdMouseTest)
	answer("mouse interface test", kbdNoMouse)
	cmd(kbdReadInput)
	answer("input port", 0)
	cmd(kbdReadOutput)
	answer("output port", 3)

	cmd(kbdReadConfig)
	answer("configuration at start", 0x74)
	cmd(kbdEnable)
	cmd(kbdMouseOn)
	cmd(kbdReadConfig)
	answer("configuration, both on", 0x44)
	cmd(kbdDisable)
	cmd(kbdMouseOff)
	cmd(kbdWriteConfig)
	data(0x70)
	wantByte(t, "status after data", status(), kbdUnlocked)
	cmd(kbdReadConfig)
	answer("configuration written", 0x70)

	// A probe for a mouse: what comes back is marked as the keyboard's.
	cmd(kbdMouseEcho)
	data(0x5a)
	wantByte(t, "status after the mouse's echo", status(), kbdUnlocked|kbdFull)
	answer("mouse's echo", 0x5a)

	irq.want(false, 0)
	cmd(kbdWriteConfig)
	data(kbdInterrupt)
	data(0xf2) // keyboard, who are you?
	irq.want(true, 1)
	wantByte(t, "status without keyboard", status(), kbdUnlocked|kbdFull|kbdTimeout)

	// The waiting byte and its interrupt survive.
	irq2 := &pin{t: t}
	k2 := NewI8042(irq2.set, func() {})
	if err := k2.Restore(k.State()); err != nil {
		t.Fatal(err)
	}
	irq2.want(true, 1)
	if k2.State() != k.State() {
		t.Errorf("restored %+v, saved %+v", k2.State(), k.State())
	}

	answer("missing keyboard", kbdResend)
	irq.want(false, 1)
	cmd(kbdMouseWrite)
	data(0xff)
	answer("missing mouse", kbdResend)
	irq.want(false, 2)

	for _, b := range []byte{0xfe, 0xf0, 0xfc} {
		cmd(b)
	}
	if resets != 3 {
		t.Errorf("%d resets by pulse, want 3", resets)
	}
	cmd(0xff)
	cmd(0xfd)
	cmd(kbdWriteOutput)
	data(kbdOutputReset)
	if resets != 3 {
		t.Errorf("%d resets after writes that leave the line alone, want 3", resets)
	}
	cmd(kbdWriteOutput)
	data(0)
	if resets != 4 {
		t.Errorf("%d resets after the output port's, want 4", resets)
	}
	wantByte(t, "port between", in(k, 0x61), 0xff)

	wantBadState(t, "status", k.Restore(I8042State{Status: 0xff}))
	wantBadState(t, "command", k.Restore(I8042State{Status: kbdUnlocked, Command: 0xfe}))
}
