package net

import (
	"errors"
	"io"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
)

func TestComplete(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ in, want Features }{
		{0, 0},
		{Offloads, Offloads},
		{CSum | HostTSO4 | HostECN, CSum | HostTSO4 | HostECN},
		{HostTSO4 | HostTSO6 | HostECN | GuestCSum, GuestCSum},
		{CSum | HostECN | GuestTSO6 | GuestECN, CSum},
		{GuestCSum | GuestTSO6 | GuestECN, GuestCSum | GuestTSO6 | GuestECN},
	} {
		if got := c.in.Complete(); got != c.want {
			t.Errorf("%#x: %#x, want %#x", uint64(c.in), uint64(got), uint64(c.want))
		}
	}
}

// TestHeaderLayout pins struct virtio_net_hdr byte by byte.
func TestHeaderLayout(t *testing.T) {
	t.Parallel()
	h := Header{
		Flags: 0x01, GSOType: 0x02, HdrLen: 0x0403, GSOSize: 0x0605, CSumStart: 0x0807, CSumOffset: 0x0a09, NumBuffers: 0x0c0b,
	}
	for _, n := range []int{ShortHeaderLen, HeaderLen} {
		b := make([]byte, n)
		h.Put(b)
		for i := range b {
			if b[i] != byte(i+1) {
				t.Errorf("length %d: byte %d is %#x", n, i, b[i])
			}
		}
		want := h
		if n == ShortHeaderLen {
			want.NumBuffers = 0
		}
		if got, err := ParseHeader(b); err != nil || got != want {
			t.Errorf("%+v, %v", got, err)
		}
	}
	for _, n := range []int{0, 1, 9, 11, 13} {
		if _, err := ParseHeader(make([]byte, n)); !errors.Is(err, ErrHeader) {
			t.Errorf("length %d: %v", n, err)
		}
	}
}

