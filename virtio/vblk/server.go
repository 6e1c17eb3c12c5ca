package vblk

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// server serves one queue. One goroutine at a time has the turn: it takes requests off the queue, parses them, and sends
// what there is for the disk off in batches. Whoever tells that a request is done returns it to the driver.
//
// Where the disk answers sooner than a second goroutine would get to work, the one that has the turn carries a request out
// by itself. It finds out by trying. If such a request takes long for once, the turn passes to another goroutine, so that
// no request holds up those behind it for more than a moment.
type server struct {
	dev       *Device
	queue     *queue.Queue
	index     int
	transport virtio.Transport
	ctx       context.Context // ends with the activation

	// underway counts what Reset waits for: requests that were sent off, the goroutine that has the turn, those that have
	// lost it but not ended, and the timer.
	underway sync.WaitGroup

	mu   sync.Mutex
	free []*request // no more than were in flight at once, which the queue's size bounds

	// turn is odd while the one that has the turn carries out a request, and grows with each.
	turn  atomic.Uint64
	timer *time.Timer // looks at turn now and then
	armed atomic.Bool
	seen  uint64 // turn when the timer last fired; the timer's own

	// What follows belongs to the one that has the turn.
	spare  *request
	batch  []*blk.Request
	silent int // requests carried out since the driver was notified
	pace
}

const (
	// passSize is how many requests are taken before those among them which were held back are sent off and the driver is
	// notified.
	passSize = 64

	// notifySize is how many requests are carried out on the spot before the driver is notified. A driver that is woken for
	// each finds one each time, which costs both sides more than the requests do.
	notifySize = 16

	// patience is how long it may take to carry out a request so that it is not worth another goroutine's while.
	patience = 20 * time.Microsecond

	// shortSize is the most bytes in such a request. Copying more takes two CPUs less time than one.
	shortSize = 64 << 10

	// watchTime is how often the timer looks whether the turn is held up.
	watchTime = time.Millisecond

	// sampleSize is how many requests of a fast disk there are for each that is timed.
	sampleSize = 8

	// minPause and maxPause bound the number of requests to send off before trying again whether the disk is fast.
	minPause = 16
	maxPause = 4096
)

// pace is what is known of how fast the disk answers. Clocks cost, so of a fast one only some requests are timed.
type pace struct {
	fast  bool
	doubt bool // the last that was timed took long
	skip  int  // requests of a fast disk until the next that is timed
	wait  int  // requests of a slow one until the next try
	pause int  // what wait begins with
	timed bool
	began time.Time
}

// try reports whether the next request should be carried out on the spot, which begins then.
func (p *pace) try() bool {
	if !p.fast && p.wait > 0 {
		p.wait--
		return false
	}
	p.timed = !p.fast || p.skip == 0
	if p.timed {
		p.began = time.Now()
	} else {
		p.skip--
	}
	return true
}

// done takes note that a request has been carried out.
func (p *pace) done() {
	if p.timed {
		p.took(time.Since(p.began))
	}
}

// took takes note of how long that took. A fast disk is given a second chance: the host may have had other things to do.
func (p *pace) took(t time.Duration) {
	switch {
	case t < patience:
		*p = pace{fast: true, skip: sampleSize - 1}
	case p.fast && !p.doubt:
		p.doubt = true
	default:
		*p = pace{pause: min(max(2*p.pause, minPause), maxPause)}
		p.wait = p.pause
	}
}

func startServer(ctx context.Context, d *Device, q *queue.Queue, index int, t virtio.Transport) *server {
	s := &server{dev: d, queue: q, index: index, transport: t, ctx: ctx}
	s.timer = time.AfterFunc(time.Hour, s.look)
	s.timer.Stop()
	s.underway.Go(s.serve)
	return s
}

// stop ends the server, once the activation's context has ended: when it returns no request is under way.
func (s *server) stop() {
	if s.timer.Stop() {
		s.underway.Done()
	}
	s.underway.Wait()
}

// serve has the turn until it loses it or the queue is stopped: by Reset, or by pass because it is broken.
func (s *server) serve() {
	for s.queue.Wait() == nil {
		if !s.pass() {
			return
		}
	}
}

