package acpi

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"
)

const testBase = 0xe0000

// testConfig is a machine as kvmlet builds it.
func testConfig(cpus int) Config {
	c := Config{
		LocalAPIC: 0xfee00000,
		IOAPIC:    0xfec00000,
		PCI:       PCI{ECAM: 0xe0000000, Low: Window{0xc0000000, 0x20000000}},
		PM:        PM{Event: 0x600, Control: 0x604, Timer: 0x608, SCI: 9, SleepOff: 5},
		ResetPort: 0xcf9, ResetValue: 6,
		Serial:  []Legacy{{0x3f8, 4}, {0x2f8, 3}},
		RTC:     Legacy{0x70, 8},
		Century: 0x32,
		Pvpanic: 0x505,
	}
	for i := range cpus {
		c.APICIDs = append(c.APICIDs, uint32(i))
	}
	return c
}

// parsed is the tables found from the RSDP, each with its signature and every checksum verified.
type parsed map[string][]byte

func parse(t *testing.T, image []byte, base, rsdp uint64) parsed {
	t.Helper()
	at := func(addr uint64, n int) []byte {
		if addr < base || addr+uint64(n) > base+uint64(len(image)) {
			t.Fatalf("%d bytes at %#x lie outside the tables", n, addr)
		}
		return image[addr-base:][:n]
	}
	sum := func(what string, b []byte) []byte {
		if checksum(b) != 0 {
			t.Errorf("%s: checksum is off by %#x", what, checksum(b))
		}
		return b
	}
	p := parsed{}
	get := func(addr uint64) string {
		h := at(addr, 8)
		name := string(h[:4])
		p[name] = at(addr, int(le.Uint32(h[4:])))
		if name != "FACS" {
			sum(name, p[name])
			if string(p[name][10:16]) != "KVMLET" {
				t.Errorf("%s: OEM %q", name, p[name][10:16])
			}
		}
		return name
	}
	r := at(rsdp, 36)
	if string(r[:8]) != "RSD PTR " || rsdp%16 != 0 || r[15] != 2 || le.Uint32(r[20:]) != 36 {
		t.Fatalf("RSDP at %#x: %x", rsdp, r)
	}
	sum("RSDP's first part", r[:20])
	p["RSDP"] = sum("RSDP", r)
	if name := get(le.Uint64(r[24:])); name != "XSDT" {
		t.Fatalf("RSDP leads to %s", name)
	}
	for list := p["XSDT"][36:]; len(list) > 0; list = list[8:] {
		get(le.Uint64(list))
	}
	fadt := p["FACP"]
	get(uint64(le.Uint32(fadt[36:])))
	get(uint64(le.Uint32(fadt[40:])))
	if facs := le.Uint32(fadt[36:]); facs%64 != 0 {
		t.Errorf("FACS at %#x", facs)
	}
	return p
}

func build(t *testing.T, c Config) parsed {
	t.Helper()
	image, rsdp, err := Build(testBase, c)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, image, testBase, rsdp)
}

func TestBuild(t *testing.T) {
	t.Parallel()
	p := build(t, testConfig(2))
	for _, name := range []string{"RSDP", "XSDT", "FACP", "FACS", "DSDT", "APIC", "MCFG"} {
		if p[name] == nil {
			t.Errorf("no %s", name)
		}
	}
	if len(p) != 7 {
		t.Errorf("%d tables", len(p))
	}
	a, _, _ := Build(testBase, testConfig(2))
	b, _, _ := Build(testBase, testConfig(2))
	if !bytes.Equal(a, b) {
		t.Error("two builds differ")
	}
}

