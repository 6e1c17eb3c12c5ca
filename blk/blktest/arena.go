package blktest

import (
	"math/rand/v2"
	"sync"

	"github.com/kvmlet/kvmlet/blk/internal/strict"
	"github.com/kvmlet/kvmlet/iov"
)

// arena is memory that a worker's vectors lie in. Between their elements are guard bytes, which nobody may change.
type arena struct {
	mem    []byte // begins at a multiple of arenaAlign
	used   int
	guards []guard
}

type guard struct{ at, n int }

const (
	arenaSize  = 8 << 20
	arenaAlign = 64 << 10
	guardByte  = 0xc3
)

// arenas are those that nobody uses. They are never given back: a new one costs more than many requests.
var arenas struct {
	mu   sync.Mutex
	free []*arena
}

func getArena() *arena {
	arenas.mu.Lock()
	defer arenas.mu.Unlock()
	last := len(arenas.free) - 1
	if last < 0 {
		return newArena()
	}
	a := arenas.free[last]
	arenas.free = arenas.free[:last]
	return a
}

func putArena(a *arena) {
	arenas.mu.Lock()
	defer arenas.mu.Unlock()
	arenas.free = append(arenas.free, a)
}

func newArena() *arena {
	b := make([]byte, arenaSize+arenaAlign)
	for i := range b {
		if strict.Aligned(b[i:], arenaAlign) {
			return &arena{mem: b[i : i+arenaSize]}
		}
	}
	return &arena{mem: b}
}

// reset takes all memory back.
func (a *arena) reset() {
	a.used = 0
	a.guards = a.guards[:0]
}

// maxVec is the longest vector that an arena makes, in bytes, and maxVecs how many of them it has room for.
const (
	maxVec  = 1 << 18
	maxVecs = 8
	maxGaps = 1 << 19 // bytes between the elements of one
)

// vec returns a vector of n bytes of any shape: in one piece or in many, with or without alignment, some of them empty.
func (a *arena) vec(r *rand.Rand, n int) iov.Vec {
	align := 1
	if r.IntN(2) == 0 {
		align = 1 << r.IntN(17)
	}
	a.used = (a.used + align - 1) &^ (align - 1)
	if align == 1 {
		a.skip(r.IntN(64))
	}
	pieces := 1
	switch r.IntN(8) {
	case 0, 1, 2:
	case 3:
		pieces = 1 + r.IntN(1500)
	default:
		pieces = 1 + r.IntN(20)
	}
	gaps, apart := 0, r.IntN(2) == 0
	v := make(iov.Vec, 0, pieces)
	for left := n; left > 0; {
		k := left
		if len(v) < pieces-1 {
			k = r.IntN(min(left, 2*(n/pieces+1)) + 1)
		}
		if align > 1 && k < left {
			k = min((k+align-1)&^(align-1), left)
		}
		v = v.Append(a.mem[a.used : a.used+k])
		a.used += k
		left -= k
		if apart && gaps+2*align+16 < maxGaps {
			before := a.used
			a.skip(max(align, 8))
			a.used = (a.used + align - 1) &^ (align - 1)
			gaps += a.used - before
		}
	}
	a.skip(16)
	return v
}

// skip leaves out n bytes, guarded.
func (a *arena) skip(n int) {
	for i := range min(n, 16) {
		a.mem[a.used+i] = guardByte
	}
	a.guards = append(a.guards, guard{a.used, min(n, 16)})
	a.used += n
}

// intact reports whether all guards are as they were.
func (a *arena) intact() bool {
	for _, g := range a.guards {
		for _, b := range a.mem[g.at : g.at+g.n] {
			if b != guardByte {
				return false
			}
		}
	}
	return true
}

// randomBlock returns bytes to write from, none of them zero: copying is faster than making new ones.
var randomBlock = sync.OnceValue(func() []byte {
	r := rand.New(rand.NewPCG(0, 0))
	b := make([]byte, 1<<20)
	for i := range b {
		b[i] = byte(1 + r.IntN(255))
	}
	return b
})
