package fault

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// Op is a call of a driver.
type Op uint8

// The calls that rules tell apart. OpAny in a Rule stands for all.
const (
	OpAny Op = iota
	OpRead
	OpWrite // with and without FUA
	OpFlush
	OpDiscard
	OpZero
	OpStatus
	OpCompressed
	OpTruncate
	OpState
	OpRefresh
	numOps
)

var opNames = [numOps]string{
	"any", "read", "write", "flush", "discard", "zero", "status", "compressed", "truncate", "state", "refresh",
}

func (o Op) String() string {
	if o < numOps {
		return opNames[o]
	}
	return fmt.Sprintf("op %d", uint8(o))
}

// Rule says which calls go wrong, and how. Of several rules that match a call, the first one with a fault decides; delays
// add up.
type Rule struct {
	// Which calls it is about.
	Op       Op    // OpAny: all
	Off, Len int64 // those that touch this range; Len 0: all. Calls without a range, such as a flush, touch every range.

	// Which of those it acts on.
	After       int     // not on the first After of them
	Every       int     // only on every Every-th from then on; 0 means 1
	Times       int     // at most so often; 0: for ever
	Probability float64 // by chance only; 0 means always

	// What it does. A rule without Err and Short only delays. Short without Err breaks the promise of blk.Backend but for
	// reads, where it means that the storage ends there.
	Err      error         // what the call returns
	Short    bool          // the call does its first Keep bytes, rounded down to the alignment, and then ends: with Err, if any
	Keep     int64         // in bytes
	Delay    time.Duration // how long the call waits first
	MaxDelay time.Duration // and how much longer by chance
}

type rule struct {
	Rule
	seen, acted int
}

// Add adds a rule and returns a function that removes it.
func (d *Disk) Add(r Rule) (remove func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	added := &rule{Rule: r}
	d.rules = append(d.rules, added)
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		for i, r := range d.rules {
			if r == added {
				d.rules = append(d.rules[:i:i], d.rules[i+1:]...)
				return
			}
		}
	}
}

// Clear removes all rules.
func (d *Disk) Clear() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules = nil
}

// verdict is what the rules say about one call.
type verdict struct {
	delay time.Duration
	fault bool
	err   error
	short bool
	keep  int64
}

func (v verdict) wait() {
	if v.delay > 0 {
		time.Sleep(v.delay) // the delay is what was asked for
	}
}

// judge counts a call and asks all rules about it.
func (d *Disk) judge(op Op, off, n int64) verdict {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls[op]++
	var v verdict
	for _, r := range d.rules {
		if !r.touches(op, off, n) || !r.due() || r.Probability > 0 && d.rand.Float64() >= r.Probability {
			continue
		}
		fault := r.Err != nil || r.Short
		if fault && v.fault {
			continue
		}
		r.acted++
		v.delay += r.Delay
		if r.MaxDelay > 0 {
			v.delay += time.Duration(d.rand.Int64N(int64(r.MaxDelay)))
		}
		if fault {
			v.fault, v.err, v.short, v.keep = true, r.Err, r.Short, r.Keep
			d.failed++
		}
	}
	return v
}

func (r *rule) touches(op Op, off, n int64) bool {
	if r.Op != OpAny && r.Op != op {
		return false
	}
	if r.Len == 0 || op == OpFlush || op == OpTruncate || op == OpRefresh || op == OpState {
		return true
	}
	end := int64(math.MaxInt64)
	if r.Len < end-r.Off {
		end = r.Off + r.Len
	}
	return off < end && r.Off < off+n
}

// due counts a call that the rule is about.
func (r *rule) due() bool {
	if r.Times > 0 && r.acted >= r.Times {
		return false
	}
	r.seen++
	at := r.seen - r.After - 1
	return at >= 0 && at%max(r.Every, 1) == 0
}

func (r Rule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v", r.Op)
	if r.Len != 0 {
		fmt.Fprintf(&b, " %d+%d", r.Off, r.Len)
	}
	if r.Short {
		fmt.Fprintf(&b, " short %d", r.Keep)
	}
	fmt.Fprintf(&b, " after %d every %d times %d p %v: %v", r.After, max(r.Every, 1), r.Times, r.Probability, r.Err)
	return b.String()
}
