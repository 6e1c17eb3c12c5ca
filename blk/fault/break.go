package fault

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/kvmlet/kvmlet/blk"
)

// points are the breakpoints of a Disk, and the requests that they hold.
type points struct {
	mu      sync.Mutex
	set     []point
	stopped []*stop
	changed chan struct{} // closed, and replaced, when a request was stopped
	events  map[blk.Event]int
}

type point struct {
	event blk.Event
	tag   string
}

// stop is a request that a breakpoint holds.
type stop struct {
	tag    string
	resume chan struct{}
}

func (p *points) init() {
	p.changed = make(chan struct{})
	p.events = make(map[blk.Event]int)
}

// Break stops the next request that comes to event, until Resume(tag). Each call stops one request. The Disk must have
// been made with Options.Observe.
func (d *Disk) Break(event blk.Event, tag string) {
	p := &d.points
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set = append(p.set, point{event, tag})
}

// Wait returns when a request is stopped at a breakpoint with this tag, or with ctx's error.
func (d *Disk) Wait(ctx context.Context, tag string) error {
	p := &d.points
	for {
		p.mu.Lock()
		stopped, changed := p.holds(tag), p.changed
		p.mu.Unlock()
		if stopped {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("no request came to breakpoint %q: %w", tag, ctx.Err())
		}
	}
}

// Stopped reports whether a request is stopped at a breakpoint with this tag.
func (d *Disk) Stopped(tag string) bool {
	d.points.mu.Lock()
	defer d.points.mu.Unlock()
	return d.points.holds(tag)
}

// Resume lets the requests go on that are stopped with this tag, and returns how many there were.
func (d *Disk) Resume(tag string) int {
	p := &d.points
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.stopped)
	p.release(func(t string) bool { return t == tag })
	return n - len(p.stopped)
}

// Remove removes the breakpoints with this tag and lets the requests go on that they hold.
func (d *Disk) Remove(tag string) {
	p := &d.points
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set = slices.DeleteFunc(p.set, func(b point) bool { return b.tag == tag })
	p.release(func(t string) bool { return t == tag })
}

// Events returns how often a request came to e.
func (d *Disk) Events(e blk.Event) int {
	d.points.mu.Lock()
	defer d.points.mu.Unlock()
	return d.points.events[e]
}

// Observing implements blk.Observer.
func (d *Disk) Observing() bool {
	if i, ok := d.inner.(blk.Observer); ok && i.Observing() {
		return true
	}
	return d.o.Observe
}

// Event implements blk.Observer. It waits at a breakpoint.
func (d *Disk) Event(e blk.Event) {
	if i, ok := d.inner.(blk.Observer); ok && i.Observing() {
		i.Event(e)
	}
	if s := d.points.reach(e); s != nil {
		<-s.resume
	}
}

// reach counts e and returns what the request has to wait for, or nil.
func (p *points) reach(e blk.Event) *stop {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.events[e]++
	i := slices.IndexFunc(p.set, func(b point) bool { return b.event == e })
	if i < 0 {
		return nil
	}
	s := &stop{tag: p.set[i].tag, resume: make(chan struct{})}
	p.set = slices.Delete(p.set, i, i+1)
	p.stopped = append(p.stopped, s)
	close(p.changed)
	p.changed = make(chan struct{})
	return s
}

func (p *points) holds(tag string) bool {
	return slices.ContainsFunc(p.stopped, func(s *stop) bool { return s.tag == tag })
}

// release lets go on what is stopped with a tag that match wants.
func (p *points) release(match func(tag string) bool) {
	p.stopped = slices.DeleteFunc(p.stopped, func(s *stop) bool {
		if !match(s.tag) {
			return false
		}
		close(s.resume)
		return true
	})
}

func (p *points) removeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set = nil
	p.release(func(string) bool { return true })
}
