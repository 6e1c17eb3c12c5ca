package qcow2

// sliceBytes is the unit in which tables are cached: a table may be as large as 2 MiB, and few of its entries are used
// at a time.
const sliceBytes = 4096

// slice is a part of an L2 table or of a refcount block, in memory as it stands in the file. Everything in it is
// guarded by the lock that guards its cache.
type slice struct {
	off     int64 // where it stands in the file
	data    []byte
	lo, hi  int           // bytes that the file does not have yet: [lo, hi)
	pins    int           // users that keep it in memory while they don't hold the lock
	used    bool          // since the hand passed
	loading chan struct{} // not nil until data is there
	dead    bool          // no longer in the cache
}

// dirty notes that data[i:i+n] changed.
func (s *slice) dirty(i, n int) {
	if s.hi == 0 {
		s.lo = i
	}
	s.lo, s.hi = min(s.lo, i), max(s.hi, i+n)
}

// cache holds up to limit slices, more only while all of them are pinned. Which to drop is decided by a clock: the hand
// goes round and takes the first one that was not used since it passed.
type cache struct {
	slices map[int64]*slice
	ring   []*slice
	hand   int
	size   int // bytes of a slice
	limit  int
}

func newCache(bytes int64, cluster int64) *cache {
	size := int(min(cluster, sliceBytes))
	return &cache{slices: make(map[int64]*slice), size: size, limit: max(int(bytes/int64(size)), minSlices)}
}

// minSlices is the least number of slices in a cache.
const minSlices = 16

// place returns a slice for off that is in the cache and has no contents yet. It is nil where all slices are dirty or in
// use and the cache is full; with force it is not.
func (c *cache) place(off int64, force bool) *slice {
	var s *slice
	if len(c.ring) >= c.limit {
		s = c.victim()
		if s == nil && !force {
			return nil
		}
	}
	if s == nil {
		s = &slice{data: make([]byte, c.size)}
		c.ring = append(c.ring, s)
	} else {
		delete(c.slices, s.off)
		// A new struct: whoever holds the old one without a pin must not see it turn into another.
		n := &slice{data: s.data}
		s.data, s.dead = nil, true
		c.ring[c.hand] = n
		s = n
	}
	s.off, s.used = off, true
	c.slices[off] = s
	return s
}

// victim moves the hand to a slice that can go.
func (c *cache) victim() *slice {
	for range 2 * len(c.ring) {
		c.hand++
		if c.hand >= len(c.ring) {
			c.hand = 0
		}
		s := c.ring[c.hand]
		switch {
		case s.pins > 0 || s.hi > 0 || s.loading != nil:
		case s.used:
			s.used = false
		default:
			return s
		}
	}
	return nil
}

// dirty reports whether the file lacks anything.
func (c *cache) dirty() bool {
	for _, s := range c.ring {
		if s.hi > 0 {
			return true
		}
	}
	return false
}

// drop forgets the slices of the n bytes at off, whatever is in them.
func (c *cache) drop(off, n int64) {
	if n/int64(c.size) > int64(len(c.ring)) {
		c.filter(func(s *slice) bool { return s.off < off || s.off >= off+n })
		return
	}
	found := false
	for at := off; at < off+n; at += int64(c.size) {
		if s := c.slices[at]; s != nil {
			s.dead, found = true, true
		}
	}
	if found {
		c.filter(func(s *slice) bool { return !s.dead })
	}
}

// filter keeps the slices for which keep is true.
func (c *cache) filter(keep func(*slice) bool) {
	ring := c.ring[:0]
	for _, s := range c.ring {
		if keep(s) {
			ring = append(ring, s)
			continue
		}
		s.dead = true
		delete(c.slices, s.off)
	}
	clear(c.ring[len(ring):])
	c.ring, c.hand = ring, 0
}
