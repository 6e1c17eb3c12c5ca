package vmm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/lab/labtest"
	"github.com/kvmlet/kvmlet/virtio"
	virtiopci "github.com/kvmlet/kvmlet/virtio/pci"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/vmm/legacy"
	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// code assembles the payloads: 64-bit code for a CPU in the state that guest/linux leaves, with the first 4 GiB mapped
// one to one, interrupts off and no IDT.
type code []byte

const (
	codeBase = 0x20_0000
	com1     = legacy.COM1Port
)

func le16(v uint16) []byte { return binary.LittleEndian.AppendUint16(nil, v) }
func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
func le64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

func (c code) bytes(parts ...[]byte) code { return append(c, bytes.Join(parts, nil)...) }

// outb: mov dx, port; mov al, v; out dx, al.
func (c code) outb(port uint16, v byte) code {
	return c.bytes([]byte{0x66, 0xBA}, le16(port), []byte{0xB0, v, 0xEE})
}

// outw: mov dx, port; mov ax, v; out dx, ax.
func (c code) outw(port uint16, v uint16) code {
	return c.bytes([]byte{0x66, 0xBA}, le16(port), []byte{0x66, 0xB8}, le16(v), []byte{0x66, 0xEF})
}

// outl: mov dx, port; mov eax, v; out dx, eax.
func (c code) outl(port uint16, v uint32) code {
	return c.bytes([]byte{0x66, 0xBA}, le16(port), []byte{0xB8}, le32(v), []byte{0xEF})
}

// in reads a port of 1, 2 or 4 bytes into the accumulator.
func (c code) in(port uint16, n int) code {
	c = c.bytes([]byte{0x66, 0xBA}, le16(port))
	return c.bytes(map[int][]byte{1: {0xEC}, 2: {0x66, 0xED}, 4: {0xED}}[n])
}

// echo sends the n bytes of the accumulator to the serial port, low byte first.
func (c code) echo(n int) code {
	for range n { // mov dx, com1; out dx, al; shr rax, 8
		c = c.bytes([]byte{0x66, 0xBA}, le16(com1), []byte{0xEE, 0x48, 0xC1, 0xE8, 8})
	}
	return c
}

// at loads an address: mov rbx, addr.
func (c code) at(addr uint64) code { return c.bytes([]byte{0x48, 0xBB}, le64(addr)) }

// store writes v to addr with an access of n bytes.
func (c code) store(addr uint64, n int, v uint32) code {
	c = c.at(addr)
	switch n {
	case 1:
		return c.bytes([]byte{0xC6, 0x03, byte(v)})
	case 2:
		return c.bytes([]byte{0x66, 0xC7, 0x03}, le16(uint16(v)))
	default:
		return c.bytes([]byte{0xC7, 0x03}, le32(v))
	}
}

// load reads n bytes at addr into the accumulator: 1, 4 or 8.
func (c code) load(addr uint64, n int) code {
	return c.at(addr).bytes(map[int][]byte{1: {0x8A, 0x03}, 4: {0x8B, 0x03}, 8: {0x48, 0x8B, 0x03}}[n])
}

// await polls the 32-bit word at addr until a bit of mask is set: test dword [rbx], mask; jz back.
func (c code) await(addr uint64, mask uint32) code {
	return c.at(addr).bytes([]byte{0xF7, 0x03}, le32(mask), []byte{0x74, 0xF8})
}

// powerOff enters S5.
func (c code) powerOff() code {
	return c.outw(legacy.PMPort+legacy.PMControl, legacy.SleepOff<<10|1<<13).spin()
}

// spin: jmp to itself.
func (c code) spin() code { return c.bytes([]byte{0xEB, 0xFE}) }

// elf wraps code in a kernel: one segment at codeBase, entered at its start.
func (c code) elf() []byte {
	const header, programHeader = 64, 56
	off := uint64(header + programHeader)
	e := bytes.Join([][]byte{
		{0x7F, 'E', 'L', 'F', 2, 1, 1, 0}, make([]byte, 8),
		le16(2), le16(62), le32(1), // ET_EXEC, EM_X86_64
		le64(codeBase), le64(header), le64(0), le32(0),
		le16(header), le16(programHeader), le16(1), le16(0), le16(0), le16(0),
		le32(1), le32(5), le64(off), le64(codeBase), le64(codeBase), // PT_LOAD, read and execute
		le64(uint64(len(c))), le64(0x1000), le64(0x1000),
	}, nil)
	return append(e, c...)
}

