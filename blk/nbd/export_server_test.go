package nbd

import (
	"github.com/kvmlet/kvmlet/blk"
)

// Allocation translates as the server does.
func Allocation(f blk.StatusFlags) uint32 { return allocation(f) }

// Memory returns how many bytes of buffers all connections have, and how many connections wait for one.
func (s *Server) Memory() (used int64, waiting int) {
	b := &s.memory
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used, len(b.queue)
}
