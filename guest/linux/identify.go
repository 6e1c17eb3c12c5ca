package linux

import (
	"fmt"
)

// headSize is how much of a file's beginning tells what it is: the setup header ends before it.
const headSize = offHeaderEnd

const (
	elfMagic    = "\x7fELF"
	headerMagic = "HdrS"
)

// strangers are files that users hand over for a kernel, by a magic string at an offset.
var strangers = []struct {
	off   int
	magic string
	err   error
	what  string
}{
	{4, "zimg", ErrArch, "an EFI zboot image, which no x86 kernel uses"},
	{56, "ARM\x64", ErrArch, "an arm64 Image"},
	{56, "RSC\x05", ErrArch, "a RISC-V Image"},
	{56, "\xcd\x23\x82\x81", ErrArch, "a LoongArch Image"},
	{36, "\x18\x28\x6f\x01", ErrArch, "a 32-bit Arm zImage"},
	{0, "\x27\x05\x19\x56", ErrArch, "a U-Boot image, which no x86 kernel uses"},
	{0, "070701", ErrNotKernel, "a cpio archive; is it the initrd?"},
	{0, "\x1f\x8b", ErrNotKernel, "a gzip file; unpack it first"},
	{0, "\xfd7zXZ\x00", ErrNotKernel, "an xz file; unpack it first"},
	{0, "\x28\xb5\x2f\xfd", ErrNotKernel, "a zstd file; unpack it first"},
	{0, "QFI\xfb", ErrNotKernel, "a qcow2 disk image"},
	{0, "#!", ErrNotKernel, "a script"},
	{0, "MZ", ErrNotKernel, "an EFI or DOS program without a Linux setup header"},
	{offBootFlag, "\x55\xaa", ErrNotKernel, "a boot sector or disk image without a Linux setup header"},
}

// identify says what the file is that begins with head and is no kernel of ours.
func identify(head []byte) error {
	for _, s := range strangers {
		if hasMagic(head, s.off, s.magic) && len(head) == headSize {
			return fmt.Errorf("%w: this is %s", s.err, s.what)
		}
	}
	if len(head) < headSize {
		return fmt.Errorf("%w: %d bytes are too few for a kernel", ErrTruncated, len(head))
	}
	return fmt.Errorf("%w: neither a bzImage nor an ELF file", ErrNotKernel)
}

func hasMagic(b []byte, off int, magic string) bool {
	return len(b) >= off+len(magic) && string(b[off:off+len(magic)]) == magic
}
