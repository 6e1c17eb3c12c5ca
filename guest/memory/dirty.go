package memory

import (
	"fmt"
	"math/bits"
	"slices"
	"sync/atomic"
)

// DirtyLog records which pages were written since its owner last asked. Several may exist at once, each for a consumer
// of its own: a migration and a differential snapshot, say. Its methods may be called from any goroutine.
type DirtyLog struct {
	mem  *Memory
	bits [][]atomic.Uint64 // per region, in the layout of KVM_GET_DIRTY_LOG: bit p%64 of word p/64 is page p
}

// EnableDirty starts a record, in which no page is dirty. Its owner closes it.
func (m *Memory) EnableDirty() *DirtyLog {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := &DirtyLog{mem: m}
	for _, r := range m.regions {
		l.bits = append(l.bits, make([]atomic.Uint64, words(r)))
	}
	logs := []*DirtyLog{l}
	if old := m.logs.Load(); old != nil {
		logs = append(logs, *old...)
	}
	m.logs.Store(&logs)
	return l
}

// words returns how many words the bitmap of r takes.
func words(r Region) int { return (len(r.Bytes)/PageSize + 63) / 64 }

// Close ends the record. A second Close does nothing.
func (l *DirtyLog) Close() {
	m := l.mem
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.logs.Load()
	if old == nil {
		return
	}
	rest := slices.DeleteFunc(slices.Clone(*old), func(o *DirtyLog) bool { return o == l })
	if len(rest) == 0 {
		m.logs.Store(nil)
		return
	}
	m.logs.Store(&rest)
}

// Recording reports whether there are records, at the cost of one load. Who asks after a write need not mark it if there
// are none: a record that begins later is for the state of memory at its beginning, and what follows.
func (m *Memory) Recording() bool { return m.logs.Load() != nil }

// MarkDirty notes in every record that the n bytes at addr were written. It is called after the write, so that who
// collects the page and then reads it sees what was written. What is not RAM is left out. Without records it costs one
// load.
func (m *Memory) MarkDirty(addr, n uint64) {
	if logs := m.logs.Load(); logs != nil && n > 0 {
		m.markDirty(*logs, addr, n)
	}
}

func (m *Memory) markDirty(logs []*DirtyLog, addr, n uint64) {
	last := addr + n - 1
	if last < addr {
		last = ^uint64(0)
	}
	for i, r := range m.regions {
		end := r.Addr + uint64(len(r.Bytes)) - 1
		if last < r.Addr || addr > end {
			continue
		}
		first, last := (max(addr, r.Addr)-r.Addr)/PageSize, (min(last, end)-r.Addr)/PageSize
		for _, l := range logs {
			mark(l.bits[i], first, last)
		}
	}
}

// mark sets the bits first to last. It sets even those that it would find set: the locked instruction is what keeps the
// write before it from becoming visible only after a collector has cleared the bit and read the page.
func mark(w []atomic.Uint64, first, last uint64) {
	for i := first / 64; i <= last/64; i++ {
		mask := ^uint64(0)
		if i == first/64 {
			mask <<= first % 64
		}
		if i == last/64 {
			mask &= ^uint64(0) >> (63 - last%64)
		}
		w[i].Or(mask)
	}
}

// MergeDirty notes in every record the pages of a region that the hypervisor saw written. dirty is what
// KVM_GET_DIRTY_LOG returned for the region's slot; region is its index in Regions.
func (m *Memory) MergeDirty(region int, dirty []uint64) error {
	if err := m.checkBitmap(region, dirty); err != nil {
		return err
	}
	logs := m.logs.Load()
	if logs == nil {
		return nil
	}
	for _, l := range *logs {
		for i, w := range dirty {
			if w != 0 {
				l.bits[region][i].Or(w)
			}
		}
	}
	return nil
}

// Collect moves the dirty pages of a region to dst, where it leaves the bits that are set already, and returns how many
// it moved. dst has one bit for each page, in the layout of MergeDirty. A page written while Collect runs shows up in
// this collection or in the next.
func (l *DirtyLog) Collect(region int, dst []uint64) (int, error) {
	if err := l.mem.checkBitmap(region, dst); err != nil {
		return 0, err
	}
	pages := 0
	for i := range dst {
		w := &l.bits[region][i]
		if w.Load() == 0 { // most are: look before taking the cache line for writing
			continue
		}
		taken := w.Swap(0)
		dst[i] |= taken
		pages += bits.OnesCount64(taken)
	}
	return pages, nil
}

func (m *Memory) checkBitmap(region int, b []uint64) error {
	if region < 0 || region >= len(m.regions) {
		return fmt.Errorf("%w: region %d of %d", ErrUnmapped, region, len(m.regions))
	}
	if want := words(m.regions[region]); len(b) != want {
		return fmt.Errorf("%w: dirty bitmap of %d words for region %d (want %d)", ErrSize, len(b), region, want)
	}
	return nil
}
