package mem

import (
	"fmt"
	"math"
	"sync"

	"github.com/kvmlet/kvmlet/iov"
)

// statePage is the unit in bytes in which VM state is kept.
const statePage = 64 << 10

// vmState is what blk.StateStore keeps: only the pages that were written.
type vmState struct {
	mu    sync.Mutex
	pages map[int64][]byte
	end   int64 // behind the last byte that was written
}

// ReadStateAt implements blk.StateStore. Bytes that were skipped read as zeroes.
func (d *Disk) ReadStateAt(dst iov.Vec, off int64) (int, error) {
	if err := d.begin(); err != nil {
		return 0, err
	}
	defer d.open.RUnlock()
	s := &d.vm
	s.mu.Lock()
	defer s.mu.Unlock()
	if off < 0 || off >= s.end {
		return 0, nil
	}
	n := int(min(int64(dst.Size()), s.end-off))
	zero := make([]byte, statePage)
	return n, s.each(off, n, func(at int, page, skip int64, k int) error {
		from := s.pages[page]
		if from == nil {
			from = zero
		}
		_, err := dst.CopyFrom(at, from[skip:skip+int64(k)])
		return err
	})
}

// WriteStateAt implements blk.StateStore.
func (d *Disk) WriteStateAt(src iov.Vec, off int64) (int, error) {
	if err := d.begin(); err != nil {
		return 0, err
	}
	defer d.open.RUnlock()
	n := src.Size()
	if off < 0 || int64(n) > math.MaxInt64-off {
		return 0, fmt.Errorf("%w: %d bytes of VM state at %d", ErrLimits, n, off)
	}
	s := &d.vm
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.each(off, n, func(at int, page, skip int64, k int) error {
		to := s.pages[page]
		if to == nil {
			if s.pages == nil {
				s.pages = make(map[int64][]byte)
			}
			to = make([]byte, statePage)
			s.pages[page] = to
		}
		_, err := src.CopyTo(to[skip:skip+int64(k)], at)
		return err
	})
	if err != nil {
		return 0, err
	}
	s.end = max(s.end, off+int64(n))
	return n, nil
}

// each calls f for each page of the n bytes at off: with what was done before, the page, where in it, and how much.
func (s *vmState) each(off int64, n int, f func(at int, page, skip int64, k int) error) error {
	for at := 0; at < n; {
		page, skip := off/statePage, off%statePage
		k := int(min(int64(n-at), statePage-skip))
		if err := f(at, page, skip, k); err != nil {
			return err
		}
		at += k
		off += int64(k)
	}
	return nil
}
