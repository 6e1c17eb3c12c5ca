package blk

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
)

var (
	// ErrBitmap refuses a Bitmap that can't be made: a bad name or granularity, or one that needs too much memory.
	ErrBitmap = errors.New("blk: bitmap")

	// ErrFrozen says that a Bitmap is frozen, or that it is not, where the call needs the opposite.
	ErrFrozen = errors.New("blk: bitmap")
)

// Bounds of a Bitmap. The shortest granule is what a guest can address, the longest and the name are as in qcow2's
// bitmaps extension (docs/interop/qcow2.txt, "Bitmap directory").
const (
	minGranularity = SectorSize
	maxGranularity = 1 << 31
	maxBitmapName  = 1023
	maxBitmapBits  = 1 << 32 // half a GiB of memory
)

// Bitmap remembers which parts of a disk were written, in granules of equal size, so that a copy can be brought up to
// date. A Device marks what it writes, zeroes or discards once that is done; its AddBitmap makes Bitmaps.
//
// An incremental copy that must not miss a write, and must not lose what it knows when it fails, freezes the Bitmap:
//
//	enabled  <-- Enable, Disable -->  disabled
//	   |  Freeze                         (the same way)
//	 frozen: content stands still, writes are marked in a successor
//	   |  Commit: the copy is good: the successor becomes the content
//	   +  Reclaim: the copy failed: the successor's marks are added to the content
//
// All methods may be called from any goroutine at any time. Mark neither locks nor allocates. A mark that is made while
// the state changes ends up in both contents rather than in neither.
type Bitmap struct {
	name  string
	shift uint // log2 of the granularity

	content atomic.Pointer[dirtyBits] // what the methods show and change
	target  atomic.Pointer[dirtyBits] // what a write marks: the content, its successor or, disabled, nil

	// mu is held for all changes but marks. Clearing a granule may hide others from a search for a moment, so searches
	// hold it too.
	mu        sync.Mutex
	enabled   bool
	successor *dirtyBits // of a frozen Bitmap
}

// newBitmap returns an enabled Bitmap without marks for a disk of size bytes.
func newBitmap(name string, size, granularity int64) (*Bitmap, error) {
	switch {
	case name == "" || len(name) > maxBitmapName:
		return nil, fmt.Errorf("%w: name of %d bytes: want 1 to %d", ErrBitmap, len(name), maxBitmapName)
	case granularity < minGranularity || granularity > maxGranularity || granularity&(granularity-1) != 0:
		return nil, fmt.Errorf("%w %q: granularity %d: want a power of two from %d to %d",
			ErrBitmap, name, granularity, minGranularity, maxGranularity)
	}
	b := &Bitmap{name: name, shift: uint(bits.TrailingZeros64(uint64(granularity))), enabled: true}
	content, err := b.newBits(size)
	if err != nil {
		return nil, err
	}
	b.content.Store(content)
	b.target.Store(content)
	return b, nil
}

// Name returns the name that AddBitmap was given.
func (b *Bitmap) Name() string { return b.name }

// Granularity returns the size of a granule in bytes. The last one of a disk may be shorter.
func (b *Bitmap) Granularity() int64 { return 1 << b.shift }

// Count returns how many bytes are marked, in whole granules.
func (b *Bitmap) Count() int64 {
	s := b.content.Load()
	n := s.count.Load() << b.shift
	if last := s.n - 1; last >= 0 && s.get(last) {
		n -= s.n<<b.shift - s.size
	}
	return max(n, 0)
}

// Get reports whether the byte at off is marked. None outside of the disk is.
func (b *Bitmap) Get(off int64) bool {
	s := b.content.Load()
	return off >= 0 && off < s.size && s.get(off>>b.shift)
}

// Next returns the first run of marked bytes at or behind off, or false where there is none.
func (b *Bitmap) Next(off int64) (start, n int64, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.run(off, (*dirtyBits).next, (*dirtyBits).nextClear)
}

