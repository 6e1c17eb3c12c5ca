package nbd

import (
	"errors"
	"fmt"
	"time"
)

// Pauses between attempts to connect anew. The first attempt follows the loss at once, unless the lost connection did
// not answer a single request.
const (
	firstBackoff = 20 * time.Millisecond
	maxBackoff   = 2 * time.Second
)

// outage is the time without a connection, the present or the last one.
type outage struct {
	id      uint64
	since   time.Time
	cause   error         // why the connection was lost, or why the last attempt failed
	expired bool          // requests don't wait any more
	backoff time.Duration // the next pause; 0 before the first attempt
}

// broadcast wakes those who wait for a change. The caller holds c.mu.
func (c *Client) broadcast() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// connected returns the connection. While there is none it waits, as long as Options.ReconnectDelay allows.
func (c *Client) connected() (*conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.fatal != nil:
			return nil, c.fatal
		case c.cur != nil:
			return c.cur, nil
		case c.outage.expired:
			return nil, c.givenUp()
		}
		changed := c.changed
		c.mu.Unlock()
		<-changed
		c.mu.Lock()
	}
}

// mayRepeat says whether r, whose connection was lost, is to be sent again. A request on which every connection breaks
// ends too.
func (c *Client) mayRepeat(r *request) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.fatal != nil:
		return c.fatal
	case c.o.ReconnectDelay <= 0:
		return c.givenUp()
	case r.firstLost.IsZero():
		r.firstLost = time.Now()
	case time.Since(r.firstLost) > c.o.ReconnectDelay:
		return c.givenUp()
	}
	return nil
}

// givenUp builds the error for a request without a connection. The caller holds c.mu.
func (c *Client) givenUp() error {
	ago := time.Since(c.outage.since).Round(time.Millisecond)
	return fmt.Errorf("%w %v ago: %s: %w", ErrLost, ago, c.o.String(), c.outage.cause)
}

// lost notes that cn has ended, and why. Requests of cn are ended after it.
func (c *Client) lost(cn *conn, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cn.unflushed() && !c.o.WritesSurvive {
		c.losses++
	}
	if c.cur != cn || c.fatal != nil {
		return // closed, or replaced
	}
	c.cur = nil
	backoff := time.Duration(0)
	if cn.answered.Load() == 0 {
		backoff = max(c.outage.backoff, firstBackoff)
	}
	c.outage = outage{id: c.outage.id + 1, since: time.Now(), cause: err, backoff: backoff, expired: c.o.ReconnectDelay <= 0}
	if errors.Is(err, ErrProtocol) {
		c.fatal = fmt.Errorf("nbd: %s: %w", c.o.String(), err)
	} else {
		c.ends.Go(c.redial)
	}
	c.broadcast()
}

// redial connects anew, until that succeeds or the Client is closed.
func (c *Client) redial() {
	c.mu.Lock()
	id, pause := c.outage.id, c.outage.backoff
	c.mu.Unlock()
	if c.o.ReconnectDelay > 0 {
		defer time.AfterFunc(c.o.ReconnectDelay, func() { c.expire(id) }).Stop()
	}
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-time.After(pause):
		}
		if c.reconnect(max(firstBackoff, min(2*pause, maxBackoff))) {
			return
		}
		pause = max(firstBackoff, min(2*pause, maxBackoff))
	}
}

// reconnect makes one attempt. next is the pause after it.
func (c *Client) reconnect(next time.Duration) (done bool) {
	l, e, err := connect(c.ctx, &c.o)
	if err == nil && !e.same(c.export.Load()) {
		err = fmt.Errorf("%w: %s; before: %s", ErrChanged, e.describe(), c.export.Load().describe())
		l.Close()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.outage.backoff = next
	if err != nil {
		if c.cur == nil {
			c.outage.cause = err
		}
		return c.cur != nil
	}
	if c.fatal != nil || c.cur != nil { // closed, or refreshed meanwhile
		l.Close()
		return true
	}
	c.cur = c.start(l, e)
	c.broadcast()
	return true
}

// expire ends the waiting for a connection that was lost in outage id.
func (c *Client) expire(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cur == nil && c.outage.id == id {
		c.outage.expired = true
		c.broadcast()
	}
}
