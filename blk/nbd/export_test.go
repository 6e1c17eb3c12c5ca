package nbd

// What tests build messages from.
var (
	BE             = be
	AppendOption   = appendOption
	AppendOptReply = appendOptReply
	AppendString   = appendString
	PutRequest     = putRequest
	PutSimple      = putSimple
	PutStructured  = putStructured
)

// Coverage is the part of a read that has come.
type Coverage struct{ c coverage }

// Add notes a chunk.
func (c *Coverage) Add(off, n int64) bool { return c.c.add(off, n) }

// All reports whether everything is there.
func (c *Coverage) All(n int64) bool { return c.c.all(n) }

// Any reports whether anything is.
func (c *Coverage) Any() bool { return c.c.any() }

// Answered returns how many requests of the present connection have ended.
func (c *Client) Answered() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cur == nil {
		return 0
	}
	return int(c.cur.answered.Load())
}
