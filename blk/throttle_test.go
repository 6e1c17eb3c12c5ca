package blk

import (
	"context"
	"errors"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The tests run in virtual time: time.Sleep steps the clock.

// throttled is a member with requests that do nothing but wait, and counts of what was let in.
type throttled struct {
	*throttleMember
	ops, bytes [numDirections]atomic.Int64
}

func (m *throttled) request(d direction, n int64) {
	go func() {
		if m.wait(context.Background(), d == writes, n) == nil {
			m.ops[d].Add(1)
			m.bytes[d].Add(n)
		}
	}()
}

// newThrottled returns n members of a group with the given limits, as name, value, name, value... At the end of the test
// they leave, so that none of their requests is left behind.
func newThrottled(t *testing.T, n int, params ...any) (*ThrottleGroup, []*throttled) {
	t.Helper()
	g, err := NewThrottleGroup(limits(t, params...))
	if err != nil {
		t.Fatal(err)
	}
	members := make([]*throttled, n)
	for i := range members {
		members[i] = &throttled{throttleMember: g.join()}
		t.Cleanup(members[i].leave)
	}
	return g, members
}

func limits(t *testing.T, params ...any) Throttle {
	t.Helper()
	var l Throttle
	for i := 0; i < len(params); i += 2 {
		var v int64
		switch p := params[i+1].(type) {
		case int:
			v = int64(p)
		case int64:
			v = p
		}
		if err := l.SetParam(params[i].(string), v); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// The patterns of QEMU's iotest 093: with requests of 512 bytes, keep the disks busy for some seconds and count what
// went through.

func bps(name string) bool { return strings.HasPrefix(name, "bps") }

// base093 is the limit per disk.
func base093(name string) int {
	if bps(name) {
		return 4096
	}
	return 10
}

func directions(name string) []direction {
	switch {
	case strings.HasSuffix(name, "-read"):
		return []direction{reads}
	case strings.HasSuffix(name, "-write"):
		return []direction{writes}
	}
	return []direction{reads, writes}
}

// counted returns what m did in direction d, in the unit of the limit called name.
func (m *throttled) counted(name string, d direction) int64 {
	if bps(name) {
		return m.bytes[d].Load()
	}
	return m.ops[d].Load()
}

// saturate expects that the limit called name lets rate units per second through, shared evenly among members and
// directions, give or take a tenth.
func saturate(t *testing.T, members []*throttled, name string, rate, seconds int) {
	t.Helper()
	const size = 512
	dirs := directions(name)
	shares := len(members) * len(dirs)
	requests := rate * seconds * 2 / shares // twice what should go through
	if bps(name) {
		requests /= size
	}
	for range requests {
		for _, m := range members {
			for _, d := range dirs {
				m.request(d, size)
			}
		}
	}
	synctest.Wait() // what is let in at once does not count
	before := make([][numDirections]int64, len(members))
	for i, m := range members {
		for _, d := range dirs {
			before[i][d] = m.counted(name, d)
		}
	}
	time.Sleep(time.Duration(seconds) * time.Second)
	synctest.Wait()
	want := float64(rate) * float64(seconds) / float64(shares)
	for i, m := range members {
		for _, d := range dirs {
			if got := float64(m.counted(name, d) - before[i][d]); got < 0.9*want || got > 1.1*want {
				t.Errorf("%s: member %d of %d did %v in direction %d in %d s, want %v", name, i, len(members), got, d, seconds, want)
			}
		}
	}
}

func TestThrottleEachLimit(t *testing.T) {
	for _, name := range rateNames {
		for n := 1; n <= 3; n++ {
			synctest.Test(t, func(t *testing.T) {
				rate := base093(name) * n
				_, members := newThrottled(t, n, name, rate)
				saturate(t, members, name, rate, 5)
			})
		}
	}
}

// TestThrottleOneBusy checks that a member has the whole limit while the others are idle.
func TestThrottleOneBusy(t *testing.T) {
	for _, name := range rateNames {
		synctest.Test(t, func(t *testing.T) {
			rate := base093(name) * 3
			_, members := newThrottled(t, 3, name, rate)
			for i := range members {
				saturate(t, members[i:i+1], name, rate, 5)
				time.Sleep(15 * time.Second) // for the rest of the requests, and the buckets to run empty
			}
		})
	}
}

func TestThrottleBurst(t *testing.T) {
	const factor, length = 7, 4
	for _, name := range rateNames {
		synctest.Test(t, func(t *testing.T) {
			rate := base093(name)
			g, members := newThrottled(t, 1, name, rate, name+"-max", rate*factor, name+"-max-length", length)
			for range 2 {
				saturate(t, members, name, rate*factor, length)
				time.Sleep(length * time.Second)
				saturate(t, members, name, rate, 5)
				time.Sleep(2 * factor * length * time.Second) // until all is done and the bucket is empty
				synctest.Wait()
				g.mu.Lock()
				if len(g.waiting[reads])+len(g.waiting[writes]) > 0 {
					t.Errorf("%s: requests are left", name)
				}
				g.mu.Unlock()
				time.Sleep(factor * length * time.Second)
			}
		})
	}
}

func TestThrottleShortBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, members := newThrottled(t, 1, "iops-total", 10, "iops-total-max", 50)
		for range 100 {
			members[0].request(reads, 1)
		}
		synctest.Wait()
		if n := members[0].ops[reads].Load(); n != 51 { // a full second's burst at once, and the one that fills the bucket
			t.Errorf("%d requests went through at once, want 51", n)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n := members[0].ops[reads].Load(); n != 61 {
			t.Errorf("%d requests went through after a second, want 61", n)
		}
	})
}

// TestThrottleCombined has limits of both kinds at once: the tighter one counts.
func TestThrottleCombined(t *testing.T) {
	for _, tt := range []struct {
		size int64
		want int64 // requests in 10 s
	}{
		{size: 512, want: 1000},  // 100 a second
		{size: 16384, want: 625}, // 1 MiB a second
	} {
		synctest.Test(t, func(t *testing.T) {
			_, members := newThrottled(t, 1, "bps-total", 1<<20, "iops-read", 100, "iops-write", 50)
			m := members[0]
			for range 2 * tt.want {
				m.request(reads, tt.size)
			}
			time.Sleep(10 * time.Second)
			synctest.Wait()
			if n := m.ops[reads].Load(); n < tt.want || n > tt.want+tt.want/20 {
				t.Errorf("%d requests of %d bytes in 10 s, want %d", n, tt.size, tt.want)
			}
		})
	}
}

// TestThrottleRemoveMember is 093's test of that name: the timer goes on for those who stay.
func TestThrottleRemoveMember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, members := newThrottled(t, 2, "bps-read", 4096)
		check := func(want0, want1 int64) {
			t.Helper()
			synctest.Wait()
			got0, got1 := members[0].bytes[reads].Load(), members[1].bytes[reads].Load()
			if got0 != want0 || got1 != want1 {
				t.Errorf("%d and %d bytes were read, want %d and %d", got0, got1, want0, want1)
			}
		}
		members[0].request(reads, 4096) // at once
		check(4096, 0)
		members[0].request(reads, 2048)
		check(4096, 0)
		members[0].request(reads, 2048)
		check(4096, 0)
		members[1].request(reads, 4096)
		check(4096, 0)
		members[0].leave()
		check(8192, 0)
		members[0].request(reads, 1<<30) // no longer limited, and no longer counted
		check(8192+1<<30, 0)
		time.Sleep(5 * time.Second)
		check(8192+1<<30, 4096)
	})
}

