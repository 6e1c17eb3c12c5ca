package vmm

import (
	"testing"

	"github.com/kvmlet/kvmlet/net"
)

// link is a network backend whose host side has an MTU.
type link struct {
	net.Backend
	mtu int
}

func (l link) MTU() int { return l.mtu }

// TestGuestMTU says nothing of the usual MTU, nor of what virtio cannot say.
func TestGuestMTU(t *testing.T) {
	t.Parallel()
	var plain struct{ net.Backend }
	if got := guestMTU(plain); got != 0 {
		t.Errorf("a backend without an MTU has %d", got)
	}
	for mtu, want := range map[int]int{1500: 0, 1499: 1499, 9000: 9000, 65521: 65521, 68: 68, 67: 0, 0: 0} {
		if got := guestMTU(link{mtu: mtu}); got != want {
			t.Errorf("the driver of a device with MTU %d is told %d, want %d", mtu, got, want)
		}
	}
}
