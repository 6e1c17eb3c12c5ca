package vnet

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/net/tap"
	"github.com/kvmlet/kvmlet/net/tap/taptest"
)

// TestTap has the driver ping the host through a real tap device, with few buffers and across resets.
func TestTap(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	c, e := tapCard(t)
	seq := uint16(0)
	for _, want := range ringModes {
		c.start(want)
		for range 300 {
			seq++
			size := int(seq) % 1473
			c.send(none, e.Request(seq, size))
			for found := false; !found; {
				for c.rx.InFlight() < 3 {
					c.post(600)
				}
				_, f, _ := c.take() // the host's network stack sends frames of its own
				found = e.IsReply(f, seq, size)
			}
		}
		c.reset()
	}
	if s := c.dev.Stats(); s.TxFrames != 600 || s.RxFrames < 600 || s.TxRefused != 0 {
		t.Errorf("%+v", s)
	}
}

// tapCard returns a card on the tap vm0 of this namespace, and what its driver needs to talk to the host behind it.
func tapCard(t *testing.T) (*card, taptest.Echo) {
	t.Helper()
	host := netip.MustParsePrefix("10.9.0.1/24")
	b, err := tap.Open("vm0", tap.Options{HostAddr: host})
	if err != nil {
		t.Fatal(err)
	}
	c := &card{tb: t, dev: newDevice(t, b, Options{MTU: b.MTU()})}
	link, err := netlink.LinkByName("vm0")
	if err != nil {
		t.Fatal(err)
	}
	e := taptest.Echo{
		GuestMAC: c.dev.MAC(), HostMAC: net.MAC(link.Attrs().HardwareAddr),
		GuestIP: [4]byte{10, 9, 0, 2}, HostIP: host.Addr().As4(),
	}
	if err := netlink.NeighSet(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: e.GuestIP[:], HardwareAddr: e.GuestMAC[:],
	}); err != nil {
		t.Fatal(err)
	}
	return c, e
}
