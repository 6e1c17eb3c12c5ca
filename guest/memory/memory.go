// Package memory is the guest's physical address space: RAM that the host maps, checked on every access, with a record
// of the pages that were written.
//
// RAM starts at guest-physical address 0. The range from HoleStart to HoleEnd belongs to devices, so a guest with more
// than 3 GiB has the rest of it from 4 GiB on:
//
//	0            HoleStart      HoleEnd
//	| region 0   |   devices    | region 1 ...
//
// Addresses and lengths that come from the guest go in as they are: every method checks them, and no sum of them can
// wrap. Bytes of guest memory may change under the reader at any time, since the guest runs beside it; who decides by
// a value reads it once.
package memory

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/iov"
)

const (
	// PageSize is that of the guest, the host and every dirty bitmap, in bytes.
	PageSize = 4096

	// HoleStart is the first guest-physical address that is never RAM.
	HoleStart = 3 << 30
	// HoleEnd is the first address above the hole.
	HoleEnd = 4 << 30

	// MaxSize is the most RAM that New accepts, in bytes.
	MaxSize = 64 << 30
)

var (
	// ErrUnmapped reports guest-physical addresses that are not RAM, or not all in one region.
	ErrUnmapped = errors.New("guest address is not memory")
	// ErrSize reports a size that New does not accept, or a dirty bitmap of another length than its region's.
	ErrSize = errors.New("bad memory size")
)

// Region is a contiguous run of RAM: what a KVM memory slot describes.
type Region struct {
	Addr  uint64 // guest-physical address of its first byte, a multiple of PageSize
	Bytes []byte // its host bytes; they start on a page and their length is a multiple of PageSize
}

// Memory is the RAM of one guest. Its methods may be called from any goroutine until Close.
type Memory struct {
	regions []Region // by address; at most two
	size    uint64
	mapping []byte // what the regions are part of; nil once closed

	mu   sync.Mutex                  // serialises changes of logs
	logs atomic.Pointer[[]*DirtyLog] // nil while nobody records
}

// New reserves size bytes of zeroed RAM, a multiple of PageSize up to MaxSize. The host gives each page when it is first
// touched, so that a guest costs what it uses. The caller closes the Memory when nothing uses its bytes any more.
func New(size uint64) (*Memory, error) {
	if size == 0 || size > MaxSize || size%PageSize != 0 {
		return nil, fmt.Errorf("%w: %d bytes (want a multiple of %d up to %d GiB)", ErrSize, size, PageSize, MaxSize>>30)
	}
	mapping, host, err := reserve(int(size))
	if err != nil {
		return nil, fmt.Errorf("reserve %d MiB of guest memory: %w (give the guest less, or raise RLIMIT_AS or "+
			"vm.overcommit_memory)", size>>20, err)
	}
	m := &Memory{size: size, mapping: mapping}
	low := min(size, HoleStart)
	m.regions = append(m.regions, Region{Addr: 0, Bytes: host[:low:low]})
	if size > low {
		m.regions = append(m.regions, Region{Addr: HoleEnd, Bytes: host[low:]})
	}
	return m, nil
}

// Close gives the RAM back to the host. Nothing may use the Memory or bytes and vectors taken from it from then on; a
// VM closes it after its vCPUs and device workers have ended and its KVM slots are gone. A second Close does nothing.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	mapping := m.mapping
	if mapping == nil {
		return nil
	}
	m.mapping, m.regions, m.size = nil, nil, 0
	m.logs.Store(nil)
	if err := unix.Munmap(mapping); err != nil {
		return fmt.Errorf("unmap guest memory: %w", err)
	}
	return nil
}

// Size returns how many bytes of RAM there are.
func (m *Memory) Size() uint64 { return m.size }

// Regions returns the RAM as it lies in the guest, by rising address. The caller must not change the slice.
func (m *Memory) Regions() []Region { return m.regions }

// Bytes returns the n bytes of RAM at addr, without copying them. They must lie in one region, and addr must be RAM even
// for n = 0; otherwise the error wraps ErrUnmapped. Who writes to them calls MarkDirty afterwards.
func (m *Memory) Bytes(addr, n uint64) ([]byte, error) {
	for i := range m.regions {
		r := &m.regions[i]
		off := addr - r.Addr // wraps below the region, and is then beyond its end
		if size := uint64(len(r.Bytes)); off < size && n <= size-off {
			return r.Bytes[off : off+n : off+n], nil
		}
	}
	return nil, unmapped(addr, n)
}

// AppendVec appends the n bytes of RAM at addr to dst, under the conditions of Bytes; on an error it returns dst as it
// was. It does not allocate when dst has room: one element is enough, as no two regions touch.
func (m *Memory) AppendVec(dst iov.Vec, addr, n uint64) (iov.Vec, error) {
	b, err := m.Bytes(addr, n)
	if err != nil {
		return dst, err
	}
	return dst.Append(b), nil
}

// MapFile lets the n bytes of RAM at addr be those of f from offset off on. All three are multiples of PageSize, and the
// range is as Bytes wants it. A page costs nothing until somebody reads it, belongs to the host's page cache until
// somebody writes to it, and is this guest's own from then on: f stays as it is and may be closed after the call. What
// the range held is lost, and nobody may use it during the call.
//
// f must not become shorter while the Memory lives: who touches a page beyond its end gets SIGBUS.
func (m *Memory) MapFile(addr, n uint64, f *os.File, off int64) error {
	b, err := m.Bytes(addr, n)
	if err != nil {
		return err
	}
	if (addr|n|uint64(off))%PageSize != 0 || n == 0 || off < 0 {
		return fmt.Errorf("%w: map %d bytes of a file from %d on at %#x: want pages", ErrSize, n, off, addr)
	}
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("map a file into guest memory: %w", err)
	}
	if off > st.Size() || n > uint64(st.Size()-off) {
		return fmt.Errorf("map %s into guest memory: %w: it has %d bytes, %d are wanted from %d on", f.Name(),
			io.ErrUnexpectedEOF, st.Size(), n, off)
	}
	if err := mapFile(b, int(f.Fd()), off); err != nil {
		return fmt.Errorf("map %s into guest memory: %w", f.Name(), err)
	}
	return nil
}

// ReadAt copies the RAM at guest-physical address off to p: all of it, or nothing and an error that wraps ErrUnmapped.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	b, err := m.Bytes(uint64(off), uint64(len(p))) // a negative offset becomes an address beyond all RAM
	if err != nil {
		return 0, err
	}
	return copy(p, b), nil
}

// WriteAt copies p to the RAM at guest-physical address off, as ReadAt reads, and marks it dirty.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	b, err := m.Bytes(uint64(off), uint64(len(p)))
	if err != nil {
		return 0, err
	}
	n := copy(b, p)
	m.MarkDirty(uint64(off), uint64(n))
	return n, nil
}

func unmapped(addr, n uint64) error {
	return fmt.Errorf("%w: %d bytes at %#x", ErrUnmapped, n, addr)
}
