package nbd_test

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk/nbd"
)

// Clients that stop in the midst of something are disconnected. Those that have nothing to say are not.
func TestServerDropsStalledClients(t *testing.T) {
	t.Parallel()
	const soon = 500 * time.Millisecond
	for _, secure := range []bool{false, true} {
		for name, tc := range map[string]struct {
			say  []byte
			want string
		}{
			"half a request":       {request(0, 0, 1, 0, 5)[:27], "midst of a request"},
			"first byte":           {request(0, 0, 1, 0, 5)[:1], "midst of a request"},
			"no payload":           {request(0, 1, 1, 0, 5), "midst of a request"},
			"half a payload":       {request(0, 1, 1, 0, 200_000, make([]byte, 100_000)...), "midst of a request"},
			"an answer not taken":  {request(0, 0, 1, 0, 32*mib), "does not take its answers"},
			"many of them":         {cat(request(0, 0, 1, 0, 8*mib), request(0, 0, 2, 0, 8*mib), request(0, 0, 3, 0, 8*mib)), "does not take its answers"},
			"a part of one":        {cat(request(0, 0, 1, 0, 8*mib), request(0, 0, 2, 0, 5)[:20]), ""},
			"half closed, no read": {cat(request(0, 0, 1, 0, 8*mib), request(0, 2, 0, 0, 0)), "does not take its answers"},
		} {
			if secure {
				name += ", TLS"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				logged := make(chan error, 1)
				o := nbd.Server{StallTimeout: soon, Log: func(_ net.Addr, err error) { logged <- err }}
				var c *certs
				if secure {
					c = newCerts(t)
					o.TLS = c.server
				}
				s, m := serveGated(t, &o)
				close(m.gate)
				idle, stalled := s.beginWith(t, c), s.beginWith(t, c)
				stalled.send(tc.say)
				if err := <-logged; !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), tc.want) {
					t.Error(err)
				}
				for range 2 {
					idle.send(request(0, 0, 1, 0, 5)) // later than soon
					idle.expect("answer", simple(0, 1, make([]byte, 5)...))
				}
			})
		}
	}
}

// beginWith is begun over TLS, where there are certificates.
func (s *server) beginWith(t *testing.T, c *certs) *peer {
	t.Helper()
	if c == nil {
		return s.begun(t)
	}
	p := s.connect(t, 3)
	if kinds, _ := p.option(5, nil); kinds[0] != 1 {
		t.Fatalf("TLS: %x", kinds)
	}
	config, err := nbd.ClientTLS(c.dir, "disks.example")
	if err != nil {
		t.Fatal(err)
	}
	p.nc = tls.Client(p.nc, config)
	p.start("", false)
	return p
}

// A client that is slow, but not idle, is waited for.
func TestServerWaitsForSlowClients(t *testing.T) {
	t.Parallel()
	s, m := serveGated(t, &nbd.Server{StallTimeout: 2 * time.Second})
	close(m.gate)
	p := s.begun(t)
	const pieces, size = 8, 64 << 10
	want := noise(pieces*size, 1)
	tick := time.NewTicker(400 * time.Millisecond)
	defer tick.Stop()
	p.send(request(0, 1, 1, 0, pieces*size))
	for i := range pieces {
		<-tick.C
		p.send(want[i*size : (i+1)*size])
	}
	p.expect("answer", simple(0, 1))
	mustRead(t, m, want, 0)
}

// More clients than are served at a time wait for their turn.
func TestServerClientsWait(t *testing.T) {
	t.Parallel()
	s, m := serveGated(t, &nbd.Server{MaxConns: 1})
	close(m.gate)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(tcp) // listeners do not take each other's places
	first := s.begun(t)
	nc, err := net.Dial("tcp", tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := nc.Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a client too many is greeted: %d, %v", n, err)
	}
	nc.SetDeadline(time.Now().Add(timeout))
	first.send(request(0, 0, 1, 0, 5))
	first.expect("answer", simple(0, 1, make([]byte, 5)...))
	first.send(request(0, 2, 0, 0, 0))
	second := &peer{t, nc}
	second.expect("greeting", hello(3))
	second.send([]byte{0, 0, 0, 3})
	second.start("", false)
	second.send(request(0, 0, 2, 0, 5))
	second.expect("answer", simple(0, 2, make([]byte, 5)...))
	// The one who waits when the server stops is disconnected.
	third := s.dialRaw(t)
	s.Close()
	third.gone("shutdown")
}
