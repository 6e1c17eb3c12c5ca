package nbd_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// transfers are started together and waited for.
type transfers struct {
	ios  []*blk.IO
	left atomic.Int64
	done chan struct{}
}

func newTransfers(ios ...*blk.IO) *transfers {
	ts := &transfers{ios: ios, done: make(chan struct{}, 1)}
	for _, io := range ios {
		io.Done = func(*blk.IO) {
			if ts.left.Add(-1) == 0 {
				ts.done <- struct{}{}
			}
		}
	}
	return ts
}

func (ts *transfers) start(s blk.Starter) {
	ts.left.Store(int64(len(ts.ios)))
	s.Start(ts.ios)
}

func (ts *transfers) run(s blk.Starter) {
	ts.start(s)
	<-ts.done
}

// What is started has the results of what is waited for.
func TestStart(t *testing.T) {
	t.Parallel()
	const size = 40 * mib
	s, m := serveMemory(t, size)
	c := dial(t, s.options())
	ro := dial(t, serve(t, nbd.Export{Disk: newDevice(t, newMemory(4096), blk.Options{}), ReadOnly: true}).options())
	odd := dial(t, nbdkit(t, "memory", "1000001"))
	ios := make([]*blk.IO, 500) // more than go at a time
	want := noise(500*1000, 1)
	for i := range ios {
		p := want[i*1000 : (i+1)*1000]
		ios[i] = &blk.IO{Op: blk.OpWrite, Vec: iov.Of(p[:300], nil, p[300:]), Off: int64(i * 1000)}
	}
	newTransfers(ios...).run(c)
	if !bytes.Equal(m.bytes(0, len(want)), want) {
		t.Error("other bytes were written")
	}
	got := make([]byte, len(want))
	for i := range ios {
		if ios[i].N != 1000 || ios[i].Err != nil {
			t.Fatalf("write: %d, %v", ios[i].N, ios[i].Err)
		}
		ios[i] = &blk.IO{Vec: iov.Of(got[i*1000 : (i+1)*1000]), Off: int64(i * 1000)}
	}
	newTransfers(ios...).run(c)
	if !bytes.Equal(got, want) {
		t.Error("other bytes were read")
	}
	large := make([]byte, size)
	for _, tc := range []struct {
		what string
		c    *nbd.Client
		io   blk.IO
		n    int
		err  error
	}{
		{"nothing", c, blk.IO{}, 0, nil},
		{"longer than a request", c, blk.IO{Op: blk.OpWrite, Vec: iov.Of(large)}, size, nil},
		{"beyond the end", c, blk.IO{Vec: iov.Of(got), Off: size - 1}, 0, blk.ErrRange},
		{"before the start", c, blk.IO{Vec: iov.Of(got), Off: -1}, 0, blk.ErrRange},
		{"read-only", ro, blk.IO{Op: blk.OpWrite, Vec: iov.Of(got[:512])}, 0, blk.ErrReadOnly},
		{"read-only, read", ro, blk.IO{Vec: iov.Of(got[:512])}, 512, nil},
		{"last sector", odd, blk.IO{Vec: iov.Of(got[:512]), Off: 1000448 - 512}, 65, nil},
		{"last sector, zeroes", odd, blk.IO{Op: blk.OpWrite, Vec: iov.Of(large[:512]), Off: 1000448 - 512}, 512, nil},
	} {
		newTransfers(&tc.io).run(tc.c)
		if tc.io.N != tc.n || !errors.Is(tc.io.Err, tc.err) {
			t.Errorf("%s: %d, %v", tc.what, tc.io.N, tc.io.Err)
		}
	}
	m.fail(errors.New("broken"))
	newTransfers(ios[0]).run(c)
	var refused *nbd.Error
	if !errors.As(ios[0].Err, &refused) || ios[0].N != 0 {
		t.Errorf("refused: %d, %v", ios[0].N, ios[0].Err)
	}
}

// Done may start the next transfer, even where the socket is full in both directions.
func TestStartFromDone(t *testing.T) {
	t.Parallel()
	const chains, links, n = 100, 20, 256 << 10
	s, _ := serveMemory(t, mib)
	c := dial(t, s.options())
	var wg sync.WaitGroup
	for i := range chains {
		wg.Add(1)
		left := links
		io := &blk.IO{Op: blk.Op(i % 2), Vec: iov.Of(make([]byte, n)), Off: int64(i%4) * n}
		io.Done = func(io *blk.IO) {
			if io.N != n || io.Err != nil {
				t.Errorf("%d, %v", io.N, io.Err)
			}
			if left--; left == 0 {
				wg.Done()
				return
			}
			c.Start([]*blk.IO{io})
		}
		c.Start([]*blk.IO{io})
	}
	wg.Wait()
}

