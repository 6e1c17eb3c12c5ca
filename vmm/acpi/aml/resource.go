package aml

import (
	"encoding/binary"
	"fmt"
)

// Resource is one descriptor of a resource template (ACPI 6.4, 6.4).
type Resource []byte

// Tags of the descriptors: small ones contain their length.
const (
	tagIRQ         = 0x22
	tagIO          = 0x47
	tagEnd         = 0x79
	tagMemory32    = 0x86
	tagDWordSpace  = 0x87
	tagWordSpace   = 0x88
	tagQWordSpace  = 0x8a
	spaceMemory    = 0
	spaceIO        = 1
	spaceBus       = 2
	spaceFixed     = 0x0c // both ends of the range are fixed; the device produces it for others; positive decode
	memoryWritable = 0x01 // not cacheable
	ioEntireRange  = 0x03
)

// Resources makes the resource template of a _CRS.
func Resources(items ...Resource) Term {
	var b []byte
	for _, r := range items {
		b = append(b, r...)
	}
	return Buffer(append(b, tagEnd, 0)) // a checksum of 0 counts as right
}

// IO is n ports from port, decoded with 16 bits.
func IO(port uint16, n uint8) Resource {
	lo, hi := byte(port), byte(port>>8)
	return Resource{tagIO, 1, lo, hi, lo, hi, 1, n}
}

// IRQ is an interrupt of the ISA bus, 0 to 15: edge-triggered and active high.
func IRQ(n uint8) Resource {
	if n > 15 {
		panic(fmt.Sprintf("aml: ISA interrupt %d", n))
	}
	return binary.LittleEndian.AppendUint16(Resource{tagIRQ}, 1<<n)
}

// Memory is a fixed range of addresses below 4 GiB, readable and writable.
func Memory(base, size uint32) Resource {
	r := Resource{tagMemory32, 9, 0, 1}
	r = binary.LittleEndian.AppendUint32(r, base)
	return binary.LittleEndian.AppendUint32(r, size)
}

// BusRange is the bus numbers from first to last, for a bridge to hand on.
func BusRange(first, last uint8) Resource {
	return wordSpace(spaceBus, 0, uint16(first), uint16(last))
}

// IORange is the ports from first to last, for a bridge to hand on; not all 65536 of them.
func IORange(first, last uint16) Resource { return wordSpace(spaceIO, ioEntireRange, first, last) }

// MemoryRange is the addresses from first to last, for a bridge to hand on. Both lie below 4 GiB or both above.
func MemoryRange(first, last uint64) Resource {
	if last < 1<<32 {
		r := Resource{tagDWordSpace, 23, 0, spaceMemory, spaceFixed, memoryWritable}
		for _, v := range []uint64{0, first, last, 0, last - first + 1} {
			r = binary.LittleEndian.AppendUint32(r, uint32(v))
		}
		return r
	}
	r := Resource{tagQWordSpace, 43, 0, spaceMemory, spaceFixed, memoryWritable}
	for _, v := range []uint64{0, first, last, 0, last - first + 1} {
		r = binary.LittleEndian.AppendUint64(r, v)
	}
	return r
}

// wordSpace has the fields of all address spaces: granularity, first, last, translation, length.
func wordSpace(kind, flags byte, first, last uint16) Resource {
	if last < first || last-first == 0xffff {
		panic(fmt.Sprintf("aml: range from %#x to %#x", first, last))
	}
	r := Resource{tagWordSpace, 13, 0, kind, spaceFixed, flags}
	for _, v := range []uint16{0, first, last, 0, last - first + 1} {
		r = binary.LittleEndian.AppendUint16(r, v)
	}
	return r
}
