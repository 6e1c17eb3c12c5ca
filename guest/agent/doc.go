// Package agent runs commands in a guest for its host, over one byte stream.
//
// The guest side is PID 1 (Main); the host side is Client, made by Connect. In a guest the stream is the virtio-serial
// port named PortName; tests use a socket pair.
//
// # Protocol
//
// Frames go both ways, little-endian:
//
//	0  type     u8   Hello, Start, Data, ...; 0 is one byte of padding between frames
//	1  channel  u8   which byte stream of a process: stdin, stdout, stderr
//	2  length   u16  payload bytes, at most MaxPayload
//	4  stream   u32  process or request, numbered by the host from 1
//	8  payload
//
// A connection begins with a hello from the host, which the guest answers. A hello carries a magic, the protocol's
// version and a session number drawn by the host; the host's also brings the time of day and random bytes, because
// a guest that was restored from a saved state has the wrong clock and an entropy pool others share. A guest whose
// port has just been connected announces itself with a hello of session 0, for which the host repeats its own.
//
// The stream may outlive either end: a restored guest still holds what an earlier host was sending. So both ends look
// for a hello anywhere in the garbage before they read frames, and a hello for a new session ends the old one and kills
// its commands. A host without an answer sends its hello again behind more padding than a frame can hold, which
// completes whatever half frame the guest was reading.
//
// The streams are multiplexed here and not by a library because of that: the usual ones take the loss of one end as the
// end of the connection, which a restored guest and its port do not notice.
//
// Each byte stream of a process has a window: the sender may have at most Window bytes under way, and the receiver
// returns credit for what its consumer took. A reader of the main stream therefore never waits for a consumer, so that
// one stalled output delays nothing else, and no end holds more than Window bytes for each.
//
// Neither end trusts the other: a frame that breaks the rules ends the session with ErrProtocol. Nothing is allocated
// by a size from the wire beyond these bounds.
package agent
