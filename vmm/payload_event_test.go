package vmm

import "testing"

// TestExceptionBeforeMMIO has exceptions delivered in the guest right before accesses to device memory. Where SVM leaves
// the type of the last event behind, as in a lab, KVM may take such an access for a part of the delivery.
func TestExceptionBeforeMMIO(t *testing.T) {
	const (
		idt        = 0x30_0000
		descriptor = 0x30_1000 // for lidt: limit and base
		handler    = 0x30_2000
		codeSeg    = 0x10 // __BOOT_CS of guest/linux
	)
	c := code{}.at(descriptor).bytes([]byte{0x0F, 0x01, 0x1B}) // lidt [rbx]
	c = c.at(pciWindow).bytes([]byte{0xBE, 20, 0, 0, 0})       // mov esi, 20
	again := len(c)
	c = c.bytes(
		[]byte{0x31, 0xD2, 0x31, 0xC9, 0xF7, 0xF1},                  // xor edx, edx; xor ecx, ecx; div ecx: vector 0
		[]byte{0xC7, 0x03, 0, 0, 0, 0},                              // mov dword [rbx], 0
		[]byte{0x48, 0x81, 0xC3, 0, 0x10, 0, 0},                     // add rbx, 4096: each page's first access is what matters
		[]byte{0xFF, 0xCE}, []byte{0x75, byte(again - len(c) - 23)}) // dec esi; jnz again
	vm, out := build(t, c.outb(com1, '!').powerOff())
	gate := append(le16(handler&0xFFFF), le16(codeSeg)...)
	gate = append(gate, 0, 0x8E) // present, 64-bit interrupt gate (Intel SDM 3A, 6.14.1)
	gate = append(gate, le16(handler>>16)...)
	for addr, b := range map[int64][]byte{
		idt:        append(gate, make([]byte, 8)...),
		descriptor: append(le16(15), le64(idt)...),
		handler:    {0x48, 0x83, 0x04, 0x24, 2, 0x48, 0xCF}, // add qword [rsp], 2; iretq: behind the division
	} {
		if _, err := vm.mem.WriteAt(b, addr); err != nil {
			t.Fatal(err)
		}
	}
	if end, got := runToEnd(t, vm, out); got != "!" || end.Outcome != PowerOff {
		t.Errorf("ended by %v (%v), sent %q", end.Outcome, end.Err, got)
	}
}
