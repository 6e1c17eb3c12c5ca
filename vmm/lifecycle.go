package vmm

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

// Outcome says how a VM ended.
type Outcome int

// The ways in which a VM ends.
const (
	PowerOff    Outcome = iota + 1 // the guest powered itself off
	Reboot                         // the guest asked for a reset
	TripleFault                    // a vCPU faulted while a double fault was delivered
	Panic                          // the guest's kernel reported a panic
	Stopped                        // Stop was called
	Failed                         // the VMM cannot go on; End.Err says why
)

func (o Outcome) String() string {
	switch o {
	case PowerOff:
		return "power-off"
	case Reboot:
		return "reboot"
	case TripleFault:
		return "triple fault"
	case Panic:
		return "guest panic"
	case Stopped:
		return "stopped"
	case Failed:
		return "failed"
	default:
		return fmt.Sprintf("outcome %d", int(o))
	}
}

// End is a VM's outcome and, where it failed, why.
type End struct {
	Outcome Outcome
	Err     error
}

// lifecycle is the part of a VM that starts, pauses and ends it:
//
//	built --Start--> running <--Pause/Resume--> paused
//	  any state --the guest, Stop or a failure--> ended --Close--> closed
type lifecycle struct {
	mu     sync.Mutex
	state  runState
	end    End
	ended  chan struct{} // closed with the first end
	closed bool
}

type runState int

const (
	built runState = iota
	running
	pausedState
)

// ErrState reports a call that does not fit the VM's state: Resume before Start, or Pause after its end.
var ErrState = errors.New("vmm: not possible in the VM's present state")

// Start lets the vCPUs run.
func (vm *VM) Start() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.state != built || vm.isEnded() {
		return fmt.Errorf("start: %w", ErrState)
	}
	for _, c := range vm.cpus {
		c.Start()
	}
	vm.state = running
	for _, c := range vm.cpus {
		c.Resume()
	}
	return nil
}

// Pause stops the vCPUs. When it returns, each is outside the guest with its last access complete. Devices go on with
// the requests that they have.
func (vm *VM) Pause() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	switch {
	case vm.state == built || vm.isEnded():
		return fmt.Errorf("pause: %w", ErrState)
	case vm.state == pausedState:
		return nil
	}
	for _, c := range vm.cpus {
		c.Pause()
	}
	vm.state = pausedState
	return nil
}

// Resume undoes Pause.
func (vm *VM) Resume() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	switch {
	case vm.state == built || vm.isEnded():
		return fmt.Errorf("resume: %w", ErrState)
	case vm.state == running:
		return nil
	}
	vm.state = running
	for _, c := range vm.cpus {
		c.Resume()
	}
	return nil
}

// Wait returns how the VM ended, or ctx's error if that comes first; the VM goes on then.
func (vm *VM) Wait(ctx context.Context) (End, error) {
	select {
	case <-vm.ended:
		return vm.end, nil
	case <-ctx.Done():
		return End{}, ctx.Err()
	}
}

// Ended is closed when the VM has ended.
func (vm *VM) Ended() <-chan struct{} { return vm.ended }

// Stop ends the VM at once, as pulling the plug would. PressPowerButton asks the guest instead.
func (vm *VM) Stop() { vm.finish(End{Outcome: Stopped}) }

// finish records the first end, hangs up the agent's port and stops the vCPUs. It waits for nobody, as it may run on a
// vCPU's own thread. Who sees the port's end finds the VM ended.
func (vm *VM) finish(e End) {
	vm.endMu.Lock()
	defer vm.endMu.Unlock()
	if vm.isEnded() {
		return
	}
	vm.end = e
	close(vm.ended)
	if vm.agentPort != nil {
		vm.agentPort.Hangup()
	}
	for _, c := range vm.cpus {
		c.RequestStop()
	}
}

func (vm *VM) isEnded() bool {
	select {
	case <-vm.ended:
		return true
	default:
		return false
	}
}

// Ended implements vcpu.Machine.
func (m machine) Ended(_ int, err error) {
	switch {
	case errors.Is(err, vcpu.ErrTripleFault):
		m.vm.finish(End{Outcome: TripleFault})
	case errors.Is(err, vcpu.ErrShutdown):
		m.vm.leave(PowerOff)
	case errors.Is(err, vcpu.ErrReset):
		m.vm.leave(Reboot)
	case errors.Is(err, vcpu.ErrCrash):
		m.vm.finish(End{Outcome: Panic})
	default:
		m.vm.finish(End{Outcome: Failed, Err: err})
	}
}

// Close ends the VM if it has not ended, stops its devices, and gives back its memory, threads and files. The VM's
// backends, disks and taps, are closed too. A console writer that does not return is left behind after two seconds. Close
// may be called in any state; a second call does nothing.
func (vm *VM) Close() error {
	vm.Stop()
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.closed {
		return nil
	}
	vm.closed = true
	if vm.state != built {
		for _, c := range vm.cpus {
			c.Stop()
		}
	}
	return vm.release()
}
