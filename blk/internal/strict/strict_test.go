package strict

import (
	"errors"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// TestNoLimits checks that the zero Limits allow everything within the disk; blk/mem tests the others.
func TestNoLimits(t *testing.T) {
	var l blk.Limits
	b := make([]byte, 1000)
	v := iov.Of(b[1:3], b[5:6], nil)
	if err := errors.Join(Transfer(l, 1000, 7, v), Discard(l, 1000, 1, 999), Zero(l, 1000, 999, 1), Range(l, 1000, 3, 5)); err != nil {
		t.Error(err)
	}
	for _, err := range []error{
		Transfer(l, 1000, 998, v), Transfer(l, 1000, -1, v), Transfer(l, 1000, 1<<62, v), Transfer(l, 1000, 0, nil),
		Discard(l, 1000, 1000, 1), Zero(l, 1000, 0, 1001), Range(l, 1000, 0, 0), Range(l, 1000, 5, 1<<63-1),
	} {
		if !errors.Is(err, Err) {
			t.Errorf("error %v, want one about limits", err)
		}
	}
}
