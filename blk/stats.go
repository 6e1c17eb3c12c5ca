package blk

import "sync/atomic"

// Counters sums up the requests of one kind that have ended.
type Counters struct {
	Ops    uint64 // requests that ended, well or not
	Bytes  uint64 // bytes moved by those that ended well
	Errors uint64 // requests that failed or were refused
}

// Stats sums up the requests of a Device since it was made. Each number is right by itself; numbers read while requests
// are under way may be apart by those.
type Stats struct {
	Read, Write, Flush Counters

	// LastError is the most recent error that the Backend reported, or nil. Refused requests, which are the guest's
	// fault and not the host's, do not show here.
	LastError error
}

// Stats returns what the Device has done so far. It takes no lock.
func (d *Device) Stats() Stats {
	s := Stats{Read: d.stats.read.load(), Write: d.stats.write.load(), Flush: d.stats.flush.load()}
	if err := d.stats.last.Load(); err != nil {
		s.LastError = *err
	}
	return s
}

type stats struct {
	read, write, flush counters
	last               atomic.Pointer[error]
}

// failed remembers an error of the Backend and returns it.
func (s *stats) failed(err error) error {
	s.last.Store(&err)
	return err
}

// counters has a cache line of its own, so that readers and writers of a busy disk don't slow each other down.
type counters struct {
	ops, bytes, errors atomic.Uint64
	_                  [40]byte
}

func (c *counters) add(n int, err error) {
	c.ops.Add(1)
	if err != nil {
		c.errors.Add(1)
		return
	}
	c.bytes.Add(uint64(n))
}

func (c *counters) load() Counters {
	return Counters{Ops: c.ops.Load(), Bytes: c.bytes.Load(), Errors: c.errors.Load()}
}