// TestThrottleOrder checks that requests of one member keep their order, and that members take turns.
func TestThrottleOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, members := newThrottled(t, 3, "iops-total", 1)
		var mu sync.Mutex
		var order []byte
		begun := func(c byte) {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, c)
		}
		for i, c := range "aAaaabbcC" { // members by letter, writes in upper case
			go func() {
				if members[(c|0x20)-'a'].wait(context.Background(), c < 'a', int64(i)) == nil {
					begun(byte(c))
				}
			}()
			synctest.Wait()
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		// Reads and writes take turns; among reads a, b and c do, which came in this order.
		if got, want := string(order), "aaAbCcaba"; got != want {
			t.Errorf("requests began in the order %s, want %s", got, want)
		}
	})
}

func TestThrottleSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, members := newThrottled(t, 1, "iops-total", 1)
		m := members[0]
		for range 1000 {
			m.request(writes, 1)
		}
		time.Sleep(4500 * time.Millisecond)
		synctest.Wait()
		if n := m.ops[writes].Load(); n != 5 {
			t.Fatalf("%d requests in 4.5 s, want 5", n)
		}
		if err := g.Set(limits(t, "iops-write", 100)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n := m.ops[writes].Load(); n < 105 || n > 120 {
			t.Fatalf("%d requests a second after the limit became 100, want about 110 more than 5", n)
		}
		if err := g.Set(limits(t, "iops-total", -1)); !errors.Is(err, ErrThrottle) {
			t.Errorf("Set = %v, want ErrThrottle", err)
		}
		if got := g.Throttle().String(); got != "iops-write=100" {
			t.Errorf("limits after a failed Set: %s", got)
		}
		if err := g.Set(Throttle{}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := m.ops[writes].Load(); n != 1000 {
			t.Errorf("%d requests after the limit was lifted, want 1000", n)
		}
	})
}

func TestThrottleCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, members := newThrottled(t, 1, "iops-total", 1)
		m := members[0]
		m.request(reads, 1)
		synctest.Wait()
		begin := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		m.request(reads, 1)
		go func() {
			time.Sleep(time.Millisecond)
			m.request(reads, 1) // behind the one that is cancelled
		}()
		errs := make(chan error)
		synctest.Wait()
		go func() { errs <- m.wait(ctx, false, 1<<40) }()
		if err := <-errs; !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != 100*time.Millisecond {
			t.Errorf("wait = %v after %v, want DeadlineExceeded after 100ms", err, time.Since(begin))
		}
		if err := m.wait(ctx, false, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("wait that is cancelled before = %v", err)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if n := m.ops[reads].Load(); n != 3 {
			t.Errorf("%d requests, want 3: the one that was cancelled must not count", n)
		}
	})
}

// TestThrottleCancelAny cancels at random places of the queues, at random times.
func TestThrottleCancelAny(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, members := newThrottled(t, 3, "iops-total", 100)
		var done, cancelled atomic.Int64
		const n = 3000
		for i := range n {
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i*7919%10007)*time.Millisecond)
				defer cancel()
				if members[i%3].wait(ctx, i%2 == 0, 1) == nil {
					done.Add(1)
				} else {
					cancelled.Add(1)
				}
			}()
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if done.Load()+cancelled.Load() != n || done.Load() < 800 || done.Load() > 1100 {
			t.Errorf("%d done, %d cancelled of %d; want about 1000 done", done.Load(), cancelled.Load(), n)
		}
		if len(g.waiting[reads])+len(g.waiting[writes]) > 0 {
			t.Error("members still wait")
		}
	})
}

func TestThrottleBypass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, members := newThrottled(t, 2, "iops-total", 1)
		a, b := members[0], members[1]
		count := func(m *throttled) int64 {
			synctest.Wait()
			return m.ops[reads].Load()
		}
		for range 10 {
			a.request(reads, 1)
			synctest.Wait()
			b.request(reads, 1)
			synctest.Wait()
		}
		if count(a) != 1 || count(b) != 0 {
			t.Fatalf("%d and %d requests at once, want 1 and 0", count(a), count(b))
		}
		a.bypass(true)
		a.bypass(true)
		if count(a) != 10 || count(b) != 0 {
			t.Errorf("%d and %d requests when one is drained, want 10 and 0", count(a), count(b))
		}
		a.bypass(false)
		a.request(reads, 1)
		if count(a) != 11 {
			t.Error("a request waits while its member is still drained")
		}
		a.bypass(false)
		a.request(reads, 1)
		if count(a) != 11 {
			t.Error("a request does not wait after the drained section")
		}
		time.Sleep(5 * time.Second)
		if count(b) != 0 {
			t.Error("requests of a drained member did not count")
		}
		time.Sleep(20 * time.Second)
		if count(a) != 12 || count(b) != 10 {
			t.Errorf("%d and %d requests in the end, want 12 and 10", count(a), count(b))
		}
	})
}

func TestThrottleIOPSSize(t *testing.T) {
	for _, tt := range []struct {
		size int64
		want int64 // requests in 10 s at 100 operations of 4096 bytes per second
	}{
		{size: 1, want: 1000},
		{size: 4096, want: 1000},
		{size: 6144, want: 667},
		{size: 8192, want: 500},
		{size: 1 << 20, want: 4},
	} {
		synctest.Test(t, func(t *testing.T) {
			_, members := newThrottled(t, 1, "iops-total", 100, "iops-size", 4096)
			for range 2 * tt.want {
				members[0].request(writes, tt.size)
			}
			time.Sleep(10 * time.Second)
			synctest.Wait()
			if n := members[0].ops[writes].Load(); n < tt.want || n > tt.want+tt.want/50+1 {
				t.Errorf("%d requests of %d bytes in 10 s, want %d", n, tt.size, tt.want)
			}
		})
	}
}

