package net

import (
	"encoding/binary"
	"fmt"
)

// Lengths of the virtio-net header: none, the one of tap devices and of old drivers, and the one of virtio 1.
const (
	NoHeaderLen    = 0
	ShortHeaderLen = 10
	HeaderLen      = 12
)

// Header flags and segmentation types (virtio 1.2, 5.1.6).
const (
	FlagNeedsCSum = 1 // the checksum from CSumStart on is to be stored at CSumStart+CSumOffset
	FlagDataValid = 2 // the checksum was checked; only in frames to the guest

	GSONone  = 0
	GSOTCPv4 = 1
	GSOTCPv6 = 4
	GSOECN   = 0x80 // or'd to a TCP type
)

// Header is struct virtio_net_hdr (virtio 1.2, 5.1.6). On the wire it is little-endian.
type Header struct {
	Flags      uint8  // 0: flags
	GSOType    uint8  // 1: gso_type
	HdrLen     uint16 // 2: hdr_len: length of the headers to repeat in each segment; a hint
	GSOSize    uint16 // 4: gso_size: payload bytes per segment
	CSumStart  uint16 // 6: csum_start
	CSumOffset uint16 // 8: csum_offset
	NumBuffers uint16 // 10: num_buffers: not in a header of ShortHeaderLen
}

// ParseHeader decodes a header of ShortHeaderLen or HeaderLen bytes.
func ParseHeader(b []byte) (Header, error) {
	if len(b) != ShortHeaderLen && len(b) != HeaderLen {
		return Header{}, fmt.Errorf("%w: %d bytes", ErrHeader, len(b))
	}
	le := binary.LittleEndian
	h := Header{
		Flags:      b[0],
		GSOType:    b[1],
		HdrLen:     le.Uint16(b[2:]),
		GSOSize:    le.Uint16(b[4:]),
		CSumStart:  le.Uint16(b[6:]),
		CSumOffset: le.Uint16(b[8:]),
	}
	if len(b) == HeaderLen {
		h.NumBuffers = le.Uint16(b[10:])
	}
	return h, nil
}

// Put encodes h into b, which has ShortHeaderLen or HeaderLen bytes.
func (h Header) Put(b []byte) {
	le := binary.LittleEndian
	b[0], b[1] = h.Flags, h.GSOType
	le.PutUint16(b[2:], h.HdrLen)
	le.PutUint16(b[4:], h.GSOSize)
	le.PutUint16(b[6:], h.CSumStart)
	le.PutUint16(b[8:], h.CSumOffset)
	if len(b) == HeaderLen {
		le.PutUint16(b[10:], h.NumBuffers)
	}
}

// CheckFromGuest reports, by an error that wraps ErrHeader, a header that a guest with the offloads f may not put in
// front of a frame of n bytes (virtio 1.2, 5.1.6.2.1).
func (h Header) CheckFromGuest(f Features, n int) error {
	if h.Flags&FlagNeedsCSum != 0 {
		if f&CSum == 0 {
			return errNoCSum
		}
		if int(h.CSumStart)+int(h.CSumOffset)+2 > n {
			return errCSumRange
		}
	}
	var need Features
	switch h.GSOType &^ GSOECN {
	case GSONone:
		if h.GSOType != GSONone {
			return errGSOType
		}
		return nil
	case GSOTCPv4:
		need = HostTSO4
	case GSOTCPv6:
		need = HostTSO6
	default:
		return errGSOType
	}
	if h.GSOType&GSOECN != 0 {
		need |= HostECN
	}
	switch {
	case f&need != need:
		return errGSOType
	case h.GSOSize == 0:
		return errGSOSize
	case h.Flags&FlagNeedsCSum == 0:
		return errGSONoCSum
	}
	return nil
}

// Made once: a guest may send bad headers as fast as it can.
var (
	errNoCSum    = fmt.Errorf("%w: checksum offload was not negotiated", ErrHeader)
	errCSumRange = fmt.Errorf("%w: the checksum lies outside the frame", ErrHeader)
	errGSOType   = fmt.Errorf("%w: segmentation of this type was not negotiated", ErrHeader)
	errGSOSize   = fmt.Errorf("%w: segments of no size", ErrHeader)
	errGSONoCSum = fmt.Errorf("%w: segmentation without a checksum to complete", ErrHeader)
)
