package bus

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

// register answers everywhere with its tag and remembers the last write.
type register struct {
	tag     byte
	reads   []uint64
	written []byte
	deaf    bool
}

func (r *register) ReadPort(port uint16, p []byte) {
	r.reads = append(r.reads, uint64(port))
	for i := range p {
		p[i] = r.tag
	}
}
func (r *register) WritePort(_ uint16, p []byte) { r.written = append(r.written, p...) }

func (r *register) ReadMMIO(addr uint64, p []byte) bool {
	if !r.deaf {
		r.ReadPort(uint16(addr), p)
	}
	return !r.deaf
}

func (r *register) WriteMMIO(_ uint64, p []byte) bool {
	r.WritePort(0, p)
	return !r.deaf
}

func TestPorts(t *testing.T) {
	t.Parallel()
	var b Ports
	low, high := &register{tag: 1}, &register{tag: 2}
	if err := errors.Join(b.Add(0x60, 1, low), b.Add(0xFFFF, 1, high), b.Add(0x64, 2, low)); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []struct{ first, n int }{{0x60, 1}, {0x5F, 2}, {0x65, 4}} {
		if err := b.Add(uint16(bad.first), bad.n, high); !errors.Is(err, ErrConflict) {
			t.Errorf("Add(%#x, %d) = %v, want ErrConflict", bad.first, bad.n, err)
		}
	}
	if b.Add(0xFFFF, 2, high) == nil || b.Add(0, 0, high) == nil {
		t.Error("a range outside the bus was accepted")
	}

	p := []byte{0, 0}
	b.Access(0xFFFF, 2, false, p)
	if !bytes.Equal(p, []byte{2, 2}) {
		t.Errorf("read %x", p)
	}
	b.Access(0x70, 1, false, p)
	if !bytes.Equal(p, []byte{0xFF, 0xFF}) || b.Unhandled() != 2 {
		t.Errorf("nobody's port read %x, %d unhandled", p, b.Unhandled())
	}
	// REP OUTSB: four units, one access each.
	b.Access(0x60, 1, true, []byte("boot"))
	if string(low.written) != "boot" {
		t.Errorf("string output arrived as %q", low.written)
	}
	b.Access(0x60, 4, true, []byte{1, 2, 3}) // shorter than one unit: ignored
	b.Access(0x60, 0, true, []byte{1, 2, 3})
	if string(low.written) != "boot" {
		t.Errorf("a malformed access reached the device")
	}
}

func TestMemory(t *testing.T) {
	t.Parallel()
	var b Memory
	one, two := &register{tag: 1}, &register{tag: 2}
	if err := errors.Join(b.Add(0x3000, 0x1000, two), b.Add(0x1000, 0x1000, one), b.Add(^uint64(0), 1, one)); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []struct{ addr, n uint64 }{{0x1FFF, 1}, {0, 0x1001}, {0x2000, 0x1001}, {0, 1 << 63}} {
		if err := b.Add(bad.addr, bad.n, two); !errors.Is(err, ErrConflict) {
			t.Errorf("Add(%#x, %#x) = %v, want ErrConflict", bad.addr, bad.n, err)
		}
	}
	if b.Add(0x9000, 0, one) == nil || b.Add(^uint64(0), 2, one) == nil {
		t.Error("a range outside the bus was accepted")
	}

	cases := []struct {
		addr uint64
		n    int
		want uint64
	}{
		{0x1000, 4, 0x01010101},
		{0x1FFC, 4, 0x01010101},
		{0x3FF8, 8, 0x0202020202020202},
		{^uint64(0), 1, 1},
		{0x1FFD, 4, 0xFFFFFFFF}, // crosses the end
		{0x2000, 1, 0xFF},
		{0, 1, 0xFF},
		{^uint64(0), 2, 0xFFFF},
	}
	for _, c := range cases {
		p := make([]byte, 8)
		b.Access(c.addr, false, p[:c.n])
		if got := binary.LittleEndian.Uint64(p); got != c.want {
			t.Errorf("read of %d bytes at %#x = %#x, want %#x", c.n, c.addr, got, c.want)
		}
	}
	before := b.Unhandled()
	one.deaf = true
	b.Access(0x1000, true, []byte{7})
	if b.Unhandled() != before+1 {
		t.Error("a write that the device refused was not counted")
	}
}

func TestAccessDoesNotAllocate(t *testing.T) {
	var ports Ports
	var memory Memory
	r := &silent{}
	if err := errors.Join(ports.Add(0x3F8, 8, r), memory.Add(0x1000, 0x1000, r)); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4)
	if n := testing.AllocsPerRun(100, func() {
		ports.Access(0x3F8, 1, true, p[:1])
		memory.Access(0x1004, false, p)
	}); n != 0 {
		t.Errorf("%v allocations per access", n)
	}
}

type silent struct{}

func (*silent) ReadPort(uint16, []byte)       {}
func (*silent) WritePort(uint16, []byte)      {}
func (*silent) ReadMMIO(uint64, []byte) bool  { return true }
func (*silent) WriteMMIO(uint64, []byte) bool { return true }
