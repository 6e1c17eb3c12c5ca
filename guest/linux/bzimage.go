package linux

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"strings"
)

// bzImage is what is known of a bzImage from its setup header.
type bzImage struct {
	header   setupHeader
	version  string
	setup    int64   // where the protected-mode code begins in the file
	method   *method // nil: the payload cannot be unpacked here
	payload  int64   // where the payload begins in the file
	packed   int64   // its length, without the size that is appended to it
	unpacked int64
}

// parseBzImage decodes and checks the setup header in head, the first headSize bytes of the file r.
func parseBzImage(r io.ReaderAt, head []byte, size int64) (*bzImage, error) {
	if len(head) < headSize {
		return nil, fmt.Errorf("%w: %d bytes are too few for a bzImage", ErrTruncated, size)
	}
	// The header's length is what the jump behind boot_flag skips ("64-bit BOOT PROTOCOL"); setup code follows.
	if end := offHeader + int(head[offHeader-1]); end < headSize {
		clear(head[end:])
	}
	b := new(bzImage)
	h := &b.header
	if _, err := binary.Decode(head[offSetupHeader:], binary.LittleEndian, h); err != nil {
		return nil, err
	}
	sects := int64(h.SetupSects)
	if sects == 0 {
		sects = 4
	}
	b.setup = (sects + 1) * 512
	if err := b.check(size); err != nil {
		return nil, err
	}
	b.version = readVersion(r, h, b.setup)
	if h.PayloadLength == 0 {
		return b, b.checkStub()
	}
	return b, b.findPayload(r, size)
}

func (b *bzImage) check(size int64) error {
	h := &b.header
	switch {
	case h.BootFlag != bootFlag:
		return fmt.Errorf("%w: boot_flag is %#x instead of %#x", ErrNotKernel, h.BootFlag, bootFlag)
	case h.Version < protocol208:
		return fmt.Errorf("%w: boot protocol %d.%02d; 2.08 (Linux 2.6.26) is the oldest known here",
			ErrUnsupported, h.Version>>8, h.Version&0xff)
	case h.LoadFlags&loadedHigh == 0:
		return fmt.Errorf("%w: a zImage (loadflags %#x), which loads below 1 MiB", ErrUnsupported, h.LoadFlags)
	case h.Version >= protocol212 && h.XLoadFlags&xlfKernel64 == 0:
		return fmt.Errorf("%w: a 32-bit x86 bzImage", ErrArch)
	}
	if end := b.setup + int64(h.SysSize)*16; end > size {
		return fmt.Errorf("%w: %d bytes, the setup header announces %d", ErrTruncated, size, end)
	}
	return nil
}

// checkStub reports whether the bzImage can be entered without being unpacked.
func (b *bzImage) checkStub() error {
	if b.header.Version < protocol212 {
		return fmt.Errorf("%w: the payload cannot be unpacked, and boot protocol %d.%02d has no 64-bit entry",
			ErrUnsupported, b.header.Version>>8, b.header.Version&0xff)
	}
	return nil
}

func (b *bzImage) findPayload(r io.ReaderAt, size int64) error {
	h := &b.header
	b.payload, b.packed = b.setup+int64(h.PayloadOffset), int64(h.PayloadLength)
	if end := b.payload + b.packed; end > size {
		return fmt.Errorf("%w: %d bytes, the payload ends at %d", ErrTruncated, size, end)
	}
	head := make([]byte, min(b.packed, magicSize))
	if err := readFull(r, head, b.payload); err != nil {
		return err
	}
	m := methodOf(head)
	if m == nil || b.packed < int64(len(head))+4 {
		return b.checkStub()
	}
	// The build appends the unpacked size; gzip ends with it by itself.
	var tail [4]byte
	if err := readFull(r, tail[:], b.payload+b.packed-4); err != nil {
		return err
	}
	b.unpacked = int64(binary.LittleEndian.Uint32(tail[:]))
	if !plausible(b.packed, b.unpacked) {
		return b.checkStub()
	}
	b.method = m
	if !m.ownSize {
		b.packed -= 4
	}
	return nil
}

// stub returns the protected-mode code as a program: a relocator and decompressor with its 64-bit entry at 0x200.
func (b *bzImage) stub() (*program, error) {
	if err := b.checkStub(); err != nil {
		return nil, err
	}
	h := &b.header
	addr := max(h.PrefAddress, highAddr)
	n := uint64(h.SysSize) * 16
	s := segment{off: b.setup, addr: addr, filesz: n, memsz: max(n, uint64(h.InitSize))}
	if s.memsz > math.MaxUint64-addr {
		return nil, fmt.Errorf("%w: its preferred address is %#x", ErrKernelTooLarge, addr)
	}
	return &program{segments: []segment{s}, entry: addr + entry64Offset}, nil
}

// readVersion returns the version string or "" where there is none: it only informs.
func readVersion(r io.ReaderAt, h *setupHeader, setup int64) string {
	off := int64(h.KernelVersion) + 0x200
	if h.KernelVersion == 0 || off >= setup {
		return ""
	}
	var buf [256]byte
	n, _ := r.ReadAt(buf[:], off)
	s, _, found := bytes.Cut(buf[:n], []byte{0})
	if !found {
		return ""
	}
	return strings.Map(printable, string(s))
}

func printable(c rune) rune {
	if c < ' ' || c > '~' {
		return '?'
	}
	return c
}
