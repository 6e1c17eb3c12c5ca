package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/pierrec/lz4/v4"
)

// The legacy frame of LZ4 (lz4_Frame_format.md, "Legacy frame"), which is what the kernel's build makes: the magic
// number, then blocks of a 32-bit length and the packed bytes, up to the end of the file. Numbers are little-endian.
// The magic number may come again, where files were put together.
const (
	lz4LegacyMagic = 0x184c2102
	lz4LegacyBlock = 8 << 20 // the most that a block unpacks to
)

var errLZ4Block = errors.New("block of impossible length")

// lz4Reader unpacks legacy frames.
type lz4Reader struct {
	src    io.Reader
	packed []byte
	block  []byte
	rest   []byte // the part of block that has not been read
}

func newLZ4Reader(src io.Reader) *lz4Reader {
	return &lz4Reader{src: src, block: make([]byte, lz4LegacyBlock)}
}

func (r *lz4Reader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if err := r.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// next unpacks one block, which may be empty. It returns io.EOF behind the last one.
func (r *lz4Reader) next() error {
	var length [4]byte
	if _, err := io.ReadFull(r.src, length[:]); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint32(length[:])
	if n == lz4LegacyMagic {
		return nil
	}
	if n > uint32(lz4.CompressBlockBound(lz4LegacyBlock)) {
		return fmt.Errorf("%w: %d bytes", errLZ4Block, n)
	}
	if int(n) > cap(r.packed) {
		r.packed = make([]byte, n)
	}
	r.packed = r.packed[:n]
	if _, err := io.ReadFull(r.src, r.packed); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	size, err := lz4.UncompressBlock(r.packed, r.block)
	if err != nil {
		return err
	}
	r.rest = r.block[:size]
	return nil
}