// output collects what a payload sends to the serial port.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// build assembles a VM with the payload as its kernel.
func build(t *testing.T, c code) (*VM, *output) {
	t.Helper()
	return buildConfig(t, c, Config{})
}

// buildConfig is build for a VM that is not like the others. What cfg leaves out is as there.
func buildConfig(t *testing.T, c code, cfg Config) (*VM, *output) {
	t.Helper()
	if len(c) == 0 {
		c = code{}.spin()
	}
	out := &output{}
	if cfg.Console == nil {
		cfg.Console = out
	}
	if cfg.Kernel == nil {
		cfg.Kernel = payload(t, c)
	}
	cfg.CPUs, cfg.Memory = max(cfg.CPUs, 1), MinMemory
	vm, err := New(&cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	})
	return vm, out
}

// runToEnd runs the VM to its end and returns what came out.
func runToEnd(t *testing.T, vm *VM, out *output) (End, string) {
	t.Helper()
	if err := vm.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	end, err := vm.Wait(ctx)
	if err != nil {
		t.Fatalf("the payload did not end: %v", err)
	}
	if err := vm.platform.serial[0].Flush(ctx); err != nil {
		t.Fatal(err)
	}
	return end, out.String()
}

func TestPortDispatch(t *testing.T) {
	c := code{}.outb(com1, 'h').outb(com1, 'i')
	// rep outsb sends a string: lea rsi, [rip+text]; mov ecx, n; mov dx, com1; rep outsb; jmp over the text
	text := "string"
	c = c.bytes([]byte{0x48, 0x8D, 0x35}, le32(13), []byte{0xB9}, le32(uint32(len(text))),
		[]byte{0x66, 0xBA}, le16(com1), []byte{0xF3, 0x6E, 0xEB, byte(len(text))}, []byte(text))
	c = c.in(0x1234, 1).echo(1).in(0x1234, 2).echo(2).in(0x1234, 4).echo(4) // nobody's port
	c = c.outb(0x1234, 7)
	vm, out := build(t, c.powerOff())
	end, got := runToEnd(t, vm, out)
	if end.Outcome != PowerOff || end.Err != nil {
		t.Errorf("ended by %v (%v)", end.Outcome, end.Err)
	}
	if want := "histring" + strings.Repeat("\xFF", 7); got != want {
		t.Errorf("the payload sent %q, want %q", got, want)
	}
	if n := vm.ports.Unhandled(); n != 4 {
		t.Errorf("%d accesses went to nobody's port, want 4", n)
	}
}

func TestMMIODispatch(t *testing.T) {
	c := code{}.load(ecamBase, 4).echo(4) // the host bridge through ECAM
	c = c.outl(0xCF8, 1<<31).in(0xCFC, 4).echo(4)
	c = c.load(pciWindow+pciWindowSize-8, 8).echo(8) // nobody's address, in the window and outside
	c = c.load(0xF000_0000, 4).echo(4).store(0xF000_0000, 4, 1)
	vm, out := build(t, c.powerOff())
	end, got := runToEnd(t, vm, out)
	bridge := "\x86\x80\xC0\x29"
	if want := bridge + bridge + strings.Repeat("\xFF", 12); got != want || end.Outcome != PowerOff {
		t.Errorf("ended by %v; the payload sent %q, want %q", end.Outcome, got, want)
	}
	if n := vm.mmio.Unhandled(); n != 3 {
		t.Errorf("%d accesses went to nobody's address, want 3", n)
	}
}

// Registers of the interrupt controllers (Intel SDM volume 3A, table 11-1; I/O APIC data sheet, 3.0).
const (
	apicSVR    = localAPIC + 0xF0
	apicIRR    = localAPIC + 0x200
	ioapicSel  = ioAPIC
	ioapicData = ioAPIC + 0x10
)

// awaitVector enables the local APIC and polls its interrupt request register: interrupts are off, so what arrives stays
// there.
func (c code) awaitVector(v uint32) code { return c.await(apicIRR+uint64(v/32)*0x10, 1<<(v%32)) }

func TestSerialInterrupt(t *testing.T) {
	const vector = 0x41
	c := code{}.store(apicSVR, 4, 0x1FF)
	c = c.store(ioapicSel, 4, 0x11+2*legacy.COM1IRQ).store(ioapicData, 4, 0) // to APIC 0
	c = c.store(ioapicSel, 4, 0x10+2*legacy.COM1IRQ).store(ioapicData, 4, vector)
	c = c.outb(com1+1, 2) // the transmitter is empty: interrupt
	c = c.awaitVector(vector).outb(com1, '!')
	vm, out := build(t, c.powerOff())
	if end, got := runToEnd(t, vm, out); got != "!" || end.Outcome != PowerOff {
		t.Errorf("ended by %v, sent %q", end.Outcome, got)
	}
}

