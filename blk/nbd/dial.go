package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"net"
	"time"

	"github.com/kvmlet/kvmlet/blk"
)

// Options says where an export is and how to use it.
type Options struct {
	Network string // "unix" or "tcp"
	Address string // path of the socket, or host:port
	Export  string // name; empty means the server's default export

	// TLS demands TLS; a server that does not offer it is refused. Nil means plain text. A ServerName must be set, or
	// InsecureSkipVerify. The configuration must not change any more.
	TLS *tls.Config

	// HandshakeTimeout is how long it may take from the first packet to the first request; 0 means 10 s.
	HandshakeTimeout time.Duration

	// ReconnectDelay is how long requests wait for a lost connection to come back. 0 means that they fail at once.
	ReconnectDelay time.Duration

	// WritesSurvive says that what the server acknowledged is not lost when its connection or its process is, so that
	// Flush need not fail with ErrUnflushed then. See the package's comment.
	WritesSurvive bool

	// Dial makes the connection, where it is set, instead of net.Dialer. Each call is for one new connection.
	Dial func(ctx context.Context) (net.Conn, error)
}

const defaultHandshakeTimeout = 10 * time.Second

func (o *Options) String() string {
	name := o.Address
	if name == "" {
		name = "server"
	}
	if o.Export != "" {
		name += fmt.Sprintf(", export %q", o.Export)
	}
	return name
}

// export is what the handshake told.
type export struct {
	size       int64
	flags      uint16 // transmission flags
	structured bool
	meta       bool   // base:allocation was selected
	metaID     uint32 // under this number, which is the connection's own
	blocks     bool   // the server told its block sizes
	minBlock   uint32
	preferred  uint32
	maxBlock   uint32
}

// sectors returns the size in whole sectors, in bytes.
func (e *export) sectors() int64 {
	return (min(e.size, math.MaxInt64&^(blk.SectorSize-1)) + blk.SectorSize - 1) &^ (blk.SectorSize - 1)
}

func (e *export) has(flag uint16) bool { return e.flags&flag != 0 }

// same reports whether o is the same export as e, as far as can be seen.
func (e *export) same(o *export) bool {
	a, b := *e, *o
	a.metaID, b.metaID = 0, 0
	return a == b
}

func (e *export) describe() string {
	return fmt.Sprintf("%d bytes, flags %#x, blocks of %d to %d bytes, structured replies %t, allocation %t",
		e.size, e.flags, e.minBlock, e.maxBlock, e.structured, e.meta)
}

// limits translates the block size constraints (proto, Block size constraints). A server that says nothing about them
// gets requests of whole sectors of at most 32 MiB, as the section recommends for maximum interoperability.
func (e *export) limits() blk.Limits {
	l := blk.Limits{MaxTransfer: maxBlock}
	l.MaxDiscard, l.MaxZero = math.MaxUint32, math.MaxUint32
	switch {
	case e.blocks:
		l.RequestAlign, l.OptimalTransfer = int(e.minBlock), int(e.preferred)
		if e.maxBlock != noMaxBlock {
			l.MaxTransfer = min(l.MaxTransfer, int64(e.maxBlock))
			l.MaxZero = int64(e.maxBlock)
		}
	case e.size%blk.SectorSize == 0:
		l.RequestAlign = blk.SectorSize
	default:
		l.RequestAlign = 1
	}
	align := int64(l.RequestAlign)
	l.MaxTransfer -= l.MaxTransfer % align
	l.MaxDiscard -= l.MaxDiscard % align
	l.MaxZero -= l.MaxZero % align
	return l
}

// connect makes one connection and negotiates.
func connect(ctx context.Context, o *Options) (*link, *export, error) {
	timeout := o.HandshakeTimeout
	if timeout == 0 {
		timeout = defaultHandshakeTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	nc, err := o.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	// The context's end shows as a time-out of whatever waits on the connection.
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	h := &handshake{link: newLink(nc), o: o}
	err = h.run(ctx)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		nc.Close()
		if ctx.Err() != nil {
			err = fmt.Errorf("%w (%w)", err, ctx.Err())
		}
		return nil, nil, err
	}
	return h.link, &h.export, nil
}

func (o *Options) dial(ctx context.Context) (net.Conn, error) {
	if o.Dial != nil {
		return o.Dial(ctx)
	}
	var d net.Dialer // its TCP connections have keep-alive, and no Nagle's algorithm
	return d.DialContext(ctx, o.Network, o.Address)
}

// maxOptReply is the longest reply to an option that is read, in bytes; those that matter are far shorter. maxOptReplies
// bounds their number for one option.
const (
	maxOptReply   = 64 << 10
	maxOptReplies = 1000
)

