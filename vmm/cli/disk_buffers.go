package cli

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// benchBuffers is memory that is aligned to pages, as O_DIRECT wants it, so that nothing is copied to align it.
type benchBuffers struct {
	memory []byte
	stride int
	size   int
}

// newBenchBuffers returns n buffers of size bytes.
func newBenchBuffers(n, size int) (*benchBuffers, error) {
	const page = 4096
	stride := (size + page - 1) &^ (page - 1)
	m, err := unix.Mmap(-1, 0, n*stride, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("memory for %d requests of %d bytes: %w (lower --depth or --size)", n, size, err)
	}
	for i := range m { // pages that are there, and not zero, which some storage treats otherwise
		m[i] = byte(i>>8) | 1
	}
	return &benchBuffers{memory: m, stride: stride, size: size}, nil
}

func (b *benchBuffers) at(i int) []byte { return b.memory[i*b.stride:][:b.size:b.size] }

func (b *benchBuffers) Close() { _ = unix.Munmap(b.memory) } // of our own making
