package blk

import (
	"context"
	"sync"
	"sync/atomic"
)

// gate counts the requests that are under way and keeps new ones out while it is shut. A request costs it one atomic
// addition on the way in and one on the way out.
type gate struct {
	state atomic.Int64 // requests inside, plus gateShut while it is shut

	mu      sync.Mutex
	shuts   int           // sections that keep it shut
	alone   chan struct{} // closed when the section ends that excludes all others; nil when there is none
	closed  bool          // for good
	empty   chan struct{} // closed when the last request leaves a shut gate; nil when nobody waits for that
	reopens chan struct{} // closed when the gate opens again
}

const gateShut = 1 << 62

// enter lets a request in, or waits until the gate is open. Errors: ErrClosed, and those of ctx.
func (g *gate) enter(ctx context.Context) error {
	for !g.tryEnter() {
		g.mu.Lock()
		closed, shut, reopens := g.closed, g.shuts > 0, g.reopens
		g.mu.Unlock()
		switch {
		case closed:
			return ErrClosed
		case shut:
			select {
			case <-reopens:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}

// tryEnter lets a request in if the gate is open.
func (g *gate) tryEnter() bool {
	if g.state.Add(1)&gateShut == 0 {
		return true
	}
	g.leave()
	return false
}

// leave ends what enter began.
func (g *gate) leave() {
	if g.state.Add(-1) != gateShut {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.empty != nil && g.state.Load() == gateShut {
		close(g.empty)
		g.empty = nil
	}
}

// shut keeps new requests out and waits until none is inside. It must be undone by open, but not after an error.
func (g *gate) shut(ctx context.Context) error { return g.section(ctx, false) }

// shutAlone is shut for a section in which there is no other: it waits until those before have ended, and those that come
// later, as close does, wait until it has.
func (g *gate) shutAlone(ctx context.Context) error { return g.section(ctx, true) }

func (g *gate) section(ctx context.Context, alone bool) error {
	g.mu.Lock()
	for g.closed || g.alone != nil || alone && g.shuts > 0 {
		if g.closed {
			g.mu.Unlock()
			return ErrClosed
		}
		over := g.reopens // a section that is alone ends with the gate open
		g.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
			return ctx.Err()
		}
		g.mu.Lock()
	}
	if g.shuts++; g.shuts == 1 {
		g.reopens = make(chan struct{})
		g.state.Add(gateShut)
	}
	if alone {
		g.alone = make(chan struct{})
	}
	empty := g.awaitEmpty()
	g.mu.Unlock()
	if empty == nil {
		return nil
	}
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		g.open()
		return ctx.Err()
	}
}

// awaitEmpty returns a channel that tells when no request is inside any more, nil if so already. The caller holds mu.
func (g *gate) awaitEmpty() <-chan struct{} {
	if g.empty == nil && g.state.Load() != gateShut {
		g.empty = make(chan struct{}) // whoever leaves takes mu before it looks here
	}
	return g.empty
}

// open undoes one shut or shutAlone.
func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.alone != nil {
		close(g.alone)
		g.alone = nil
	}
	if g.shuts--; g.shuts == 0 && !g.closed {
		g.state.Add(-gateShut)
		g.empty = nil // nobody waits for it any more
		close(g.reopens)
	}
}

// close refuses requests and sections from now on, those that wait included, and waits until no request is inside and no
// section is alone. It returns false if the gate was closed before.
func (g *gate) close() bool {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return false
	}
	g.closed = true
	if g.shuts == 0 {
		g.state.Add(gateShut)
	} else {
		close(g.reopens)
	}
	empty, alone := g.awaitEmpty(), g.alone
	g.mu.Unlock()
	if empty != nil {
		<-empty
	}
	if alone != nil {
		<-alone
	}
	return true
}
