package nbd

import "github.com/kvmlet/kvmlet/blk"

// starter is the part of a Client that carries out transfers for which nobody waits. Client.mu guards it.
type starter struct {
	first, last *request // to be sent, in this order
	sending     bool     // a goroutine does that
	send        func()   // what it runs: a method value, made once
}

// Start implements blk.Starter. A goroutine that lives as long as there are transfers to send sends them, and the one that
// receives answers ends them; so no number of transfers takes more than these two. A connection that is lost means for
// them what it means for those that somebody waits for.
func (c *Client) Start(batch []*blk.IO) {
	e := c.export.Load()
	most := e.limits().MaxTransfer
	var first, last *request
	for _, io := range batch {
		n := int64(io.Vec.Size())
		cmd := uint16(cmdRead)
		if io.Op == blk.OpWrite {
			cmd = cmdWrite
		}
		if n == 0 || n > most || io.Off < 0 || e.inside(io.Off, n) < n || cmd == cmdWrite && e.has(flagReadOnly) {
			go c.alone(io) // refused, or more than one request; a Device sends few of these
			continue
		}
		r := getRequest(cmd, 0, io.Off, n)
		r.vec, r.io = io.Vec, io
		if last == nil {
			first = r
		} else {
			last.next = r
		}
		last = r
	}
	if first != nil {
		c.enqueue(first, last)
	}
}

func (c *Client) alone(io *blk.IO) {
	io.Transfer(c)
	io.Done(io)
}

// enqueue has requests sent that were started, from first to last. It does not wait.
func (c *Client) enqueue(first, last *request) {
	c.mu.Lock()
	if err := c.fatal; err != nil { // Close may be waiting for the goroutines already
		c.mu.Unlock()
		for r := first; r != nil; {
			next := r.next
			r.complete(err)
			r = next
		}
		return
	}
	defer c.mu.Unlock()
	s := &c.starter
	if s.last == nil {
		s.first = first
	} else {
		s.last.next = first
	}
	s.last = last
	if !s.sending {
		s.sending = true
		c.ends.Add(1)
		go s.send()
	}
}

// dequeue returns the next request to send. Nil means that there is none, and that the goroutine which asks has to end.
func (c *Client) dequeue() *request {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &c.starter
	r := s.first
	if r == nil {
		s.sending = false
		return nil
	}
	if s.first = r.next; s.first == nil {
		s.last = nil
	}
	r.next = nil
	return r
}

// sendStarted sends what is queued.
func (c *Client) sendStarted() {
	defer c.ends.Done()
	for r := c.dequeue(); r != nil; r = c.dequeue() {
		cn, err := c.connected()
		if err != nil {
			r.complete(err)
			continue
		}
		r.users.Store(2)
		if !cn.begin(r) {
			r.err = errLost
			c.ended(r)
			continue
		}
		cn.letGo(r)
	}
}

// letGo is called for a started request by the goroutine that has sent it, and by the one that has received its answer or
// lost the connection. Whoever comes last ends it: until then its memory is in use.
func (cn *conn) letGo(r *request) {
	if r.users.Add(-1) > 0 {
		return
	}
	cn.free <- r.slot
	cn.c.ended(r)
}

// ended ends a started request, or has it sent again, as do does for others.
func (c *Client) ended(r *request) {
	err := r.err
	if err == errLost {
		if err = c.mayRepeat(r); err == nil {
			c.enqueue(r, r)
			return
		}
	}
	r.complete(err)
}

// complete tells the owner of a started request that it is done.
func (r *request) complete(err error) {
	io := r.io
	io.N, io.Err = int(r.n), err
	if err != nil {
		io.N = 0
	}
	putBack(r)
	io.Done(io)
}
