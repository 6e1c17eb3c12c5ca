package vmm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/linux"
	"github.com/kvmlet/kvmlet/vmm/legacy"
)

// TestStopBeforeAndDuringStart stops VMs at any time around their start: nobody waits for ever.
func TestStopBeforeAndDuringStart(t *testing.T) {
	early, _ := buildConfig(t, nil, Config{CPUs: 2})
	for _, c := range early.cpus {
		c.RequestStop()
		c.Start()
		c.Stop()
	}
	for round := range 10 {
		vm, _ := buildConfig(t, nil, Config{CPUs: 4})
		var wg sync.WaitGroup
		wg.Go(func() {
			for range round * 40 { // a little later each time
				_ = vm.isEnded()
			}
			vm.Stop()
		})
		if err := vm.Start(); err != nil && !errors.Is(err, ErrState) {
			t.Error(err)
		}
		wg.Wait()
		if end, err := vm.Wait(t.Context()); err != nil || end.Outcome != Stopped {
			t.Errorf("ended by %v, %v", end.Outcome, err)
		}
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	}
}

// stuck is a console that takes one byte and does not return.
type stuck struct{ entered, leave chan struct{} }

func (s stuck) Write(p []byte) (int, error) {
	close(s.entered)
	<-s.leave
	return len(p), nil
}

func TestCloseWithStuckConsole(t *testing.T) {
	console := stuck{make(chan struct{}), make(chan struct{})}
	vm, _ := buildConfig(t, code{}.outb(com1, 'a').outb(com1, 'b').spin(), Config{Console: console})
	if err := vm.Start(); err != nil {
		t.Fatal(err)
	}
	<-console.entered
	start := time.Now()
	if err := vm.Close(); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d < flushTime {
		t.Errorf("Close gave up after %v", d)
	}
	close(console.leave)
}

// broken is a console that fails.
type broken struct{}

var errBroken = errors.New("the console is broken")

func (broken) Write([]byte) (int, error) { return 0, errBroken }

// TestCloseReportsOnce wants the console's error in Close's, once.
func TestCloseReportsOnce(t *testing.T) {
	k := payload(t, code{}.outb(com1, 'a').powerOff())
	vm, err := New(&Config{CPUs: 1, Memory: MinMemory, Kernel: k, Console: broken{}})
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Start(); err != nil {
		t.Error(err)
	}
	<-vm.Ended()
	if err := vm.Close(); !errors.Is(err, errBroken) || strings.Count(err.Error(), errBroken.Error()) != 1 {
		t.Errorf("Close: %v", err)
	}
	if err := vm.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	// What failed is tried again: the level that KVM refused is not taken for the line's.
	for range 2 {
		if vm.irq.set(legacy.COM1IRQ, 0, true) == nil {
			t.Error("a line of a closed VM was raised")
		}
	}
	if vm.PressPowerButton() {
		t.Error("a closed VM listens to the power button")
	}
}

// numbers is a device that answers each read with the next number, on ports and in memory.
type numbers struct{ n atomic.Uint32 }

func (d *numbers) ReadPort(_ uint16, p []byte) { binary.LittleEndian.PutUint32(p, d.n.Add(1)) }
func (d *numbers) WritePort(uint16, []byte)    {}
func (d *numbers) ReadMMIO(_ uint64, p []byte) bool {
	d.ReadPort(0, p)
	return true
}
func (*numbers) WriteMMIO(uint64, []byte) bool { return true }

// TestPauseCompletesReads pauses a payload that reads a device and stores what it got, over and over. Whenever it is
// paused after a read, RIP is behind the reading instruction.
func TestPauseCompletesReads(t *testing.T) {
	const (
		port  = 0x1230
		addr  = 0xF000_0000
		store = 0x30_0000
	)
	for _, c := range []struct {
		name string
		read []byte
	}{
		{"port", []byte{0xED}},         // in eax, dx
		{"memory", []byte{0x8B, 0x06}}, // mov eax, [rsi]
	} {
		t.Run(c.name, func(t *testing.T) {
			p := code{}.bytes([]byte{0x66, 0xBA}, le16(port), []byte{0xBE}, le32(addr)).at(store)
			read := codeBase + uint64(len(p))
			p = p.bytes(c.read, []byte{0x89, 0x03, 0xEB, byte(-4 - len(c.read))}) // mov [rbx], eax; jmp back
			vm, _ := build(t, p)
			dev := &numbers{}
			if err := errors.Join(vm.ports.Add(port, 4, dev), vm.mmio.Add(addr, 0x1000, dev)); err != nil {
				t.Fatal(err)
			}
			if err := vm.Start(); err != nil {
				t.Fatal(err)
			}
			for dev.n.Load() == 0 {
				runtime.Gosched()
			}
			places := map[uint64]int{}
			for range 200 {
				if err := vm.Pause(); err != nil {
					t.Fatal(err)
				}
				w, err := vm.cpus[0].Where()
				if err != nil {
					t.Fatal(err)
				}
				b := make([]byte, 4)
				if _, err := vm.mem.ReadAt(b, store); err != nil {
					t.Fatal(err)
				}
				stored, want := binary.LittleEndian.Uint32(b), dev.n.Load()
				places[w.RIP-read]++
				if w.RIP == read+uint64(len(c.read)) {
					want-- // in the register, and not stored yet
				}
				if stored != want {
					t.Fatalf("at RIP %#x %d is stored, want %d of %d", w.RIP, stored, want, dev.n.Load())
				}
				if err := vm.Resume(); err != nil {
					t.Fatal(err)
				}
				for last := dev.n.Load(); dev.n.Load() == last; {
					runtime.Gosched()
				}
			}
			t.Logf("RIP, from the reading instruction: %v", places)
		})
	}
}

// TestNewRefuses hands New what the guest could not boot from or with.
func TestNewRefuses(t *testing.T) {
	k := payload(t, code{}.spin())
	for name, c := range map[string]struct {
		cfg  Config
		want string
	}{
		"no kernel":        {Config{}, ErrNoKernel.Error()},
		"unknown template": {Config{Kernel: k, Template: "fast"}, "template"},
	} {
		c.cfg.CPUs, c.cfg.Memory = 1, MinMemory
		if vm, err := New(&c.cfg); vm != nil || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := (&Config{Memory: MinMemory}).CheckBoot(); !errors.Is(err, ErrNoKernel) {
		t.Errorf("CheckBoot without a kernel: %v", err)
	}
}

func TestRebootsWarm(t *testing.T) {
	for cmdline, want := range map[string]bool{
		"":                                 false,
		BaseCmdline:                        false,
		BaseCmdline + " reboot=w":          true,
		"reboot=warm,s31,force":            true,
		"reboot=pci,warm":                  true,
		"reboot=w reboot=t,k":              true,
		"reboot=w reboot=cold":             false,
		"reboot=w,smp2":                    true,
		"reboot=w,soft":                    false,
		"reboot=w reboot=panic_cold":       true,
		"a=b -- reboot=w":                  false,
		"noreboot=w":                       false,
		BaseCmdline + " reboot= quiet x=w": false,
	} {
		if got := rebootsWarm(cmdline); got != want {
			t.Errorf("%q: %t, want %t", cmdline, got, want)
		}
	}
}

// payload wraps code in a parsed kernel.
func payload(t *testing.T, c code) *linux.Kernel {
	t.Helper()
	elf := c.elf()
	k, err := linux.Parse(bytes.NewReader(elf), int64(len(elf)))
	if err != nil {
		t.Fatal(err)
	}
	return k
}
