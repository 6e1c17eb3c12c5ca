// Package bus carries a vCPU's port and memory-mapped accesses to the devices that own the addresses.
//
// A bus is filled while the machine is assembled and never changes afterwards, so vCPUs read it without a lock. An
// access that no device owns behaves as on a PC: reads give all ones, writes vanish, and both are counted.
package bus

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
)

// ErrConflict reports that two devices claim one address.
var ErrConflict = errors.New("address range already taken")

// PortDevice answers I/O ports. Both methods may be called from several vCPUs at once; p is 1, 2 or 4 bytes long.
type PortDevice interface {
	ReadPort(port uint16, p []byte)
	WritePort(port uint16, p []byte)
}

// MemoryDevice answers memory-mapped accesses. Both methods may be called from several vCPUs at once; p is 1 to 8
// bytes long. They return false for an address at which nothing answers.
type MemoryDevice interface {
	ReadMMIO(addr uint64, p []byte) bool
	WriteMMIO(addr uint64, p []byte) bool
}

// Ports dispatches the 64 Ki I/O ports. The zero value is an empty bus.
type Ports struct {
	owner     [1 << 16]uint8 // index into devices, plus one: one load finds the device
	devices   []PortDevice
	unhandled atomic.Uint64
}

// Add gives ports first to first+n-1 to d.
func (b *Ports) Add(first uint16, n int, d PortDevice) error {
	if n <= 0 || int(first)+n > len(b.owner) {
		return fmt.Errorf("ports %#x+%d: out of range", first, n)
	}
	if len(b.devices) == 255 {
		return fmt.Errorf("ports %#x+%d: more than 255 devices", first, n)
	}
	ports := b.owner[first : int(first)+n]
	for i, o := range ports {
		if o != 0 {
			return fmt.Errorf("port %#x: %w", int(first)+i, ErrConflict)
		}
	}
	b.devices = append(b.devices, d)
	for i := range ports {
		ports[i] = uint8(len(b.devices))
	}
	return nil
}

// Access carries out count accesses of size bytes at one port, as IN, OUT and their string forms do: data holds the
// units one after the other, size is 1, 2 or 4.
func (b *Ports) Access(port uint16, size int, write bool, data []byte) {
	for ; size > 0 && len(data) >= size; data = data[size:] {
		b.access(port, write, data[:size:size])
	}
}

func (b *Ports) access(port uint16, write bool, p []byte) {
	o := b.owner[port]
	switch {
	case o == 0:
		b.unhandled.Add(1)
		if !write {
			fillOnes(p)
		}
	case write:
		b.devices[o-1].WritePort(port, p)
	default:
		b.devices[o-1].ReadPort(port, p)
	}
}

// Unhandled returns how many accesses found no device.
func (b *Ports) Unhandled() uint64 { return b.unhandled.Load() }

// Memory dispatches memory-mapped accesses. The zero value is an empty bus.
type Memory struct {
	ranges    []span // sorted, disjoint
	unhandled atomic.Uint64
}

type span struct {
	first, last uint64
	dev         MemoryDevice
}

// Add gives the n bytes from addr on to d.
func (b *Memory) Add(addr, n uint64, d MemoryDevice) error {
	if n == 0 || addr+n-1 < addr {
		return fmt.Errorf("memory %#x+%#x: out of range", addr, n)
	}
	s := span{first: addr, last: addr + n - 1, dev: d}
	i, _ := slices.BinarySearchFunc(b.ranges, addr, byFirst)
	if i > 0 && b.ranges[i-1].last >= s.first || i < len(b.ranges) && b.ranges[i].first <= s.last {
		return fmt.Errorf("memory %#x+%#x: %w", addr, n, ErrConflict)
	}
	b.ranges = slices.Insert(b.ranges, i, s)
	return nil
}

func byFirst(s span, addr uint64) int { return cmp.Compare(s.first, addr) }

// Access carries out one access of len(p) bytes at addr.
func (b *Memory) Access(addr uint64, write bool, p []byte) {
	if d := b.find(addr, uint64(len(p))); d != nil {
		if write && d.WriteMMIO(addr, p) || !write && d.ReadMMIO(addr, p) {
			return
		}
	}
	b.unhandled.Add(1)
	if !write {
		fillOnes(p)
	}
}

// find returns the device that owns all n bytes at addr, or nil.
func (b *Memory) find(addr, n uint64) MemoryDevice {
	i, found := slices.BinarySearchFunc(b.ranges, addr, byFirst)
	if !found {
		i--
	}
	if i < 0 || addr > b.ranges[i].last || n > b.ranges[i].last-addr+1 {
		return nil
	}
	return b.ranges[i].dev
}

// Unhandled returns how many accesses found no device.
func (b *Memory) Unhandled() uint64 { return b.unhandled.Load() }

func fillOnes(p []byte) {
	for i := range p {
		p[i] = 0xFF
	}
}
