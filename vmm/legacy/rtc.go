package legacy

import (
	"fmt"
	"sync"
	"time"
)

// The place of the CMOS clock: an index and a data port.
const (
	RTCPort = 0x70
	RTCIRQ  = 8
	// RTCPorts is the number of ports an RTC takes.
	RTCPorts = 2
	// RTCCentury is the register of the century, for the FADT.
	RTCCentury = 0x32
)

// Registers and their bits (MC146818A data sheet, "Registers" and "Address map").
const (
	rtcSecond, rtcSecondAlarm = 0, 1
	rtcMinute, rtcMinuteAlarm = 2, 3
	rtcHour, rtcHourAlarm     = 4, 5
	rtcWeekday                = 6
	rtcDay                    = 7
	rtcMonth                  = 8
	rtcYear                   = 9
	rtcA                      = 10
	rtcB                      = 11
	rtcC                      = 12
	rtcD                      = 13

	rtcUIP     = 0x80 // A: an update is near
	rtcHold    = 0x60 // A: both bits hold the divider chain in reset
	rtcRate    = 0x0f // A: rate of the periodic interrupt
	rtcSet     = 0x80 // B: the guest sets the time
	rtcEvents  = 0x70 // B and C: periodic, alarm, update ended
	rtcTick    = 0x40
	rtcAlarm   = 0x20
	rtcUpdate  = 0x10
	rtcBinary  = 0x04 // B: binary, not BCD
	rtc24      = 0x02 // B: 24 hours, not 12
	rtcPM      = 0x80 // hour: afternoon, in 12-hour mode
	rtcIRQ     = 0x80 // C: an enabled event is pending
	rtcValid   = 0x80 // D: power never failed
	rtcAnyTime = 0xc0 // an alarm register with both bits matches everything
)

// updateNear is how long before a second's end UIP is set, in nanoseconds: 8 cycles of 32768 Hz, the 244 us of the data
// sheet's table of update cycles. The update itself takes no time here.
const updateNear = 8 * 1_000_000_000 / 32768

// RTC is an MC146818A with 128 bytes of CMOS memory, in UTC. It runs on the host's clock at an offset that the guest
// chooses when it sets the time. A timer of the host runs only while the guest has an interrupt enabled and none is
// pending.
//
// The CMOS bytes for the memory's size follow PC practice: kilobytes up to 640 in 15h, above 1 MiB in 17h and 30h; 64 KiB
// units above 16 MiB in 34h and above 4 GiB in 5bh to 5dh. The rest is plain memory, the shutdown byte 0fh included: no
// firmware runs on a reset that would look at it.
type RTC struct {
	clock func() time.Time
	irq   Line

	mu     sync.Mutex
	st     RTCState
	line   bool
	timer  *time.Timer // nil until first needed
	closed bool
}

// RTCState is what a guest can know of an RTC. The guest's clock goes on with the host's while a state is kept: in a
// restored guest it shows the time of the restore.
type RTCState struct {
	Index byte
	// CMOS holds all bytes. Those of the time count only while the guest has stopped the clock; they are computed
	// otherwise.
	CMOS [128]byte
	// Seconds and Nanoseconds (0 to 1e9-1) are what the guest's clock is ahead of the host's.
	Seconds     int64
	Nanoseconds int64
	// SeenSeconds and SeenNanoseconds are the guest's time, since 1970, up to which register C counts the events.
	SeenSeconds, SeenNanoseconds int64
}

// NewRTC returns a clock with the CMOS bytes set for a guest with that many bytes of memory below and above 4 GiB. clock
// gives the host's time; nil means time.Now.
func NewRTC(below4G, above4G uint64, clock func() time.Time, irq Line) *RTC {
	if clock == nil {
		clock = time.Now
	}
	r := &RTC{clock: clock, irq: irq}
	c := &r.st.CMOS
	c[rtcA] = 0x26 // 32768 Hz, periodic rate 1024 Hz
	c[rtcB] = rtc24
	c[rtcD] = rtcValid
	c[0x14] = 0x02 // equipment: a mathematics unit
	put := func(at int, v, limit uint64, n int) {
		for v, i := min(v, limit), 0; i < n; i++ {
			c[at+i] = byte(v >> (8 * i))
		}
	}
	above := func(n, base uint64) uint64 { return n - min(n, base) }
	put(0x15, below4G>>10, 640, 2)
	put(0x17, above(below4G, 1<<20)>>10, 0xffff, 2)
	put(0x30, above(below4G, 1<<20)>>10, 0xffff, 2)
	put(0x34, above(below4G, 16<<20)>>16, 0xffff, 2)
	put(0x5b, above4G>>16, 0xffffff, 3)
	sum := 0
	for _, b := range c[0x10:0x2e] {
		sum += int(b)
	}
	c[0x2e], c[0x2f] = byte(sum>>8), byte(sum) // the checksum that PC firmware keeps, high byte first
	r.see(r.now())
	return r
}

