package blk

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvmlet/kvmlet/iov"
)

// submitter is the part of a Device that carries out requests which nobody waits for.
type submitter struct {
	mu     sync.Mutex
	plugs  int        // Plugs without their Unplug
	queued []*Request // what was submitted meanwhile
	closed bool

	handoff chan *Request // to a goroutine that has nothing to do
	idle    atomic.Int32  // goroutines that wait for handoff, or are about to
	closing chan struct{}
}

// maxIdle is how many goroutines a Device keeps for requests to come.
const maxIdle = 64

func (s *submitter) init() {
	s.handoff = make(chan *Request)
	s.closing = make(chan struct{})
}

// close has goroutines end, and returns what was held back.
func (s *submitter) close() []*Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	close(s.closing)
	queued := s.queued
	s.queued = nil
	return queued
}

// submitted is what a Request needs between Submit and Done.
type submitted struct {
	device  *Device
	ctx     context.Context
	began   time.Time
	order   int // place in its batch
	io      IO
	tracked tracked
	work    *work      // of a modify under way
	merged  *merged    // set for a request that stands for others
	next    *Request   // to be carried out when this one is done
	own     ownContext // ctx, where a goroutine of the Device's carries it out
}

// ownContext is the context of a request that a goroutine of the Device's carries out, and not one that called Do.
type ownContext struct{ context.Context }

func onOwnGoroutine(ctx context.Context) bool {
	_, ok := ctx.(*ownContext)
	return ok
}

// waiter waits for one transfer of a Starter.
type waiter struct {
	io    IO
	batch [1]*IO // &io
	done  chan struct{}
}

var waiters = sync.Pool{New: func() any {
	w := &waiter{done: make(chan struct{}, 1)}
	w.batch[0] = &w.io
	return w
}}

// call has the backend carry out one transfer. Whoever calls Do has come to wait, and gets the shortest way. A goroutine of
// the Device's own has the backend carry it out by itself, where that takes no thread while it waits.
func (d *Device) call(ctx context.Context, op Op, v iov.Vec, off int64) (int, error) {
	if d.can.threadless && onOwnGoroutine(ctx) {
		w := waiters.Get().(*waiter)
		w.io = IO{Op: op, Vec: v, Off: off, Done: waited, Owner: w}
		d.can.starter.Start(w.batch[:])
		<-w.done
		n, err := w.io.N, w.io.Err
		w.io = IO{}
		waiters.Put(w)
		return n, err
	}
	if op == OpRead {
		return d.backend.ReadVecAt(v, off)
	}
	return d.backend.WriteVecAt(v, off)
}

func waited(io *IO) { io.Owner.(*waiter).done <- struct{}{} }

// Submit begins every request of batch and returns without waiting for them; the Done of each tells when it is done. What
// Do says holds for each of them. Requests of a batch have no order among each other, except where writes overlap that
// are merged: then the later one stays. Submit does not keep batch.
//
// Reads and writes that lie side by side go to the backend as one. Where the backend can carry out transfers by itself
// (Starter) no goroutine is needed for a request that it can serve as it stands, and where that takes no thread either
// (Threadless), none for a write that changes parts of two blocks at most; others run on one of the Device's.
func (d *Device) Submit(ctx context.Context, batch []*Request) {
	now := time.Now()
	for _, r := range batch {
		r.submitted.device, r.submitted.ctx, r.submitted.began, r.submitted.next = d, ctx, now, nil
	}
	d.mu.Lock()
	if d.plugs > 0 && !d.closed {
		d.queued = append(d.queued, batch...)
		d.mu.Unlock()
		return
	}
	d.mu.Unlock()
	d.dispatch(batch)
}

// Plug holds back what is submitted, by anybody, until Unplug, so that requests which come one by one can be merged and
// begun in one go. Pairs may be nested.
func (d *Device) Plug() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.plugs++
}

// Unplug ends what Plug began. The last one begins all requests that were held back.
func (d *Device) Unplug() {
	d.mu.Lock()
	d.plugs--
	var queued []*Request
	if d.plugs == 0 {
		queued, d.queued = d.queued, nil
	}
	d.mu.Unlock()
	d.dispatch(queued)
}