// pass takes the requests that are there, up to a number. It returns false if the turn has passed to another goroutine.
func (s *server) pass() bool {
	for range passSize {
		r := s.take()
		ok, err := s.queue.Pop(&r.chain)
		if !ok {
			s.spare = r
			if err != nil {
				s.queue.Stop()
				s.transport.NeedsReset()
			}
			break
		}
		switch {
		case !s.dev.begin(r):
			s.finish(r)
			s.spare = r
		case s.short(r) && s.try():
			s.sendOff() // what is held back must not wait for this one
			if !s.carryOut(r) {
				return false
			}
		default:
			s.batch = append(s.batch, &r.part)
		}
	}
	s.sendOff()
	s.notify()
	s.silent = 0
	return true
}

// take returns a request that is not in use.
func (s *server) take() *request {
	if r := s.spare; r != nil {
		s.spare = nil
		return r
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.free); n > 0 {
		r := s.free[n-1]
		s.free = s.free[:n-1]
		return r
	}
	r := new(request)
	r.batch[0] = &r.part
	r.part.Done = func(*blk.Request) { s.partDone(r) }
	return r
}

// release gives back what take returned.
func (s *server) release(r *request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free = append(s.free, r)
}

// short reports whether r may be over soon: a flush, for one, takes its time on the fastest disk.
func (s *server) short(r *request) bool {
	return r.part.Op <= blk.OpWrite && r.part.Flags == 0 && r.size <= shortSize
}

// sendOff gives the disk what is held back.
func (s *server) sendOff() {
	if len(s.batch) == 0 {
		return
	}
	s.underway.Add(len(s.batch))
	s.dev.disk.Submit(s.ctx, s.batch)
	clear(s.batch)
	s.batch = s.batch[:0]
}

// carryOut carries out r on the spot. It returns false if that took so long that the turn has passed to another goroutine.
func (s *server) carryOut(r *request) bool {
	turn := s.turn.Add(1)
	s.watch()
	for s.dev.advance(r, s.dev.disk.Do(s.ctx, &r.part)) {
	}
	mine := s.turn.CompareAndSwap(turn, turn+1)
	s.finish(r)
	if !mine {
		s.notify()
		s.release(r)
		return false
	}
	if s.silent++; s.silent == notifySize {
		s.notify()
		s.silent = 0
	}
	s.spare = r
	s.done()
	return true
}

// partDone is told by the disk that it is done with a part of r that was sent off.
func (s *server) partDone(r *request) {
	if s.dev.advance(r, r.part.Err) {
		s.dev.disk.Submit(s.ctx, r.batch[:])
		return
	}
	s.finish(r)
	s.notify()
	s.release(r)
	s.underway.Done()
}

// finish returns a request to the driver.
func (s *server) finish(r *request) {
	if r.answer != nil {
		r.answer[0] = r.status
	}
	if int(r.written) < r.room {
		// The status byte is the last one, and a read that failed may have changed any before it.
		r.chain.Touched()
	}
	s.queue.Push(&r.chain, r.written)
}

// notify tells the driver of requests that were returned, unless it said that it will look by itself.
func (s *server) notify() {
	if s.queue.ShouldNotify() && s.transport.NotifyQueue(s.index) != nil {
		s.dev.lost.Add(1)
	}
}

// watch sees to it that the timer runs: the count of turn was changed before.
func (s *server) watch() {
	if !s.armed.Load() && s.armed.CompareAndSwap(false, true) {
		s.underway.Add(1)
		s.timer.Reset(watchTime)
	}
}

// look is called by the timer. Where the same request has been carried out since the last time, it takes the turn. Where
// nothing has happened, the timer has nothing to do until watch is called again.
func (s *server) look() {
	defer s.underway.Done()
	turn := s.turn.Load()
	held, idle := turn == s.seen && turn%2 != 0, turn == s.seen && turn%2 == 0
	s.seen = turn
	if held && s.ctx.Err() == nil && s.turn.CompareAndSwap(turn, turn+1) {
		s.armed.Store(false)
		s.pace = pace{wait: minPause}
		s.notify() // what the last owner of the turn has not got to
		s.serve()
		return
	}
	s.armed.Store(false)
	// Whoever has changed turn by now may have found the timer armed; whoever does so later arms it.
	if !idle && s.ctx.Err() == nil || s.turn.Load() != turn {
		s.watch()
	}
}
