package legacy

import (
	"encoding/binary"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func (m *PM) get(reg uint16, n int) uint32 {
	p := make([]byte, 4)
	m.ReadPort(m.base+reg, p[:n])
	return binary.LittleEndian.Uint32(p)
}

func (m *PM) put(reg uint16, n int, v uint32) {
	p := make([]byte, 4)
	binary.LittleEndian.PutUint32(p, v)
	m.WritePort(m.base+reg, p[:n])
}

func newTestPM(t testing.TB) (*PM, *pin) {
	irq := &pin{t: t}
	return NewPM(PMPort, nil, irq.set, func() { t.Error("powered off") }), irq
}

func wantReg(t *testing.T, what string, got, want uint32) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %#x, want %#x", what, got, want)
	}
}

func TestPMRegisters(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, _ := newTestPM(t)
		wantReg(t, "events", m.get(PMEvent, 4), 0)
		wantReg(t, "control", m.get(PMControl, 2), pmSCI)
		wantReg(t, "control in 4 bytes", m.get(PMControl, 4), pmSCI)
		wantReg(t, "before", m.get(0xffff, 2), 0x00ff)
		wantReg(t, "beyond", m.get(PMPorts, 4), 0xffffffff)

		m.put(PMEvent+2, 2, 0xffff)
		wantReg(t, "enable", m.get(PMEvent, 4), pmEnables<<16)
		m.put(PMEvent, 4, 0x0020<<16)
		wantReg(t, "enable in 4 bytes", m.get(PMEvent+2, 2), pmGlobal)
		m.put(PMEvent+3, 1, 1)
		wantReg(t, "enable in bytes", m.get(PMEvent+2, 2), pmGlobal|pmButton)
		m.put(PMControl, 2, 0xdfff&^(7<<10)|1<<10) // all but SLP_EN, S1
		wantReg(t, "control", m.get(PMControl, 2), 0x0403)
		m.put(PMControl, 2, 0)
		wantReg(t, "SCI_EN stays", m.get(PMControl, 2), pmSCI)
	})
}

func TestPMPowerOff(t *testing.T) {
	t.Parallel()
	off := 0
	m := NewPM(PMPort, nil, nil, func() { off++ })
	for _, tc := range []struct {
		reg  uint16
		n    int
		v    uint32
		want int
	}{
		{PMControl, 2, SleepOff << 10, 0},
		{PMControl, 2, SleepOff<<10 | pmSleep, 1},
		{PMControl, 4, SleepOff<<10 | pmSleep | pmSCI, 1},
		{PMControl + 1, 1, (SleepOff<<10 | pmSleep) >> 8, 1},
		{PMEvent + 2, 4, (SleepOff<<10 | pmSleep) << 16, 1},
		{PMControl, 2, 0<<10 | pmSleep, 0},
		{PMControl, 2, 3<<10 | pmSleep, 0},
		{PMControl, 1, pmSleep & 0xff, 0},
		{PMTimer, 4, 0xffffffff, 0},
	} {
		off = 0
		m.put(tc.reg, tc.n, tc.v)
		if off != tc.want {
			t.Errorf("%d bytes %#x to %d: off %d times, want %d", tc.n, tc.v, tc.reg, off, tc.want)
		}
	}
	if m.get(PMControl, 2)&pmSleep != 0 {
		t.Error("SLP_EN can be read")
	}
}

func TestPMPowerButton(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, irq := newTestPM(t)
		if m.PressPowerButton() {
			t.Error("a guest that did not enable the button listens")
		}
		irq.want(false, 0)
		wantReg(t, "status", m.get(PMEvent, 2), pmButton)
		m.put(PMEvent, 2, pmButton) // as ACPI does before it enables an event
		wantReg(t, "status", m.get(PMEvent, 2), 0)
		m.put(PMEvent+2, 2, pmButton)
		irq.want(false, 0)
		if !m.PressPowerButton() {
			t.Error("the guest does not listen")
		}
		irq.want(true, 1)
		m.put(PMEvent, 2, ^uint32(pmButton)) // acknowledging others leaves it
		irq.want(true, 1)

		st := m.State()
		m2, irq2 := newTestPM(t)
		if err := m2.Restore(st); err != nil {
			t.Fatal(err)
		}
		irq2.want(true, 1)

		m.put(PMEvent+1, 1, pmButton>>8)
		irq.want(false, 1)
		m.PressPowerButton()
		m.put(PMEvent+2, 2, 0)
		irq.want(false, 2)
		m.put(PMEvent+2, 2, pmButton)
		irq.want(true, 3)
	})
}

