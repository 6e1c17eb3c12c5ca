package vmm

import (
	"errors"
	"slices"
	"testing"

	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/vmm/kvm"
)

var (
	errRoute = errors.New("route refused")
	errIRQFD = errors.New("eventfd refused")
)

// picky is an interrupt controller that, as KVM, takes a routing table as a whole or not at all. It refuses messages to
// one address.
type picky struct {
	interruptController
	refused uint64
	noIRQFD bool
	table   []kvm.Route
}

func (p *picky) SetRoutes(routes []kvm.Route) error {
	if slices.ContainsFunc(routes, func(r kvm.Route) bool { return r == kvm.MSIRoute(r.GSI, p.refused, r.U[2]) }) {
		return errRoute
	}
	p.table = slices.Clone(routes)
	return nil
}

func (p *picky) AssignIRQFD(int, uint32) error {
	if p.noIRQFD {
		return errIRQFD
	}
	return nil
}

func (p *picky) DeassignIRQFD(int, uint32) error { return nil }

// What is refused leaves no trace: every other message works on, and can be changed and removed.
func TestRefusedMSI(t *testing.T) {
	t.Parallel()
	const good, bad = 0xfee0_0000, 0xbad_0000_0000
	p := &picky{refused: bad}
	r, err := newInterrupts(p)
	if err != nil {
		t.Fatal(err)
	}
	ev, err := queue.NewEvent()
	if err != nil {
		t.Fatal(err)
	}
	defer ev.Close()
	var ids [2]int
	for i := range ids {
		if ids[i], err = r.addMSI(ev, good, uint32(i)); err != nil {
			t.Fatal(err)
		}
	}
	want := func(what string, data ...uint32) {
		t.Helper()
		routes := p.table[r.pins:]
		if !slices.Equal(p.table, r.routes) || len(routes) != len(data) {
			t.Fatalf("%s: the table is %v, KVM has %v", what, r.routes[r.pins:], routes)
		}
		for i, d := range data {
			if routes[i] != kvm.MSIRoute(uint32(ids[i]), good, d) {
				t.Errorf("%s: message %d is %v, want data %d", what, i, routes[i], d)
			}
		}
	}
	want("at first", 0, 1)

	if err := r.updateMSI(ids[0], bad, 7); !errors.Is(err, errRoute) {
		t.Errorf("changed to a bad address: %v", err)
	}
	want("after a refused change", 0, 1)
	if err := r.updateMSI(ids[1], good, 8); err != nil {
		t.Errorf("change of another message: %v", err)
	}
	want("after a change", 0, 8)

	if _, err := r.addMSI(ev, bad, 9); !errors.Is(err, errRoute) {
		t.Errorf("a message to a bad address: %v", err)
	}
	p.noIRQFD = true
	if _, err := r.addMSI(ev, good, 9); !errors.Is(err, errIRQFD) {
		t.Errorf("a message without an eventfd: %v", err)
	}
	p.noIRQFD = false
	want("after refused messages", 0, 8)

	if err := r.removeMSI(ids[1], ev); err != nil {
		t.Error(err)
	}
	want("after a removal", 0)
	if err := r.updateMSI(ids[1], good, 9); err == nil {
		t.Error("a message that was removed has been changed")
	}
}
