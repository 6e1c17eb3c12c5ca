package nbd

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Magic numbers: proto, Handshake; proto, Transmission.
const (
	magicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOldstyle   = 0x00420281861253   // what an oldstyle server says in its place
	magicOptReply   = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
)

// DefaultPort is the TCP port of NBD (proto, Newstyle negotiation).
const DefaultPort = "10809"

// Sizes of messages in bytes, without payload.
const (
	helloLen      = 18 // two magic numbers, handshake flags
	optionLen     = 16 // magic, option, length
	optReplyLen   = 20 // magic, option, type, length
	exportInfoLen = 10 // size, transmission flags: the answer to NBD_OPT_EXPORT_NAME
	exportZeroes  = 124
	requestLen    = 28
	simpleLen     = 16
	structuredLen = 20
)

// maxString bounds every string (proto, Conventions).
const maxString = 4096

// Handshake and client flags: proto, Handshake flags; Client flags.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Transmission flags: proto, Transmission flags.
const (
	flagHasFlags     = 1 << 0
	flagReadOnly     = 1 << 1
	flagSendFlush    = 1 << 2
	flagSendFUA      = 1 << 3
	flagSendTrim     = 1 << 5
	flagSendZeroes   = 1 << 6
	flagSendDF       = 1 << 7
	flagMultiConn    = 1 << 8
	flagSendFastZero = 1 << 11
)

// Options: proto, Option types.
const (
	optExportName     = 1
	optAbort          = 2
	optList           = 3
	optStartTLS       = 5
	optInfo           = 6
	optGo             = 7
	optStructured     = 8
	optListMeta       = 9
	optSetMeta        = 10
	repErr            = 1 << 31
	repAck            = 1
	repServer         = 2
	repInfo           = 3
	repMeta           = 4
	repErrUnsup       = repErr + 1
	repErrPolicy      = repErr + 2
	repErrInvalid     = repErr + 3
	repErrPlatform    = repErr + 4
	repErrTLSRequired = repErr + 5
	repErrUnknown     = repErr + 6
	repErrShutdown    = repErr + 7
	repErrBlockSize   = repErr + 8
	repErrTooBig      = repErr + 9
	infoExport        = 0
	infoName          = 1
	infoDescription   = 2
	infoBlockSize     = 3
)

// Commands: proto, Request types.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Command flags: proto, Command flags.
const (
	cmdFUA      = 1 << 0
	cmdNoHole   = 1 << 1
	cmdDF       = 1 << 2
	cmdReqOne   = 1 << 3
	cmdFastZero = 1 << 4
)

// Structured reply chunks: proto, Structured reply flags; Structured reply types.
const (
	chunkDone        = 1 << 0
	chunkNone        = 0
	chunkData        = 1
	chunkHole        = 2
	chunkBlockStatus = 5
	chunkErrBit      = 1 << 15
	chunkErr         = chunkErrBit + 1
	chunkErrOffset   = chunkErrBit + 2
)

// The metadata context base:allocation: proto, The `base:` metadata namespace.
const (
	metaBase       = "base:"
	metaAllocation = "base:allocation"
	stateHole      = 1 << 0
	stateZero      = 1 << 1
)

// Block sizes: proto, Block size constraints.
const (
	maxMinBlock  = 64 << 10
	maxBlock     = 32 << 20 // the largest payload that clients may expect to be served, and our own maximum
	noMaxBlock   = 0xffffffff
	defaultBlock = 4096
)

// errno is an error of the transmission phase: proto, Error values.
type errno uint32

const (
	errPerm     errno = 1
	errIO       errno = 5
	errNoMem    errno = 12
	errInval    errno = 22
	errNoSpace  errno = 28
	errOverflow errno = 75
	errNotSup   errno = 95
	errShutdown errno = 108
)

