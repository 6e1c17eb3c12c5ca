// Package linux loads x86-64 Linux kernels into guest memory and describes the CPU state in which they are entered.
//
// It takes bzImages and ELF files (vmlinux). A bzImage's payload is unpacked on the host and entered at its 64-bit
// entry, so that the guest does not run its own, much slower decompressor; a payload that cannot be unpacked here is
// left to that decompressor. An ELF whose entry is no physical address is entered through its PVH note.
//
// The layouts follow Documentation/arch/x86/boot.rst of the Linux sources ("boot.rst" in comments), the ELF
// specification, and Xen's public/arch-x86/hvm/start_info.h for PVH.
package linux

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// What a caller may want to tell apart. Every error of this package wraps one of them or an error of the file system.
var (
	// ErrNotKernel reports a file that is neither a bzImage nor an ELF kernel, or one whose headers contradict
	// themselves.
	ErrNotKernel = errors.New("not a Linux kernel")
	// ErrArch reports a kernel for another architecture.
	ErrArch = errors.New("kernel for another architecture")
	// ErrTruncated reports a file that ends before what its headers announce.
	ErrTruncated = errors.New("truncated file")
	// ErrUnsupported reports a kernel that is too old or that offers no entry known here.
	ErrUnsupported = errors.New("unsupported kernel")
	// ErrCorrupt reports a payload that does not decompress to what the kernel announces.
	ErrCorrupt = errors.New("corrupt kernel payload")
	// ErrKernelTooLarge reports a kernel that does not fit the guest's memory.
	ErrKernelTooLarge = errors.New("the kernel does not fit the guest's memory")
	// ErrInitrdTooLarge reports an initial RAM disk for which there is no room beside the kernel.
	ErrInitrdTooLarge = errors.New("the initrd does not fit the guest's memory")
	// ErrCmdlineTooLong reports a command line that is longer than the kernel takes.
	ErrCmdlineTooLong = errors.New("kernel command line too long")
	// ErrOptions reports other options of Load that cannot be followed.
	ErrOptions = errors.New("bad boot options")
)

// Format tells how a kernel file is built.
type Format uint8

// The formats that Parse knows.
const (
	BzImage Format = iota + 1
	ELF
)

func (f Format) String() string {
	switch f {
	case BzImage:
		return "bzImage"
	case ELF:
		return "ELF"
	default:
		return fmt.Sprintf("Format(%d)", uint8(f))
	}
}

// Kernel is a kernel file whose headers have been read and checked. The file is read again by Unpack and Load and must
// not change until then. A Kernel may be loaded any number of times, also concurrently, except while SetUnpacked or
// Close runs.
type Kernel struct {
	file   io.ReaderAt
	size   int64
	closer io.Closer // what Open opened

	bz *bzImage // nil for an ELF file

	program *program    // the ELF's, or the one given to SetUnpacked; nil while the payload is packed
	vmlinux io.ReaderAt // where program's segments are read from
}

// Open reads the headers of the kernel at path, which must be a regular file. The caller closes the Kernel.
func Open(path string) (*Kernel, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe is to be refused, not waited for
	if err != nil {
		return nil, fmt.Errorf("kernel: %w", err)
	}
	k, err := openFile(f)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("kernel %s: %w", path, err), f.Close())
	}
	return k, nil
}

func openFile(f *os.File) (*Kernel, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: not a regular file", ErrNotKernel)
	}
	k, err := Parse(f, fi.Size())
	if err != nil {
		return nil, err
	}
	k.closer = f
	return k, nil
}

// Parse reads the headers of a kernel of size bytes. The Kernel keeps r.
func Parse(r io.ReaderAt, size int64) (*Kernel, error) {
	head := make([]byte, min(max(size, 0), headSize))
	if err := readFull(r, head, 0); err != nil {
		return nil, err
	}
	k := &Kernel{file: r, size: size}
	var err error
	switch {
	case hasMagic(head, 0, elfMagic):
		k.vmlinux = r
		k.program, err = parseELF(r, size)
	case hasMagic(head, offHeader, headerMagic):
		k.bz, err = parseBzImage(r, head, size)
	default:
		err = identify(head)
	}
	if err != nil {
		return nil, err
	}
	return k, nil
}

// Close closes the file that Open opened.
func (k *Kernel) Close() error {
	if k.closer == nil {
		return nil
	}
	return k.closer.Close()
}

// Format returns how the file is built.
func (k *Kernel) Format() Format {
	if k.bz != nil {
		return BzImage
	}
	return ELF
}

// Version returns the version string of a bzImage, such as "6.1.0 (user@host) #1 SMP ...". It is empty where the file
// has none.
func (k *Kernel) Version() string {
	if k.bz == nil {
		return ""
	}
	return k.bz.version
}

// Compression names the method by which a bzImage's payload is compressed, such as "zstd". It is empty for an ELF file
// and for a method that is unknown here.
func (k *Kernel) Compression() string {
	if k.bz == nil || k.bz.method == nil {
		return ""
	}
	return k.bz.method.name
}

// Packed reports whether Load has to unpack the kernel first. A caller that starts a kernel often keeps what Unpack
// writes and gives it to SetUnpacked: reading that file is some ten times faster.
func (k *Kernel) Packed() bool { return k.program == nil && k.bz.method != nil }

// UnpackedSize returns how many bytes Unpack will write, 0 for a kernel that has no payload known here.
func (k *Kernel) UnpackedSize() int64 {
	if k.bz == nil || k.bz.method == nil {
		return 0
	}
	return k.bz.unpacked
}

// Unpack writes a bzImage's unpacked payload, an ELF file, to w: exactly UnpackedSize bytes, in order. When it fails,
// what was written so far is worthless.
func (k *Kernel) Unpack(w io.Writer) error {
	if k.UnpackedSize() == 0 {
		return fmt.Errorf("unpack: %w: no payload of a known compression", ErrUnsupported)
	}
	u, err := k.unpacker()
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	// The wrapper hides ReadFrom, which would choose a buffer of its own.
	if _, err := io.CopyBuffer(struct{ io.Writer }{w}, u, buf); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	return nil
}

// SetUnpacked gives a bzImage the ELF file that Unpack wrote before, so that Load reads it and unpacks nothing. The
// setup header stays the bzImage's. The Kernel keeps r, which the caller closes after the last Load.
func (k *Kernel) SetUnpacked(r io.ReaderAt, size int64) error {
	if want := k.UnpackedSize(); size != want {
		return fmt.Errorf("unpacked kernel: %w: %d bytes instead of %d", ErrCorrupt, size, want)
	}
	p, err := parseELF(r, size)
	if err != nil {
		return fmt.Errorf("unpacked kernel: %w", err)
	}
	k.program, k.vmlinux = p, r
	return nil
}

// readFull fills p from offset off and takes a file's end inside p for a truncated file.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return fmt.Errorf("%w: it ends at byte %d, needed are %d", ErrTruncated, off+int64(n), off+int64(len(p)))
	default:
		return err
	}
}