// handshake is the client's side of the negotiation.
type handshake struct {
	link *link
	o    *Options
	export
	zeroes bool // the server pads its answer to NBD_OPT_EXPORT_NAME
}

func (h *handshake) run(ctx context.Context) error {
	var hello [helloLen]byte
	if err := h.link.readFull(hello[:]); err != nil {
		return fmt.Errorf("greeting: %w", unexpected(err))
	}
	if be.Uint64(hello[:]) != magicInit {
		return violation("this is no NBD server: it begins with %x", hello[:8])
	}
	switch be.Uint64(hello[8:]) {
	case magicOption:
	case magicOldstyle:
		return violation("the server speaks oldstyle negotiation, which is not supported")
	default:
		return violation("greeting of unknown style %x", hello[8:16])
	}
	flags := be.Uint16(hello[16:])
	fixed := flags&flagFixedNewstyle != 0
	h.zeroes = flags&flagNoZeroes == 0
	var answer [4]byte
	be.PutUint32(answer[:], uint32(flags&(flagFixedNewstyle|flagNoZeroes)))
	if err := h.link.send(answer[:], nil, 0, 0); err != nil {
		return err
	}
	switch {
	case !fixed && h.o.TLS != nil:
		return fmt.Errorf("%w: demanded, but the server has no fixed newstyle negotiation, and so none", ErrTLS)
	case !fixed:
		return h.exportName()
	}
	if h.o.TLS != nil {
		if err := h.startTLS(ctx); err != nil {
			return err
		}
	}
	if err := h.negotiate(); err != nil {
		var refused *optError
		if errors.As(err, &refused) {
			// The way to leave without having broken the rules. Whether the server answers does not matter any more.
			_ = h.link.send(appendOption(nil, optAbort, nil), nil, 0, 0)
			switch refused.kind {
			case repErrTLSRequired:
				err = fmt.Errorf("%w: %w (use nbds:// or nbds+unix://)", ErrTLS, err)
			case repErrUnknown:
				err = &noExportError{h.o.Export, err}
			}
		}
		return err
	}
	return nil
}

// noExportError says of a refusal which export was asked for; what a server adds to it is only that in other words.
type noExportError struct {
	name string
	err  error
}

func (e *noExportError) Error() string { return fmt.Sprintf("the server has no export %q", e.name) }
func (e *noExportError) Unwrap() error { return e.err }

func (h *handshake) negotiate() error {
	err := h.simple(optStructured)
	h.structured = err == nil
	if err = tolerate(err); err != nil {
		return err
	}
	if h.structured {
		if err := h.setMeta(); err != nil {
			return err
		}
	}
	err = h.goOn()
	var refused *optError
	if errors.As(err, &refused) && refused.kind == repErrUnsup {
		return h.exportName()
	}
	return err
}

// tolerate drops the refusal of an option that is not needed.
func tolerate(err error) error {
	var refused *optError
	if errors.As(err, &refused) && refused.kind != repErrTLSRequired && refused.kind != repErrShutdown {
		return nil
	}
	return err
}

// startTLS goes over to TLS (proto, TLS support). A server without it is refused: anything else could be the work of
// somebody in between (proto, Protocol downgrade attacks).
func (h *handshake) startTLS(ctx context.Context) error {
	if err := h.simple(optStartTLS); err != nil {
		return fmt.Errorf("%w: demanded: %w", ErrTLS, err)
	}
	tc := tls.Client(h.link.conn, h.o.TLS)
	if err := h.link.upgrade(tc); err != nil {
		return err
	}
	if err := tc.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("%w: %w", ErrTLS, err)
	}
	return nil
}

// simple sends an option without data, to which the server answers yes or no.
func (h *handshake) simple(opt uint32) error {
	return h.option(opt, nil, func(kind uint32, _ []byte) error {
		return violation("option %d is answered with type %d", opt, kind)
	})
}