// NextClear returns the first run of unmarked bytes at or behind off, or false where there is none.
func (b *Bitmap) NextClear(off int64) (start, n int64, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.run(off, (*dirtyBits).nextClear, (*dirtyBits).next)
}

// run returns the run from off on which begins where begin says and ends where end does.
func (b *Bitmap) run(off int64, begin, end func(s *dirtyBits, i int64) int64) (start, n int64, ok bool) {
	s := b.content.Load()
	off = max(off, 0)
	if off >= s.size {
		return 0, 0, false
	}
	i := begin(s, off>>b.shift)
	if i == s.n {
		return 0, 0, false
	}
	start = max(i<<b.shift, off)
	return start, min(end(s, i+1)<<b.shift, s.size) - start, true
}

// Mark marks every granule that the n bytes at off touch. What lies outside of the disk is ignored. It changes the
// content of a frozen or disabled Bitmap, too.
func (b *Bitmap) Mark(off, n int64) { b.markIn(&b.content, off, n) }

// mark is for Device: it marks what was written, unless the Bitmap is disabled, and in the successor where it is frozen.
func (b *Bitmap) mark(off, n int64) { b.markIn(&b.target, off, n) }

// markIn marks in what p points to, and again if that was replaced meanwhile: whoever did that might not have seen the
// mark.
func (b *Bitmap) markIn(p *atomic.Pointer[dirtyBits], off, n int64) {
	for s := p.Load(); s != nil; {
		if from, to, ok := s.clip(off, n); ok {
			s.set(from>>b.shift, (to-1)>>b.shift)
		}
		now := p.Load()
		if now == s {
			return
		}
		s = now
	}
}

// Clear removes the marks of the n bytes at off. A granule that has bytes outside of them keeps its mark. A mark that is
// made meanwhile may stay or not.
func (b *Bitmap) Clear(off, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.content.Load()
	from, to, ok := s.clip(off, n)
	if !ok {
		return
	}
	first, last := (from+b.Granularity()-1)>>b.shift, to>>b.shift-1
	if to == s.size {
		last = s.n - 1
	}
	s.clear(first, last)
}

// ClearAll removes all marks.
func (b *Bitmap) ClearAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.content.Load()
	b.replace(old.empty(old.size))
}

// SetAll marks the whole disk.
func (b *Bitmap) SetAll() { b.Mark(0, b.content.Load().size) }

// Merge marks what is marked in from, whose granularity may be another. Marks that are made in from meanwhile are taken
// along or not.
func (b *Bitmap) Merge(from *Bitmap) {
	for off := int64(0); ; {
		start, n, ok := from.Next(off)
		if !ok {
			return
		}
		b.Mark(start, n)
		off = start + n
	}
}

// Enable lets writes be marked, as they are in a new Bitmap.
func (b *Bitmap) Enable() { b.enable(true) }

// Disable leaves later writes unmarked.
func (b *Bitmap) Disable() { b.enable(false) }

// Enabled reports whether writes are marked.
func (b *Bitmap) Enabled() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.enabled
}

func (b *Bitmap) enable(on bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.enabled = on
	b.aim()
}

// Freeze makes the content stand still: later writes are marked in a successor, which begins empty. Every write that
// ended before the call shows in the content. It returns ErrFrozen where the Bitmap is frozen already.
func (b *Bitmap) Freeze() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.successor != nil {
		return fmt.Errorf("%w %q is frozen already: another copy uses it", ErrFrozen, b.name)
	}
	s := b.content.Load()
	b.successor = s.empty(s.size)
	b.aim()
	return nil
}

// Frozen reports whether the Bitmap is frozen.
func (b *Bitmap) Frozen() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.successor != nil
}

// Commit ends the frozen state after a copy that went well: what was marked since Freeze is the content now. It returns
// ErrFrozen where the Bitmap is not frozen.
func (b *Bitmap) Commit() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.successor == nil {
		return b.notFrozen()
	}
	b.content.Store(b.successor) // no change of target: writes go there already
	b.successor = nil
	return nil
}

