package blk

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Counters sums up the requests of one kind that have ended.
type Counters struct {
	Ops    uint64 // requests that ended, well or not
	Bytes  uint64 // bytes moved by those that ended well
	Errors uint64 // requests that failed or were refused
	Merged uint64 // requests that went to the backend as part of another
}

// Stats sums up the requests of a Device since it was made. Each number is right by itself; numbers read while requests
// are under way may be apart by those.
type Stats struct {
	Read, Write, Flush, Discard, WriteZeroes Counters

	// LastError is the most recent error that the Backend reported, or nil. Refused requests, which are the guest's
	// fault and not the host's, do not show here.
	LastError error
}

// Stats returns what the Device has done so far. It takes no lock.
func (d *Device) Stats() Stats {
	s := Stats{
		Read: d.stats.kinds[OpRead].load(), Write: d.stats.kinds[OpWrite].load(), Flush: d.stats.kinds[OpFlush].load(),
		Discard: d.stats.kinds[OpDiscard].load(), WriteZeroes: d.stats.kinds[OpWriteZeroes].load(),
	}
	if err := d.stats.last.Load(); err != nil {
		s.LastError = err.error
	}
	return s
}

// Latency returns how long the requests of one kind took, from Do or Submit to their end, what they waited for included.
func (d *Device) Latency(op Op) Histogram {
	var h Histogram
	if op < numOps {
		d.stats.kinds[op].latency.load(&h)
	}
	return h
}

type stats struct {
	kinds [numOps]counters
	last  atomic.Pointer[lastError]
}

type lastError struct{ error }

// failed remembers an error of the Backend and returns it.
func (s *stats) failed(err error) error {
	s.last.Store(&lastError{err})
	return err
}

// ended counts one request.
func (s *stats) ended(op Op, n int64, began time.Time, err error) {
	if op >= numOps {
		return
	}
	c := &s.kinds[op]
	c.ops.Add(1)
	if err != nil {
		c.errors.Add(1)
	} else {
		c.bytes.Add(uint64(n))
	}
	c.latency.add(time.Since(began))
}

// counters has cache lines of its own, so that readers and writers of a busy disk don't slow each other down.
type counters struct {
	ops, bytes, errors, merged atomic.Uint64
	latency                    histogram
	_                          [64]byte
}

func (c *counters) load() Counters {
	return Counters{Ops: c.ops.Load(), Bytes: c.bytes.Load(), Errors: c.errors.Load(), Merged: c.merged.Load()}
}

// Histogram tells how many of a number of times lie in which range. The ranges are four to each power of two, so a value
// that is read from it is right to a fifth.
type Histogram struct {
	Count [histogramSize]uint64
	Sum   time.Duration // of all times
}

// histogramSize has ranges for times of up to 2^41 ns, more than half an hour; the last range takes longer ones as well.
const histogramSize = 4 * 40

// rangeOf returns the range that holds t.
func rangeOf(t time.Duration) int {
	n := uint64(max(t, 4))
	exp := bits.Len64(n) - 3 // t is 1xx times 2^exp
	return min(4*exp+int(n>>exp)&3, histogramSize-1)
}

// Limit returns the end of range i, which the times in it lie below.
func (h *Histogram) Limit(i int) time.Duration { return time.Duration(4+i&3+1) << (i >> 2) }

// Total returns how many times there are.
func (h *Histogram) Total() uint64 {
	total := uint64(0)
	for _, n := range h.Count {
		total += n
	}
	return total
}

// Mean returns the mean of all times, 0 if there is none.
func (h *Histogram) Mean() time.Duration {
	n := h.Total()
	if n == 0 {
		return 0
	}
	return h.Sum / time.Duration(n)
}

// Quantile returns a time that the fraction q of all times, from 0 to 1, lies below; 0 if there is none.
func (h *Histogram) Quantile(q float64) time.Duration {
	total := h.Total()
	if total == 0 {
		return 0
	}
	below := uint64(0)
	for i, n := range h.Count {
		if below += n; float64(below) >= q*float64(total) && below > 0 {
			return h.Limit(i)
		}
	}
	return h.Limit(histogramSize - 1)
}

// histogram is a Histogram that is counted up without a lock.
type histogram struct {
	count [histogramSize]atomic.Uint64
	sum   atomic.Int64
}

func (h *histogram) add(t time.Duration) {
	h.count[rangeOf(t)].Add(1)
	h.sum.Add(int64(t))
}

func (h *histogram) load(to *Histogram) {
	for i := range h.count {
		to.Count[i] = h.count[i].Load()
	}
	to.Sum = time.Duration(h.sum.Load())
}
