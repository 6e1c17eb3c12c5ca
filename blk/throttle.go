package blk

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// ErrThrottle reports a Throttle that makes no sense.
var ErrThrottle = errors.New("blk: throttle")

// maxRate bounds every rate, and every burst in whole, as QEMU does. Sums stay far below the 2^53 up to which a float64
// counts exactly.
const maxRate = int64(1e15)

// Rate is one limit, in bytes or operations per second. The zero Rate is no limit.
//
// It is a bucket that leaks Avg each second. A request may begin unless the bucket is full, and is poured in whole then:
// how large it is delays those behind it, not itself. The bucket holds a tenth of a second's worth or, where Max is set,
// a burst of Length seconds at Max per second. An idle disk's bucket runs empty, which allows the next burst.
type Rate struct {
	Avg    int64 // per second in the long run; 0 means no limit
	Max    int64 // per second in a burst, at least Avg; 0 means no bursts
	Length int64 // longest burst in seconds; needs Max. 0 means 1
}

// Throttle says how fast a group of Devices may work. The zero value sets no limit. A total limit counts reads and
// writes together and excludes limits on either.
type Throttle struct {
	BPSTotal, BPSRead, BPSWrite    Rate // bytes per second
	IOPSTotal, IOPSRead, IOPSWrite Rate // operations per second

	// IOPSSize is the size in bytes that counts as one operation. A larger request counts as proportionally more, a
	// smaller one as one. 0 means that size does not matter.
	IOPSSize int64
}

// The buckets of a group. The one for writes follows that for reads.
const (
	bpsTotal = iota
	bpsRead
	bpsWrite
	iopsTotal
	iopsRead
	iopsWrite
	numBuckets
)

// rateNames are the limits' names in QEMU's -drive and -object throttle-group, and in our options.
var rateNames = [numBuckets]string{"bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write"}

// Suffixes of the names of a Rate's other fields, and the name of IOPSSize.
const (
	maxSuffix    = "-max"
	lengthSuffix = "-max-length"
	iopsSizeName = "iops-size"
)

// rates returns the limits in the order of the buckets.
func (t *Throttle) rates() [numBuckets]*Rate {
	return [numBuckets]*Rate{&t.BPSTotal, &t.BPSRead, &t.BPSWrite, &t.IOPSTotal, &t.IOPSRead, &t.IOPSWrite}
}

// SetParam sets the field that QEMU calls name: bps or iops, then -total, -read or -write, then nothing (Avg), -max or
// -max-length; or iops-size. The result is checked as a whole later, by NewThrottleGroup or ThrottleGroup.Set.
func (t *Throttle) SetParam(name string, value int64) error {
	if name == iopsSizeName {
		t.IOPSSize = value
		return nil
	}
	for i, r := range t.rates() {
		switch name {
		case rateNames[i]:
			r.Avg = value
		case rateNames[i] + maxSuffix:
			r.Max = value
		case rateNames[i] + lengthSuffix:
			r.Length = value
		default:
			continue
		}
		return nil
	}
	return fmt.Errorf("%w: no limit is called %q (%s, each also with %s and %s, or %s)",
		ErrThrottle, name, strings.Join(rateNames[:], ", "), maxSuffix, lengthSuffix, iopsSizeName)
}

