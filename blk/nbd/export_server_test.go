package nbd

import (
	"github.com/kvmlet/kvmlet/blk"
)

// Allocation translates as the server does.
func Allocation(f blk.StatusFlags) uint32 { return allocation(f) }