func TestSerialInput(t *testing.T) {
	c := code{}.outb(com1+4, 2) // RTS: ready to receive
	for range 3 {
		// again: in al, LSR; test al, 1; jz again
		c = c.bytes([]byte{0x66, 0xBA}, le16(com1+5), []byte{0xEC, 0xA8, 1, 0x74, 0xFB})
		c = c.in(com1, 1).echo(1)
	}
	vm, out := build(t, c.powerOff())
	go func() { _, _ = vm.Serial([]byte("abc")) }() // ends with the VM at the latest
	if _, got := runToEnd(t, vm, out); got != "abc" {
		t.Errorf("the payload received %q", got)
	}
}

// beeper is a virtio device whose driver is notified of a configuration change as soon as it is ready.
type beeper struct{ activated chan struct{} }

func (*beeper) ID() virtio.ID              { return virtio.RNG }
func (*beeper) Features() virtio.Features  { return 0 }
func (*beeper) QueueSizes() []uint16       { return []uint16{8} }
func (*beeper) ReadConfig(p []byte, _ int) { clear(p) }
func (*beeper) WriteConfig([]byte, int)    {}
func (*beeper) Reset() error               { return nil }
func (b *beeper) Activate(_ virtio.Features, _ []*queue.Queue, t virtio.Transport) error {
	close(b.activated)
	return t.NotifyConfig()
}

// findCapability walks a function's list and returns the first capability of that id that match accepts.
func findCapability(t *testing.T, f *virtiopci.Function, id byte, match func(off int) bool) int {
	t.Helper()
	for off := int(configByte(f, 0x34)); off != 0; off = int(configByte(f, off+1)) {
		if configByte(f, off) == id && match(off) {
			return off
		}
	}
	t.Fatalf("no capability %#x", id)
	return 0
}

func configByte(f *virtiopci.Function, off int) byte {
	p := []byte{0}
	f.ReadConfig(p, off)
	return p[0]
}

func configLong(f *virtiopci.Function, off int) uint32 {
	p := make([]byte, 4)
	f.ReadConfig(p, off)
	return binary.LittleEndian.Uint32(p)
}

func barAddress(f *virtiopci.Function, bar int) uint64 {
	return uint64(configLong(f, 0x10+4*bar) &^ 15)
}

func TestMSIX(t *testing.T) {
	vm, out := build(t, nil)
	dev := &beeper{activated: make(chan struct{})}
	if err := vm.addFunction(dev); err != nil {
		t.Fatal(err)
	}
	f := vm.functions[len(vm.functions)-1]
	slot := uint64(len(vm.functions)) // slot 0 is the bridge's
	config := ecamBase + slot<<15

	common := findCapability(t, f, 9, func(off int) bool { return configByte(f, off+3) == 1 }) // VIRTIO_PCI_CAP_COMMON_CFG
	regs := barAddress(f, int(configByte(f, common+4))) + uint64(configLong(f, common+8))
	msix := findCapability(t, f, 0x11, func(int) bool { return true })
	where := configLong(f, msix+4)
	table := barAddress(f, int(where&7)) + uint64(where&^7)

	const vector = 0x51
	c := code{}.store(apicSVR, 4, 0x1FF)
	c = c.store(config+4, 2, 6) // memory and bus master
	c = c.store(table, 4, localAPIC).store(table+4, 4, 0).store(table+8, 4, vector).store(table+12, 4, 0)
	c = c.store(config+uint64(msix)+2, 2, 1<<15) // MSI-X enable
	// virtio 1.2, 4.1.4.3: status at 20, feature selector at 8, features at 12, config_msix_vector at 16
	c = c.store(regs+20, 1, 1).store(regs+20, 1, 3)
	c = c.store(regs+8, 4, 1).store(regs+12, 4, 1) // VIRTIO_F_VERSION_1
	c = c.store(regs+20, 1, 11).store(regs+16, 2, 0).store(regs+20, 1, 15)
	c = c.awaitVector(vector).outb(com1, '!').powerOff()
	if _, err := vm.mem.WriteAt(c, codeBase); err != nil {
		t.Fatal(err)
	}
	end, got := runToEnd(t, vm, out)
	if got != "!" || end.Outcome != PowerOff {
		t.Errorf("ended by %v (%v), sent %q", end.Outcome, end.Err, got)
	}
	<-dev.activated
}