// String returns the limits that are set, as name=value joined by commas, with the names of SetParam.
func (t Throttle) String() string {
	var b strings.Builder
	add := func(name, suffix string, value int64) {
		if value == 0 {
			return
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%s%s=%d", name, suffix, value)
	}
	for i, r := range t.rates() {
		add(rateNames[i], "", r.Avg)
		add(rateNames[i], maxSuffix, r.Max)
		add(rateNames[i], lengthSuffix, r.Length)
	}
	add(iopsSizeName, "", t.IOPSSize)
	return b.String()
}

// check reports the first field that makes no sense.
func (t Throttle) check() error {
	rates := t.rates()
	for i, r := range rates {
		if err := r.check(rateNames[i]); err != nil {
			return err
		}
	}
	for _, total := range []int{bpsTotal, iopsTotal} {
		for i := total + 1; i <= total+2; i++ {
			if rates[total].Avg != 0 && rates[i].Avg != 0 {
				return fmt.Errorf("%w: %s together with %s: set either the total or reads and writes apart",
					ErrThrottle, rateNames[total], rateNames[i])
			}
		}
	}
	switch {
	case t.IOPSSize < 0 || t.IOPSSize > maxRate:
		return fmt.Errorf("%w: %s %d: want 0 to %d", ErrThrottle, iopsSizeName, t.IOPSSize, maxRate)
	case t.IOPSSize > 0 && rates[iopsTotal].Avg+rates[iopsRead].Avg+rates[iopsWrite].Avg == 0:
		return fmt.Errorf("%w: %s without a limit of operations: set %s, %s or %s as well",
			ErrThrottle, iopsSizeName, rateNames[iopsTotal], rateNames[iopsRead], rateNames[iopsWrite])
	}
	return nil
}

func (r Rate) check(name string) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrThrottle, fmt.Sprintf(format, args...))
	}
	switch {
	case r.Avg < 0 || r.Avg > maxRate:
		return bad("%s %d: want 0 to %d", name, r.Avg, maxRate)
	case r.Max < 0 || r.Max > maxRate:
		return bad("%s%s %d: want 0 to %d", name, maxSuffix, r.Max, maxRate)
	case r.Length < 0 || r.Length > maxRate:
		return bad("%s%s %d: want 0 to %d seconds", name, lengthSuffix, r.Length, maxRate)
	case r.Max > 0 && r.Avg == 0:
		return bad("%s%s without %s: a burst needs a limit that it exceeds", name, maxSuffix, name)
	case r.Max > 0 && r.Max < r.Avg:
		return bad("%s%s %d is below %s %d", name, maxSuffix, r.Max, name, r.Avg)
	case r.Length > 1 && r.Max == 0:
		return bad("%s%s without %s%s: say how fast a burst may be", name, lengthSuffix, name, maxSuffix)
	case r.Max > 0 && r.Length > maxRate/r.Max:
		return bad("%s%s %d: a burst of %d per second may last %d seconds at most",
			name, lengthSuffix, r.Length, r.Max, maxRate/r.Max)
	}
	return nil
}

// bucket is one limit at work. Everything is a float64 because a nanosecond leaks a fraction of a unit.
type bucket struct {
	avg, max float64 // units per second that leak from level and burst; avg 0 means that there is no limit
	size     float64 // where level stops requests
	long     bool    // bursts last longer than a second, and burst keeps them at max meanwhile

	level, burst float64
}

func newBucket(r Rate) bucket {
	b := bucket{avg: float64(r.Avg), max: float64(r.Max), long: r.Length > 1}
	if r.Max > 0 {
		b.size = b.max * float64(max(r.Length, 1))
	} else {
		b.size = b.avg / 10 // without any slack every other request would wait
	}
	return b
}

func (b *bucket) leak(seconds float64) {
	b.level = max(b.level-b.avg*seconds, 0)
	if b.long {
		b.burst = max(b.burst-b.max*seconds, 0)
	}
}

func (b *bucket) add(units float64) {
	b.level += units
	if b.long {
		b.burst += units
	}
}

// delay returns the seconds until the bucket lets a request in, which is 0 where it does now.
func (b *bucket) delay() float64 {
	switch {
	case b.avg == 0:
		return 0
	case b.level > b.size:
		return (b.level - b.size) / b.avg
	case b.long && b.burst > b.max/10:
		return (b.burst - b.max/10) / b.max
	}
	return 0
}

// direction tells reads from writes, whose limits and queues are apart.
type direction int

const (
	reads direction = iota
	writes
	numDirections
)

// ThrottleGroup shares one Throttle among the Devices that were given it. Each Device's requests begin in the order in
// which they came, reads and writes apart; Devices that wait take turns, and so do reads and writes. All methods may be
// called from any goroutine at any time.
type ThrottleGroup struct {
	limited atomic.Bool // there is a limit: what a request looks at where there is none

	mu      sync.Mutex
	limits  Throttle
	buckets [numBuckets]bucket
	leaked  time.Time // up to when the buckets have leaked
	waiting [numDirections][]*throttleMember
	turn    direction   // which one begins when both may
	timer   *time.Timer // runs dispatch when the next waiter may begin
}