// ReadPort implements the bus's reads.
func (r *RTC) ReadPort(port uint16, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range p {
		p[i] = floating // the index cannot be read back
		if port+uint16(i) == RTCPort+1 {
			p[i] = r.read()
		}
	}
}

// WritePort implements the bus's writes.
func (r *RTC) WritePort(port uint16, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, b := range p {
		switch port + uint16(i) {
		case RTCPort:
			r.st.Index = b & 0x7f // bit 7 gates the NMI
		case RTCPort + 1:
			r.write(b)
		}
	}
}

func (r *RTC) read() byte {
	c := &r.st.CMOS
	switch i := r.st.Index; i {
	case rtcSecond, rtcMinute, rtcHour, rtcWeekday, rtcDay, rtcMonth, rtcYear, RTCCentury:
		if !r.stopped() {
			r.show(r.now())
		}
		return c[i]
	case rtcA:
		if t := r.now(); !r.stopped() && t.nsec >= 1e9-updateNear {
			return c[rtcA] | rtcUIP
		}
		return c[rtcA]
	case rtcC:
		r.advance()
		v := c[rtcC]
		c[rtcC] = 0
		r.arm()
		return v
	default:
		return c[i]
	}
}

func (r *RTC) write(b byte) {
	c := &r.st.CMOS
	switch i := r.st.Index; i {
	case rtcSecond, rtcMinute, rtcHour, rtcWeekday, rtcDay, rtcMonth, rtcYear, RTCCentury:
		if r.stopped() {
			c[i] = b
			return
		}
		t := r.now()
		r.advance()
		r.show(t)
		c[i] = b
		r.start(t.nsec)
	case rtcSecondAlarm, rtcMinuteAlarm, rtcHourAlarm:
		r.advance()
		c[i] = b
	case rtcA:
		r.control(b&^rtcUIP, c[rtcB])
	case rtcB:
		if b&rtcSet != 0 {
			b &^= rtcUpdate // the data sheet: setting SET clears UIE
		}
		r.control(c[rtcA], b)
	case rtcC, rtcD: // read-only
		return
	default:
		c[i] = b
		return
	}
	r.arm()
}

// control sets registers A and B, and stops or starts the clock with them.
func (r *RTC) control(a, b byte) {
	c := &r.st.CMOS
	r.advance()
	t, was, held := r.now(), r.stopped(), r.held()
	if !was {
		r.show(t) // in the old format, which is what stays in the registers
	}
	c[rtcA], c[rtcB] = a, b
	switch is := r.stopped(); {
	case was && !is && held:
		r.start(1e9 / 2) // the data sheet: the first update comes half a second after the divider is released
	case was && !is:
		r.start(t.nsec)
	}
	if held && !r.held() {
		r.see(r.now()) // the divider starts anew: no tick is left over from before
	}
}

// held says whether the divider chain is held in reset.
func (r *RTC) held() bool { return r.st.CMOS[rtcA]&rtcHold == rtcHold }

// stopped says whether the time stands still.
func (r *RTC) stopped() bool { return r.held() || r.st.CMOS[rtcB]&rtcSet != 0 }

// advance sets the flags in C for what happened since it was last called.
func (r *RTC) advance() {
	from, to := moment{r.st.SeenSeconds, r.st.SeenNanoseconds}, r.now()
	r.see(to)
	if !from.before(to) { // the host's clock was set back
		return
	}
	c := &r.st.CMOS
	if n := r.period(); n != 0 && !r.held() && from.ticks()/n != to.ticks()/n {
		c[rtcC] |= rtcTick
	}
	if r.stopped() {
		return
	}
	if from.sec != to.sec {
		c[rtcC] |= rtcUpdate
	}
	if at, ok := r.nextAlarm(from.sec); ok && at <= to.sec {
		c[rtcC] |= rtcAlarm
	}
}

