package pci

import (
	"encoding/binary"
	"fmt"

	"github.com/kvmlet/kvmlet/virtio"
)

// Registers of the configuration space (PCI 3.0, 6.1).
const (
	regVendor     = 0x00
	regDevice     = 0x02
	regCommand    = 0x04
	regStatus     = 0x06
	regRevision   = 0x08
	regClass      = 0x09 // 3 bytes: interface, subclass, class
	regBAR        = 0x10
	regSubVendor  = 0x2C
	regSubDevice  = 0x2E
	regCapPointer = 0x34
	regLine       = 0x3C
	regPin        = 0x3D
)

// Bits of the command and status registers (PCI 3.0, 6.2.2, 6.2.3).
const (
	commandMemory      = 1 << 1
	commandMaster      = 1 << 2
	commandINTxDisable = 1 << 10

	statusInterrupt = 1 << 3
	statusCapList   = 1 << 4
)

// Ids of virtio on PCI (virtio 1.2, 4.1.2). Revision 1 and a subsystem of 0x40 or higher keep legacy drivers away.
const (
	vendorID       = 0x1AF4
	deviceIDBase   = 0x1040
	revisionModern = 1
)

// classes are the class codes of device types (PCI Code and ID Assignment 1.11): class, subclass, interface.
var classes = map[virtio.ID]uint32{
	virtio.Net:     0x02_00_00, // Ethernet
	virtio.Block:   0x01_80_00, // other mass storage
	virtio.Console: 0x07_80_00, // other communication
	virtio.VSock:   0x02_80_00, // other network
}

// classOther is the class code of a device that fits no class.
const classOther = 0xFF_00_00

// Capability ids (PCI 3.0, appendix H) and the types of virtio's own (virtio 1.2, 4.1.4).
const (
	capVendor = 0x09
	capMSIX   = 0x11

	capCommon = 1
	capNotify = 2
	capISR    = 3
	capDevice = 4
	capPCICfg = 5
)

// Offsets in struct virtio_pci_cap (virtio 1.2, 4.1.4).
const (
	capLen      = 2
	capType     = 3
	capBAR      = 4
	capOffset   = 8
	capLength   = 12
	capExtra    = 16 // notify_off_multiplier of the notification, pci_cfg_data of the window
	capSize     = 16
	capSizeLong = 20
)

// Where the capabilities lie.
const (
	atCommon = 0x40
	atISR    = atCommon + capSize
	atDevice = atISR + capSize
	atNotify = atDevice + capSize
	atWindow = atNotify + capSizeLong
	atMSIX   = atWindow + capSizeLong

	msixControl = atMSIX + 2 // message control of MSI-X (PCI 3.0, 6.8.2.3)
)

const (
	msixEnable   = 1 << 15
	msixFuncMask = 1 << 14
)

// configSize is the size of the configuration space that holds anything; the rest of the 4 KiB reads as zero, which
// says that there are no extended capabilities (PCIe 5.0, 7.6).
const configSize = 256

// configSpace is a function's configuration space.
type configSpace struct {
	bytes    [configSize]byte
	writable [configSize]byte // bits that the guest may change
}

// init fills in a function of the device type id with the given number of MSI-X vectors.
func (c *configSpace) init(id virtio.ID, vectors int) {
	le := binary.LittleEndian
	b, w := c.bytes[:], c.writable[:]
	le.PutUint16(b[regVendor:], vendorID)
	le.PutUint16(b[regDevice:], deviceIDBase+uint16(id))
	le.PutUint16(w[regCommand:], commandMemory|commandMaster|commandINTxDisable)
	le.PutUint16(b[regStatus:], statusCapList)
	b[regRevision] = revisionModern
	class, ok := classes[id]
	if !ok {
		class = classOther
	}
	b[regClass], b[regClass+1], b[regClass+2] = byte(class), byte(class>>8), byte(class>>16)
	// A 32-bit memory BAR that is not prefetchable has zeros in its low four bits (PCI 3.0, 6.2.5.1). The bits below its
	// size cannot be set, which is how the guest measures it.
	le.PutUint32(w[regBAR:], ^uint32(barSize-1))
	le.PutUint16(b[regSubVendor:], vendorID)
	le.PutUint16(b[regSubDevice:], deviceIDBase+uint16(id))
	b[regCapPointer] = atCommon
	w[regLine] = 0xFF
	b[regPin] = 1 // INTA

	c.capability(atCommon, atISR, capCommon, capSize, commonOffset, commonSize)
	c.capability(atISR, atDevice, capISR, capSize, isrOffset, 1)
	c.capability(atDevice, atNotify, capDevice, capSize, deviceOffset, pageSize)
	c.capability(atNotify, atWindow, capNotify, capSizeLong, notifyOffset, pageSize)
	le.PutUint32(b[atNotify+capExtra:], notifyMultiplier)
	c.capability(atWindow, atMSIX, capPCICfg, capSizeLong, 0, 0)
	w[atWindow+capBAR] = 0xFF
	for i := capOffset; i < capSizeLong; i++ {
		w[atWindow+i] = 0xFF
	}

	b[atMSIX] = capMSIX // the last: its next pointer is zero
	le.PutUint16(b[msixControl:], uint16(vectors-1))
	le.PutUint16(w[msixControl:], msixEnable|msixFuncMask)
	le.PutUint32(b[atMSIX+4:], tableOffset) // in BAR 0, so the low three bits are zero (PCI 3.0, 6.8.2.4)
	le.PutUint32(b[atMSIX+8:], pbaOffset)
}

