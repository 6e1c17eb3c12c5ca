// Package nbd speaks the NBD protocol on both sides: Client is a blk.Backend over a network block device, and Server
// exports disks to other people's clients.
//
// Both follow doc/proto.md and doc/uri.md of https://github.com/NetworkBlockDevice/nbd; comments name the sections as
// "proto, Section". What they speak: fixed newstyle negotiation over unix and TCP sockets, TLS by an upgrade in the
// session, block size constraints, structured replies, and the metadata context base:allocation. Extended headers, the
// CACHE and RESIZE commands and several connections for one Client are not spoken.
//
//	dial.go       the client's side of the handshake            handshake.go  the server's
//	client.go     requests, and what blk.Backend asks for       session.go    requests
//	replies.go    what the server answers                       server.go     listeners, connections, shutdown
//	reconnect.go  when the connection is lost
//	start.go      requests for which nobody waits               budget.go     the memory of all connections
//	link.go       bytes on a connection, for both               certs.go      certificates, for both
//
// # Buffers
//
// On plain sockets payload goes between the socket and the caller's own memory, by readv and sendmsg. One exception
// saves a system call for each message: a header is read together with up to 8 KiB of what follows it, and payload
// among that is copied. TLS copies everything, as it must.
//
// # Lost connections
//
// A Client whose connection is lost dials again, with growing pauses, until it is closed. Requests, those under way and
// new ones, wait for the new connection for up to Options.ReconnectDelay after the loss, and are then sent again: each
// of them may be carried out twice. From then on they fail at once with ErrLost, until a connection stands. This is what
// QEMU's reconnect-delay does. Two things to know:
//
// A server that dies may take with it what it had acknowledged but not flushed. When the connection is lost between a
// write that ended well and the flush after it, a later Flush on a new connection says nothing about that write. So the
// next Flush fails, once, with ErrUnflushed (QEMU's succeeds). Options.WritesSurvive turns that off for a server that
// has no cache of its own: its writes are in its host's page cache, which outlives the process.
//
// A server that is only cut off may still carry out a write of the old connection after the new one did so, and after
// later writes to the same place. The protocol has nothing against that; servers that end their old sessions soon, as
// those that see the socket closed do, make it unlikely.
package nbd

import (
	"errors"
	"fmt"
)

var (
	// ErrProtocol reports a peer that breaks the protocol. A Client does not dial again after it: every request fails
	// with it from then on.
	ErrProtocol = errors.New("nbd: protocol violation")

	// ErrTLS refuses a server that does not offer TLS where Options.TLS demands it, or demands it where there is none.
	ErrTLS = errors.New("nbd: TLS")

	// ErrLost reports a request that was given up because the connection is lost and did not come back in time. Writes
	// among such requests may have been carried out or not.
	ErrLost = errors.New("nbd: connection lost")

	// ErrUnflushed is what the first Flush after a lost connection answers if writes that had ended well before the loss
	// were not flushed by then. They may be gone. Data written since is on stable storage.
	ErrUnflushed = errors.New("nbd: the connection was lost after writes that were not flushed yet; they may be lost too")

	// ErrChanged reports a server that came back with another export than before: another size, other abilities.
	ErrChanged = errors.New("nbd: the export has changed")

	// ErrServerClosed is what Serve returns after Shutdown or Close.
	ErrServerClosed = errors.New("nbd: server closed")
)

func violation(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrProtocol, fmt.Errorf(format, args...))
}
