package vmm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/kvmlet/kvmlet/guest/linux"
	"github.com/kvmlet/kvmlet/virtio"
	virtiopci "github.com/kvmlet/kvmlet/virtio/pci"
	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

// pvhELF wraps 32-bit code in a kernel that only has a PVH entry: its ELF entry is a virtual address.
func (c code) pvhELF() []byte {
	const header, programHeader, note = 64, 56, 20
	const off = header + 2*programHeader
	e := bytes.Join([][]byte{
		{0x7F, 'E', 'L', 'F', 2, 1, 1, 0}, make([]byte, 8),
		le16(2), le16(62), le32(1), // ET_EXEC, EM_X86_64
		le64(0xFFFF_FFFF_8000_0000 + codeBase), le64(header), le64(0), le32(0),
		le16(header), le16(programHeader), le16(2), le16(0), le16(0), le16(0),
		le32(1), le32(5), le64(off + note), le64(codeBase), le64(codeBase), // PT_LOAD, read and execute
		le64(uint64(len(c))), le64(0x1000), le64(0x1000),
		le32(4), le32(4), le64(off), le64(0), le64(0), le64(note), le64(note), le64(4), // PT_NOTE
		le32(4), le32(4), le32(18), []byte("Xen\x00"), le32(codeBase), // XEN_ELFNOTE_PHYS32_ENTRY
	}, nil)
	return append(e, c...)
}

// TestPVHEntry enters a kernel as the PVH boot ABI says: 32-bit protected mode without paging, start_info at EBX.
func TestPVHEntry(t *testing.T) {
	c := code{}.bytes([]byte{0x66, 0xBA}, le16(com1))
	c = c.bytes([]byte{0x8B, 0x03}) // mov eax, [ebx]
	for range 4 {
		c = c.bytes([]byte{0xEE, 0xC1, 0xE8, 8}) // out dx, al; shr eax, 8
	}
	c = c.bytes([]byte{0xB8}, le32(1), []byte{0x48, 0x90, 0xEE})     // mov eax, 1; dec eax, or REX.W in long mode; nop; out
	c = c.bytes([]byte{0x0F, 0x20, 0xC0, 0xC1, 0xE8, 24, 0xEE}, nil) // mov eax, cr0; shr eax, 24; out
	elf := c.powerOff().pvhELF()
	k, err := linux.Parse(bytes.NewReader(elf), int64(len(elf)))
	if err != nil {
		t.Fatal(err)
	}
	vm, out := buildConfig(t, nil, Config{Kernel: k})
	end, got := runToEnd(t, vm, out)
	const magic = "\x78\xC5\x6E\x33" // XEN_HVM_START_MAGIC_VALUE (Xen, public/arch-x86/hvm/start_info.h)
	if want := magic + "\x00\x00"; got != want || end.Outcome != PowerOff {
		t.Errorf("ended by %v (%v), sent %q, want %q", end.Outcome, end.Err, got, want)
	}
}

// TestMaxCPUs has the first of 64 CPUs start the others by INIT and SIPI, as an operating system does. Each counts itself
// by its APIC id.
func TestMaxCPUs(t *testing.T) {
	const (
		icr     = localAPIC + 0x300 // Intel SDM 3A, 11.6.1
		init    = 0xC_4500          // to all but self, assert, INIT
		startup = 0xC_4600
		page    = 0x60 // of the real-mode code
		base    = page << 12
		count   = 0x100 // offsets behind base
		byID    = 0x200
	)
	c := code{}.store(apicSVR, 4, 0x1FF).store(icr, 4, init).store(icr, 4, startup|page).at(base + count)
	c = c.bytes([]byte{0x66, 0x83, 0x3B, MaxCPUs - 1, 0x75, 0xFA}) // again: cmp word [rbx], n; jne again
	vm, out := buildConfig(t, c.outb(com1, '!').powerOff(), Config{CPUs: MaxCPUs})
	start := bytes.Join([][]byte{
		{0x66, 0xB8}, le32(1), {0x0F, 0xA2, 0x66, 0xC1, 0xEB, 24}, // mov eax, 1; cpuid; shr ebx, 24
		{0x2E, 0xFE, 0x87}, le16(byID), // inc byte cs:[bx+byID]
		{0x2E, 0xF0, 0xFF, 0x06}, le16(count), // lock inc word cs:[count]
		{0xFA, 0xF4, 0xEB, 0xFD}, // cli; again: hlt; jmp again
	}, nil)
	if _, err := vm.mem.WriteAt(start, base); err != nil {
		t.Fatal(err)
	}
	if end, got := runToEnd(t, vm, out); got != "!" || end.Outcome != PowerOff {
		t.Errorf("ended by %v (%v), sent %q", end.Outcome, end.Err, got)
	}
	seen := make([]byte, MaxCPUs)
	if _, err := vm.mem.ReadAt(seen, base+byID); err != nil {
		t.Fatal(err)
	}
	if want := append([]byte{0}, bytes.Repeat([]byte{1}, MaxCPUs-1)...); !bytes.Equal(seen, want) {
		t.Errorf("starts by APIC id: %v", seen)
	}
}

// TestEmulationError has KVM emulate what its emulator does not know: an arithmetic instruction on device memory.
func TestEmulationError(t *testing.T) {
	insn := []byte{0xF3, 0x0F, 0xB8, 0x03} // popcnt eax, [rbx]
	c := code{}.at(pciWindow)
	rip := codeBase + uint64(len(c))
	vm, out := build(t, c.bytes(insn).spin())
	end, _ := runToEnd(t, vm, out)
	var e *vcpu.EmulationError
	if end.Outcome != Failed || !errors.As(end.Err, &e) {
		t.Fatalf("ended by %v (%v)", end.Outcome, end.Err)
	}
	if e.RIP != rip || !bytes.HasPrefix(e.Insn, insn) {
		t.Errorf("%v: want RIP %#x and % x", e, rip, insn)
	}
}

