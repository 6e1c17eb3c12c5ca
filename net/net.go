// Package net moves Ethernet frames between a guest's network card and the host. A Backend is one way of doing that: a
// tap device, an in-memory pipe. Packages that need the standard library's net beside this one rename one of them.
package net

import (
	"errors"
	"io"
	"time"

	"github.com/kvmlet/kvmlet/iov"
)

// Errors that Backends return and callers branch on.
var (
	// ErrFrameTooLong reports a frame that did not fit the buffer, or that is longer than MaxFrame. It is lost.
	ErrFrameTooLong = errors.New("net: frame too long")
	// ErrHeader reports a virtio-net header that is malformed or asks for what was not negotiated.
	ErrHeader = errors.New("net: bad virtio-net header")
	// ErrFeatures reports features or a header length that a Backend does not have.
	ErrFeatures = errors.New("net: features or header length not supported")
)

// Lengths of the longest packet, which is an IP packet before segmentation, and of the longest frame, which has an
// Ethernet and a VLAN header more, but no virtio-net header.
const (
	MaxPacket = 65535
	MaxFrame  = 14 + 4 + MaxPacket
)

// A Backend carries frames. Each frame starts with a virtio-net header of the negotiated length, which
// SetFeatures is called to fix before the first of them.
//
// Send and Recv may each be used by one goroutine at a time, and by two at the same time as each other. SetFeatures is
// called while neither runs. The other methods may be called from any goroutine at any time.
type Backend interface {
	// Send passes one frame to the host and returns its length. It takes the frame as a whole or not at all. When the
	// host is slow it waits. An error other than os.ErrClosed and os.ErrDeadlineExceeded concerns that frame alone.
	Send(frame iov.Vec) (int, error)

	// Recv waits for a frame from the host, stores it from the start of frame on, and returns its length. A frame that
	// is longer than frame.Size() is lost, the bytes of frame are then undefined, and the error is ErrFrameTooLong. Any
	// error but this one and os.ErrDeadlineExceeded means that no more frames will come.
	Recv(frame iov.Vec) (int, error)

	// Features returns what the backend can do, for SetFeatures to choose from.
	Features() Features

	// SetFeatures fixes the offloads in use and the length of the header in front of each frame: 0, 10 or 12. The error
	// wraps ErrFeatures when the backend has not all of it; then nothing changed.
	SetFeatures(f Features, headerLen int) error

	// SetDeadline makes Send and Recv that wait past t, now and later, return os.ErrDeadlineExceeded. A zero t takes
	// the deadline away. It is how a device interrupts them without closing the backend.
	SetDeadline(t time.Time) error

	// Close ends the backend: Send and Recv return os.ErrClosed, also where they wait. Closing again does nothing.
	io.Closer
}

// Features is a set of offloads, with the bit numbers of virtio-net's feature bits (virtio 1.2, 5.1.3), so that what a
// backend can do and what a guest negotiates are compared by a bitwise and. "Guest" bits are about frames towards the
// guest, the others about frames from it.
type Features uint64

// The offloads.
const (
	CSum      Features = 1 << 0  // frames from the guest may need their checksum completed
	GuestCSum Features = 1 << 1  // frames to the guest may need their checksum completed
	GuestTSO4 Features = 1 << 7  // frames to the guest may be unsegmented TCP over IPv4
	GuestTSO6 Features = 1 << 8  // the same over IPv6
	GuestECN  Features = 1 << 9  // frames to the guest may be unsegmented TCP with ECN
	HostTSO4  Features = 1 << 11 // frames from the guest may be unsegmented TCP over IPv4
	HostTSO6  Features = 1 << 12 // the same over IPv6
	HostECN   Features = 1 << 13 // frames from the guest may be unsegmented TCP with ECN

	// Offloads are all of them.
	Offloads = CSum | GuestCSum | GuestTSO4 | GuestTSO6 | GuestECN | HostTSO4 | HostTSO6 | HostECN
)

// Complete returns f without the offloads whose prerequisites f lacks (virtio 1.2, 5.1.3.1): segmentation needs the
// checksum, ECN needs segmentation.
func (f Features) Complete() Features {
	if f&CSum == 0 {
		f &^= HostTSO4 | HostTSO6
	}
	if f&GuestCSum == 0 {
		f &^= GuestTSO4 | GuestTSO6
	}
	if f&(HostTSO4|HostTSO6) == 0 {
		f &^= HostECN
	}
	if f&(GuestTSO4|GuestTSO6) == 0 {
		f &^= GuestECN
	}
	return f
}