// system returns the errno of this system. One that the protocol does not know counts as NBD_EINVAL.
func (e errno) system() unix.Errno {
	switch e {
	case errPerm:
		return unix.EPERM
	case errIO:
		return unix.EIO
	case errNoMem:
		return unix.ENOMEM
	case errNoSpace:
		return unix.ENOSPC
	case errOverflow:
		return unix.EOVERFLOW
	case errNotSup:
		return unix.EOPNOTSUPP
	case errShutdown:
		return unix.ESHUTDOWN
	}
	return unix.EINVAL
}

var be = binary.BigEndian // every number on the wire: proto, Conventions

// putRequest encodes a request message (proto, Request message).
func putRequest(p *[requestLen]byte, flags, cmd uint16, cookie, off uint64, n uint32) {
	be.PutUint32(p[0:], magicRequest)
	be.PutUint16(p[4:], flags)
	be.PutUint16(p[6:], cmd)
	be.PutUint64(p[8:], cookie)
	be.PutUint64(p[16:], off)
	be.PutUint32(p[24:], n)
}

// putSimple encodes a simple reply (proto, Simple reply message).
func putSimple(p []byte, e errno, cookie uint64) {
	be.PutUint32(p[0:], magicSimple)
	be.PutUint32(p[4:], uint32(e))
	be.PutUint64(p[8:], cookie)
}

// putStructured encodes the header of a reply chunk (proto, Structured reply chunk message).
func putStructured(p []byte, flags, kind uint16, cookie uint64, n uint32) {
	be.PutUint32(p[0:], magicStructured)
	be.PutUint16(p[4:], flags)
	be.PutUint16(p[6:], kind)
	be.PutUint64(p[8:], cookie)
	be.PutUint32(p[16:], n)
}

// appendOption appends an option with its data (proto, Newstyle negotiation).
func appendOption(p []byte, opt uint32, data []byte) []byte {
	p = be.AppendUint64(p, magicOption)
	p = be.AppendUint32(p, opt)
	p = be.AppendUint32(p, uint32(len(data)))
	return append(p, data...)
}

// appendOptReply appends the reply to an option (proto, Fixed newstyle negotiation).
func appendOptReply(p []byte, opt, kind uint32, data []byte) []byte {
	p = be.AppendUint64(p, magicOptReply)
	p = be.AppendUint32(p, opt)
	p = be.AppendUint32(p, kind)
	p = be.AppendUint32(p, uint32(len(data)))
	return append(p, data...)
}

// appendString appends a string behind its length of 32 bits.
func appendString(p []byte, s string) []byte {
	return append(be.AppendUint32(p, uint32(len(s))), s...)
}

// cutString takes a string behind its length of 32 bits from the front of p.
func cutString(p []byte) (s string, rest []byte, ok bool) {
	if len(p) < 4 {
		return "", nil, false
	}
	n := be.Uint32(p)
	if p = p[4:]; n > maxString || int(n) > len(p) {
		return "", nil, false
	}
	return string(p[:n]), p[n:], true
}

var repErrNames = map[uint32]string{
	repErrUnsup:       "option not supported",
	repErrPolicy:      "forbidden by the server's policy",
	repErrInvalid:     "option invalid",
	repErrPlatform:    "not supported on the server's platform",
	repErrTLSRequired: "TLS required",
	repErrUnknown:     "no such export",
	repErrShutdown:    "server is shutting down",
	repErrBlockSize:   "server wants block sizes negotiated",
	repErrTooBig:      "too big",
}

// optError is a server's refusal of an option.
type optError struct {
	opt, kind uint32
	msg       string // what the server says, for a human
}

func (e *optError) Error() string {
	name, ok := repErrNames[e.kind]
	if !ok {
		name = fmt.Sprintf("error %#x", e.kind)
	}
	if e.msg != "" {
		name += fmt.Sprintf(": %q", e.msg)
	}
	return fmt.Sprintf("the server refuses option %d: %s", e.opt, name)
}
