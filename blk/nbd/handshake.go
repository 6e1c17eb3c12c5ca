package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"strings"
	"sync"
	"time"
)

const (
	defaultServerHandshake = 10 * time.Second // as QEMU
	shutdownHandshake      = time.Second      // for clients that are still negotiating when the server stops

	maxOption  = 64 << 10 // longest option that is looked at, in bytes; a longer one is skipped
	maxSkipped = 1 << 20  // longest option that is skipped
	maxQueries = 128      // metadata contexts asked for at once
	metaID     = 1        // our number for base:allocation
)

// errSoft ends the negotiation as the client asked for.
var errSoft = errors.New("nbd: the client leaves")

// serverConn is one client of a Server.
type serverConn struct {
	s     *Server
	link  *link
	plain net.Conn // under TLS, if any

	// Negotiated.
	noZeroes   bool
	secure     bool
	structured bool
	meta       *Export // base:allocation was selected for it
	export     *Export // the transmission phase has begun

	mu      sync.Mutex
	winding bool // the server shuts down
	session *session
}

// serve serves the client until one of both is done. An error says that it did not end well.
func (c *serverConn) serve() error {
	_ = c.plain.SetDeadline(time.Now().Add(orDefault(c.s.HandshakeTimeout, defaultServerHandshake)))
	switch err := c.negotiate(); {
	case err == errSoft || err == io.EOF:
		return nil
	case err != nil:
		return timedOut(err)
	}
	ss := newSession(c)
	c.mu.Lock()
	winding := c.winding
	if !winding {
		_ = c.plain.SetDeadline(time.Time{})
		c.session = ss
	}
	c.mu.Unlock()
	if winding {
		return nil
	}
	return ss.run()
}

// wind tells the client's session that the server shuts down.
func (c *serverConn) wind() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.winding = true
	if c.session == nil {
		_ = c.plain.SetDeadline(time.Now().Add(shutdownHandshake))
		return
	}
	c.session.wind()
}

// negotiate is the handshake (proto, Fixed newstyle negotiation). It returns when the client has chosen an export.
func (c *serverConn) negotiate() error {
	hello := be.AppendUint64(nil, magicInit)
	hello = be.AppendUint64(hello, magicOption)
	hello = be.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	if err := c.link.send(hello, nil, 0, 0); err != nil {
		return err
	}
	var flags [4]byte
	if err := c.link.readFull(flags[:]); err != nil {
		return err
	}
	f := be.Uint32(flags[:])
	if f&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return violation("client flags %#x", f)
	}
	c.noZeroes = f&flagNoZeroes != 0
	for c.export == nil {
		var head [optionLen]byte
		if err := c.link.readFull(head[:]); err != nil {
			return err
		}
		if be.Uint64(head[:]) != magicOption {
			return violation("option begins with %x", head[:8])
		}
		opt, n := be.Uint32(head[8:]), be.Uint32(head[12:])
		if n > maxOption {
			if n > maxSkipped || opt == optExportName {
				return violation("option %d of %d bytes", opt, n)
			}
			if err := c.link.skip(int(n)); err != nil {
				return err
			}
			if err := c.refuse(opt, repErrTooBig, "option too long"); err != nil {
				return err
			}
			continue
		}
		data := make([]byte, n)
		if err := c.link.readFull(data); err != nil {
			return unexpected(err)
		}
		if err := c.option(opt, data); err != nil {
			return err
		}
	}
	return nil
}

func (c *serverConn) reply(opt, kind uint32, data []byte) error {
	return c.link.send(appendOptReply(nil, opt, kind, data), nil, 0, 0)
}

func (c *serverConn) refuse(opt, kind uint32, why string) error {
	return c.reply(opt, kind, []byte(why))
}

// option answers one option (proto, Option types).
func (c *serverConn) option(opt uint32, data []byte) error {
	hidden := c.s.TLS != nil && !c.secure // FORCEDTLS mode: proto, TLS support
	switch {
	case opt == optAbort:
		_ = c.reply(opt, repAck, nil) // the client may be gone already
		return errSoft
	case c.s.isStopping():
		if opt == optExportName {
			return errSoft
		}
		return c.refuse(opt, repErrShutdown, "the server is shutting down")
	case opt == optExportName && hidden:
		return errors.New("the client asks for an export without TLS")
	case opt == optExportName:
		return c.exportName(string(data))
	case opt == optStartTLS:
		return c.startTLS(data)
	case hidden:
		return c.refuse(opt, repErrTLSRequired, "this server wants TLS")
	case opt == optInfo || opt == optGo:
		return c.info(opt, data)
	case opt == optListMeta || opt == optSetMeta:
		return c.metaContext(opt, data)
	case opt == optList:
		return c.list(data)
	case opt == optStructured:
		if len(data) != 0 {
			return c.refuse(opt, repErrInvalid, "this option has no data")
		}
		c.structured = true
		return c.reply(opt, repAck, nil)
	}
	return c.refuse(opt, repErrUnsup, "")
}