// TestFADT reads the fields back at the offsets of ACPI 6.4, table 5.9.
func TestFADT(t *testing.T) {
	t.Parallel()
	f := build(t, testConfig(1))["FACP"]
	if len(f) != 276 || f[8] != 6 || f[131] != 4 {
		t.Fatalf("%d bytes, revision %d.%d", len(f), f[8], f[131])
	}
	for _, w := range []struct {
		what     string
		at, size int
		want     uint64
	}{
		{"preferred profile", 45, 1, 0},
		{"SCI", 46, 2, 9},
		{"SMI command", 48, 4, 0},
		{"ACPI enable", 52, 1, 0},
		{"PM1a events", 56, 4, 0x600},
		{"PM1b events", 60, 4, 0},
		{"PM1a control", 64, 4, 0x604},
		{"PM timer", 76, 4, 0x608},
		{"GPE0", 80, 4, 0},
		{"event length", 88, 1, 4},
		{"control length", 89, 1, 2},
		{"timer length", 91, 1, 4},
		{"GPE0 length", 92, 1, 0},
		{"C2 latency", 96, 2, 0xffff},
		{"C3 latency", 98, 2, 0xffff},
		{"century", 108, 1, 0x32},
		{"boot architecture", 109, 2, 0x05},
		{"flags", 112, 4, 0x565},
		{"reset register", 116, 4, 0x00000801},
		{"reset address", 120, 8, 0xcf9},
		{"reset value", 128, 1, 6},
		{"X events", 148, 4, 0x00002001},
		{"X events address", 152, 8, 0x600},
		{"X control", 172, 4, 0x00001001},
		{"X control address", 176, 8, 0x604},
		{"X timer", 208, 4, 0x00002001},
		{"X timer address", 212, 8, 0x608},
		{"X DSDT", 140, 8, uint64(le.Uint32(f[40:]))},
	} {
		var v [8]byte
		copy(v[:], f[w.at:w.at+w.size])
		if got := le.Uint64(v[:]); got != w.want {
			t.Errorf("%s: got %#x, want %#x", w.what, got, w.want)
		}
	}

	c := testConfig(1)
	c.RTC, c.ResetPort = Legacy{}, 0
	f = build(t, c)["FACP"]
	if boot, flags := le.Uint16(f[109:]), le.Uint32(f[112:]); boot != 0x25 || flags != 0x165 {
		t.Errorf("without RTC and reset: boot architecture %#x, flags %#x", boot, flags)
	}
}

func TestMADT(t *testing.T) {
	t.Parallel()
	common := []string{
		"010c0000" + "0000c0fe" + "00000000", // I/O APIC
		"020a0000" + "02000000" + "0000",     // IRQ 0
		"020a0009" + "09000000" + "0d00",     // SCI
		"0406ff000001",                       // NMI
	}
	for _, tc := range []struct {
		ids  []uint32
		cpus []string
		nmi  []string
	}{
		{[]uint32{0}, []string{"0008000001000000"}, nil},
		{[]uint32{0, 2, 254}, []string{"0008000001000000", "0008010201000000", "000802fe01000000"}, nil},
		{[]uint32{0, 255, 0x1000}, []string{
			"0008000001000000",
			"09100000" + "ff000000" + "01000000" + "01000000",
			"09100000" + "00100000" + "01000000" + "02000000",
		}, []string{"0a0c0000" + "ffffffff" + "01000000"}},
	} {
		c := testConfig(0)
		c.APICIDs = tc.ids
		m := build(t, c)["APIC"]
		if m[8] != 5 || le.Uint32(m[36:]) != 0xfee00000 || le.Uint32(m[40:]) != 1 {
			t.Errorf("revision %d, %x", m[8], m[36:44])
		}
		var got []string
		for e := m[44:]; len(e) > 0; e = e[e[1]:] {
			if len(e) < 2 || e[1] < 2 || int(e[1]) > len(e) {
				t.Fatalf("entry %x", e)
			}
			got = append(got, fmt.Sprintf("%x", e[:e[1]]))
		}
		want := slices.Concat(tc.cpus, common, tc.nmi)
		if !slices.Equal(got, want) {
			t.Errorf("ids %d:\n got %q\nwant %q", tc.ids, got, want)
		}
	}
	// 254 processors fit into the small entries, UID 255 does not.
	m := build(t, func() Config {
		c := testConfig(0)
		for i := range uint32(300) {
			c.APICIDs = append(c.APICIDs, i)
		}
		return c
	}())["APIC"]
	small, large := 0, 0
	for e := m[44:]; len(e) > 0; e = e[e[1]:] {
		switch e[0] {
		case madtLocalAPIC:
			small++
		case madtLocalX2APIC:
			large++
		}
	}
	if small != 255 || large != 45 {
		t.Errorf("%d small, %d large entries", small, large)
	}
}