// NewThrottleGroup returns a group with the limits t. The error, if any, is an ErrThrottle.
func NewThrottleGroup(t Throttle) (*ThrottleGroup, error) {
	g := &ThrottleGroup{}
	if err := g.Set(t); err != nil {
		return nil, err
	}
	return g, nil
}

// Set replaces the limits. The new ones begin with empty buckets and hold at once, also for requests that wait already.
// On an error, which is an ErrThrottle, the old ones stay.
func (g *ThrottleGroup) Set(t Throttle) error {
	if err := t.check(); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.limits, g.leaked = t, time.Now()
	limited := false
	for i, r := range t.rates() {
		g.buckets[i] = newBucket(*r)
		limited = limited || r.Avg > 0
	}
	g.limited.Store(limited)
	g.dispatch()
	return nil
}

// Throttle returns the limits.
func (g *ThrottleGroup) Throttle() Throttle {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.limits
}

// join makes a new member of the group, for one Device.
func (g *ThrottleGroup) join() *throttleMember { return &throttleMember{group: g} }

// leak lets pass the time since the last call.
func (g *ThrottleGroup) leak() {
	now := time.Now()
	seconds := now.Sub(g.leaked).Seconds()
	if seconds <= 0 {
		return
	}
	g.leaked = now
	for i := range g.buckets {
		g.buckets[i].leak(seconds)
	}
}

// delay returns how long requests in direction d have to wait from the last leak on.
func (g *ThrottleGroup) delay(d direction) time.Duration {
	seconds := max(g.buckets[bpsTotal].delay(), g.buckets[bpsRead+d].delay(),
		g.buckets[iopsTotal].delay(), g.buckets[iopsRead+d].delay())
	const longest = 24 * time.Hour // what is longer, and may not fit a Duration, is looked at again then
	return time.Duration(min(seconds, longest.Seconds()) * float64(time.Second))
}

// account pours a request into its buckets.
func (g *ThrottleGroup) account(d direction, n int64) {
	units := 1.0
	if size := g.limits.IOPSSize; size > 0 && n > size {
		units = float64(n) / float64(size)
	}
	g.buckets[bpsTotal].add(float64(n))
	g.buckets[bpsRead+d].add(float64(n))
	g.buckets[iopsTotal].add(units)
	g.buckets[iopsRead+d].add(units)
}

// dispatch begins the waiting requests that may begin now and sets the timer for the next one. mu is held.
func (g *ThrottleGroup) dispatch() {
	g.leak()
	for {
		d := g.turn
		if !g.ready(d) {
			d = reads + writes - d
		}
		if !g.ready(d) {
			break
		}
		g.turn = reads + writes - d
		m := g.waiting[d][0]
		g.waiting[d] = append(g.waiting[d][1:], m) // at the end, where admit leaves it if it has more
		m.admit(m.queues[d].first)
	}
	g.arm()
}

// ready reports whether a request waits in direction d and need not.
func (g *ThrottleGroup) ready(d direction) bool { return len(g.waiting[d]) > 0 && g.delay(d) == 0 }

// arm sets the timer for the request that may begin next. mu is held, and leak was called.
func (g *ThrottleGroup) arm() {
	next := time.Duration(-1)
	for d := range numDirections {
		if len(g.waiting[d]) == 0 {
			continue
		}
		if delay := g.delay(d); next < 0 || delay < next {
			next = delay
		}
	}
	switch {
	case next < 0 && g.timer != nil:
		g.timer.Stop()
	case next < 0:
	case g.timer == nil:
		g.timer = time.AfterFunc(next, func() {
			g.mu.Lock()
			defer g.mu.Unlock()
			g.dispatch()
		})
	default:
		g.timer.Reset(next)
	}
}