// Reclaim ends the frozen state after a copy that failed: what was marked since Freeze is added to the content. It
// returns ErrFrozen where the Bitmap is not frozen.
func (b *Bitmap) Reclaim() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.successor == nil {
		return b.notFrozen()
	}
	s := b.successor
	b.successor = nil
	b.aim()
	b.content.Load().add(s) // a mark that is made in s from now on finds that target has changed
	return nil
}

func (b *Bitmap) notFrozen() error { return fmt.Errorf("%w %q is not frozen", ErrFrozen, b.name) }

// resize follows the disk to a new size. New bytes are not marked, which is for its caller to do. On an error, which is
// ErrBitmap, nothing changes.
func (b *Bitmap) resize(size int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	content, err := b.newBits(size)
	if err != nil {
		return err
	}
	if s := b.successor; s != nil {
		b.successor = s.empty(size)
		b.aim()
		b.successor.add(s)
	}
	old := b.content.Load()
	b.replace(content)
	content.add(old)
	return nil
}

// replace changes the content. mu is held.
func (b *Bitmap) replace(s *dirtyBits) {
	b.content.Store(s)
	b.aim()
}

// aim makes target follow the state. mu is held.
func (b *Bitmap) aim() {
	switch {
	case !b.enabled:
		b.target.Store(nil)
	case b.successor != nil:
		b.target.Store(b.successor)
	default:
		b.target.Store(b.content.Load())
	}
}

// fits reports whether a disk of size bytes has few enough granules.
func (b *Bitmap) fits(size int64) error {
	if (size-1)>>b.shift >= maxBitmapBits {
		return fmt.Errorf("%w %q: a disk of %d bytes in granules of %d takes more than %d of them (use larger ones)",
			ErrBitmap, b.name, size, b.Granularity(), int64(maxBitmapBits))
	}
	return nil
}

func (b *Bitmap) newBits(size int64) (*dirtyBits, error) {
	if err := b.fits(size); err != nil {
		return nil, err
	}
	return newDirtyBits(size, b.shift), nil
}

// dirtyBits is the content of a Bitmap: one bit for each granule and, so that a search skips what is empty, one bit for
// each word of bits, one for each word of those, and so on up to a single word.
//
// Bits are set bottom up and without a lock. clear, which one goroutine calls at a time, also goes bottom up, and looks
// at each word again after it cleared the bit above it. So a set that has returned shows in all levels, except while
// clear runs. A bit above may stay set over an empty word.
type dirtyBits struct {
	size  int64 // of the disk, in bytes
	shift uint  // log2 of the granularity
	n     int64 // granules
	count atomic.Int64

	levels [maxLevels][]atomic.Uint64
	depth  int
}

// maxLevels is how many levels maxBitmapBits need.
const maxLevels = 6

func newDirtyBits(size int64, shift uint) *dirtyBits {
	s := &dirtyBits{size: size, shift: shift, n: (size-1)>>shift + 1}
	if size <= 0 {
		s.size, s.n = 0, 0
	}
	for words := max((s.n+63)/64, 1); ; words = (words + 63) / 64 {
		s.levels[s.depth] = make([]atomic.Uint64, words)
		s.depth++
		if words == 1 {
			return s
		}
	}
}

// empty returns the same without marks, for a disk of size bytes.
func (s *dirtyBits) empty(size int64) *dirtyBits { return newDirtyBits(size, s.shift) }

// clip cuts a range of bytes to the disk and reports whether something is left.
func (s *dirtyBits) clip(off, n int64) (from, to int64, ok bool) {
	if n <= 0 || off >= s.size {
		return 0, 0, false
	}
	from, to = max(off, 0), s.size
	if off < 0 || n < s.size-off {
		to = min(off+n, s.size) // does not overflow: one of both is negative, or the sum below size
	}
	return from, to, from < to
}

func (s *dirtyBits) get(i int64) bool { return s.levels[0][i/64].Load()>>(i%64)&1 != 0 }

