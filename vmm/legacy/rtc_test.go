package legacy

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func newTestRTC(t testing.TB) (*RTC, *pin) {
	irq := &pin{t: t}
	return NewRTC(3<<30, 0, nil, irq.set), irq
}

func (r *RTC) get(i byte) byte    { out(r, RTCPort, i|0x80); return in(r, RTCPort+1) }
func (r *RTC) put(i byte, b byte) { out(r, RTCPort, i); out(r, RTCPort+1, b) }

// date reads the time as a driver does: century to second.
func (r *RTC) date() [7]byte {
	var d [7]byte
	for n, i := range [...]byte{RTCCentury, rtcYear, rtcMonth, rtcDay, rtcHour, rtcMinute, rtcSecond} {
		d[n] = r.get(i)
	}
	return d
}

func (r *RTC) setDate(d [7]byte) {
	for n, i := range [...]byte{RTCCentury, rtcYear, rtcMonth, rtcDay, rtcHour, rtcMinute, rtcSecond} {
		r.put(i, d[n])
	}
}

func TestRTCDate(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		host string
		b    byte
		want [7]byte
		dow  byte
	}{
		{"2024-02-29T23:59:58Z", rtc24, [7]byte{0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58}, 5},
		{"2024-02-29T23:59:58Z", rtc24 | rtcBinary, [7]byte{20, 24, 2, 29, 23, 59, 58}, 5},
		{"2024-02-29T23:59:58Z", 0, [7]byte{0x20, 0x24, 0x02, 0x29, 0x91, 0x59, 0x58}, 5},
		{"2024-02-29T23:59:58Z", rtcBinary, [7]byte{20, 24, 2, 29, 0x8b, 59, 58}, 5},
		{"1999-12-31T00:30:00Z", 0, [7]byte{0x19, 0x99, 0x12, 0x31, 0x12, 0x30, 0x00}, 6},
		{"2038-01-19T12:14:08Z", 0, [7]byte{0x20, 0x38, 0x01, 0x19, 0x92, 0x14, 0x08}, 3},
		{"2100-07-04T13:00:00+05:00", rtc24, [7]byte{0x21, 0x00, 0x07, 0x04, 0x08, 0x00, 0x00}, 1}, // UTC whatever the zone
	} {
		host, err := time.Parse(time.RFC3339, tc.host)
		if err != nil {
			t.Fatal(err)
		}
		r := NewRTC(0, 0, func() time.Time { return host }, nil)
		r.put(rtcB, tc.b)
		if got := r.date(); got != tc.want {
			t.Errorf("%s, B %#x: read %x, want %x", tc.host, tc.b, got, tc.want)
		}
		wantByte(t, "weekday", r.get(rtcWeekday), tc.dow)

		// The guest sets the same time again, stopped: the clock does not move.
		want := r.now()
		r.put(rtcB, tc.b|rtcSet)
		r.setDate(tc.want)
		r.put(rtcB, tc.b)
		if got := r.now(); got != want {
			t.Errorf("%s, B %#x: set to %v, want %v", tc.host, tc.b, got, want)
		}
	}
}

func TestRTCSetRunning(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _ := newTestRTC(t)
		time.Sleep(250 * time.Millisecond)
		r.put(rtcYear, 0x31)
		r.put(rtcMinute, 0x45)
		if got, want := r.date(), [7]byte{0x20, 0x31, 0x01, 0x01, 0x00, 0x45, 0x00}; got != want {
			t.Errorf("read %x, want %x", got, want)
		}
		time.Sleep(749 * time.Millisecond)
		wantByte(t, "second", r.get(rtcSecond), 0) // the second's phase is kept
		time.Sleep(time.Millisecond)
		wantByte(t, "second", r.get(rtcSecond), 1)
	})
}