func TestOutcomes(t *testing.T) {
	var emulation *vcpu.EmulationError
	// The crash kernel goes on, and so does the VM.
	crash := code{}.outb(legacy.PvpanicPort, byte(legacy.GuestCrashLoaded)).outb(com1, '!')
	crash = crash[:len(crash):len(crash)] // each case appends to its own copy
	cases := []struct {
		name string
		code code
		want Outcome
		args string
	}{
		{"power-off", code{}.powerOff(), PowerOff, ""},
		{"reset by 0xcf9", code{}.outb(legacy.ResetPort, 0x0E).spin(), Reboot, ""},
		{"reset by the keyboard controller", code{}.outb(legacy.I8042CommandPort, 0xFE).spin(), Reboot, ""},
		{"reset by port 0x92", code{}.outb(legacy.FastPort, 1).spin(), Reboot, ""},
		{"reset after a panic", code{}.store(warmAddr, 2, warmFlag).outb(legacy.ResetPort, 6).spin(), Panic, BaseCmdline},
		{"reset of a kernel that always resets warm", code{}.store(warmAddr, 2, warmFlag).outb(legacy.ResetPort, 6).spin(),
			Reboot, BaseCmdline + " reboot=w"},
		{"panic port", code{}.outb(legacy.PvpanicPort, 1).spin(), Panic, ""},
		{"panic port, with a crash kernel", crash.outb(legacy.PvpanicPort, 1).spin(), Panic, ""},
		{"reset by the crash kernel", crash.outb(legacy.ResetPort, 6).spin(), Panic, ""},
		{"power-off by the crash kernel", crash.powerOff(), Panic, ""},
		{"triple fault", code{}.bytes([]byte{0x0F, 0x0B}).spin(), TripleFault, ""}, // ud2, and no IDT
		// mov rbx, window; jmp rbx: code in device memory is beyond KVM's emulator
		{"code in device memory", code{}.at(pciWindow).bytes([]byte{0xFF, 0xE3}), Failed, ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			vm, out := buildConfig(t, c.code, Config{Cmdline: c.args})
			end, got := runToEnd(t, vm, out)
			if end.Outcome != c.want {
				t.Errorf("ended by %v (%v), want %v", end.Outcome, end.Err, c.want)
			}
			if bytes.HasPrefix(c.code, crash) && got != "!" {
				t.Errorf("the crash kernel sent %q", got)
			}
			if c.want == Failed && (!errors.As(end.Err, &emulation) || emulation.RIP != pciWindow) {
				t.Errorf("the error is %v", end.Err)
			}
		})
	}
}

// TestPauseResume has a payload count in memory: a paused VM does not.
func TestPauseResume(t *testing.T) {
	const counter = 0x30_0000
	// again: lock inc qword [rbx]; jmp again
	vm, _ := build(t, code{}.at(counter).bytes([]byte{0xF0, 0x48, 0xFF, 0x03, 0xEB, 0xFA}))
	read := func() uint64 {
		p := make([]byte, 8)
		if _, err := vm.mem.ReadAt(p, counter); err != nil {
			t.Fatal(err)
		}
		return binary.LittleEndian.Uint64(p)
	}
	if err := vm.Pause(); !errors.Is(err, ErrState) {
		t.Errorf("Pause before Start: %v", err)
	}
	if err := vm.Start(); err != nil {
		t.Fatal(err)
	}
	last := uint64(0)
	for range 20 {
		if err := vm.Pause(); err != nil {
			t.Fatal(err)
		}
		first := read()
		for range 1000 { // long enough for a running vCPU to be seen
			if now := read(); now != first {
				t.Fatalf("a paused VM counted from %d to %d", first, now)
			}
		}
		if err := vm.Resume(); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); read() == first; {
			if time.Now().After(deadline) {
				t.Fatal("a resumed VM does not run")
			}
		}
		if first < last {
			t.Fatalf("the counter went from %d to %d", last, first)
		}
		last = first
	}
	vm.Stop()
	if end, err := vm.Wait(t.Context()); err != nil || end.Outcome != Stopped {
		t.Errorf("Stop: %v, %v", end.Outcome, err)
	}
	if err := vm.Resume(); !errors.Is(err, ErrState) {
		t.Errorf("Resume after the end: %v", err)
	}
}