func TestPMTimer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, irq := newTestPM(t)
		defer m.Close()
		wantReg(t, "timer", m.get(PMTimer, 4), 0)
		time.Sleep(time.Second)
		wantReg(t, "timer after 1 s", m.get(PMTimer, 4), PMFrequency)
		wantReg(t, "its high half", m.get(PMTimer+2, 2), PMFrequency>>16)
		m.put(PMTimer, 4, 7)
		wantReg(t, "timer after a write", m.get(PMTimer, 4), PMFrequency)

		m.put(PMEvent+2, 2, pmTimer)
		half := (1 << 31) * time.Second / PMFrequency
		time.Sleep(half - time.Second - time.Millisecond)
		irq.want(false, 0)
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		irq.want(true, 1)
		wantReg(t, "status", m.get(PMEvent, 2), pmTimer)
		if m.get(PMTimer, 4)>>31 != 1 {
			t.Error("the highest bit did not change")
		}
		m.put(PMEvent, 2, pmTimer)
		irq.want(false, 1)
		time.Sleep(half)
		synctest.Wait()
		irq.want(true, 2)
		if v := m.get(PMTimer, 4); v > PMFrequency {
			t.Errorf("the timer did not wrap: %#x", v)
		}

		// Without the enable bit the status is there all the same, and no timer of the host runs.
		m.put(PMEvent, 4, pmTimer)
		time.Sleep(half)
		wantReg(t, "status", m.get(PMEvent, 2), pmTimer)
		irq.want(false, 2)
		// A day is many times round.
		m.put(PMEvent, 2, pmTimer)
		before := m.get(PMTimer, 4)
		time.Sleep(24 * time.Hour)
		wantReg(t, "timer after a day", m.get(PMTimer, 4), before+uint32(24*3600*PMFrequency%(1<<32)))
	})
}

func TestPMState(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, _ := newTestPM(t)
		defer m.Close()
		time.Sleep(20 * time.Minute)
		m.put(PMEvent+2, 2, pmTimer)
		m.put(PMControl, 2, 0x1402)
		st := m.State()
		ticks := m.get(PMTimer, 4)

		time.Sleep(time.Hour)
		m2, irq := newTestPM(t)
		defer m2.Close()
		if err := m2.Restore(st); err != nil {
			t.Fatal(err)
		}
		irq.want(true, 1)
		if m2.State() != st {
			t.Errorf("restored %+v, saved %+v", m2.State(), st)
		}
		wantReg(t, "timer", m2.get(PMTimer, 4), ticks)
		time.Sleep(time.Second)
		wantReg(t, "timer a second later", m2.get(PMTimer, 4), ticks+PMFrequency)

		for name, bad := range map[string]PMState{
			"status":  {Status: 1 << 15},
			"enable":  {Enable: 1 << 1},
			"control": {Control: pmSleep},
		} {
			wantBadState(t, name, m2.Restore(bad))
		}
		if err := m2.Restore(PMState{Enable: pmTimer, Ticks: 1<<64 - 1}); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Second)
		m2.get(PMTimer, 4)
	})
}

// TestPMClosed wants the line left alone after Close: what it leads to is gone by then.
func TestPMClosed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, irq := newTestPM(t)
		m.put(PMEvent+2, 2, pmTimer|pmButton)
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if m.PressPowerButton() {
			t.Error("a closed PM listens to the button")
		}
		time.Sleep(time.Hour)
		m.expire() // as a timer does that expired just before Close
		synctest.Wait()
		m.put(PMEvent+2, 2, pmTimer)
		irq.want(false, 0)
		wantReg(t, "status", m.get(PMEvent, 2), pmTimer)
	})
}

func TestPMConcurrent(t *testing.T) {
	t.Parallel()
	m, _ := newTestPM(t)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for i := range 500 {
				m.put(PMEvent, 4, uint32(i)<<24|0xffff)
				m.get(PMTimer, 4)
				m.PressPowerButton()
				m.State()
			}
		})
	}
	wg.Wait()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

func TestPMNoAllocations(t *testing.T) {
	m, _ := newTestPM(t)
	p := make([]byte, 4)
	if n := testing.AllocsPerRun(100, func() { m.ReadPort(PMPort+PMTimer, p) }); n != 0 {
		t.Errorf("%v allocations for each read of the timer", n)
	}
}