func TestMCFG(t *testing.T) {
	t.Parallel()
	c := testConfig(1)
	c.PCI.LastBus = 3
	if got, want := fmt.Sprintf("%x", build(t, c)["MCFG"][36:]),
		"0000000000000000"+"000000e000000000"+"0000"+"00"+"03"+"00000000"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestRejects(t *testing.T) {
	t.Parallel()
	for what, spoil := range map[string]func(*Config){
		"no CPU":           func(c *Config) { c.APICIDs = nil },
		"too many CPUs":    func(c *Config) { c.APICIDs = make([]uint32, MaxCPUs+1) },
		"duplicate id":     func(c *Config) { c.APICIDs = []uint32{1, 1} },
		"reserved id":      func(c *Config) { c.APICIDs = []uint32{0xffffffff} },
		"ECAM alignment":   func(c *Config) { c.PCI.ECAM++ },
		"ECAM end":         func(c *Config) { c.PCI.LastBus = 255; c.PCI.ECAM = 0xf8000000 },
		"no window":        func(c *Config) { c.PCI.Low = Window{} },
		"window end":       func(c *Config) { c.PCI.Low.Size = 1 << 31 },
		"window wraps":     func(c *Config) { c.PCI.Low.Size = ^uint64(0) },
		"high window low":  func(c *Config) { c.PCI.High = Window{1 << 31, 1 << 30} },
		"high window ends": func(c *Config) { c.PCI.High = Window{1 << 63, 1<<63 + 1} },
		"SCI":              func(c *Config) { c.PM.SCI = 16 },
		"SCI cascade":      func(c *Config) { c.PM.SCI = 2 },
		"sleep type":       func(c *Config) { c.PM.SleepOff = 8 },
		"RTC's interrupt":  func(c *Config) { c.RTC.IRQ = 16 },
		"COM's interrupt":  func(c *Config) { c.Serial[0].IRQ = 16 },
		"serial ports":     func(c *Config) { c.Serial = make([]Legacy, 10) },
	} {
		c := testConfig(1)
		spoil(&c)
		if _, _, err := Build(testBase, c); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: ACPI: %v", what, err)
		}
		if _, err := BuildMPTable(0xf0000, c); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: MP table: %v", what, err)
		}
	}
	for _, base := range []uint64{0xe0020, 1<<32 - 64, 1 << 32} {
		if _, _, err := Build(base, testConfig(1)); !errors.Is(err, ErrConfig) {
			t.Errorf("ACPI at %#x: %v", base, err)
		}
	}
	for _, base := range []uint64{0xf0008, 1<<32 - 16} {
		if _, err := BuildMPTable(base, testConfig(1)); !errors.Is(err, ErrConfig) {
			t.Errorf("MP table at %#x: %v", base, err)
		}
	}
}

// TestFits checks that the tables of the largest usual machine stay in the 64 KiB that the layout gives each.
func TestFits(t *testing.T) {
	t.Parallel()
	c := testConfig(255)
	if b, _, err := Build(testBase, c); err != nil || len(b) > 64<<10 {
		t.Errorf("ACPI: %d bytes, %v", len(b), err)
	}
	if b, err := BuildMPTable(0xf0000, c); err != nil || len(b) > 64<<10 {
		t.Errorf("MP table: %d bytes, %v", len(b), err)
	}
}

// TestDSDTNames looks for what must be there, and not there, in the encoded devices. What it all means to an interpreter
// is TestIASL's.
func TestDSDTNames(t *testing.T) {
	t.Parallel()
	full := build(t, testConfig(2))["DSDT"]
	for _, name := range []string{"PCI0", "MBRD", "COM1", "COM2", "RTC_", "PEVT", "C000", "C001", `\_S5_`, "QEMU0001"} {
		if !bytes.Contains(full, []byte(name)) {
			t.Errorf("no %s", name)
		}
	}
	c := testConfig(1)
	c.Serial, c.RTC, c.Pvpanic = []Legacy{{}, {0x2f8, 3}}, Legacy{}, 0
	bare := build(t, c)["DSDT"]
	for _, name := range []string{"COM1", "RTC_", "PEVT", "C001"} {
		if bytes.Contains(bare, []byte(name)) {
			t.Errorf("%s without being asked for", name)
		}
	}
	if !bytes.Contains(bare, []byte("COM2")) {
		t.Error("no COM2")
	}
	if full[8] != 2 {
		t.Errorf("revision %d", full[8])
	}
}