func (c *serverConn) startTLS(data []byte) error {
	switch {
	case c.s.TLS == nil:
		return c.refuse(optStartTLS, repErrPolicy, "this server has no certificate")
	case c.secure || len(data) != 0:
		return c.refuse(optStartTLS, repErrInvalid, "")
	}
	if c.link.r != c.link.w {
		return violation("plain text behind the request for TLS")
	}
	if err := c.reply(optStartTLS, repAck, nil); err != nil {
		return err
	}
	tc := tls.Server(c.plain, c.s.TLS)
	if err := c.link.upgrade(tc); err != nil {
		return err
	}
	if err := tc.HandshakeContext(c.s.ctx); err != nil {
		return fmt.Errorf("%w: %w", ErrTLS, err)
	}
	c.secure, c.structured, c.meta = true, false, nil
	return nil
}

func (c *serverConn) list(data []byte) error {
	if len(data) != 0 {
		return c.refuse(optList, repErrInvalid, "this option has no data")
	}
	for i := range c.s.Exports {
		e := &c.s.Exports[i]
		if err := c.reply(optList, repServer, append(appendString(nil, e.Name), e.Description...)); err != nil {
			return err
		}
	}
	return c.reply(optList, repAck, nil)
}

// flags returns the transmission flags of an export (proto, Transmission flags). The disk is the same for every
// connection, and so is what it has cached.
func (c *serverConn) flags(e *Export) uint16 {
	f := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagMultiConn)
	if e.readOnly() {
		f |= flagReadOnly
	} else {
		f |= flagSendTrim | flagSendZeroes | flagSendFastZero
	}
	if c.structured {
		f |= flagSendDF
	}
	return f
}

func (c *serverConn) exportName(name string) error {
	e := c.s.find(name)
	if e == nil {
		return fmt.Errorf("no export %q", name)
	}
	p := be.AppendUint64(nil, uint64(e.Disk.Size()))
	p = be.AppendUint16(p, c.flags(e))
	if !c.noZeroes {
		p = append(p, make([]byte, exportZeroes)...)
	}
	c.choose(e)
	return c.link.send(p, nil, 0, 0)
}

func (c *serverConn) choose(e *Export) {
	c.export = e
	if c.meta != e {
		c.meta = nil // selected for another export
	}
}

// info answers NBD_OPT_INFO and NBD_OPT_GO.
func (c *serverConn) info(opt uint32, data []byte) error {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(be.Uint16(rest)) {
		return c.refuse(opt, repErrInvalid, "malformed")
	}
	e := c.s.find(name)
	if e == nil {
		return c.refuse(opt, repErrUnknown, "no such export")
	}
	p := be.AppendUint16(nil, infoExport)
	p = be.AppendUint64(p, uint64(e.Disk.Size()))
	p = be.AppendUint16(p, c.flags(e))
	if err := c.reply(opt, repInfo, p); err != nil {
		return err
	}
	asked := map[uint16]bool{}
	for rest = rest[2:]; len(rest) > 0; rest = rest[2:] {
		what := be.Uint16(rest)
		if asked[what] {
			continue
		}
		asked[what] = true
		p = be.AppendUint16(p[:0], what)
		switch what {
		case infoName:
			p = append(p, e.Name...)
		case infoDescription:
			if e.Description == "" {
				continue
			}
			p = append(p, e.Description...)
		case infoBlockSize:
			p = be.AppendUint32(p, 1)
			p = be.AppendUint32(p, e.preferred())
			p = be.AppendUint32(p, maxBlock)
		default:
			continue
		}
		if err := c.reply(opt, repInfo, p); err != nil {
			return err
		}
	}
	if opt == optGo {
		c.choose(e)
	}
	return c.reply(opt, repAck, nil)
}

// preferred returns the size from which on the disk need not read before it writes, a power of two.
func (e *Export) preferred() uint32 {
	l := e.Disk.Limits()
	n := min(max(defaultBlock, l.RequestAlign, l.PhysicalBlock), maxBlock)
	return 1 << bits.Len32(uint32(n-1))
}

// metaContext answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT (proto, Metadata querying).
func (c *serverConn) metaContext(opt uint32, data []byte) error {
	if opt == optSetMeta {
		c.meta = nil // even if this one fails
	}
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 4 {
		return c.refuse(opt, repErrInvalid, "malformed")
	}
	queries := be.Uint32(rest)
	if queries > maxQueries {
		return c.refuse(opt, repErrTooBig, "too many queries")
	}
	found := queries == 0 && opt == optListMeta
	rest = rest[4:]
	for range queries {
		var query string
		if query, rest, ok = cutString(rest); !ok {
			return c.refuse(opt, repErrInvalid, "malformed")
		}
		if !strings.Contains(query, ":") {
			return c.refuse(opt, repErrInvalid, "a query without a namespace")
		}
		found = found || query == metaAllocation || query == metaBase && opt == optListMeta
	}
	e := c.s.find(name)
	switch {
	case len(rest) != 0:
		return c.refuse(opt, repErrInvalid, "malformed")
	case opt == optSetMeta && !c.structured:
		return c.refuse(opt, repErrInvalid, "this needs structured replies")
	case e == nil:
		return c.refuse(opt, repErrUnknown, "no such export")
	}
	if found {
		id := uint32(0)
		if opt == optSetMeta {
			c.meta, id = e, metaID
		}
		if err := c.reply(opt, repMeta, append(be.AppendUint32(nil, id), metaAllocation...)); err != nil {
			return err
		}
	}
	return c.reply(opt, repAck, nil)
}