// TestRTCSetStopped sets the clock as Linux does: SET, divider in reset, time, then both back.
func TestRTCSetStopped(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _ := newTestRTC(t)
		time.Sleep(300 * time.Millisecond)
		r.put(rtcB, rtc24|rtcSet)
		r.put(rtcA, 0x76)
		time.Sleep(10 * time.Second)
		if got, want := r.date(), [7]byte{0x20, 0, 1, 1, 0, 0, 0}; got != want {
			t.Errorf("time runs while stopped: %x", got)
		}
		r.setDate([7]byte{0x20, 0x27, 0x12, 0x31, 0x23, 0x59, 0x59})
		r.put(rtcB, rtc24)
		if got, want := r.date(), [7]byte{0x20, 0x27, 0x12, 0x31, 0x23, 0x59, 0x59}; got != want {
			t.Errorf("read back %x while the divider is held, want %x", got, want)
		}
		r.put(rtcA, 0x26)
		time.Sleep(499 * time.Millisecond)
		wantByte(t, "year", r.get(rtcYear), 0x27)
		time.Sleep(time.Millisecond)
		if got, want := r.date(), [7]byte{0x20, 0x28, 1, 1, 0, 0, 0}; got != want {
			t.Errorf("half a second later %x, want %x", got, want)
		}
	})
}

// TestRTCNonsenseDate sets dates that do not exist, in both formats; the clock must show one that does.
func TestRTCNonsenseDate(t *testing.T) {
	t.Parallel()
	for _, b := range []byte{0, rtc24, rtcBinary, rtcBinary | rtc24} {
		for _, v := range []byte{0x00, 0x7f, 0x9f, 0xff} {
			r, _ := newTestRTC(t)
			r.put(rtcB, b|rtcSet)
			r.setDate([7]byte{v, v, v, v, v, v, v})
			r.put(rtcB, b)
			if m := r.get(rtcMonth); r.decode(m) < 1 || r.decode(m) > 12 {
				t.Errorf("B %#x, all %#x: month %#x", b, v, m)
			}
			if err := r.Restore(r.State()); err != nil {
				t.Errorf("B %#x, all %#x: %v", b, v, err)
			}
		}
	}
}

func TestRTCUpdateInProgress(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _ := newTestRTC(t)
		wantByte(t, "A", r.get(rtcA), 0x26)
		time.Sleep(time.Second - 250*time.Microsecond)
		wantByte(t, "A", r.get(rtcA), 0x26)
		time.Sleep(10 * time.Microsecond)
		wantByte(t, "A", r.get(rtcA), 0xa6)
		r.put(rtcB, rtc24|rtcSet)
		wantByte(t, "A while stopped", r.get(rtcA), 0x26)
		r.put(rtcB, rtc24)
		time.Sleep(240 * time.Microsecond)
		wantByte(t, "A", r.get(rtcA), 0x26)
		r.put(rtcA, 0xa6) // the bit cannot be written
		wantByte(t, "A", r.get(rtcA), 0x26)
	})
}

func TestRTCFlagsWithoutInterrupt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, irq := newTestRTC(t)
		wantByte(t, "C", r.get(rtcC), 0)
		time.Sleep(time.Millisecond)
		wantByte(t, "C after 1 ms", r.get(rtcC), rtcTick)
		wantByte(t, "C read twice", r.get(rtcC), 0)
		r.put(rtcA, 0x20)
		time.Sleep(time.Second)
		wantByte(t, "C after 1 s", r.get(rtcC), rtcUpdate)
		r.put(rtcC, 0xff)
		r.put(rtcD, 0xff)
		wantByte(t, "C written", r.get(rtcC), 0)
		wantByte(t, "D", r.get(rtcD), rtcValid)
		time.Sleep(24 * time.Hour) // the alarm registers are zero: midnight
		wantByte(t, "C after a day", r.get(rtcC), rtcUpdate|rtcAlarm)
		irq.want(false, 0)
		if r.timer != nil {
			t.Error("a timer without an interrupt to raise")
		}
	})
}