// virtioRegs are the places of a virtio function's registers, as a driver finds them.
type virtioRegs struct{ config, common, notify, table, pba uint64 }

func findRegs(t *testing.T, vm *VM, i int) (r virtioRegs, msix int) {
	t.Helper()
	f := vm.functions[i]
	r.config = ecamBase + uint64(i+1)<<15 // slot 0 is the bridge's
	for _, c := range []struct {
		kind byte // virtio 1.2, 4.1.4
		reg  *uint64
	}{{1, &r.common}, {2, &r.notify}} {
		off := findCapability(t, f, 9, func(off int) bool { return configByte(f, off+3) == c.kind })
		*c.reg = barAddress(f, int(configByte(f, off+4))) + uint64(configLong(f, off+8))
	}
	msix = findCapability(t, f, 0x11, func(int) bool { return true })
	at := func(off int) uint64 {
		v := configLong(f, off)
		return barAddress(f, int(v&7)) + uint64(v&^7)
	}
	r.table, r.pba = at(msix+4), at(msix+8)
	return r, msix
}

// TestQueueInterrupts drives the entropy device: the doorbell goes through KVM's ioeventfd, the interrupt through its
// irqfd. The second one comes while its vector is masked: it is pending, and arrives when the vector is unmasked.
func TestQueueInterrupts(t *testing.T) {
	const (
		desc, avail, used = 0x30_0000, 0x30_1000, 0x30_2000
		buffer            = 0x30_3000
		first, second     = 0x51, 0x61
	)
	vm, out := build(t, nil)
	i := len(vm.functions) - 1
	if id := configLong(vm.functions[i], 0) >> 16; id != 0x1040+uint32(virtio.RNG) { // virtio 1.2, 4.1.2
		t.Fatalf("device %#x is no entropy device", id)
	}
	r, msix := findRegs(t, vm, i)
	c := code{}.store(apicSVR, 4, 0x1FF)
	c = c.store(r.config+4, 2, 6) // memory and bus master
	c = c.store(r.table, 4, localAPIC).store(r.table+4, 4, 0).store(r.table+8, 4, first).store(r.table+12, 4, 0)
	c = c.store(r.config+uint64(msix)+2, 2, 1<<15) // MSI-X enable
	// virtio 1.2, 4.1.4.3: status at 20, feature selector at 8, features at 12; of queue 0 the vector at 26, the rings'
	// addresses at 32, 40 and 48, enable at 28
	c = c.store(r.common+20, 1, 1).store(r.common+20, 1, 3)
	c = c.store(r.common+8, 4, 1).store(r.common+12, 4, 1) // VIRTIO_F_VERSION_1
	c = c.store(r.common+20, 1, 11).store(r.common+22, 2, 0).store(r.common+26, 2, 0)
	for off, addr := range map[uint64]uint32{32: desc, 40: avail, 48: used} {
		c = c.store(r.common+off, 4, addr).store(r.common+off+4, 4, 0)
	}
	c = c.store(r.common+28, 2, 1).store(r.common+20, 1, 15)
	c = c.store(avail+2, 2, 1).store(r.notify, 2, 0).awaitVector(first).outb(com1, '1')

	c = c.store(r.table+12, 4, 1).store(r.table+8, 4, second) // mask
	c = c.store(avail+2, 2, 2).store(r.notify, 2, 0)
	c = c.await(r.pba, 1).outb(com1, 'p').load(apicIRR+second/32*0x10, 4).echo(4) // nothing has arrived
	c = c.store(r.table+12, 4, 0).awaitVector(second).outb(com1, '2').load(r.pba, 4).echo(1)
	rings := map[int64][]byte{
		codeBase: c.powerOff(),
		desc: bytes.Join([][]byte{
			le64(buffer), le32(16), le16(2), le16(0), // VIRTQ_DESC_F_WRITE
			le64(buffer + 16), le32(16), le16(2), le16(0),
		}, nil),
		avail: bytes.Join([][]byte{le16(0), le16(0), le16(0), le16(1)}, nil), // both descriptors, none available yet
	}
	for addr, b := range rings {
		if _, err := vm.mem.WriteAt(b, addr); err != nil {
			t.Fatal(err)
		}
	}
	end, got := runToEnd(t, vm, out)
	if want := "1p\x00\x00\x00\x002\x00"; got != want || end.Outcome != PowerOff {
		t.Errorf("ended by %v (%v), sent %q, want %q", end.Outcome, end.Err, got, want)
	}
	usedRing, random := make([]byte, 4), make([]byte, 32)
	if _, err := vm.mem.ReadAt(usedRing, used); err != nil {
		t.Fatal(err)
	}
	if _, err := vm.mem.ReadAt(random, buffer); err != nil {
		t.Fatal(err)
	}
	if n := binary.LittleEndian.Uint16(usedRing[2:]); n != 2 || bytes.Equal(random[:16], make([]byte, 16)) ||
		bytes.Equal(random[16:], make([]byte, 16)) {
		t.Errorf("%d buffers are used: %x", n, random)
	}
	if got := vm.functions[i].Counters(); got != (virtiopci.Counters{Interrupts: 1, Held: 1}) {
		t.Errorf("%+v: want one interrupt sent, one held back, and no doorbell that left KVM", got)
	}
}