// mask returns the bits of word w that are from first to last.
func mask(w, first, last int64) uint64 {
	m := ^uint64(0)
	if w == first/64 {
		m <<= first % 64
	}
	if w == last/64 {
		m &= ^uint64(0) >> (63 - last%64)
	}
	return m
}

// set sets the bits from first to last, which are bits of s.
func (s *dirtyBits) set(first, last int64) {
	for w := first / 64; w <= last/64; w++ {
		m, word := mask(w, first, last), &s.levels[0][w]
		if word.Load()&m != m { // what is set already, as most is on a busy disk, costs no write to a shared cache line
			old := word.Or(m)
			if added := bits.OnesCount64(m &^ old); added > 0 {
				s.count.Add(int64(added))
			}
		}
		s.setAbove(0, w)
	}
}

// setAbove sets the bits of word w of a level in the levels above.
func (s *dirtyBits) setAbove(level int, w int64) {
	for level++; level < s.depth; level++ {
		word, bit := &s.levels[level][w/64], uint64(1)<<(w%64)
		if word.Load()&bit != 0 {
			return
		}
		word.Or(bit)
		w /= 64
	}
}

// clear clears the bits from first to last, which are bits of s; none where last is below first.
func (s *dirtyBits) clear(first, last int64) {
	for w := first / 64; first <= last && w <= last/64; w++ {
		m, word := mask(w, first, last), &s.levels[0][w]
		if word.Load()&m == 0 {
			continue
		}
		old := word.And(^m)
		s.count.Add(-int64(bits.OnesCount64(old & m)))
		if old&^m == 0 {
			s.clearAbove(0, w)
		}
	}
}

// clearAbove clears the bits of word w of a level, which was found empty, in the levels above.
func (s *dirtyBits) clearAbove(level int, w int64) {
	for ; level+1 < s.depth; level++ {
		bit := uint64(1) << (w % 64)
		left := s.levels[level+1][w/64].And(^bit) &^ bit
		if s.levels[level][w].Load() != 0 {
			s.setAbove(level, w) // set again before its bit above was cleared
			return
		}
		if left != 0 {
			return
		}
		w /= 64
	}
}

// next returns the first set bit from i on, or n.
func (s *dirtyBits) next(i int64) int64 {
	level := 0
	for {
		// Up, until a word has a bit at or behind i; i counts bits of the level.
		w := i / 64
		if w >= int64(len(s.levels[level])) {
			return s.n
		}
		m := s.levels[level][w].Load() >> (i % 64) << (i % 64)
		switch {
		case m == 0 && level+1 == s.depth:
			return s.n
		case m == 0:
			i = w + 1
			level++
		case level == 0:
			return w*64 + int64(bits.TrailingZeros64(m))
		default:
			// Down, to the first bit of the word below. It may be empty; then the way leads up again, past it.
			i = (w*64 + int64(bits.TrailingZeros64(m))) * 64
			level--
		}
	}
}

// nextClear returns the first bit from i on that is not set, or n.
func (s *dirtyBits) nextClear(i int64) int64 {
	words := s.levels[0]
	for w := i / 64; w < int64(len(words)); w++ {
		m := ^words[w].Load()
		if w == i/64 {
			m = m >> (i % 64) << (i % 64)
		}
		if m != 0 {
			return min(w*64+int64(bits.TrailingZeros64(m)), s.n)
		}
	}
	return s.n
}

// add sets the bits that are set in from, as far as s has them.
func (s *dirtyBits) add(from *dirtyBits) {
	words := min(len(s.levels[0]), len(from.levels[0]))
	for i := from.next(0); i < from.n; i = from.next((i/64 + 1) * 64) {
		w := i / 64
		if w >= int64(words) {
			return
		}
		m := from.levels[0][w].Load()
		if end := s.n - w*64; end < 64 {
			m &= 1<<end - 1
		}
		old := s.levels[0][w].Or(m)
		s.count.Add(int64(bits.OnesCount64(m &^ old)))
		if m != 0 {
			s.setAbove(0, w)
		}
	}
}
