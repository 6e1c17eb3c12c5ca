package legacy

import "time"

// now returns the guest's time, whether or not it is shown.
func (r *RTC) now() moment {
	t := r.clock()
	m := moment{t.Unix() + r.st.Seconds, int64(t.Nanosecond()) + r.st.Nanoseconds}
	if m.nsec >= 1e9 {
		m.sec, m.nsec = m.sec+1, m.nsec-1e9
	}
	return m
}

func (r *RTC) see(m moment) { r.st.SeenSeconds, r.st.SeenNanoseconds = m.sec, m.nsec }

// show writes m into the time registers in the format that register B asks for.
func (r *RTC) show(m moment) {
	c := &r.st.CMOS
	t := time.Unix(m.sec, 0).UTC()
	year, month, day := t.Date()
	hour, minute, second := t.Clock()
	c[rtcSecond] = r.encode(second)
	c[rtcMinute] = r.encode(minute)
	c[rtcHour] = r.encodeHour(hour)
	c[rtcWeekday] = r.encode(int(t.Weekday()) + 1) // Sunday is 1
	c[rtcDay] = r.encode(day)
	c[rtcMonth] = r.encode(int(month))
	c[rtcYear] = r.encode(year % 100)
	c[RTCCentury] = r.encode(year / 100 % 100)
}

// start lets the clock run on from the time registers, nsec nanoseconds into their second. Registers that name no date
// count as the date that many seconds, days or months later.
func (r *RTC) start(nsec int64) {
	c := &r.st.CMOS
	hour, ok := r.decodeHour(c[rtcHour])
	if !ok {
		hour = 0
	}
	year := r.decode(c[RTCCentury])*100 + r.decode(c[rtcYear])
	want := moment{nsec: nsec, sec: time.Date(year, time.Month(r.decode(c[rtcMonth])), r.decode(c[rtcDay]), hour,
		r.decode(c[rtcMinute]), r.decode(c[rtcSecond]), 0, time.UTC).Unix()}
	t := r.clock()
	r.st.Seconds, r.st.Nanoseconds = want.sec-t.Unix(), want.nsec-int64(t.Nanosecond())
	if r.st.Nanoseconds < 0 {
		r.st.Seconds, r.st.Nanoseconds = r.st.Seconds-1, r.st.Nanoseconds+1e9
	}
	r.see(want)
}

// nextAlarm returns the first second after sec at which the alarm registers match, if they ever do.
func (r *RTC) nextAlarm(sec int64) (int64, bool) {
	c := &r.st.CMOS
	second, anySecond := r.decode(c[rtcSecondAlarm]), c[rtcSecondAlarm] >= rtcAnyTime
	minute, anyMinute := r.decode(c[rtcMinuteAlarm]), c[rtcMinuteAlarm] >= rtcAnyTime
	hour, ok := r.decodeHour(c[rtcHourAlarm])
	anyHour := c[rtcHourAlarm] >= rtcAnyTime
	if !anySecond && second > 59 || !anyMinute && minute > 59 || !anyHour && !ok {
		return 0, false
	}
	// From the coarsest unit to the finest, to the start of the next while it does not match: some 150 steps at most.
	for sec++; ; {
		switch of := (sec%86400 + 86400) % 86400; {
		case !anyHour && of/3600 != int64(hour):
			sec += 3600 - of%3600
		case !anyMinute && of/60%60 != int64(minute):
			sec += 60 - of%60
		case !anySecond && of%60 != int64(second):
			sec++
		default:
			return sec, true
		}
	}
}

// encode puts a number below 100 into the format that B asks for.
func (r *RTC) encode(n int) byte {
	if r.st.CMOS[rtcB]&rtcBinary != 0 {
		return byte(n)
	}
	return byte(n/10<<4 | n%10)
}

// decode is the reverse of encode. Of a byte that is not BCD it makes a number up to 165.
func (r *RTC) decode(b byte) int {
	if r.st.CMOS[rtcB]&rtcBinary != 0 {
		return int(b)
	}
	return int(b>>4)*10 + int(b&0xf)
}

func (r *RTC) encodeHour(hour int) byte {
	if r.st.CMOS[rtcB]&rtc24 != 0 {
		return r.encode(hour)
	}
	b := r.encode((hour+11)%12 + 1)
	if hour >= 12 {
		b |= rtcPM
	}
	return b
}

// decodeHour returns the hour of the day that b means, if it means one.
func (r *RTC) decodeHour(b byte) (hour int, ok bool) {
	if r.st.CMOS[rtcB]&rtc24 != 0 {
		hour = r.decode(b)
		return hour, hour < 24
	}
	n := r.decode(b &^ rtcPM)
	hour = n % 12
	if b&rtcPM != 0 {
		hour += 12
	}
	return hour, n >= 1 && n <= 12
}