// batch is the room that dispatch needs.
type batch struct {
	requests []*Request
	out      []*Request
	ios      []*IO
}

var batches = sync.Pool{New: func() any { return new(batch) }}

// dispatch begins requests: merged where they can be, by the backend itself where it can, else on a goroutine.
func (d *Device) dispatch(requests []*Request) {
	if len(requests) == 0 {
		return
	}
	b := batches.Get().(*batch)
	if len(requests) > 1 {
		requests = d.merge(b, requests)
	}
	for _, r := range requests {
		if d.canStart(r) {
			b.ios = append(b.ios, &r.submitted.io)
		} else {
			d.handOff(r)
		}
	}
	if len(b.ios) > 0 {
		d.can.starter.Start(b.ios)
	}
	b.put()
}

func (b *batch) put() {
	clear(b.requests)
	clear(b.out)
	clear(b.ios)
	b.requests, b.out, b.ios = b.requests[:0], b.out[:0], b.ios[:0]
	batches.Put(b)
}

// canStart takes r through the stages up to the backend, if it passes all of them without having to wait or to be changed.
func (d *Device) canStart(r *Request) bool {
	write := r.Op == OpWrite
	if d.can.starter == nil || d.can.observer != nil || r.Flags != 0 || r.Op > OpWrite ||
		write && (d.detect != DetectOff || d.through) || !d.gate.tryEnter() {
		return false
	}
	// What a drained section may change is looked at behind the gate.
	s := &r.submitted
	n := r.bytes()
	l := d.limits.Load()
	if d.throttle.Load() != nil || write && len(d.beforeWrite.all()) > 0 || !write && d.copiesOnRead(0) ||
		n == 0 || d.check(r, n) != nil || s.ctx.Err() != nil || !d.start(l, r, n) {
		d.gate.leave()
		return false
	}
	return true
}

// start sets up the first transfer of r, if one or two do it all and it need not wait for other requests.
func (d *Device) start(l *Limits, r *Request, n int64) bool {
	s := &r.submitted
	write := r.Op == OpWrite
	switch {
	case l.fits(r.Vec, r.Off, int(n)):
		if write && d.tracks(l) && !d.tracker.tryBegin(&s.tracked, r.Off, r.Off+n, false) {
			return false
		}
		s.io = IO{Op: r.Op, Vec: r.Vec, Off: r.Off, Done: startedDone, Owner: r}
		return true
	case write && d.can.threadless:
		return d.startModify(l, r, n)
	}
	return false
}

// startedDone ends a request that canStart let through.
func startedDone(io *IO) {
	r := io.Owner.(*Request)
	d := r.submitted.device
	n := r.bytes()
	var err error
	if r.Op == OpRead {
		err = d.readEnded(r.Vec, int(n), io.N, io.Err)
	} else {
		err = d.writeEnded(int(n), io.N, io.Err)
		d.changed(r.Off, n)
	}
	d.startedEnded(r, err)
}

// startedEnded ends r, all of whose transfers are done.
func (d *Device) startedEnded(r *Request, err error) {
	s := &r.submitted
	if r.Op == OpWrite && d.tracks(d.limits.Load()) {
		d.tracker.end(&s.tracked)
	}
	s.io.Vec, s.io.Owner = nil, nil
	d.complete(r, r.bytes(), err)
	d.gate.leave()
}

// startModify is modify for a write whose blocks are read at once, as those of most small ones are: no goroutine waits
// between the read and the write.
func (d *Device) startModify(l *Limits, r *Request, n int64) bool {
	s := &r.submitted
	start, end := l.down(r.Off), l.up(r.Off+n)
	size := int(end - start)
	if l.aligned(r.Off, n) || size > 2*l.RequestAlign || int64(size) > l.MaxTransfer ||
		!d.tracker.tryBegin(&s.tracked, start, end, true) {
		return false
	}
	w := getWork()
	w.one = w.one[:0].Append(w.pad.get(2*l.RequestAlign, max(l.RequestAlign, l.MemoryAlign))[:size])
	s.work = w
	s.io = IO{Op: OpRead, Vec: w.one, Off: start, Done: modifyRead, Owner: r}
	return true
}

