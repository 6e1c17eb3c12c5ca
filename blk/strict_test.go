package blk_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// strict is a Backend in memory that notes every call and fails the test at one that breaks its limits.
type strict struct {
	t      *testing.T
	limits blk.Limits

	mu    sync.Mutex
	data  []byte // what is stored; the disk may be larger by less than a block
	size  int64
	calls []string
	gap   []byte // allocation map by cluster, for Backed; nil means that all is allocated
	base  *blk.Device

	noZero, noDiscard, noFUA bool
	fail                     func(call string) error // asked before every call
}

func newStrict(t *testing.T, size int64, limits blk.Limits) *strict {
	return &strict{t: t, limits: limits, size: size, data: make([]byte, size)}
}

// open returns a Device over s.
func (s *strict) open(o blk.Options) *blk.Device {
	s.t.Helper()
	return newDevice(s.t, s, o)
}

// took returns the calls since it was called last.
func (s *strict) took() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls := strings.Join(s.calls, ", ")
	s.calls = nil
	return calls
}

// call notes a call; the caller holds mu.
func (s *strict) call(op string, off, n int64, unit, most int64) error {
	s.t.Helper()
	call := fmt.Sprintf("%s %d+%d", op, off, n)
	s.calls = append(s.calls, call)
	align := int64(max(s.limits.RequestAlign, 1))
	end := (s.size + align - 1) &^ (align - 1)
	if off < 0 || n <= 0 || off%align != 0 || n%align != 0 || off+n > end || most > 0 && n > most {
		s.t.Errorf("%s breaks the limits %+v of a disk of %d bytes", call, s.limits, s.size)
	}
	if unit > 0 && !(off%unit == 0 && (n%unit == 0 || off+n == end)) && off/unit != (off+n-1)/unit {
		s.t.Errorf("%s breaks the unit %d", call, unit)
	}
	if s.fail != nil {
		return s.fail(call)
	}
	return nil
}

func (s *strict) transfer(op string, v iov.Vec, off int64) error {
	s.t.Helper()
	if s.limits.MaxVec > 0 && len(v) > s.limits.MaxVec {
		s.t.Errorf("%s at %d: %d elements", op, off, len(v))
	}
	return s.call(op, off, int64(v.Size()), 0, s.limits.MaxTransfer)
}

// grow makes room for what lies between the end of the disk and that of its last block.
func (s *strict) grow(end int64) {
	if n := end - int64(len(s.data)); n > 0 {
		s.data = append(s.data, make([]byte, n)...)
	}
}

func (s *strict) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.transfer("read", dst, off); err != nil {
		return 0, err
	}
	for at := off; s.gap != nil && at < off+int64(dst.Size()); at++ {
		if s.base == nil || at >= s.base.Size() || at >= s.size {
			break
		}
		if s.gap[at/s.limits.Cluster] == 0 {
			if _, err := s.base.ReadVecAt(iov.Of(s.data[at:at+1]), at); err != nil {
				return 0, err
			}
		}
	}
	return dst.CopyFrom(0, s.data[min(off, int64(len(s.data))):])
}

func (s *strict) WriteVecAt(src iov.Vec, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.transfer("write", src, off); err != nil {
		return 0, err
	}
	return s.put(src, off)
}

func (s *strict) put(src iov.Vec, off int64) (int, error) {
	end := off + int64(src.Size())
	s.grow(end)
	s.allocate(off, end)
	return src.CopyTo(s.data[off:end], 0)
}

func (s *strict) allocate(off, end int64) {
	for i := range s.gap {
		if at := int64(i) * s.limits.Cluster; off < at+s.limits.Cluster && at < end {
			s.gap[i] = 1
		}
	}
}

func (s *strict) WriteVecFUA(src iov.Vec, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noFUA {
		return 0, blk.ErrUnsupported
	}
	if err := s.transfer("fua", src, off); err != nil {
		return 0, err
	}
	return s.put(src, off)
}

func (s *strict) WriteZeroes(off, n int64, unmap bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noZero {
		return blk.ErrUnsupported
	}
	op := "zero"
	if unmap {
		op = "unmap"
	}
	if err := s.call(op, off, n, s.limits.ZeroAlign, s.limits.MaxZero); err != nil {
		return err
	}
	s.grow(off + n)
	s.allocate(off, off+n)
	clear(s.data[off : off+n])
	return nil
}

func (s *strict) Discard(off, n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noDiscard {
		return blk.ErrUnsupported
	}
	if err := s.call("discard", off, n, s.limits.DiscardAlign, s.limits.MaxDiscard); err != nil {
		return err
	}
	s.grow(off + n)
	clear(s.data[off : off+n])
	return nil
}

func (s *strict) BlockStatus(off, n int64) (blk.Status, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gap == nil {
		return blk.Status{Flags: blk.StatusData | blk.StatusAllocated}, n, nil
	}
	c := s.limits.Cluster
	run := min(n, c-off%c)
	for run < n && s.gap[(off+run)/c] == s.gap[off/c] {
		run = min(n, run+c)
	}
	if s.gap[off/c] == 0 {
		return blk.Status{}, run, nil
	}
	return blk.Status{Flags: blk.StatusData | blk.StatusAllocated}, run, nil
}

func (s *strict) Flush() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, "flush")
	if s.fail != nil {
		return s.fail("flush")
	}
	return nil
}

func (s *strict) Truncate(size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size = size
	s.data = append(make([]byte, 0, size), s.data[:min(size, int64(len(s.data)))]...)
	s.data = s.data[:size]
	return nil
}

func (s *strict) Size() int64          { return s.size }
func (s *strict) Limits() blk.Limits   { return s.limits }
func (s *strict) Backing() *blk.Device { return s.base }
func (s *strict) Close() error         { return nil }
