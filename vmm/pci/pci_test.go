package pci

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

const ecam = 0xE000_0000

// memoryFunction is 4 KiB of plain bytes as configuration space and one page of device memory.
type memoryFunction struct {
	config [ConfigSize]byte
	bar    uint64
	device [4096]byte
}

func (f *memoryFunction) ReadConfig(p []byte, off int)  { copy(p, f.config[off:]) }
func (f *memoryFunction) WriteConfig(p []byte, off int) { copy(f.config[off:], p) }
func (f *memoryFunction) ReadMMIO(addr uint64, p []byte) bool {
	if addr-f.bar >= 4096 {
		return false
	}
	copy(p, f.device[addr-f.bar:])
	return true
}

func (f *memoryFunction) WriteMMIO(addr uint64, p []byte) bool {
	if addr-f.bar >= 4096 {
		return false
	}
	copy(f.device[addr-f.bar:], p)
	return true
}

func outl(h *Host, port uint16, v uint32) {
	p := make([]byte, 4)
	binary.LittleEndian.PutUint32(p, v)
	h.WritePort(port, p)
}

func in(h *Host, port uint16, n int) []byte {
	p := make([]byte, n)
	h.ReadPort(port, p)
	return p
}

func TestConfigThroughPorts(t *testing.T) {
	t.Parallel()
	h := NewHost(ecam)
	f := &memoryFunction{bar: 0xC000_0000}
	slot, err := h.Add(f)
	if err != nil || slot != 1 {
		t.Fatalf("Add = %d, %v", slot, err)
	}

	address := uint32(1<<31 | 1<<11 | 0x40)
	outl(h, AddressPort, address)
	if got := binary.LittleEndian.Uint32(in(h, AddressPort, 4)); got != address {
		t.Errorf("CONFIG_ADDRESS reads %#x", got)
	}
	outl(h, DataPort, 0x11223344)
	h.WritePort(DataPort+1, []byte{0xAA})
	if got := binary.LittleEndian.Uint32(in(h, DataPort, 4)); got != 0x1122AA44 {
		t.Errorf("register 0x40 reads %#x", got)
	}
	if got := in(h, DataPort+2, 2); !bytes.Equal(got, []byte{0x22, 0x11}) {
		t.Errorf("its upper half reads %x", got)
	}

	// Nothing answers: enable bit clear, another bus, another function, an empty slot.
	for _, a := range []uint32{0x40 | 1<<11, address | 1<<16, address | 1<<8, 1<<31 | 5<<11} {
		outl(h, AddressPort, a)
		if got := in(h, DataPort, 4); !bytes.Equal(got, []byte{0xFF, 0xFF, 0xFF, 0xFF}) {
			t.Errorf("address %#x reads %x", a, got)
		}
		outl(h, DataPort, 0)
	}
	if got := binary.LittleEndian.Uint32(f.config[0x40:]); got != 0x1122AA44 {
		t.Errorf("a write to nobody changed the function: %#x", got)
	}
	// Byte accesses near CONFIG_ADDRESS are not for it.
	h.WritePort(AddressPort, []byte{1})
	if got := binary.LittleEndian.Uint32(in(h, AddressPort, 4)); got != 1<<31|5<<11 {
		t.Errorf("a byte write changed CONFIG_ADDRESS to %#x", got)
	}
}

func TestHostBridge(t *testing.T) {
	t.Parallel()
	h := NewHost(ecam)
	outl(h, AddressPort, 1<<31|8)
	if got := in(h, DataPort, 4); got[3] != 6 || got[2] != 0 {
		t.Errorf("class of slot 0 is %x, want a host bridge", got)
	}
	outl(h, DataPort, 0)
	p := make([]byte, 4)
	if !h.ReadMMIO(ecam+0x100, p) || !bytes.Equal(p, make([]byte, 4)) {
		t.Errorf("the bridge's extended space reads %x", p)
	}
}

func TestECAM(t *testing.T) {
	t.Parallel()
	h := NewHost(ecam)
	f := &memoryFunction{bar: 0xC000_0000}
	if _, err := h.Add(f); err != nil {
		t.Fatal(err)
	}
	at := uint64(ecam + 1<<15 + 0xFFC)
	if !h.WriteMMIO(at, []byte{1, 2, 3, 4}) || !bytes.Equal(f.config[0xFFC:], []byte{1, 2, 3, 4}) {
		t.Errorf("extended space holds %x", f.config[0xFFC:])
	}
	p := make([]byte, 8)
	if !h.ReadMMIO(at-4, p) || !bytes.Equal(p, bytes.Repeat([]byte{0xFF}, 8)) {
		t.Errorf("an 8-byte access reads %x", p)
	}
	if !h.ReadMMIO(ecam+2<<15, p[:4]) || p[0] != 0xFF {
		t.Errorf("an empty slot reads %x", p[:4])
	}
}

func TestDeviceMemory(t *testing.T) {
	t.Parallel()
	h := NewHost(ecam)
	for i := range uint64(Slots - 1) {
		if _, err := h.Add(&memoryFunction{bar: 0xC000_0000 + i<<12}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Add(&memoryFunction{}); !errors.Is(err, ErrNoSlot) {
		t.Errorf("a full bus said %v", err)
	}
	for i := range uint64(Slots - 1) {
		if !h.WriteMMIO(0xC000_0000+i<<12, []byte{byte(i)}) {
			t.Errorf("function %d did not answer", i)
		}
	}
	p := make([]byte, 1)
	for i := range uint64(Slots - 1) {
		if !h.ReadMMIO(0xC000_0000+i<<12, p) || p[0] != byte(i) {
			t.Errorf("function %d reads %d", i, p[0])
		}
	}
	if h.ReadMMIO(0xC000_0000+Slots<<12, p) || h.WriteMMIO(0xBFFF_FFFF, p) {
		t.Error("an address outside all BARs was answered")
	}
}

// FuzzHost sends arbitrary accesses through both mechanisms; nothing may panic or reach beyond a function's space.
func FuzzHost(f *testing.F) {
	f.Add(uint32(1<<31|1<<11|0xFC), uint16(DataPort+3), uint8(4), uint64(ecam+1<<15+0xFFF))
	f.Add(uint32(0xFFFF_FFFF), uint16(DataPort), uint8(1), uint64(0xC000_0FFF))
	f.Fuzz(func(t *testing.T, address uint32, port uint16, n uint8, addr uint64) {
		h := NewHost(ecam)
		if _, err := h.Add(&memoryFunction{bar: 0xC000_0000}); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 1<<(n%4))
		outl(h, AddressPort, address)
		port = DataPort + port%4
		h.ReadPort(port, p)
		h.WritePort(port, p)
		h.ReadMMIO(addr, p)
		h.WriteMMIO(addr, p)
	})
}