// modifyRead changes the blocks that startModify had read and has them written.
func modifyRead(io *IO) {
	r := io.Owner.(*Request)
	s := &r.submitted
	d, block := s.device, s.work.one
	err := d.readEnded(block, block.Size(), io.N, io.Err)
	if err == nil {
		err = s.ctx.Err()
	}
	if err == nil {
		_, err = iov.Copy(block, int(r.Off-io.Off), r.Vec, 0, int(r.bytes()))
	}
	if err != nil {
		d.modifyEnded(r, err)
		return
	}
	s.io = IO{Op: OpWrite, Vec: block, Off: io.Off, Done: modifyWritten, Owner: r}
	b := batches.Get().(*batch)
	b.ios = append(b.ios, &s.io)
	d.can.starter.Start(b.ios)
	b.put()
}

func modifyWritten(io *IO) {
	r := io.Owner.(*Request)
	d := r.submitted.device
	err := d.writeEnded(io.Vec.Size(), io.N, io.Err)
	d.changed(r.Off, r.bytes())
	d.modifyEnded(r, err)
}

func (d *Device) modifyEnded(r *Request, err error) {
	w := r.submitted.work
	r.submitted.work = nil
	d.startedEnded(r, err)
	putWork(w)
}

// complete tells the owner of r that it is done.
func (d *Device) complete(r *Request, n int64, err error) {
	if m := r.submitted.merged; m != nil {
		m.complete(d, err)
		return
	}
	d.stats.ended(r.Op, n, r.submitted.began, err)
	r.Err = err
	r.Done(r)
}

// maxSlots is how many submitted requests the backend is called for at a time, other than by Start. Each call may take a
// thread, and how many requests there are is for guests to say.
const maxSlots = 64