// throttleMember is a Device's place in its group. The group's mu guards it.
type throttleMember struct {
	group    *ThrottleGroup
	queues   [numDirections]throttleQueue
	bypassed int  // how often bypass(true) was called more than bypass(false)
	gone     bool // leave was called
}

// throttleQueue holds the requests of one member that wait in one direction, in the order in which they came.
type throttleQueue struct{ first, last *throttleWaiter }

// throttleWaiter is a request that waits.
type throttleWaiter struct {
	dir        direction
	n          int64
	begin      chan struct{} // closed when it is let in
	queued     bool
	prev, next *throttleWaiter
}

// wait returns when a request of n bytes may begin: with nil, or with ctx's error where that ended first and the request
// does not count. It returns at once, and does not allocate, where the limits allow it and nobody came before.
func (m *throttleMember) wait(ctx context.Context, write bool, n int64) error {
	g := m.group
	if !g.limited.Load() {
		return nil
	}
	d := reads
	if write {
		d = writes
	}
	g.mu.Lock()
	if m.gone {
		g.mu.Unlock()
		return nil
	}
	if len(g.waiting[reads])+len(g.waiting[writes]) > 0 {
		g.dispatch() // those who came before have the first claim to what has leaked since
	} else {
		g.leak()
	}
	if m.bypassed > 0 || len(g.waiting[d]) == 0 && g.delay(d) == 0 {
		g.account(d, n)
		g.mu.Unlock()
		return nil
	}
	return m.queue(ctx, d, n)
}

// queue is the part of wait that waits. mu is held when it is called, and not when it returns.
func (m *throttleMember) queue(ctx context.Context, d direction, n int64) error {
	g := m.group
	if err := ctx.Err(); err != nil {
		g.mu.Unlock()
		return err
	}
	w := &throttleWaiter{dir: d, n: n, begin: make(chan struct{})}
	m.push(w)
	g.arm()
	g.mu.Unlock()
	select {
	case <-w.begin:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !w.queued {
		return nil // let in meanwhile, and counted
	}
	m.remove(w)
	g.dispatch()
	return ctx.Err()
}

// bypass lets the member's requests pass without waiting while it was called more often with true than with false: a
// Device that is being drained must not wait for its limits. They still count, so that others are not overrun later.
func (m *throttleMember) bypass(on bool) {
	m.group.mu.Lock()
	defer m.group.mu.Unlock()
	if !on {
		m.bypassed--
		return
	}
	m.bypassed++
	m.release()
}

// leave ends the membership: requests that wait begin at once, later ones are not limited. The others stay as they are.
func (m *throttleMember) leave() {
	m.group.mu.Lock()
	defer m.group.mu.Unlock()
	m.gone = true
	m.release()
}

// release lets in everyone who waits.
func (m *throttleMember) release() {
	m.group.leak()
	for d := range m.queues {
		for m.queues[d].first != nil {
			m.admit(m.queues[d].first)
		}
	}
	m.group.arm()
}

// admit lets w in.
func (m *throttleMember) admit(w *throttleWaiter) {
	m.remove(w)
	m.group.account(w.dir, w.n)
	close(w.begin)
}

// push adds w at the end of its queue. A member that did not wait yet has its turn after those who did.
func (m *throttleMember) push(w *throttleWaiter) {
	q := &m.queues[w.dir]
	w.queued, w.prev = true, q.last
	if q.last == nil {
		q.first = w
		m.group.waiting[w.dir] = append(m.group.waiting[w.dir], m)
	} else {
		q.last.next = w
	}
	q.last = w
}

// remove takes w out of its queue, wherever it stands.
func (m *throttleMember) remove(w *throttleWaiter) {
	q := &m.queues[w.dir]
	if w.prev == nil {
		q.first = w.next
	} else {
		w.prev.next = w.next
	}
	if w.next == nil {
		q.last = w.prev
	} else {
		w.next.prev = w.prev
	}
	w.queued, w.prev, w.next = false, nil, nil
	if q.first == nil {
		all := &m.group.waiting[w.dir]
		*all = slices.DeleteFunc(*all, func(o *throttleMember) bool { return o == m })
	}
}
