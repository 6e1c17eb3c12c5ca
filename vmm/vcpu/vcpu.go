// Package vcpu runs virtual CPUs: one locked thread each, the KVM_RUN loop, kicks, pause and resume, CPUID templates and
// the register state that a boot protocol asks for.
package vcpu

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/vmm/kvm"
)

// Machine is what a vCPU's exits are addressed to. Its methods are called on the vCPU's own thread, from several vCPUs
// at once. Of the vCPU's methods they may call RequestStop, ID and Exits; the others would wait for the caller.
type Machine interface {
	// PortIO carries out the access: data holds units of size bytes, written by the guest or to be filled.
	PortIO(port uint16, size int, write bool, data []byte)
	// MMIO carries out the access: data is what the guest wrote, or to be filled.
	MMIO(addr uint64, write bool, data []byte)
	// Ended says that vCPU id cannot go on, and why: one of this package's errors, or KVM's own. It is called once.
	Ended(id int, err error)
}

// Why a vCPU ends.
var (
	// ErrTripleFault reports a fault while a double fault was being delivered.
	ErrTripleFault = errors.New("triple fault")
	// ErrShutdown, ErrReset and ErrCrash report that the guest told KVM itself (KVM_EXIT_SYSTEM_EVENT).
	ErrShutdown = errors.New("shut down through KVM")
	ErrReset    = errors.New("reset through KVM")
	ErrCrash    = errors.New("crash reported through KVM")
)

// EmulationError reports an instruction that KVM had to emulate and does not know. Software KVM meets it in any stock
// kernel; hardware KVM, when the guest runs code in device memory.
type EmulationError struct {
	CPU  int
	RIP  uint64
	Insn []byte // may be empty: not every KVM tells
}

func (e *EmulationError) Error() string {
	insn := "an instruction"
	if len(e.Insn) > 0 {
		insn = fmt.Sprintf("the instruction % x", e.Insn)
	}
	return fmt.Sprintf("vCPU %d: KVM cannot emulate %s at RIP %#x (if `kvmlet probe` says that this host's KVM is "+
		"software, use --accel lab)", e.CPU, insn, e.RIP)
}

// VCPU is one virtual CPU and the thread that runs it. Its life is: New, the setters of this package, Start, any number
// of Pause and Resume, Stop, Close.
type VCPU struct {
	id      int
	kvm     *kvm.VCPU
	machine Machine
	exits   atomic.Uint64

	mu     sync.Mutex
	cond   sync.Cond // signalled when want or parked changes
	want   state     // what the owner asks for
	parked bool      // the thread is not in KVM_RUN and will not enter it until want changes; no access is incomplete
	tid    int       // the thread, once it runs
	done   chan struct{}
}

type state int

const (
	running state = iota
	paused
	stopped
)

// New wraps vCPU number id. The VCPU owns k from here on.
func New(id int, k *kvm.VCPU, m Machine) *VCPU {
	v := &VCPU{id: id, kvm: k, machine: m, want: paused, done: make(chan struct{})}
	v.cond.L = &v.mu
	return v
}

// ID returns the vCPU's number, which is its APIC id.
func (v *VCPU) ID() int { return v.id }

// Exits returns how often the guest left KVM_RUN for the VMM.
func (v *VCPU) Exits() uint64 { return v.exits.Load() }

// Start makes the vCPU's thread. The vCPU is paused; Resume lets it run. If the vCPU is stopped before or meanwhile, the
// thread ends at once.
func (v *VCPU) Start() {
	go v.loop()
	v.mu.Lock()
	defer v.mu.Unlock()
	for !v.parked && v.want != stopped {
		v.cond.Wait()
	}
}

// Resume lets the vCPU enter the guest.
func (v *VCPU) Resume() { v.set(running) }

// Pause returns when the vCPU is outside the guest, with its last exit's access complete: what the guest read is in its
// register, and RIP is behind the instruction. It must not be called from Machine's methods.
func (v *VCPU) Pause() {
	v.set(paused)
	v.mu.Lock()
	defer v.mu.Unlock()
	for !v.parked && v.want == paused {
		v.cond.Wait()
	}
}

// set changes what the thread is asked for and wakes it, wherever it is.
func (v *VCPU) set(s state) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.want == stopped {
		return
	}
	v.want = s
	v.cond.Broadcast()
	v.kvm.Interrupt(s != running)
	if s != running && v.tid != 0 && !v.parked {
		// KVM reads immediate_exit on entry only; a thread that is in the guest needs a signal. The Go runtime
		// handles SIGURG on every thread and takes a stray one for a preemption request, so no handler is needed.
		_ = unix.Tgkill(os.Getpid(), v.tid, unix.SIGURG)
	}
}