func TestRTCUpdateInterrupt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, irq := newTestRTC(t)
		defer r.Close()
		r.put(rtcA, 0x20)
		time.Sleep(100 * time.Millisecond)
		r.put(rtcB, rtc24|rtcUpdate)
		time.Sleep(899 * time.Millisecond)
		irq.want(false, 0)
		time.Sleep(time.Millisecond)
		synctest.Wait()
		irq.want(true, 1)
		time.Sleep(5 * time.Second)
		irq.want(true, 1) // nothing more until C is read
		wantByte(t, "C", r.get(rtcC), rtcIRQ|rtcUpdate)
		irq.want(false, 1)
		time.Sleep(time.Second)
		synctest.Wait()
		irq.want(true, 2)
		r.put(rtcB, rtc24) // disabling lowers the line, enabling raises it again: the flag is still there
		irq.want(false, 2)
		r.put(rtcB, rtc24|rtcUpdate)
		irq.want(true, 3)
		r.put(rtcB, rtc24|rtcUpdate|rtcSet)
		wantByte(t, "B", r.get(rtcB), rtc24|rtcSet)
		irq.want(false, 3)
	})
}

func TestRTCPeriodicInterrupt(t *testing.T) {
	t.Parallel()
	for rate, period := range map[byte]time.Duration{
		1: 3906250, 2: 7812500, 3: 122070, 6: 976562, 15: 500 * time.Millisecond,
	} {
		synctest.Test(t, func(t *testing.T) {
			r, irq := newTestRTC(t)
			defer r.Close()
			r.put(rtcA, 0x20|rate)
			r.put(rtcB, rtc24|rtcTick)
			start := time.Now()
			for i := range int32(100) {
				for !irq.level.Load() {
					time.Sleep(period / 50)
					synctest.Wait()
				}
				irq.want(true, i+1)
				wantByte(t, "C", r.get(rtcC)&^(rtcUpdate|rtcAlarm), rtcIRQ|rtcTick)
			}
			want := 100 * float64(period)
			if got := float64(time.Since(start)); got < 0.99*want || got > 1.01*want {
				t.Errorf("rate %d: 100 ticks took %v, want %v", rate, time.Duration(got), time.Duration(want))
			}
			r.put(rtcA, 0x20)
			time.Sleep(time.Second)
			irq.want(false, 100)
			r.put(rtcA, 0x70|rate) // held
			time.Sleep(time.Second)
			irq.want(false, 100)
		})
	}
}

func TestRTCAlarm(t *testing.T) {
	t.Parallel()
	const every = 0xff
	for _, tc := range []struct {
		hour, minute, second byte
		b                    byte
		first, next          time.Duration // from midnight, 2000-01-01
	}{
		{0x00, 0x00, 0x10, rtc24, 10 * time.Second, 24 * time.Hour},
		{0x23, 0x59, 0x59, rtc24, 24*time.Hour - time.Second, 24 * time.Hour},
		{23, 59, 59, rtc24 | rtcBinary, 24*time.Hour - time.Second, 24 * time.Hour},
		{0x81, 0x30, 0x00, 0, 13*time.Hour + 30*time.Minute, 24 * time.Hour},
		{0x12, 0x00, 0x01, 0, time.Second, 24 * time.Hour},
		{every, every, every, rtc24, time.Second, time.Second},
		{every, every, 0x30, rtc24, 30 * time.Second, time.Minute},
		{every, 0x15, 0x00, rtc24, 15 * time.Minute, time.Hour},
		{0x06, every, 0x00, rtc24, 6 * time.Hour, time.Minute},
		{0x00, 0x00, 0x00, rtc24, 24 * time.Hour, 24 * time.Hour}, // the second that is running does not count
		{0x24, 0x00, 0x00, rtc24, 0, 0},
		{0x00, 0x60, 0x00, rtc24, 0, 0},
		{0x00, 0x00, 0x7f, rtc24, 0, 0},
		{0x13, 0x00, 0x00, 0, 0, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			r, irq := newTestRTC(t)
			defer r.Close()
			r.put(rtcB, tc.b)
			time.Sleep(500 * time.Microsecond)
			r.put(rtcHourAlarm, tc.hour)
			r.put(rtcMinuteAlarm, tc.minute)
			r.put(rtcSecondAlarm, tc.second)
			r.put(rtcB, tc.b|rtcAlarm)
			if tc.first == 0 {
				time.Sleep(72 * time.Hour)
				synctest.Wait()
				irq.want(false, 0)
				return
			}
			time.Sleep(tc.first - 600*time.Microsecond)
			irq.want(false, 0)
			time.Sleep(100 * time.Microsecond)
			synctest.Wait()
			irq.want(true, 1)
			wantByte(t, "C", r.get(rtcC)&^(rtcTick|rtcUpdate), rtcIRQ|rtcAlarm)
			time.Sleep(tc.next - time.Microsecond)
			irq.want(false, 1)
			time.Sleep(time.Microsecond)
			synctest.Wait()
			irq.want(true, 2)
		})
	}
}