// option sends an option and passes the replies to each, but for the last: an acknowledgement, or an error, which is
// returned as *optError.
func (h *handshake) option(opt uint32, data []byte, each func(kind uint32, data []byte) error) error {
	if err := h.link.send(appendOption(nil, opt, data), nil, 0, 0); err != nil {
		return err
	}
	for range maxOptReplies {
		var head [optReplyLen]byte
		if err := h.link.readFull(head[:]); err != nil {
			return fmt.Errorf("answer to option %d: %w", opt, unexpected(err))
		}
		kind, n := be.Uint32(head[12:]), be.Uint32(head[16:])
		switch {
		case be.Uint64(head[:]) != magicOptReply:
			return violation("answer to option %d begins with %x", opt, head[:8])
		case be.Uint32(head[8:]) != opt:
			return violation("answer to option %d while %d waits for one", be.Uint32(head[8:]), opt)
		case n > maxOptReply:
			return violation("answer of %d bytes to option %d", n, opt)
		}
		payload := make([]byte, n)
		if err := h.link.readFull(payload); err != nil {
			return fmt.Errorf("answer to option %d: %w", opt, unexpected(err))
		}
		switch {
		case kind&repErr != 0:
			return &optError{opt, kind, string(payload[:min(len(payload), maxString)])}
		case kind == repAck && n != 0:
			return violation("acknowledgement of option %d with %d bytes", opt, n)
		case kind == repAck:
			return nil
		}
		if err := each(kind, payload); err != nil {
			return err
		}
	}
	return violation("more than %d answers to option %d", maxOptReplies, opt)
}

// setMeta selects base:allocation, if the server has it.
func (h *handshake) setMeta() error {
	data := appendString(nil, h.o.Export)
	data = be.AppendUint32(data, 1)
	data = appendString(data, metaAllocation)
	err := h.option(optSetMeta, data, func(kind uint32, p []byte) error {
		if kind != repMeta || len(p) < 4 || string(p[4:]) != metaAllocation || h.meta {
			return violation("context %q (type %d) where %s was asked for", p[min(len(p), 4):], kind, metaAllocation)
		}
		h.meta, h.metaID = true, be.Uint32(p)
		return nil
	})
	if err != nil {
		h.meta = false // those named before an error don't count
	}
	return tolerate(err)
}

// goOn asks for the export by NBD_OPT_GO and ends the negotiation.
func (h *handshake) goOn() error {
	data := appendString(nil, h.o.Export)
	data = be.AppendUint16(data, 1)
	data = be.AppendUint16(data, infoBlockSize)
	known := false
	err := h.option(optGo, data, func(kind uint32, p []byte) error {
		if kind != repInfo || len(p) < 2 {
			return violation("export information of type %d and %d bytes", kind, len(p))
		}
		switch what := be.Uint16(p); {
		case what == infoExport && len(p) == 12:
			known = true
			return h.setExport(p[2:])
		case what == infoBlockSize && len(p) == 14:
			return h.setBlocks(be.Uint32(p[2:]), be.Uint32(p[6:]), be.Uint32(p[10:]))
		case what == infoExport || what == infoBlockSize:
			return violation("export information %d of %d bytes", what, len(p))
		}
		return nil // unknown ones are to be ignored
	})
	switch {
	case err != nil:
		return err
	case !known:
		return violation("the server does not say how large the export is")
	}
	return h.check()
}

// exportName asks for the export by NBD_OPT_EXPORT_NAME, which a server refuses by hanging up.
func (h *handshake) exportName() error {
	if err := h.link.send(appendOption(nil, optExportName, []byte(h.o.Export)), nil, 0, 0); err != nil {
		return err
	}
	var p [exportInfoLen]byte
	if err := h.link.readFull(p[:]); err != nil {
		return fmt.Errorf("no export of that name, or it is not for us: the server hung up: %w", unexpected(err))
	}
	if h.zeroes {
		if err := h.link.skip(exportZeroes); err != nil {
			return err
		}
	}
	if err := h.setExport(p[:]); err != nil {
		return err
	}
	return h.check()
}

func (h *handshake) setExport(p []byte) error {
	size := be.Uint64(p)
	if size > math.MaxInt64 {
		return violation("an export of %d bytes", size)
	}
	h.size, h.flags = int64(size), be.Uint16(p[8:])
	return nil
}

func (h *handshake) setBlocks(smallest, preferred, largest uint32) error {
	pow2 := func(n uint32) bool { return n != 0 && n&(n-1) == 0 }
	if !pow2(smallest) || smallest > maxMinBlock || !pow2(preferred) || preferred < smallest ||
		largest < smallest || largest != noMaxBlock && largest%smallest != 0 {
		return violation("block sizes of %d, %d and %d bytes", smallest, preferred, largest)
	}
	h.blocks, h.minBlock, h.preferred, h.maxBlock = true, smallest, preferred, largest
	return nil
}

// check looks at the export as a whole.
func (h *handshake) check() error {
	if h.blocks && h.size%int64(h.minBlock) != 0 {
		return fmt.Errorf("export of %d bytes in blocks of %d: its last bytes can't be reached", h.size, h.minBlock)
	}
	return nil
}
