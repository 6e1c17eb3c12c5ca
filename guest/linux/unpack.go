package linux

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"
	"github.com/ulikunitz/xz/lzma"
)

// Bounds on what a payload may ask for. Kernels are below 100 MiB; their build uses windows of up to 128 MiB.
const (
	maxUnpacked = 1 << 30 // KERNEL_IMAGE_SIZE: the kernel's own mapping is no larger
	maxPacked   = 256 << 20
	maxWindow   = 128 << 20
	magicSize   = 8
)

// plausible reports whether a payload of these sizes is one to unpack. What a decoder reads need not produce anything, as
// empty frames and padding don't: without a bound, a sparse file could keep one busy for long. No method here makes data
// an eighth longer.
func plausible(packed, unpacked int64) bool {
	return unpacked > 0 && unpacked <= maxUnpacked && packed <= min(maxPacked, unpacked+unpacked/8+64<<10)
}

// method is a way to compress a payload. The kernel's build (scripts/Makefile.lib) also knows LZO, for which there is
// no decoder that we would depend on: such kernels unpack themselves.
type method struct {
	name    string
	magic   string
	ownSize bool // the format itself ends with the unpacked size; otherwise the build appends it
	open    func(packed *io.SectionReader) (io.Reader, error)
}

var methods = []method{
	{"gzip", "\x1f\x8b\x08", true, func(r *io.SectionReader) (io.Reader, error) {
		return gzip.NewReader(buffered(r))
	}},
	{"bzip2", "BZh", false, func(r *io.SectionReader) (io.Reader, error) {
		return bzip2.NewReader(buffered(r)), nil
	}},
	{"lzma", "\x5d\x00\x00", false, func(r *io.SectionReader) (io.Reader, error) {
		return lzma.ReaderConfig{DictCap: maxWindow}.NewReader(buffered(r))
	}},
	{"xz", "\xfd7zXZ\x00", false, func(r *io.SectionReader) (io.Reader, error) {
		return xz.NewReader(buffered(r), maxWindow)
	}},
	{"lz4", "\x02\x21\x4c\x18", false, func(r *io.SectionReader) (io.Reader, error) {
		return newLZ4Reader(buffered(r)), nil
	}},
	{"zstd", "\x28\xb5\x2f\xfd", false, unzstd},
}

func buffered(r io.Reader) io.Reader { return bufio.NewReaderSize(r, 256<<10) }

// unzstd decodes a block at a time. Kernels are packed with a window larger than themselves, so this takes as much memory
// as all of the kernel, but never more than a window, whatever the frames' headers say.
func unzstd(r *io.SectionReader) (io.Reader, error) {
	// With a concurrency of 1 the decoder has no goroutines, and need not be closed.
	return zstd.NewReader(buffered(r), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow))
}

// methodOf returns the method of a payload that begins with head, nil if it is unknown.
func methodOf(head []byte) *method {
	for i := range methods {
		if bytes.HasPrefix(head, []byte(methods[i].magic)) {
			return &methods[i]
		}
	}
	return nil
}

// unpacker reads a payload's unpacked bytes: as many as the kernel announces, then io.EOF. Any other length, a bad
// checksum included, is an error.
type unpacker struct {
	name string
	r    io.Reader
	left int64
	err  error // what every further Read returns
}

func (k *Kernel) unpacker() (*unpacker, error) {
	b := k.bz
	src := io.NewSectionReader(k.file, b.payload, b.packed)
	u := &unpacker{name: b.method.name, left: b.unpacked}
	var err error
	if u.r, err = b.method.open(src); err != nil {
		return nil, u.explain(err)
	}
	return u, nil
}

func (u *unpacker) Read(p []byte) (int, error) {
	if u.err != nil {
		return 0, u.err
	}
	if u.left == 0 {
		u.err = u.finish()
		return 0, u.err
	}
	n, err := u.r.Read(p[:min(int64(len(p)), u.left)])
	u.left -= int64(n)
	switch {
	case err == nil || errors.Is(err, io.EOF) && u.left == 0:
	case errors.Is(err, io.EOF):
		u.err = fmt.Errorf("%w: %s data ends %d bytes early", ErrCorrupt, u.name, u.left)
	default:
		u.err = u.explain(err)
	}
	return n, u.err
}

// finish makes the decoder read to its end, where checksums are, and returns io.EOF if all is well.
func (u *unpacker) finish() error {
	var extra [1]byte
	switch _, err := io.ReadFull(u.r, extra[:]); {
	case err == nil:
		return fmt.Errorf("%w: %s data continues beyond the announced size", ErrCorrupt, u.name)
	case errors.Is(err, io.EOF):
		return io.EOF
	default:
		return u.explain(err)
	}
}

// explain tells data that this package's decoders do not know from broken data.
func (u *unpacker) explain(err error) error {
	class := ErrCorrupt
	for _, e := range []error{
		xz.ErrOptions, xz.ErrMemlimit, xz.ErrUnsupportedCheck, zstd.ErrUnknownDictionary,
		zstd.ErrWindowSizeExceeded, zstd.ErrDecoderSizeExceeded, // which is a window too, that of a frame in one segment
	} {
		if errors.Is(err, e) {
			class = ErrUnsupported
		}
	}
	if _, ok := errors.AsType[*lzma.ErrDictSize](err); ok {
		class = ErrUnsupported
	}
	return fmt.Errorf("%w: %s: %w", class, u.name, err)
}