// Started transfers outlive the server as others do.
func TestStartedReconnect(t *testing.T) {
	t.Parallel()
	const workers, span = 8, 64 << 10
	r := newRestartable(t, workers*span)
	c := r.dial(timeout, true)
	var wg sync.WaitGroup
	var stop atomic.Bool
	var ops atomic.Int64
	for w := range workers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 6))
			for i := 0; !stop.Load() && !t.Failed(); i++ {
				want := noise(span, uint64(w*10000+i))
				got := make([]byte, span)
				var out, in []*blk.IO
				for at := 0; at < span; {
					n := min(1+rnd.IntN(16<<10), span-at)
					off := int64(w*span + at)
					out = append(out, &blk.IO{Op: blk.OpWrite, Vec: iov.Of(want[at : at+n]), Off: off})
					in = append(in, &blk.IO{Vec: iov.Of(got[at : at+n]), Off: off})
					at += n
				}
				newTransfers(out...).run(c)
				newTransfers(in...).run(c)
				for j := range out {
					if err := errors.Join(out[j].Err, in[j].Err); err != nil {
						t.Errorf("worker %d: %v", w, err)
					}
				}
				if !bytes.Equal(got, want) {
					t.Errorf("worker %d: read other bytes than were written", w)
				}
				ops.Add(int64(len(in)))
			}
		})
	}
	r.comeAndGo(&ops)
	stop.Store(true)
	wg.Wait()
}

// What is under way, and what waits to be sent, ends with the client, or with a connection that does not come back.
func TestStartedEnd(t *testing.T) {
	for _, tc := range []struct {
		name   string
		outage bool // there is no connection to begin with
		delay  time.Duration
		end    func(r *restartable, c *nbd.Client)
		want   error
	}{
		{"close", false, timeout, func(_ *restartable, c *nbd.Client) { c.Close() }, blk.ErrClosed},
		{"close during outage", true, timeout, func(_ *restartable, c *nbd.Client) { c.Close() }, blk.ErrClosed},
		{"loss", false, 0, func(r *restartable, _ *nbd.Client) { r.down() }, nbd.ErrLost},
		{"loss, later", false, 50 * time.Millisecond, func(r *restartable, _ *nbd.Client) { r.down() }, nbd.ErrLost},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRestartable(t, 4096)
			r.down()
			gate := make(chan struct{})
			r.m.gate = gate
			r.up()
			check := leaks(t)
			c := r.dial(tc.delay, false)
			ios := make([]*blk.IO, 600) // more than may be under way
			for i := range ios {
				ios[i] = &blk.IO{Vec: iov.Of(make([]byte, 100)), Off: int64(i)}
			}
			ts := newTransfers(ios...)
			if tc.outage {
				r.down()
			}
			ts.start(c)
			if !tc.outage {
				eventually(t, "some are under way", func() bool { return r.m.arrived.Load() > 10 })
			}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				tc.end(r, c) // a server waits for its disk
			}()
			<-ts.done
			close(gate)
			<-ended
			for i, io := range ios {
				if io.N != 0 || !errors.Is(io.Err, tc.want) {
					t.Errorf("transfer %d: %d, %v", i, io.N, io.Err)
				}
			}
			late := newTransfers(&blk.IO{Vec: iov.Of(make([]byte, 1))})
			late.run(c)
			if err := late.ios[0].Err; !errors.Is(err, tc.want) {
				t.Errorf("started later: %v", err)
			}
			c.Close()
			r.down()
			r.m.gate = nil
			r.up() // what was open at first
			check()
		})
	}
}

// A transfer that is started allocates nothing, here or in a Device.
func TestStartAllocations(t *testing.T) {
	s, _ := serveMemory(t, mib)
	c := dial(t, s.options())
	ios := make([]*blk.IO, 16)
	for i := range ios {
		ios[i] = &blk.IO{Op: blk.Op(i % 2), Vec: iov.Of(make([]byte, 4096)), Off: int64(i) * 4096}
	}
	for _, n := range []int{1, len(ios)} {
		ts := newTransfers(ios[:n]...)
		if got := testing.AllocsPerRun(500, func() { ts.run(c) }); got != 0 && !hosttest.Race {
			t.Errorf("%v allocations for %d transfers", got, n)
		}
	}
	for _, io := range ios {
		if io.Err != nil {
			t.Error(io.Err)
		}
	}
}

func BenchmarkSubmit(b *testing.B) {
	s, _ := serveMemory(b, 64*mib)
	for _, depth := range []int{1, 64} {
		for _, starter := range []bool{false, true} {
			b.Run(fmt.Sprintf("read 4 KiB, depth %d, starter %v", depth, starter), func(b *testing.B) {
				c := dial(b, s.options())
				backend := blk.Backend(c)
				if !starter {
					backend = struct{ blk.Backend }{c}
				}
				d := newDevice(b, backend, blk.Options{})
				batch := make([]*blk.Request, depth)
				var wg sync.WaitGroup
				for i := range batch {
					batch[i] = &blk.Request{Op: blk.OpRead, Off: int64(i) * 40960, Vec: iov.Of(make([]byte, 4096)),
						Done: func(*blk.Request) { wg.Done() }}
				}
				b.ReportAllocs()
				for b.Loop() {
					wg.Add(depth)
					d.Submit(b.Context(), batch)
					wg.Wait()
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*depth), "ns/request")
			})
		}
	}
}
