package nbd_test

import (
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk/nbd"
)

const mib = 1 << 20

// serveGated exports a disk of 32 MiB that a request leaves only when it is let go, with the settings of o.
func serveGated(t *testing.T, o *nbd.Server) (*server, *memory) {
	t.Helper()
	m := newMemory(32 * mib)
	m.gate = make(chan struct{})
	s := &server{Server: nbd.Server{MaxMemory: o.MaxMemory, StallTimeout: o.StallTimeout, MaxConns: o.MaxConns, Log: o.Log,
		TLS: o.TLS, Exports: only(t, m)}}
	return s.start(t), m
}

// begun returns a client in the transmission phase.
func (s *server) begun(t *testing.T) *peer {
	t.Helper()
	p := s.connect(t, 3)
	p.start("", false)
	return p
}

// idle waits until nobody has memory any more.
func (s *server) idle(t *testing.T) {
	t.Helper()
	eventually(t, "everything is given back", func() bool {
		used, waiting := s.Memory()
		return used == 0 && waiting == 0
	})
}

// However much each client asks for, together they have no more than there is, and each has the same.
func TestServerMemory(t *testing.T) {
	t.Parallel()
	const clients, requests, n = 8, 3, 4 * mib // what a Device passes on as one
	s, m := serveGated(t, &nbd.Server{MaxMemory: clients * n})
	full := func() bool {
		used, waiting := s.Memory()
		return used == clients*n && waiting == clients
	}
	peers := make([]*peer, clients)
	for i := range peers {
		peers[i] = s.begun(t)
	}
	for _, p := range peers {
		for i := range uint64(requests) {
			p.send(request(0, 0, i, 0, n-5)) // the buffer is larger
		}
	}
	eventually(t, "all memory is given out", full)
	eventually(t, "all that may arrive", func() bool { return m.arrived.Load() == clients })
	if !full() {
		t.Error("more is given out than there is")
	}
	// None has more than one of them: when those are let go, each client gets an answer.
	for range clients {
		m.gate <- struct{}{}
	}
	answer := func(p *peer) {
		if head := p.read(16); nbd.BE.Uint32(head[4:]) != 0 {
			t.Errorf("answer: %x", head)
		}
		p.read(n - 5)
	}
	for _, p := range peers {
		answer(p)
	}
	close(m.gate)
	var wg sync.WaitGroup
	for _, p := range peers {
		wg.Go(func() {
			for range requests - 1 {
				answer(p)
			}
		})
	}
	wg.Wait()
	s.idle(t)
}

// A client that is alone has all of it; what it holds when others come, it keeps until it is done.
func TestServerMemoryShares(t *testing.T) {
	t.Parallel()
	const n = 8 * mib
	s, m := serveGated(t, &nbd.Server{}) // and so 256 MiB, of which one client gets 64
	first := s.begun(t)
	for i := range uint64(9) {
		first.send(request(0, 0, i, 0, n))
	}
	eventually(t, "its limit is reached", func() bool { return m.arrived.Load() == 8 })
	if used, waiting := s.Memory(); used != 8*n || waiting != 0 {
		t.Errorf("%d bytes, %d wait", used, waiting)
	}
	second := s.begun(t)
	second.send(request(0, 1, 99, 0, 3, 1, 2, 3))
	eventually(t, "the other is let in", func() bool { return m.arrived.Load() == 9 })
	close(m.gate)
	second.expect("answer", simple(0, 99))
}

// A client that does not read its answers keeps the others waiting until its time is over, and no longer.
func TestServerMemoryOfTheSilent(t *testing.T) {
	t.Parallel()
	logged := make(chan error, 1)
	s, m := serveGated(t, &nbd.Server{MaxMemory: 1, StallTimeout: 300 * time.Millisecond, // the least is the largest request
		Log: func(_ net.Addr, err error) { logged <- err }})
	close(m.gate)
	silent, other := s.begun(t), s.begun(t)
	silent.send(request(0, 0, 1, 0, 32*mib))
	eventually(t, "it has everything", func() bool { used, _ := s.Memory(); return used == 32*mib })
	other.send(request(0, 0, 2, 0, 3))
	eventually(t, "the other has to wait, or has waited", func() bool {
		used, waiting := s.Memory()
		return waiting == 1 || used < 32*mib
	})
	other.expect("answer", simple(0, 2, 0, 0, 0))
	if err := <-logged; !strings.Contains(err.Error(), "answers") {
		t.Error(err)
	}
}

// Clients that come, ask for all sorts of things and go in the midst of them. Nothing is lost, and nobody waits for ever.
func TestServerMemoryUnderLoad(t *testing.T) {
	t.Parallel()
	const clients, limit = 8, 32 * mib
	s, m := serveGated(t, &nbd.Server{MaxMemory: limit, MaxConns: clients / 2})
	close(m.gate)
	done := make(chan struct{})
	var wg, watch sync.WaitGroup
	watch.Go(func() {
		for {
			if used, _ := s.Memory(); used < 0 || used > limit {
				t.Errorf("%d bytes in use", used)
				return
			}
			select {
			case <-done:
				return
			case <-time.After(100 * time.Microsecond):
			}
		}
	})
	for w := range clients {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			for range 6 {
				nc, err := net.Dial("unix", s.socket)
				if err != nil {
					t.Error(err)
					return
				}
				nc.SetDeadline(time.Now().Add(timeout))
				p := &peer{t, nc}
				p.expect("greeting", hello(3))
				p.send([]byte{0, 0, 0, 3})
				p.start("", false)
				var reads, writes []byte
				total := 0
				for i := range uint64(1 + r.IntN(8)) {
					n := r.IntN(1 << (10 + r.IntN(13)))
					reads = append(reads, request(0, 0, i, 0, uint32(n))...)
					writes = append(writes, request(0, 1, i, 0, uint32(n/2), make([]byte, n/2)...)...)
					total += 16 + n
				}
				switch r.IntN(4) {
				case 0: // goes without its answers
					p.send(reads)
				case 1: // goes in the midst of a payload
					p.send(writes[:len(writes)-1])
				default:
					p.send(reads)
					p.read(total)
				}
				nc.Close()
			}
		})
	}
	wg.Wait()
	close(done)
	watch.Wait()
	s.idle(t)
}
