package acpi

import "testing"

// mpEntries cuts the table's entries apart: 20 bytes for a processor, 8 for all others.
func mpEntries(t *testing.T, b []byte) [][]byte {
	t.Helper()
	var list [][]byte
	for len(b) > 0 {
		size := 8
		if b[0] == mpProcessor {
			size = 20
		}
		if len(b) < size {
			t.Fatalf("entry %x is cut short", b)
		}
		list = append(list, b[:size])
		b = b[size:]
	}
	return list
}

func TestMPTable(t *testing.T) {
	t.Parallel()
	c := testConfig(0)
	c.APICIDs = []uint32{0, 1, 254, 255}
	c.IOAPICID = 5
	const base = 0xf0000
	b, err := BuildMPTable(base, c)
	if err != nil {
		t.Fatal(err)
	}
	p, h := b[:16], b[16:]
	if string(p[:4]) != "_MP_" || le.Uint32(p[4:]) != base+16 || p[8] != 1 || p[9] != 4 || checksum(p) != 0 {
		t.Errorf("floating pointer %x", p)
	}
	if string(h[:4]) != "PCMP" || int(le.Uint16(h[4:])) != len(h) || h[6] != 4 || checksum(h) != 0 ||
		le.Uint32(h[36:]) != 0xfee00000 || le.Uint16(h[40:]) != 0 {
		t.Errorf("header %x", h[:44])
	}

	type source struct{ kind, bus, irq byte }
	pins := map[source]byte{}
	processors, last := 0, byte(0)
	list := mpEntries(t, h[44:])
	for _, e := range list {
		if e[0] < last {
			t.Errorf("entry %x comes after type %d", e, last)
		}
		last = e[0]
		switch e[0] {
		case mpProcessor:
			want := byte(mpEnabled)
			if processors == 0 {
				want |= mpBoot
			}
			if e[1] != byte(c.APICIDs[processors]) || e[2] != 0x14 || e[3] != want {
				t.Errorf("processor %x", e)
			}
			processors++
		case mpBus:
			if want := [...]string{"PCI   ", "ISA   "}[e[1]]; string(e[2:]) != want {
				t.Errorf("bus %x", e)
			}
		case mpIOAPIC:
			if e[1] != 5 || e[2] != 0x11 || e[3] != 1 || le.Uint32(e[4:]) != 0xfec00000 {
				t.Errorf("I/O APIC %x", e)
			}
		case mpInterrupt:
			want := uint16(0)
			if e[4] == mpBusISA && e[5] == c.PM.SCI {
				want = levelHigh
			}
			if le.Uint16(e[2:]) != want || e[6] != 5 {
				t.Errorf("interrupt %x", e)
			}
			pins[source{e[1], e[4], e[5]}] = e[7]
		case mpLocal:
			if e[6] != 0xff || e[7] != map[byte]byte{mpExtINT: 0, mpNMI: 1}[e[1]] {
				t.Errorf("local interrupt %x", e)
			}
		default:
			t.Errorf("entry %x", e)
		}
	}
	if len(list) != int(le.Uint16(h[34:])) {
		t.Errorf("%d entries, the header says %d", len(list), le.Uint16(h[34:]))
	}
	if processors != 3 {
		t.Errorf("%d processors, want the 3 whose id fits", processors)
	}
	if want := 15 + 31*4; len(pins) != want {
		t.Errorf("%d interrupt sources, want %d", len(pins), want)
	}
	for s, want := range map[source]byte{
		{mpINT, mpBusISA, 0}:         2,
		{mpINT, mpBusISA, 4}:         4,
		{mpINT, mpBusISA, 15}:        15,
		{mpINT, mpBusPCI, 1 << 2}:    17,
		{mpINT, mpBusPCI, 1<<2 | 3}:  20,
		{mpINT, mpBusPCI, 31 << 2}:   23,
		{mpINT, mpBusPCI, 31<<2 | 1}: 16,
	} {
		if got, ok := pins[s]; !ok || got != want {
			t.Errorf("source %+v goes to pin %d (%v), want %d", s, got, ok, want)
		}
	}
}

func TestINTx(t *testing.T) {
	t.Parallel()
	for slot := range uint8(Slots) {
		seen := map[uint32]bool{}
		for pin := range uint8(4) {
			gsi := INTx(slot, pin)
			if gsi < 16 || gsi > 23 || seen[gsi] {
				t.Errorf("slot %d, pin %d: GSI %d", slot, pin, gsi)
			}
			seen[gsi] = true
		}
	}
}