// TestThrottleHuge has numbers that must not overflow on their way to a timer.
func TestThrottleHuge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, members := newThrottled(t, 1, "bps-total", 1, "iops-total", maxRate, "iops-total-max", maxRate, "iops-total-max-length", 1)
		members[0].request(reads, math.MaxInt64)
		synctest.Wait()
		members[0].request(reads, 1)
		time.Sleep(100 * 365 * 24 * time.Hour)
		synctest.Wait()
		if n := members[0].ops[reads].Load(); n != 1 {
			t.Errorf("%d requests went through, want 1", n)
		}
		if err := g.Set(Throttle{}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := members[0].ops[reads].Load(); n != 2 {
			t.Errorf("%d requests went through without a limit, want 2", n)
		}
	})
}

func TestThrottleCheck(t *testing.T) {
	for _, tt := range []struct {
		limits []any
		want   string // part of the error; "" for none
	}{
		{limits: []any{}},
		{limits: []any{"bps-total", maxRate, "bps-total-max", maxRate, "bps-total-max-length", 1}},
		{limits: []any{"bps-read", 1, "bps-write", 2, "iops-total", 3, "iops-size", 4096}},
		{limits: []any{"iops-read", 5, "iops-read-max", 5, "iops-read-max-length", 60}},
		{limits: []any{"iops-read", 5, "iops-read-max-length", 1}}, // says what holds anyhow
		{[]any{"bps-total", -1}, "bps-total -1: want 0 to"},
		{[]any{"iops-write", maxRate + 1}, "iops-write 1000000000000001: want 0 to 1000000000000000"},
		{[]any{"iops-write", 1, "iops-write-max", maxRate + 1}, "iops-write-max 1000000000000001: want 0 to"},
		{[]any{"bps-read", 1, "bps-read-max", -5}, "bps-read-max -5"},
		{[]any{"bps-read", 1, "bps-read-max", 5, "bps-read-max-length", -1}, "bps-read-max-length -1"},
		{[]any{"bps-read", 10, "bps-read-max", 9}, "bps-read-max 9 is below bps-read 10"},
		{[]any{"bps-read-max", 9}, "bps-read-max without bps-read"},
		{[]any{"bps-read", 10, "bps-read-max-length", 2}, "bps-read-max-length without bps-read-max"},
		{[]any{"bps-read", 10, "bps-read-max", maxRate / 2, "bps-read-max-length", 3}, "may last 2 seconds at most"},
		{[]any{"bps-total", 1, "bps-write", 1}, "bps-total together with bps-write"},
		{[]any{"iops-total", 1, "iops-read", 1}, "iops-total together with iops-read"},
		{[]any{"bps-total", 1, "iops-size", 512}, "iops-size without a limit of operations"},
		{[]any{"iops-total", 1, "iops-size", -1}, "iops-size -1"},
	} {
		_, err := NewThrottleGroup(limits(t, tt.limits...))
		if tt.want == "" && err != nil || tt.want != "" && (!errors.Is(err, ErrThrottle) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%v: error %v, want %q", tt.limits, err, tt.want)
		}
	}
	var l Throttle
	if err := l.SetParam("bps-max", 1); !errors.Is(err, ErrThrottle) || !strings.Contains(err.Error(), `"bps-max"`) {
		t.Errorf("SetParam of an unknown name = %v", err)
	}
}

func TestThrottleString(t *testing.T) {
	const want = "bps-read=1,bps-read-max=2,bps-read-max-length=3,iops-total=4,iops-size=5"
	l := limits(t, "bps-read", 1, "bps-read-max", 2, "bps-read-max-length", 3, "iops-total", 4, "iops-size", 5)
	if got := l.String(); got != want {
		t.Errorf("String = %s, want %s", got, want)
	}
}

func TestThrottleAllocs(t *testing.T) {
	for _, l := range []Throttle{{}, {BPSTotal: Rate{Avg: maxRate}, IOPSRead: Rate{Avg: maxRate}}} {
		g, err := NewThrottleGroup(l)
		if err != nil {
			t.Fatal(err)
		}
		m, ctx := g.join(), context.Background()
		if n := testing.AllocsPerRun(100, func() {
			if err := m.wait(ctx, false, 4096); err != nil {
				t.Error(err)
			}
		}); n != 0 {
			t.Errorf("%v allocations per request that need not wait (%v)", n, l)
		}
	}
}

func BenchmarkThrottleFree(b *testing.B) {
	g, err := NewThrottleGroup(Throttle{BPSTotal: Rate{Avg: maxRate}, IOPSTotal: Rate{Avg: maxRate}})
	if err != nil {
		b.Fatal(err)
	}
	m, ctx := g.join(), context.Background()
	for b.Loop() {
		_ = m.wait(ctx, true, 512)
	}
}