// arm brings C's summary bit and the interrupt line up to date, and the timer to the next event that would raise it.
// After Close it only does the first.
func (r *RTC) arm() {
	c := &r.st.CMOS
	c[rtcC] &^= rtcIRQ
	enabled := c[rtcB] & rtcEvents
	pending := c[rtcC]&enabled != 0
	if pending {
		c[rtcC] |= rtcIRQ
	}
	if r.closed {
		return
	}
	if pending != r.line {
		r.line = pending
		r.irq.set(pending)
	}
	if r.timer != nil {
		r.timer.Stop()
	}
	if enabled == 0 || pending {
		return
	}
	now := r.now()
	wait, ok := r.nextEvent(now, enabled)
	switch {
	case !ok:
	case r.timer == nil:
		r.timer = time.AfterFunc(wait, r.expire)
	default:
		r.timer.Reset(wait)
	}
}

// expire is the timer's function.
func (r *RTC) expire() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.advance()
	r.arm() // also when it came too early, or after the guest had changed its mind
}

// nextEvent returns the time until the first of the enabled events, if one can come at all.
func (r *RTC) nextEvent(now moment, enabled byte) (time.Duration, bool) {
	wait, ok := time.Duration(0), false
	at := func(d time.Duration) {
		if !ok || d < wait {
			wait, ok = d, true
		}
	}
	if n := r.period(); n != 0 && !r.held() && enabled&rtcTick != 0 {
		// Every rate divides a second. Rounded up, lest the timer expire just before the tick.
		next := int64((now.ticks()/n+1)*n - moment{sec: now.sec}.ticks())
		at(time.Duration((next*1e9+32767)/32768 - now.nsec))
	}
	if r.stopped() {
		return wait, ok
	}
	if enabled&rtcUpdate != 0 {
		at(time.Duration(1e9 - now.nsec))
	}
	if enabled&rtcAlarm != 0 {
		if sec, ok := r.nextAlarm(now.sec); ok {
			at(time.Duration(sec-now.sec)*time.Second - time.Duration(now.nsec))
		}
	}
	return wait, ok
}

// period returns the periodic rate in cycles of 32768 Hz, or 0 for none (MC146818A data sheet, table of rates).
func (r *RTC) period() uint64 {
	switch n := r.st.CMOS[rtcA] & rtcRate; n {
	case 0:
		return 0
	case 1, 2:
		return 1 << (n + 6)
	default:
		return 1 << (n - 1)
	}
}

// State returns the registers. The vCPUs are paused.
func (r *RTC) State() RTCState {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.advance()
	r.arm()
	return r.st
}

// Restore sets the registers. The vCPUs are paused, and the interrupt controller is restored already: the line is
// lowered and, if an event is pending, raised again.
func (r *RTC) Restore(st RTCState) error {
	c := &st.CMOS
	// A date of the calendar's 10000 years, counted in seconds from any other, is far below this.
	const farthest = 1 << 40
	switch {
	case st.Index > 0x7f:
		return fmt.Errorf("%w: RTC index %#x", ErrBadState, st.Index)
	case c[rtcA]&rtcUIP != 0 || c[rtcC]&^byte(rtcIRQ|rtcEvents) != 0 || c[rtcD] != rtcValid:
		return fmt.Errorf("%w: RTC registers A, C, D: %#x, %#x, %#x", ErrBadState, c[rtcA], c[rtcC], c[rtcD])
	case max(abs(st.Seconds), abs(st.SeenSeconds)) > farthest,
		uint64(st.Nanoseconds) >= 1e9, uint64(st.SeenNanoseconds) >= 1e9:
		return fmt.Errorf("%w: RTC time %d s %d ns, seen %d s %d ns", ErrBadState,
			st.Seconds, st.Nanoseconds, st.SeenSeconds, st.SeenNanoseconds)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.st = st
	r.line = false
	r.irq.set(false)
	r.advance()
	r.arm()
	return nil
}

// Close stops the timer for good. The registers keep answering the guest; the interrupt line stays as it is.
func (r *RTC) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	if r.timer != nil {
		r.timer.Stop() // one that has expired finds the RTC closed
	}
	return nil
}

func abs(n int64) uint64 {
	if n < 0 {
		return -uint64(n)
	}
	return uint64(n)
}

// moment is a time of the guest's clock since 1970, in UTC. Unlike time.Time's nanoseconds it has no end in reach.
type moment struct{ sec, nsec int64 }

func (m moment) before(n moment) bool { return m.sec < n.sec || m.sec == n.sec && m.nsec < n.nsec }

// ticks counts cycles of 32768 Hz.
func (m moment) ticks() uint64 { return uint64(m.sec)*32768 + uint64(m.nsec)*32768/1e9 }
