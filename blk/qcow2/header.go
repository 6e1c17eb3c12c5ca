package qcow2

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// The header (docs/interop/qcow2.rst, "Header"). All numbers in the file are big-endian.
const (
	magic = 0x514649fb // "QFI\xfb"

	headerLen2   = 72  // length of a version 2 header, and offset of what version 3 adds
	headerLen3   = 104 // shortest header of version 3
	offFeatures  = 72  // incompatible, compatible, autoclear
	offRefOrder  = 96
	offHeaderLen = 100
	offCompress  = 104

	minClusterBits = 9
	maxClusterBits = 21 // QEMU's own limit, which the specification names
	maxL1Bytes     = 32 << 20
	maxTableBytes  = 8 << 20 // refcount table
	maxRefOrder    = 6
	maxBackingName = 1023
	maxSnapshots   = 65536
	maxOffset      = 1<<56 - 1 // L1 and L2 entries hold bits 9 to 55 of an offset
)

// Feature bits ("Header", bytes 72 to 95).
const (
	incompatDirty    = 1 << 0
	incompatCorrupt  = 1 << 1
	incompatDataFile = 1 << 2
	incompatCompress = 1 << 3
	incompatExtL2    = 1 << 4

	compatLazy = 1 << 0

	autoclearBitmaps = 1 << 0
)

// Header extensions ("Header extensions").
const (
	extEnd      = 0x00000000
	extBacking  = 0xe2792aca
	extFeatures = 0x6803f857
	extBitmaps  = 0x23852875
	extCrypto   = 0x0537be77
	extDataFile = 0x44415441

	featureNameLen = 48 // bytes of an entry in the feature name table
)

// header is the header as it stands in the file.
type header struct {
	version     uint32
	backingOff  uint64
	backingLen  uint32
	clusterBits uint32
	size        uint64
	crypt       uint32
	l1Size      uint32 // entries
	l1Off       uint64
	rtOff       uint64
	rtClusters  uint32
	snapshots   uint32
	snapOff     uint64
	incompat    uint64
	compat      uint64
	autoclear   uint64
	refOrder    uint32
	length      uint32
	compression uint8

	backing       string // name of the backing file, "" without one
	backingFormat string // of the header extension, "" without it
	extensions    []extension
}

type extension struct {
	kind uint32
	data []byte
}

// parseHeader reads the fixed part of a header from the beginning of a file.
func parseHeader(b []byte) (*header, error) {
	be := binary.BigEndian
	if len(b) < headerLen2 || be.Uint32(b) != magic {
		return nil, fmt.Errorf("%w: it does not begin as one", ErrFormat)
	}
	h := &header{
		version: be.Uint32(b[4:]), backingOff: be.Uint64(b[8:]), backingLen: be.Uint32(b[16:]),
		clusterBits: be.Uint32(b[20:]), size: be.Uint64(b[24:]), crypt: be.Uint32(b[32:]),
		l1Size: be.Uint32(b[36:]), l1Off: be.Uint64(b[40:]), rtOff: be.Uint64(b[48:]), rtClusters: be.Uint32(b[56:]),
		snapshots: be.Uint32(b[60:]), snapOff: be.Uint64(b[64:]), refOrder: 4, length: headerLen2,
	}
	if h.version != 2 && h.version != 3 {
		return nil, fmt.Errorf("%w: version %d (2 and 3 are known)", ErrFeature, h.version)
	}
	if h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits {
		return nil, fmt.Errorf("%w: clusters of 2^%d bytes (2^%d to 2^%d are possible)", ErrFormat, h.clusterBits,
			minClusterBits, maxClusterBits)
	}
	if h.version == 2 {
		return h, nil
	}
	if len(b) < headerLen3 {
		return nil, fmt.Errorf("%w: header cut short", ErrFormat)
	}
	h.incompat, h.compat, h.autoclear = be.Uint64(b[offFeatures:]), be.Uint64(b[80:]), be.Uint64(b[88:])
	h.refOrder, h.length = be.Uint32(b[offRefOrder:]), be.Uint32(b[offHeaderLen:])
	switch {
	case h.length < headerLen3 || h.length%8 != 0 || h.length > 1<<h.clusterBits || int64(h.length) > int64(len(b)):
		return nil, fmt.Errorf("%w: header of %d bytes", ErrFormat, h.length)
	case h.refOrder > maxRefOrder:
		return nil, fmt.Errorf("%w: refcounts of 2^%d bits", ErrFormat, h.refOrder)
	}
	if h.length > offCompress {
		h.compression = b[offCompress]
	}
	return h, nil
}