func TestCheckFromGuest(t *testing.T) {
	t.Parallel()
	const n = 100
	csum := Header{Flags: FlagNeedsCSum, CSumStart: 34, CSumOffset: 16}
	with := func(change func(*Header)) Header {
		h := csum
		change(&h)
		return h
	}
	tso := func(typ uint8) Header { return with(func(h *Header) { h.GSOType, h.GSOSize = typ, 10 }) }
	for name, c := range map[string]struct {
		h  Header
		f  Features
		ok bool
	}{
		"plain":                  {Header{}, 0, true},
		"hint only":              {Header{HdrLen: 0xffff, GSOSize: 0xffff, CSumStart: 0xffff}, 0, true},
		"checksum":               {csum, CSum, true},
		"checksum, not agreed":   {csum, Offloads &^ CSum, false},
		"checksum at the end":    {with(func(h *Header) { h.CSumStart = n - 18 }), CSum, true},
		"checksum past the end":  {with(func(h *Header) { h.CSumStart = n - 17 }), CSum, false},
		"checksum overflows":     {with(func(h *Header) { h.CSumStart, h.CSumOffset = 0xffff, 0xffff }), CSum, false},
		"TSO4":                   {tso(GSOTCPv4), CSum | HostTSO4, true},
		"TSO4, not agreed":       {tso(GSOTCPv4), CSum | HostTSO6, false},
		"TSO6":                   {tso(GSOTCPv6), CSum | HostTSO6, true},
		"TSO6, not agreed":       {tso(GSOTCPv6), CSum | HostTSO4, false},
		"TSO and ECN":            {tso(GSOTCPv4 | GSOECN), CSum | HostTSO4 | HostECN, true},
		"ECN, not agreed":        {tso(GSOTCPv4 | GSOECN), CSum | HostTSO4, false},
		"ECN alone":              {tso(GSOECN), Offloads, false},
		"UFO":                    {tso(3), Offloads, false},
		"unknown type":           {tso(0x7f), Offloads, false},
		"segments of size 0":     {with(func(h *Header) { h.GSOType = GSOTCPv4 }), Offloads, false},
		"TSO without a checksum": {Header{GSOType: GSOTCPv4, GSOSize: 10}, Offloads, false},
	} {
		err := c.h.CheckFromGuest(c.f, n)
		if (err == nil) != c.ok || (err != nil && !errors.Is(err, ErrHeader)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzHeader(f *testing.F) {
	f.Add(make([]byte, HeaderLen), uint64(Offloads), 60)
	f.Add([]byte{1, 0x81, 54, 0, 10, 0, 34, 0, 16, 0, 1, 0}, uint64(Offloads), 100)
	f.Add([]byte{1, 4, 54, 0, 10, 0, 0xff, 0xff, 0xff, 0xff}, uint64(CSum|HostTSO6), 100)
	f.Fuzz(func(t *testing.T, b []byte, features uint64, n int) {
		h, err := ParseHeader(b)
		if err != nil {
			return
		}
		again := make([]byte, len(b))
		h.Put(again)
		if string(again) != string(b) {
			t.Errorf("% x became % x", b, again)
		}
		if h.CheckFromGuest(Features(features), n) == nil && h.Flags&FlagNeedsCSum != 0 &&
			int(h.CSumStart)+int(h.CSumOffset)+2 > n {
			t.Error("a checksum outside the frame passed")
		}
	})
}

func TestMAC(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"52:54:00:12:34:56", "02:00:00:00:00:01", "fe:ff:ff:ff:ff:ff"} {
		if m, err := ParseMAC(s); err != nil || m.String() != s {
			t.Errorf("%s: %v, %v", s, m, err)
		}
	}
	if m, err := ParseMAC("FE:AB:CD:EF:01:23"); err != nil || m != (MAC{0xfe, 0xab, 0xcd, 0xef, 0x01, 0x23}) {
		t.Errorf("%v, %v", m, err)
	}
	for _, s := range []string{
		"", "52", "52:54:00:12:34", "52:54:00:12:34:56:78", "52-54-00-12-34-56", "5254:0:12:34:567", "52:54:00:12:34:5g",
		"00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "52:54:00:12:34:5\xff", ":::::::::::::::::",
	} {
		if _, err := ParseMAC(s); !errors.Is(err, ErrMAC) {
			t.Errorf("%q: %v", s, err)
		}
	}
	seen := map[MAC]bool{}
	for range 100 {
		m := RandomMAC()
		if m.Check() != nil || m[0]&2 == 0 || seen[m] {
			t.Errorf("random address %v", m)
		}
		seen[m] = true
	}
}

func TestSpec(t *testing.T) {
	t.Parallel()
	s, err := ParseSpec("tap=vm0,hostip=10.0.0.1/24,existing,note=a=b")
	if err != nil || s.Kind != "tap" || s.Name != "vm0" {
		t.Fatalf("%+v, %v", s, err)
	}
	for _, c := range []struct {
		option, value string
		ok            bool
	}{{"hostip", "10.0.0.1/24", true}, {"hostip", "", false}, {"existing", "", true}, {"note", "a=b", true}, {"mac", "", false}} {
		if value, ok := s.Take(c.option); value != c.value || ok != c.ok {
			t.Errorf("%s: %q, %v", c.option, value, ok)
		}
	}
	if err := s.Unknown(); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "=vm0", ",a=b", "tap=a,", "tap=a,,b", "tap=a,=b", "tap=a,x=1,x=2"} {
		if _, err := ParseSpec(bad); !errors.Is(err, ErrSpec) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestRegistry(t *testing.T) {
	t.Parallel()
	var opened *Spec
	r := Registry{
		"fake": func(s *Spec) (Backend, error) { opened = s; return nil, errors.Join(s.Unknown(), io.EOF) },
		"also": nil,
	}
	s, _ := ParseSpec("fake=x,b=1,a")
	if _, err := r.Open(s); !errors.Is(err, io.EOF) || !errors.Is(err, ErrSpec) || !strings.Contains(err.Error(), "a, b") {
		t.Errorf("%v", err)
	}
	if !reflect.DeepEqual(opened, s) {
		t.Errorf("%+v", opened)
	}
	s, _ = ParseSpec("tpa=x")
	if _, err := r.Open(s); !errors.Is(err, ErrSpec) || !strings.Contains(err.Error(), "also, fake") {
		t.Errorf("%v", err)
	}
}

func BenchmarkCheckFromGuest(b *testing.B) {
	buf := []byte{1, 1, 54, 0, byte(1 + rand.IntN(9)), 0, 34, 0, 16, 0, 1, 0}
	b.ReportAllocs()
	for b.Loop() {
		h, _ := ParseHeader(buf)
		if err := h.CheckFromGuest(Offloads, 1514); err != nil {
			b.Fatal(err)
		}
	}
}