// TestRTCHostClockSteps sets the host's clock back and forth; the guest follows and nothing is counted twice.
func TestRTCHostClockSteps(t *testing.T) {
	t.Parallel()
	host := time.Date(2020, 5, 5, 5, 5, 5, 0, time.UTC)
	r := NewRTC(0, 0, func() time.Time { return host }, nil)
	host = host.Add(-time.Hour)
	wantByte(t, "C", r.get(rtcC), 0)
	wantByte(t, "hour", r.get(rtcHour), 0x04)
	host = host.Add(time.Second)
	wantByte(t, "C", r.get(rtcC), rtcTick|rtcUpdate)
	host = host.AddDate(50, 0, 0)
	wantByte(t, "C", r.get(rtcC), rtcTick|rtcUpdate|rtcAlarm)
	wantByte(t, "year", r.get(rtcYear), 0x70)
}

func TestRTCMemorySize(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		below, above     uint64
		base, ext, ext16 uint16
		over             uint32
	}{
		{512 << 10, 0, 512, 0, 0, 0},
		{64 << 20, 0, 640, 0xfc00, 48 << 4, 0},
		{128 << 20, 0, 640, 0xffff, 112 << 4, 0},
		{3 << 30, 5 << 30, 640, 0xffff, 3056 << 4, 5 << 14},
		{8 << 30, 2 << 40, 640, 0xffff, 0xffff, 0xffffff},
	} {
		r := NewRTC(tc.below, tc.above, nil, nil)
		word := func(at byte) uint16 { return uint16(r.get(at)) | uint16(r.get(at+1))<<8 }
		if word(0x15) != tc.base || word(0x17) != tc.ext || word(0x30) != tc.ext || word(0x34) != tc.ext16 {
			t.Errorf("%d bytes below: %d, %d, %d, %d", tc.below, word(0x15), word(0x17), word(0x30), word(0x34))
		}
		if over := uint32(word(0x5b)) | uint32(r.get(0x5d))<<16; over != tc.over {
			t.Errorf("%d bytes above: %#x, want %#x", tc.above, over, tc.over)
		}
		sum := uint16(0)
		for i := byte(0x10); i < 0x2e; i++ {
			sum += uint16(r.get(i))
		}
		wantByte(t, "checksum", r.get(0x2e), byte(sum>>8))
		wantByte(t, "checksum", r.get(0x2f), byte(sum))
	}
}