// parseExtensions reads what follows the fixed part in the first cluster b: extensions and the backing file's name.
func (h *header) parseExtensions(b []byte) error {
	be := binary.BigEndian
	end := uint64(len(b))
	if h.backingOff != 0 {
		if h.backingLen > maxBackingName || h.backingOff > end || uint64(h.backingLen) > end-h.backingOff ||
			h.backingOff < uint64(h.length) {
			return fmt.Errorf("%w: name of the backing file at byte %d, %d bytes long", ErrFormat, h.backingOff, h.backingLen)
		}
		h.backing = string(b[h.backingOff:][:h.backingLen])
		end = h.backingOff
	}
	for at := uint64(h.length); end-at >= 8; {
		e := extension{kind: be.Uint32(b[at:])}
		n := uint64(be.Uint32(b[at+4:]))
		at += 8
		if e.kind == extEnd {
			break
		}
		if n > end-at {
			return fmt.Errorf("%w: header extension %#x of %d bytes", ErrFormat, e.kind, n)
		}
		e.data = b[at : at+n]
		h.extensions = append(h.extensions, e)
		if e.kind == extBacking {
			h.backingFormat = string(e.data)
		}
		at = min(at+(n+7)&^7, end)
	}
	return nil
}

// checkFeatures refuses what this driver can't do, by name.
func (h *header) checkFeatures() error {
	const known = incompatDirty | incompatCorrupt | incompatCompress
	switch {
	case h.crypt != 0:
		return fmt.Errorf("%w: it is encrypted (decrypt it with: qemu-img convert)", ErrFeature)
	case h.incompat&incompatDataFile != 0:
		return fmt.Errorf("%w: external data file (incompatible bit 2; copy it into one file with: qemu-img convert)", ErrFeature)
	case h.incompat&incompatExtL2 != 0:
		return fmt.Errorf("%w: extended L2 entries (incompatible bit 4; convert it with: qemu-img convert -O qcow2)", ErrFeature)
	case h.incompat&^uint64(known) != 0:
		return fmt.Errorf("%w: %s", ErrFeature, h.featureNames(h.incompat&^uint64(known)))
	case (h.incompat&incompatCompress != 0) != (h.compression != 0):
		return fmt.Errorf("%w: compression type %d does not agree with incompatible bit 3", ErrFormat, h.compression)
	case h.compression > uint8(Zstd):
		return fmt.Errorf("%w: compression type %d (0, zlib, and 1, zstd, are known)", ErrFeature, h.compression)
	}
	return nil
}

// featureNames spells out incompatible feature bits, by the image's own feature name table where it has them.
func (h *header) featureNames(bits uint64) string {
	var names []string
	for bit := range 64 {
		if bits>>bit&1 == 0 {
			continue
		}
		name := fmt.Sprintf("incompatible feature bit %d", bit)
		for _, e := range h.extensions {
			for d := e.data; e.kind == extFeatures && len(d) >= featureNameLen; d = d[featureNameLen:] {
				if d[0] == 0 && int(d[1]) == bit {
					name = fmt.Sprintf("%q (%s)", strings.TrimRight(string(d[2:featureNameLen]), "\x00"), name)
				}
			}
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}

// encode returns the fixed part, as much of it as this driver ever changes. Unknown fields and extensions behind it stay
// in the file as they are.
func (h *header) encode() []byte {
	be := binary.BigEndian
	b := make([]byte, headerLen3)
	be.PutUint32(b, magic)
	be.PutUint32(b[4:], h.version)
	be.PutUint64(b[8:], h.backingOff)
	be.PutUint32(b[16:], h.backingLen)
	be.PutUint32(b[20:], h.clusterBits)
	be.PutUint64(b[24:], h.size)
	be.PutUint32(b[32:], h.crypt)
	be.PutUint32(b[36:], h.l1Size)
	be.PutUint64(b[40:], h.l1Off)
	be.PutUint64(b[48:], h.rtOff)
	be.PutUint32(b[56:], h.rtClusters)
	be.PutUint32(b[60:], h.snapshots)
	be.PutUint64(b[64:], h.snapOff)
	if h.version == 2 {
		return b[:headerLen2]
	}
	be.PutUint64(b[offFeatures:], h.incompat)
	be.PutUint64(b[80:], h.compat)
	be.PutUint64(b[88:], h.autoclear)
	be.PutUint32(b[offRefOrder:], h.refOrder)
	be.PutUint32(b[offHeaderLen:], h.length)
	return b
}

// featureTable is the feature name table that new images get.
func featureTable() []byte {
	var b []byte
	for _, f := range []struct {
		kind, bit byte
		name      string
	}{
		{0, 0, "dirty bit"}, {0, 1, "corrupt bit"}, {0, 2, "external data file"}, {0, 3, "compression type"},
		{0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"}, {2, 0, "bitmaps"}, {2, 1, "raw external data"},
	} {
		var e [featureNameLen]byte
		e[0], e[1] = f.kind, f.bit
		copy(e[2:], f.name)
		b = append(b, e[:]...)
	}
	return b
}