// takeSlot waits until a submitted request may go to the backend. What it waits for otherwise comes before: no slot is held
// by one that waits for another.
func (d *Device) takeSlot(ctx context.Context) error {
	if !onOwnGoroutine(ctx) {
		return nil
	}
	select {
	case d.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *Device) leaveSlot(ctx context.Context) {
	if onOwnGoroutine(ctx) {
		<-d.slots
	}
}

// handOff gives r to a goroutine that has nothing to do, or to a new one.
func (d *Device) handOff(r *Request) {
	select {
	case d.handoff <- r:
	default:
		go d.serve(r)
	}
}

// serve carries out r, and then what is handed to it.
func (d *Device) serve(r *Request) {
	for {
		for r != nil {
			next := r.submitted.next
			d.doSubmitted(r)
			r = next
		}
		if d.idle.Add(1) > maxIdle {
			d.idle.Add(-1)
			return
		}
		select {
		case r = <-d.handoff:
			d.idle.Add(-1)
		case <-d.closing:
			return
		}
	}
}

// doSubmitted carries out r on this goroutine. What is submitted and done counts as under way until its Done has returned.
func (d *Device) doSubmitted(r *Request) {
	if err := d.gate.enter(r.submitted.ctx); err != nil {
		d.complete(r, 0, err)
		return
	}
	defer d.gate.leave()
	r.submitted.own.Context = r.submitted.ctx
	n, err := d.do(&r.submitted.own, r)
	d.complete(r, n, err)
}

// Bounds of what merge makes of several requests. Larger ones gain nothing, and several transfers go on side by side.
const (
	maxMergedBytes = 1 << 20
	maxMergedElems = iov.MaxElems
	maxMergedCount = 64
)

// merged is a request that stands for several.
type merged struct {
	request Request
	members []*Request // in the order of their offsets
}

var mergeds = sync.Pool{New: func() any { return new(merged) }}

// merge returns requests with those put together that touch. It is called before the gate: what does not pass its checks
// is left alone.
func (d *Device) merge(b *batch, requests []*Request) []*Request {
	for i, r := range requests {
		r.submitted.order = i
		b.requests = append(b.requests, r)
	}
	slices.SortFunc(b.requests, func(x, y *Request) int {
		return cmp.Or(cmp.Compare(x.Op, y.Op), cmp.Compare(x.Off, y.Off), cmp.Compare(x.submitted.order, y.submitted.order))
	})
	l := d.limits.Load()
	for rest := b.requests; len(rest) > 0; {
		n := d.run(l, rest)
		if n == 1 {
			b.out = append(b.out, rest[0])
		} else {
			b.out = append(b.out, d.newMerged(rest[:n]))
		}
		rest = rest[n:]
	}
	return b.out
}

// run returns how many requests at the front of sorted become one.
func (d *Device) run(l *Limits, sorted []*Request) int {
	first := sorted[0]
	if first.Op > OpWrite || first.Flags != 0 || d.check(first, first.bytes()) != nil {
		return 1
	}
	most := min(l.MaxTransfer, maxMergedBytes)
	end, elems := first.Off+first.bytes(), len(first.Vec)
	n := 1
	for ; n < min(len(sorted), maxMergedCount); n++ {
		r := sorted[n]
		size := r.bytes()
		elems += len(r.Vec)
		touches := r.Off == end || r.Op == OpWrite && r.Off < end
		if r.Op != first.Op || r.Flags != 0 || !touches || d.check(r, size) != nil ||
			max(end, r.Off+size)-first.Off > most || elems > min(l.MaxVec, maxMergedElems) ||
			r.submitted.ctx.Done() != first.submitted.ctx.Done() {
			break
		}
		end = max(end, r.Off+size)
	}
	return n
}

func (d *Device) newMerged(members []*Request) *Request {
	m := mergeds.Get().(*merged)
	m.members = append(m.members[:0], members...)
	first := members[0]
	m.request = Request{Op: first.Op, Off: first.Off, Vec: m.request.Vec[:0]}
	m.request.submitted = submitted{device: d, ctx: first.submitted.ctx, merged: m}
	if !m.join() {
		m.request.Vec = m.request.Vec[:0]
		m.overlay()
	}
	d.stats.kinds[first.Op].merged.Add(uint64(len(members) - 1))
	return &m.request
}

// join builds the vector of requests that lie end to end; it returns false if they don't.
func (m *merged) join() bool {
	end := m.request.Off
	for _, r := range m.members {
		if r.Off != end {
			return false
		}
		m.request.Vec = append(m.request.Vec, r.Vec...)
		end += r.bytes()
	}
	return true
}

// overlay builds the vector of writes that overlap: the one that was submitted last gives the bytes.
func (m *merged) overlay() {
	at := m.request.Off
	for {
		var from *Request
		stop := int64(-1) // where another member may take over
		for _, r := range m.members {
			end := r.Off + r.bytes()
			switch {
			case end <= at:
			case r.Off > at:
				if stop < 0 || r.Off < stop {
					stop = r.Off
				}
			default:
				if from == nil || r.submitted.order > from.submitted.order {
					from = r
				}
			}
		}
		if from == nil {
			return
		}
		if end := from.Off + from.bytes(); stop < 0 || end < stop {
			stop = end
		}
		// A slice of what is there: it can't fail.
		m.request.Vec, _ = from.Vec.AppendSlice(m.request.Vec, int(at-from.Off), int(stop-at))
		at = stop
	}
}

// complete ends all members. Where the whole failed, each is tried by itself and gets its own answer: one after the other,
// so that the bytes of the later one stay.
func (m *merged) complete(d *Device, err error) {
	if err == nil {
		for _, r := range m.members {
			d.complete(r, r.bytes(), nil)
		}
	} else {
		slices.SortFunc(m.members, func(x, y *Request) int { return cmp.Compare(x.submitted.order, y.submitted.order) })
		for i, r := range m.members[1:] {
			m.members[i].submitted.next = r
		}
		d.handOff(m.members[0])
	}
	clear(m.members)
	mergeds.Put(m)
}
