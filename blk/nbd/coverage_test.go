package nbd_test

import (
	"math/rand/v2"
	"testing"

	"github.com/kvmlet/kvmlet/blk/nbd"
)

// Chunks of a read against an array that knows which bytes have come.
func TestCoverage(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		const size = 64
		var c nbd.Coverage
		var have [size]bool
		count := 0
		for range 100 {
			off := r.Int64N(size)
			n := 1 + r.Int64N(min(size-off, 1+r.Int64N(16)))
			free := true
			for i := off; i < off+n; i++ {
				free = free && !have[i]
			}
			if got := c.Add(off, n); got != free {
				t.Fatalf("%d bytes at %d: %t in %v", n, off, got, have)
			}
			for i := off; free && i < off+n; i++ {
				have[i] = true
				count++
			}
			if c.All(size) != (count == size) || c.Any() != (count > 0) {
				t.Fatalf("all %t, any %t of %d", c.All(size), c.Any(), count)
			}
		}
	}
	var c nbd.Coverage
	for i := range int64(1024) {
		if !c.Add(2*i, 1) {
			t.Fatalf("gap %d refused", i)
		}
	}
	if c.Add(4096, 1) || !c.Add(1, 1) || !c.Add(4096, 1) {
		t.Error("the number of gaps is not bounded where it should be")
	}
}
