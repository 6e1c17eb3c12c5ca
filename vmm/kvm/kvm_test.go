package kvm

import (
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"
)

// TestAfter cancels a call before it begins, and one that goes on.
func TestAfter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		after(time.Second, func() { t.Error("called though cancelled") })()
		time.Sleep(2 * time.Second)

		ended := false
		cancel := after(time.Second, func() {
			time.Sleep(time.Minute)
			ended = true
		})
		time.Sleep(2 * time.Second)
		cancel()
		if !ended {
			t.Error("the cancelled call still goes on")
		}
	})
}

func TestRoutingTable(t *testing.T) {
	t.Parallel()
	table := routingTable([]Route{ChipRoute(3, ChipIOAPIC, 7), MSIRoute(24, 0x1_FEE0_1000, 0x51)})
	if len(table) != 8+2*48 {
		t.Fatalf("two routes take %d bytes", len(table))
	}
	for off, want := range map[int]uint32{
		0: 2, 4: 0,
		8: 3, 12: routeIRQChip, 24: ChipIOAPIC, 28: 7,
		56: 24, 60: routeMSI, 72: 0xFEE0_1000, 76: 1, 80: 0x51,
	} {
		if got := binary.LittleEndian.Uint32(table[off:]); got != want {
			t.Errorf("at %d is %#x, want %#x", off, got, want)
		}
	}
	if n := len(routingTable(nil)); n != 8 {
		t.Errorf("no routes take %d bytes", n)
	}
}