// RequestStop asks the thread to end without waiting for it. It may be called from Machine's methods.
func (v *VCPU) RequestStop() { v.set(stopped) }

// Stop ends the thread and waits for it. Start must have been called.
func (v *VCPU) Stop() {
	v.set(stopped)
	<-v.done
}

// Close releases the vCPU. If Start was called, Stop comes first.
func (v *VCPU) Close() error { return v.kvm.Close() }

func (v *VCPU) loop() {
	defer close(v.done)
	runtime.LockOSThread() // for good: KVM wants one thread per vCPU, and the thread ends with the goroutine
	v.mu.Lock()
	v.tid = unix.Gettid()
	v.mu.Unlock()
	incomplete := false
	for v.mayRun(incomplete) {
		err := v.kvm.Run()
		// KVM completes an access when it is entered again: it loads the register and moves RIP (api.rst, 5, kvm_run).
		incomplete = err == nil
		switch {
		case err == nil:
			v.exits.Add(1)
			err = v.dispatch()
			if err == nil {
				continue
			}
			v.end(err)
		case errors.Is(err, kvm.ErrInterrupted):
		default:
			v.end(fmt.Errorf("vCPU %d: %w", v.id, err))
		}
	}
}

// mayRun parks the thread while the vCPU is paused. It returns false when it is to end. With an access to complete the
// thread enters KVM once more first: that has been told to return before it enters the guest. An access of several parts
// takes one entry for each; KVM ends an instruction that repeats itself between two of them.
func (v *VCPU) mayRun(incomplete bool) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.want == running || v.want == paused && incomplete {
		return true
	}
	v.parked = true
	v.cond.Broadcast()
	for v.want == paused {
		v.cond.Wait()
	}
	v.parked = false
	if v.want == stopped {
		v.tid = 0 // the thread's number may be another's soon
		return false
	}
	return true
}

// end reports err and makes sure that the guest is not entered again.
func (v *VCPU) end(err error) {
	v.RequestStop()
	v.machine.Ended(v.id, err)
}

// dispatch carries out what the guest left for. An error means that the vCPU cannot go on.
func (v *VCPU) dispatch() error {
	switch reason := v.kvm.Exit(); reason {
	case kvm.ExitIO:
		io := v.kvm.PortIO()
		v.machine.PortIO(io.Port, io.Size, io.Write, io.Data)
		return nil
	case kvm.ExitMMIO:
		m := v.kvm.MMIO()
		v.machine.MMIO(m.Addr, m.Write, m.Data)
		return nil
	case kvm.ExitIntr, kvm.ExitIRQWindow:
		return nil
	case kvm.ExitShutdown:
		return ErrTripleFault
	case kvm.ExitSystemEvent:
		return v.systemEvent()
	case kvm.ExitFailEntry:
		return fmt.Errorf("vCPU %d: the CPU refused to enter the guest, hardware reason %#x", v.id, v.kvm.FailEntry())
	case kvm.ExitInternalError:
		return v.internalError()
	default:
		return fmt.Errorf("vCPU %d: unexpected %v", v.id, reason)
	}
}

func (v *VCPU) systemEvent() error {
	switch t := v.kvm.SystemEvent(); t {
	case kvm.SystemEventShutdown:
		return ErrShutdown
	case kvm.SystemEventReset:
		return ErrReset
	case kvm.SystemEventCrash:
		return ErrCrash
	default:
		return fmt.Errorf("vCPU %d: unexpected system event %d", v.id, t)
	}
}

func (v *VCPU) internalError() error {
	e := v.kvm.InternalError()
	if e.SubError == kvm.InternalErrorDelivery {
		events, err := v.kvm.Events()
		if err != nil {
			return err
		}
		if !events.Injected() {
			// No event is being delivered: KVM's check (svm_check_emulate_instruction) looks at the type in EXITINTINFO
			// but not at its valid bit, and QEMU's SVM leaves the type of the last event there. The guest's access to
			// device memory has not been carried out; at the next entry it is tried again, without what was left.
			return nil
		}
	}
	if e.SubError != kvm.InternalErrorEmulation {
		return fmt.Errorf("vCPU %d: KVM internal error, suberror %d, data %#x", v.id, e.SubError, e.Data)
	}
	regs, err := v.kvm.Regs()
	if err != nil {
		return err
	}
	return &EmulationError{CPU: v.id, RIP: regs.RIP, Insn: e.Insn}
}