func TestRTCPlainBytes(t *testing.T) {
	t.Parallel()
	r, _ := newTestRTC(t)
	for i := byte(14); i < 128; i++ {
		if i != RTCCentury {
			r.put(i, i^0x5a)
			wantByte(t, "CMOS", r.get(i), i^0x5a)
		}
	}
	wantByte(t, "index", in(r, RTCPort), 0xff)
	r.WritePort(RTCPort, []byte{0x0f, 0x12, 0x34, 0x56}) // index and data at once
	p := make([]byte, 4)
	r.ReadPort(RTCPort, p)
	if string(p) != "\xff\x12\xff\xff" {
		t.Errorf("read %x", p)
	}
}

func TestRTCState(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, irq := newTestRTC(t)
		defer r.Close()
		r.put(rtcYear, 0x42)
		r.put(0x0f, 9)
		r.put(rtcB, rtc24|rtcUpdate)
		time.Sleep(time.Second)
		synctest.Wait()
		irq.want(true, 1)
		st := r.State()

		time.Sleep(time.Hour)
		r2, irq2 := newTestRTC(t)
		defer r2.Close()
		if err := r2.Restore(st); err != nil {
			t.Fatal(err)
		}
		irq2.want(true, 1)
		wantByte(t, "C", r2.get(rtcC)&^rtcTick, rtcIRQ|rtcUpdate)
		irq2.want(false, 1)
		wantByte(t, "CMOS", r2.get(0x0f), 9)
		if got, want := r2.date(), [7]byte{0x20, 0x42, 1, 1, 1, 0, 1}; got != want {
			t.Errorf("restored at %x, want %x", got, want)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		irq2.want(true, 2)

		// A stopped clock stays where it was.
		r.put(rtcB, rtc24|rtcSet)
		want := r.date()
		st = r.State()
		time.Sleep(time.Hour)
		if err := r2.Restore(st); err != nil || r2.date() != want {
			t.Errorf("restored stopped at %x, %v, want %x", r2.date(), err, want)
		}

		for name, spoil := range map[string]func(*RTCState){
			"index":       func(s *RTCState) { s.Index = 0x80 },
			"UIP":         func(s *RTCState) { s.CMOS[rtcA] |= rtcUIP },
			"C":           func(s *RTCState) { s.CMOS[rtcC] = 1 },
			"D":           func(s *RTCState) { s.CMOS[rtcD] = 0 },
			"seconds":     func(s *RTCState) { s.Seconds = -1 << 63 },
			"nanoseconds": func(s *RTCState) { s.Nanoseconds = 1e9 },
			"seen":        func(s *RTCState) { s.SeenSeconds = 1 << 62 },
			"seen ns":     func(s *RTCState) { s.SeenNanoseconds = -1 },
		} {
			bad := st
			spoil(&bad)
			wantBadState(t, name, r2.Restore(bad))
		}
		if r2.State().CMOS != st.CMOS {
			t.Error("a bad state changed the clock")
		}
	})
}

func TestRTCConcurrent(t *testing.T) {
	t.Parallel()
	r, _ := newTestRTC(t)
	r.put(rtcA, 0x23)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for i := range 500 {
				r.put(rtcB, rtc24|byte(i)&rtcEvents)
				r.get(rtcC)
				r.get(rtcHour)
				r.put(rtcMonth, byte(i))
				r.State()
			}
		})
	}
	wg.Wait()
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

func TestRTCNoAllocations(t *testing.T) {
	r, _ := newTestRTC(t)
	p := make([]byte, 1)
	if n := testing.AllocsPerRun(100, func() {
		for i := range byte(14) {
			p[0] = i
			r.WritePort(RTCPort, p)
			r.ReadPort(RTCPort+1, p)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestRTCClosed wants the line left alone after Close: what it leads to is gone by then.
func TestRTCClosed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, irq := newTestRTC(t)
		r.put(rtcB, rtcUpdate|rtc24)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		r.expire() // as a timer does that expired just before Close
		synctest.Wait()
		irq.want(false, 0)
		if c := r.get(rtcC); c&(rtcIRQ|rtcUpdate) != rtcIRQ|rtcUpdate {
			t.Errorf("register C reads %#x", c)
		}
	})
}
