package qcow2

import (
	"context"
	"sync"

	"github.com/kvmlet/kvmlet/blk"
)

// started is a transfer that was passed on to the file.
type started struct {
	request blk.Request
	done    func(*blk.Request) // the method value, made once
	im      *Image
	io      *blk.IO
	slot    uint32 // of its generation
}

var (
	starteds = sync.Pool{New: func() any { return new(started) }}
	batches  = sync.Pool{New: func() any { return new([]*blk.Request) }}
)

// Start implements blk.Starter. A transfer of data that has its place, which memory knows, goes to the file as it is; for
// any other there is a goroutine.
func (im *Image) Start(batch []*blk.IO) {
	b := batches.Get().(*[]*blk.Request)
	for _, io := range batch {
		if r := im.pass(io); r != nil {
			*b = append(*b, r)
		} else {
			go im.serve(io)
		}
	}
	if len(*b) > 0 {
		im.f.Submit(context.Background(), *b)
	}
	clear(*b)
	*b = (*b)[:0]
	batches.Put(b)
}

// pass returns the request to the file that io comes to, nil where it is not as simple as that.
func (im *Image) pass(io *blk.IO) *blk.Request {
	write := io.Op == blk.OpWrite
	n := int64(io.Vec.Size())
	if n == 0 || write && (!im.ready.Load() || im.broken.Load()) || !im.ops.TryRLock() {
		return nil
	}
	slot := im.gen.enter()
	im.mu.Lock()
	x, ok := im.peek(io.Off, n)
	im.mu.Unlock()
	if !ok || x.kind != normal || x.n != n || x.host+n > im.f.length.Load() || write && (!x.copied || !im.clear(x)) {
		im.end(slot)
		return nil
	}
	s := starteds.Get().(*started)
	if s.done == nil {
		s.done = s.passed
	}
	s.request = blk.Request{Op: io.Op, Vec: io.Vec, Off: x.host, Done: s.done}
	s.im, s.io, s.slot = im, io, slot
	return &s.request
}

// clear reports whether no metadata lies where x does.
func (im *Image) clear(x extent) bool {
	first := x.host &^ (im.cluster - 1)
	return !im.meta.has(first, im.clusters(x.host+x.n-first))
}

// passed ends a transfer that pass began.
func (s *started) passed(r *blk.Request) {
	io, n, err := s.io, r.Vec.Size(), r.Err
	s.im.end(s.slot)
	s.request, s.im, s.io = blk.Request{}, nil, nil
	starteds.Put(s)
	io.N, io.Err = n, err
	if err != nil {
		io.N = 0
	}
	io.Done(io)
}

// serve carries out a transfer as if it had come one by one.
func (im *Image) serve(io *blk.IO) {
	io.Transfer(im)
	io.Done(io)
}
