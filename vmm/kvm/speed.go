package kvm

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// SoftwareLimit separates the two kinds of KVM by the speed of a guest kernel's code, in instructions a second. Software
// KVM reaches about 1.2 million, a CPU without hardware help being emulated one instruction after the other; hardware
// reaches billions, and even hardware that is itself emulated reaches hundreds of millions.
const SoftwareLimit = 20e6

// speedWindows are how long the measurements last. The later ones are for a guest that looks slow, since a busy host may
// have let it run for none of the first ones' time: a lab, whose CPU is a thread among others.
var speedWindows = [...]time.Duration{5 * time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond}

// GuestSpeed measures how fast this host's KVM runs a guest kernel's code, in instructions a second: the best of some runs
// of a counting loop in protected mode at CPL 0. It takes about 10 ms, and 150 where that is slow.
func (s *System) GuestSpeed() (float64, error) { return bestSpeed(s.guestSpeed) }

func bestSpeed(measure func(window time.Duration) (float64, error)) (float64, error) {
	best := 0.0
	for i, window := range speedWindows {
		if i > 1 && best >= SoftwareLimit {
			break
		}
		v, err := measure(window)
		if err != nil {
			return 0, fmt.Errorf("measure guest speed: %w", err)
		}
		best = max(best, v)
	}
	return best, nil
}

func (s *System) guestSpeed(window time.Duration) (_ float64, err error) {
	mem, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, fmt.Errorf("mmap: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(mem)) }()
	copy(mem, []byte{
		0x40,       // 0: inc eax
		0xEB, 0xFD, // 1: jmp 0
	})
	vm, err := s.CreateVM()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, vm.Close()) }()
	// VMX without unrestricted guest runs real mode from these pages; elsewhere they lie idle.
	if err := errors.Join(vm.SetIdentityMapAddr(0xFFFB_C000), vm.SetTSSAddr(0xFFFB_D000)); err != nil {
		return 0, err
	}
	if err := vm.SetMemory(0, 0, 0x1000, mem); err != nil {
		return 0, err
	}
	cpu, err := vm.CreateVCPU(0)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, cpu.Close()) }()
	if err := cpu.enterFlat(0x1000); err != nil {
		return 0, err
	}
	return cpu.count(window)
}

// enterFlat puts the vCPU at rip in 32-bit protected mode without paging, all segments flat.
func (v *VCPU) enterFlat(rip uint64) error {
	sregs, err := v.SRegs()
	if err != nil {
		return err
	}
	const typeData, typeCode = 3, 11 // accessed, writable or readable
	data := Segment{Limit: 0xFFFF_FFFF, Selector: 16, Typ: typeData, Present: 1, DB: 1, S: 1, G: 1}
	sregs.DS, sregs.ES, sregs.FS, sregs.GS, sregs.SS = data, data, data, data, data
	sregs.CS = data
	sregs.CS.Selector, sregs.CS.Typ = 8, typeCode
	sregs.CR0 |= 1 // PE
	if err := v.SetSRegs(&sregs); err != nil {
		return err
	}
	return v.SetRegs(&Regs{RIP: rip, RFLAGS: 2})
}

// count runs the loop for window and returns its speed.
func (v *VCPU) count(window time.Duration) (float64, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid := unix.Gettid()
	defer after(window, func() {
		v.Interrupt(true)
		_ = unix.Tgkill(os.Getpid(), tid, unix.SIGURG) // the Go runtime's own handler takes it; the thread is locked
	})()
	start := time.Now()
	for {
		switch err := v.Run(); {
		case errors.Is(err, ErrInterrupted):
			if time.Since(start) < window {
				continue // some other signal
			}
			regs, err := v.Regs()
			return 2 * float64(uint32(regs.RAX)) / time.Since(start).Seconds(), err
		case err != nil:
			return 0, err
		default:
			return 0, fmt.Errorf("the counting loop left with %v", v.Exit())
		}
	}
}

// after calls f once, after d, in its own goroutine. The function that it returns prevents the call or waits for its end, so
// that f may use what is closed next; it is called once.
func after(d time.Duration, f func()) (cancel func()) {
	called := make(chan struct{})
	timer := time.AfterFunc(d, func() {
		defer close(called)
		f()
	})
	return func() {
		if !timer.Stop() {
			<-called
		}
	}
}
