// Package pci is the PCI host of a machine: bus 0 with its host bridge, configuration space through the ports
// 0xCF8/0xCFC and through ECAM, and the window in which the functions' memory BARs lie.
//
// References are to the PCI Local Bus Specification 3.0 and the PCI Express Base Specification 5.0.
package pci

import (
	"encoding/binary"
	"errors"
	"sync"
)

// Function is what sits in a slot. Its methods may be called from several vCPUs at once.
//
// ReadConfig and WriteConfig access 1, 2 or 4 bytes of its 4 KiB configuration space. ReadMMIO and WriteMMIO access
// device memory; they return false where addr lies in no enabled BAR of the function. Every access to device memory asks
// the functions in turn, so that answer must not wait for anything.
type Function interface {
	ReadConfig(p []byte, off int)
	WriteConfig(p []byte, off int)
	ReadMMIO(addr uint64, p []byte) bool
	WriteMMIO(addr uint64, p []byte) bool
}

const (
	// Slots is the number of slots of the bus, the host bridge's included.
	Slots = 32

	// ConfigSize is the size of a function's configuration space through ECAM; through the ports it is 256 bytes.
	ConfigSize = 4096

	// ECAMSize is the size of the ECAM region of one bus (PCIe 5.0, 7.2.2).
	ECAMSize = Slots * 8 * ConfigSize

	// AddressPort is CONFIG_ADDRESS, a double word, of configuration mechanism #1 (PCI 3.0, 3.2.2.3.2).
	AddressPort = 0xCF8

	// DataPort is CONFIG_DATA, four ports wide.
	DataPort = 0xCFC
)

// ErrNoSlot reports that the bus is full.
var ErrNoSlot = errors.New("pci: no slot left")

// Host is the host side of bus 0. Slots are filled before the machine runs.
type Host struct {
	ecam uint64
	slot [Slots]Function

	mu      sync.Mutex
	address uint32 // CONFIG_ADDRESS as the guest last wrote it
}

// NewHost returns a bus that has its host bridge in slot 0 and whose ECAM region lies at guest-physical address ecam.
func NewHost(ecam uint64) *Host {
	h := &Host{ecam: ecam}
	h.slot[0] = bridge{}
	return h
}

// Add puts f into the first free slot from 1 on and returns the slot's number.
func (h *Host) Add(f Function) (int, error) {
	for i := range h.slot {
		if h.slot[i] == nil {
			h.slot[i] = f
			return i, nil
		}
	}
	return 0, ErrNoSlot
}

// ReadPort reads CONFIG_ADDRESS or, through CONFIG_DATA, the function that it selects.
func (h *Host) ReadPort(port uint16, p []byte) {
	if port < DataPort {
		h.readAddress(port, p)
		return
	}
	if f, off, ok := h.selected(port, len(p)); ok {
		f.ReadConfig(p, off)
		return
	}
	ones(p)
}

// WritePort writes CONFIG_ADDRESS or, through CONFIG_DATA, the function that it selects.
func (h *Host) WritePort(port uint16, p []byte) {
	if port < DataPort {
		// Only a whole double word reaches the register; smaller accesses are other devices' ports on a PC.
		if port == AddressPort && len(p) == 4 {
			h.mu.Lock()
			h.address = binary.LittleEndian.Uint32(p)
			h.mu.Unlock()
		}
		return
	}
	if f, off, ok := h.selected(port, len(p)); ok {
		f.WriteConfig(p, off)
	}
}

func (h *Host) readAddress(port uint16, p []byte) {
	if port != AddressPort || len(p) != 4 {
		ones(p)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	binary.LittleEndian.PutUint32(p, h.address)
}

// selected decodes CONFIG_ADDRESS: enable 31, bus 23:16, device 15:11, function 10:8, register 7:2.
func (h *Host) selected(port uint16, n int) (Function, int, bool) {
	h.mu.Lock()
	a := h.address
	h.mu.Unlock()
	if a&(1<<31) == 0 {
		return nil, 0, false
	}
	return h.lookup(a>>16&0xFF, a>>8&0xFF, int(a&0xFC)+int(port-DataPort), n)
}

// lookup returns the function that answers n bytes at offset off of the given bus and device/function number.
func (h *Host) lookup(bus, devfn uint32, off, n int) (Function, int, bool) {
	f := h.slot[devfn>>3&(Slots-1)]
	if bus != 0 || devfn&7 != 0 || f == nil || n > 4 || off+n > ConfigSize {
		return nil, 0, false
	}
	return f, off, true
}

// ReadMMIO reads configuration space through ECAM, or device memory.
func (h *Host) ReadMMIO(addr uint64, p []byte) bool {
	if addr-h.ecam < ECAMSize {
		f, off, ok := h.decodeECAM(addr, len(p))
		if ok {
			f.ReadConfig(p, off)
		} else {
			ones(p)
		}
		return true
	}
	for _, f := range h.slot {
		if f != nil && f.ReadMMIO(addr, p) {
			return true
		}
	}
	return false
}

// WriteMMIO writes configuration space through ECAM, or device memory.
func (h *Host) WriteMMIO(addr uint64, p []byte) bool {
	if addr-h.ecam < ECAMSize {
		if f, off, ok := h.decodeECAM(addr, len(p)); ok {
			f.WriteConfig(p, off)
		}
		return true
	}
	for _, f := range h.slot {
		if f != nil && f.WriteMMIO(addr, p) {
			return true
		}
	}
	return false
}

// decodeECAM splits an ECAM address: bus 27:20, device 19:15, function 14:12, register 11:0 (PCIe 5.0, 7.2.2).
func (h *Host) decodeECAM(addr uint64, n int) (Function, int, bool) {
	a := uint32(addr - h.ecam)
	return h.lookup(a>>20, a>>12&0xFF, int(a&(ConfigSize-1)), n)
}

func ones(p []byte) {
	for i := range p {
		p[i] = 0xFF
	}
}

// bridge is the function in slot 0: a host bridge that nobody configures.
type bridge struct{}

// bridgeHeader is the bridge's configuration header (PCI 3.0, 6.1): vendor and device of Intel's 82G33/Q35 MCH, so that
// Linux accepts ECAM without an entry in its quirk lists; class 0x0600, a host bridge.
var bridgeHeader = [64]byte{
	0x00: 0x86, 0x01: 0x80, // vendor 0x8086
	0x02: 0xC0, 0x03: 0x29, // device 0x29C0
	0x0A: 0x00, 0x0B: 0x06, // class 0x0600
	0x2C: 0xF4, 0x2D: 0x1A, // subsystem vendor 0x1AF4
	0x2E: 0x00, 0x2F: 0x11, // subsystem 0x1100
}

func (bridge) ReadConfig(p []byte, off int) {
	clear(p)
	if off < len(bridgeHeader) {
		copy(p, bridgeHeader[off:])
	}
}

func (bridge) WriteConfig([]byte, int)       {}
func (bridge) ReadMMIO(uint64, []byte) bool  { return false }
func (bridge) WriteMMIO(uint64, []byte) bool { return false }
