package queuetest

import (
	"slices"
	"testing"

	"github.com/kvmlet/kvmlet/guest/memory"
)

// Dirty takes the pages that log holds and returns their guest-physical addresses, by rising address.
func Dirty(tb testing.TB, mem *memory.Memory, log *memory.DirtyLog) []uint64 {
	tb.Helper()
	var pages []uint64
	for i, r := range mem.Regions() {
		b := make([]uint64, (len(r.Bytes)/memory.PageSize+63)/64)
		if _, err := log.Collect(i, b); err != nil {
			tb.Fatal(err)
		}
		for p := range uint64(64 * len(b)) {
			if b[p/64]&(1<<(p%64)) != 0 {
				pages = append(pages, r.Addr+p*memory.PageSize)
			}
		}
	}
	return pages
}

// Pages returns the addresses of the pages that hold these addresses, each once, by rising address: what Dirty returns
// for them.
func Pages(addrs ...uint64) []uint64 {
	var pages []uint64
	for _, a := range addrs {
		pages = append(pages, a&^(memory.PageSize-1))
	}
	slices.Sort(pages)
	return slices.Compact(pages)
}
