package cli

import (
	"fmt"

	"github.com/kvmlet/kvmlet/guest/memory"
)

// benchBuffers is what requests of `disk bench` read to and write from. It lies in memory as that of a guest does: in huge
// pages where the host has them, so that a disk past the page cache meets few pieces.
type benchBuffers struct {
	memory *memory.Memory
	all    []byte
	stride int
	size   int
}

// newBenchBuffers returns n buffers of size bytes, each at the start of a page, so that nothing is copied to align it.
func newBenchBuffers(n, size int) (*benchBuffers, error) {
	stride := (size + memory.PageSize - 1) &^ (memory.PageSize - 1)
	total := uint64(n) * uint64(stride)
	if total > memory.HoleStart {
		return nil, fmt.Errorf("%d requests of %d bytes: want %d bytes at most in all (lower --depth or --size)",
			n, size, int64(memory.HoleStart))
	}
	m, err := memory.New(total)
	if err != nil {
		return nil, fmt.Errorf("memory for %d requests of %d bytes: %w (lower --depth or --size)", n, size, err)
	}
	all, err := m.Bytes(0, total)
	if err != nil {
		_ = m.Close()
		return nil, err
	}
	for i := range all { // pages that are there, and not zero, which some storage treats otherwise
		all[i] = byte(i>>8) | 1
	}
	return &benchBuffers{memory: m, all: all, stride: stride, size: size}, nil
}

func (b *benchBuffers) at(i int) []byte { return b.all[i*b.stride:][:b.size:b.size] }

func (b *benchBuffers) Close() { _ = b.memory.Close() } // nothing uses it any more