// capability writes a struct virtio_pci_cap for BAR 0 at offset at; next is the capability after it.
func (c *configSpace) capability(at, next int, kind, size byte, offset, length uint32) {
	b := c.bytes[at:]
	b[0], b[1], b[capLen], b[capType] = capVendor, byte(next), size, kind
	binary.LittleEndian.PutUint32(b[capOffset:], offset)
	binary.LittleEndian.PutUint32(b[capLength:], length)
}

func (c *configSpace) uint16(off int) uint16 { return binary.LittleEndian.Uint16(c.bytes[off:]) }
func (c *configSpace) uint32(off int) uint32 { return binary.LittleEndian.Uint32(c.bytes[off:]) }

// ReadConfig reads len(p) bytes of the configuration space at offset off, as an access through the configuration ports
// or ECAM does. What does not exist reads as zero.
func (f *Function) ReadConfig(p []byte, off int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(p)
	if off < 0 || off >= configSize {
		return
	}
	n := min(len(p), configSize-off)
	if overlap(off, n, atWindow+capExtra, 4) {
		f.readWindow()
	}
	copy(p, f.config.bytes[off:])
	if i := regStatus - off; i >= 0 && i < n && !f.msixOn.Load() && f.intx.pending() {
		p[i] |= statusInterrupt
	}
}

// WriteConfig writes len(p) bytes of the configuration space at offset off; what is read-only stays as it is.
func (f *Function) WriteConfig(p []byte, off int) {
	f.mu.Lock()
	defer f.unlock()
	if off < 0 || off >= configSize || f.closed {
		return
	}
	n := min(len(p), configSize-off)
	for i := range n {
		w := f.config.writable[off+i]
		f.config.bytes[off+i] = f.config.bytes[off+i]&^w | p[i]&w
	}
	if overlap(off, n, regCommand, 2) {
		f.setCommand()
	}
	if overlap(off, n, regBAR, 4) {
		f.decode()
	}
	if overlap(off, n, msixControl, 2) {
		f.setMSIX()
	}
	if overlap(off, n, atWindow+capExtra, 4) {
		f.writeWindow()
	}
}

// overlap reports whether n bytes at off share a byte with size bytes at reg.
func overlap(off, n, reg, size int) bool { return off < reg+size && reg < off+n }

// setCommand follows a change of the command register.
func (f *Function) setCommand() {
	command := f.config.uint16(regCommand)
	f.intx.mask(command&commandINTxDisable != 0 || f.msixOn.Load())
	f.decode()
	if master := command&commandMaster != 0; master != f.master {
		f.master = master
		f.syncVectors()
		if master {
			f.start() // DRIVER_OK may have come first
		} else if f.active {
			// The driver took away the memory that a worker may be writing to: stop for good.
			f.halt(false)
			f.needReset()
		}
	}
}

// decode follows a change of the BAR or of memory decoding. Address zero counts as unassigned.
func (f *Function) decode() {
	var base uint64
	if f.config.uint16(regCommand)&commandMemory != 0 && !f.closed {
		base = uint64(f.config.uint32(regBAR))
	}
	f.base.Store(base)
	f.syncDoorbells()
}

// BARSize returns the size of BAR i in bytes, 0 if there is none. A BAR lies below 4 GiB, aligned to its size.
func (f *Function) BARSize(i int) uint64 {
	if i != 0 {
		return 0
	}
	return barSize
}

// SetBAR assigns an address to BAR i, as firmware does before the guest runs. The guest may move it.
func (f *Function) SetBAR(i int, addr uint64) error {
	if i != 0 || addr%barSize != 0 || addr >= 1<<32 {
		return fmt.Errorf("virtio device %d on PCI: no BAR %d of %#x bytes at %#x", f.dev.ID(), i, f.BARSize(i), addr)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	binary.LittleEndian.PutUint32(f.config.bytes[regBAR:], uint32(addr))
	f.decode()
	return nil
}

// SetInterruptLine sets the interrupt line register, which tells the guest where firmware routed INTA. The guest may
// overwrite it.
func (f *Function) SetInterruptLine(n uint8) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.config.bytes[regLine] = n
}

// window returns the BAR offset and the length that the driver selected for VIRTIO_PCI_CAP_PCI_CFG, or false if they
// make no access (virtio 1.2, 4.1.4.9).
func (f *Function) window() (off, n int, ok bool) {
	o, l := f.config.uint32(atWindow+capOffset), f.config.uint32(atWindow+capLength)
	if f.config.bytes[atWindow+capBAR] != 0 || l != 1 && l != 2 && l != 4 || o%l != 0 || o >= barSize {
		return 0, 0, false
	}
	return int(o), int(l), true
}

// readWindow and writeWindow move pci_cfg_data from and to the BAR. They do not need it to be decoded.
func (f *Function) readWindow() {
	if off, n, ok := f.window(); ok && !f.closed {
		f.readBAR(f.config.bytes[atWindow+capExtra:][:n], off)
	}
}

func (f *Function) writeWindow() {
	if off, n, ok := f.window(); ok {
		f.writeBAR(f.config.bytes[atWindow+capExtra:][:n], off)
	}
}
