package legacy

import (
	"bytes"
	"testing"
	"testing/synctest"
	"time"
)

// FuzzSerial lets a guest and a host do anything to a port: each two bytes of the script are one access. Whatever they
// do, the line is high exactly while IIR names a cause, every byte transmitted comes out, every byte typed is received
// in order or was thrown away by a reset of the FIFO, and the state survives being saved.
func FuzzSerial(f *testing.F) {
	const typeIn, save = 8, 9 // steps besides the registers
	read, write := func(reg byte) []byte { return []byte{reg, 0} }, func(reg, v byte) []byte { return []byte{reg | 0x80, v} }
	join := func(steps ...[]byte) []byte { return bytes.Join(steps, nil) }
	f.Add(join(write(regIER, ierTHRE), write(regData, 'a'), read(regIIR), write(regData, 'b')))
	f.Add(join(write(regMCR, mcrRTS), write(regIIR, 0x81), write(regIER, 1), []byte{typeIn, 40}, read(regIIR), read(regData), read(regLSR)))
	f.Add(join(write(regMCR, mcrLoop), write(regIIR, 1), write(regData, 'a'), write(regData, 'b'), write(regMCR, 0x1f), read(regMSR)))
	f.Add(join(write(regLCR, lcrDLAB), write(regData, 1), write(regIER, 0), write(regLCR, 3), write(regSCR, 9), read(regSCR)))
	f.Add(join(write(regMCR, mcrRTS), []byte{typeIn, 3}, write(regIIR, 1), []byte{save, 0}, write(regIIR, 3), read(regData), []byte{save, 0}))
	f.Fuzz(func(t *testing.T, script []byte) {
		synctest.Test(t, func(t *testing.T) { runSerial(t, script[:min(len(script), 2000)]) })
	})
}

func runSerial(t *testing.T, script []byte) {
	const typeIn, save = 8, 9
	var w bytes.Buffer
	irq := &pin{t: t}
	s := NewSerial(COM1Port, &w, irq.set)
	typed := make(chan int, 2000)
	fed := make(chan struct{})
	go func() { // the host: counts upwards
		defer close(fed)
		next := byte(0)
		for n := range typed {
			p := make([]byte, n)
			for i := range p {
				p[i] = next
				next++
			}
			if _, err := s.Write(p); err != nil {
				return
			}
		}
	}()

	var sent []byte
	looped := false // loopback and restored bytes mix with the host's: order is not checked any more
	last := -1
	for len(script) >= 2 {
		op, v := script[0], script[1]
		script = script[2:]
		reg := uint16(op & 0x0f)
		switch {
		case reg == typeIn:
			typed <- int(v)
			synctest.Wait()
		case reg == save:
			if err := s.Restore(s.State()); err != nil {
				t.Fatal(err)
			}
		case op&0x80 == 0:
			st := s.State()
			b := s.get(reg)
			if reg == regData && st.LCR&lcrDLAB == 0 && st.RXLen > 0 && !looped {
				if d := b - byte(last+1); last >= 0 && d >= 128 {
					t.Fatalf("received %d after %d", b, last)
				}
				last = int(b)
			}
		default:
			st := s.State()
			if reg == regData && st.LCR&lcrDLAB == 0 {
				if looped = looped || st.MCR&mcrLoop != 0; st.MCR&mcrLoop == 0 {
					sent = append(sent, v)
				}
			}
			s.put(reg, v)
		}
		synctest.Wait() // the host may type into the room that the guest has just made
		st := s.State()
		if id := s.peekIIR(); irq.level.Load() != (id&iirNone == 0) {
			t.Fatalf("line is %v, IIR %#x, %+v", irq.level.Load(), id, st)
		}
		if err := st.check(); err != nil {
			t.Fatal(err)
		}
	}
	close(typed)
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-fed
	if !bytes.Equal(w.Bytes(), sent) || s.Dropped() != 0 {
		t.Fatalf("%d bytes came out, %d dropped, %d went in", w.Len(), s.Dropped(), len(sent))
	}
}

func (s *Serial) peekIIR() byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.source()
}

// FuzzPorts lets a guest do anything to the other devices: each four bytes of the script are an access of one to four
// bytes, or time that passes. The devices must stay whole: a state they save is one they accept.
func FuzzPorts(f *testing.F) {
	f.Add([]byte{0, 0x80, rtcB, 0x72, 0, 0x81, 0, 0x72, 9, 0, 0, 200, 0, 0x80, rtcC, 0, 0, 1, 0, 0})
	f.Add([]byte{0, 0x80, rtcA, 0, 0, 0x81, 0x7f, 0, 0, 0x80, rtcMonth, 0, 0, 0x81, 0xff, 0, 9, 0, 0, 1})
	f.Add([]byte{2, 0x80, kbdWriteConfig, 0, 1, 0x80, 1, 0, 1, 0x80, 0xf2, 0, 1, 0, 0, 0})
	f.Add([]byte{3, 0xb0, 0xff, 0xff, 3, 0x34, 0, 0, 3, 0x38, 0, 0, 9, 0, 0xff, 0xff, 3, 0x38, 0, 0})
	f.Add([]byte{4, 0x80, 6, 0, 5, 0x80, 1, 0, 6, 0x80, 1, 0})
	f.Fuzz(func(t *testing.T, script []byte) {
		synctest.Test(t, func(t *testing.T) { runPorts(t, script[:min(len(script), 2000)]) })
	})
}

func runPorts(t *testing.T, script []byte) {
	nop := func() {}
	clock := NewRTC(1<<30, 0, nil, (&pin{t: t}).set)
	defer clock.Close()
	kbd := NewI8042((&pin{t: t}).set, nop)
	pm := NewPM(PMPort, nil, (&pin{t: t}).set, nop)
	defer pm.Close()
	reset := NewReset(nop)
	places := []struct {
		device
		port uint16
	}{
		{clock, RTCPort}, {kbd, I8042DataPort}, {kbd, I8042CommandPort}, {pm, PMPort}, {reset, ResetPort},
		{reset, FastPort}, {NewPvpanic(PvpanicPort, func(PanicEvent) {}), PvpanicPort}, {&Debug{}, DebugPort},
	}
	for len(script) >= 4 {
		op, how, a, b := script[0], script[1], script[2], script[3]
		script = script[4:]
		if int(op) >= len(places) {
			time.Sleep(time.Duration(a)*time.Second + time.Duration(b)*100*time.Microsecond)
			synctest.Wait()
			continue
		}
		p := []byte{a, b, a, b}[:[4]int{1, 2, 4, 1}[how>>4&3]]
		port := places[op].port + uint16(how&0x0f)
		if how&0x80 != 0 {
			places[op].WritePort(port, p)
		} else {
			places[op].ReadPort(port, p)
		}
	}
	if err := clock.Restore(clock.State()); err != nil {
		t.Error(err)
	}
	if err := kbd.Restore(kbd.State()); err != nil {
		t.Error(err)
	}
	if err := pm.Restore(pm.State()); err != nil {
		t.Error(err)
	}
	if err := reset.Restore(reset.State()); err != nil {
		t.Error(err)
	}
}
