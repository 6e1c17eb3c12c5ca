package vmm

import (
	"context"
	"fmt"
	"time"

	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

// Trace is where one vCPU stood in the looks of VM.Trace, in order.
type Trace struct {
	CPU   int
	Looks []vcpu.Where
}

const (
	traceLooks    = 10
	traceInterval = 200 * time.Millisecond

	// traceEnough is how many looks it takes to call a vCPU hung: a kernel is deaf now and then, but not for a second.
	traceEnough = 6
)

// Deaf reports whether the vCPU was found in its kernel with interrupts off, and not halted, whenever it was looked at.
// A kernel that has come up is not for as long, unless it is hung: it waits for a lock that it holds itself, say.
func (t *Trace) Deaf() bool {
	for _, w := range t.Looks {
		if !w.Deaf() {
			return false
		}
	}
	return len(t.Looks) >= traceEnough
}

// String tells in one line where the vCPU stood last, and what the other looks add to that.
func (t *Trace) String() string {
	if len(t.Looks) == 0 {
		return fmt.Sprintf("vCPU %d: not looked at", t.CPU)
	}
	places := map[uint64]bool{}
	for _, w := range t.Looks {
		places[w.RIP] = true
	}
	s := fmt.Sprintf("vCPU %d %v", t.CPU, t.Looks[len(t.Looks)-1])
	if len(places) > 1 {
		s += fmt.Sprintf(", at %d addresses in %d looks", len(places), len(t.Looks))
	}
	if t.Deaf() {
		s += ", always with interrupts off: it hangs"
	}
	return s
}

// Trace finds out what the vCPUs of a guest do that does not do what it shall: it looks at each several times in two
// seconds, for which that one is stopped for a moment. It ends early, with what it has, when ctx or the VM ends; the
// error is ErrState if the VM does not run at all.
func (vm *VM) Trace(ctx context.Context) ([]Trace, error) {
	traces := make([]Trace, len(vm.cpus))
	for i := range traces {
		traces[i].CPU = i
	}
	tick := time.NewTicker(traceInterval)
	defer tick.Stop()
	for n := range traceLooks {
		if n > 0 {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return traces, nil
			case <-vm.ended:
				return traces, nil
			}
		}
		for i, c := range vm.cpus {
			w, err := vm.look(c)
			if err != nil && n > 0 && vm.isEnded() {
				return traces, nil
			}
			if err != nil {
				return nil, err
			}
			traces[i].Looks = append(traces[i].Looks, w)
		}
	}
	return traces, nil
}

// look stops one vCPU for as long as it takes to read its registers.
func (vm *VM) look(c *vcpu.VCPU) (vcpu.Where, error) {
	vm.mu.Lock() // Close waits until this is done
	defer vm.mu.Unlock()
	if vm.state == built || vm.isEnded() {
		return vcpu.Where{}, fmt.Errorf("look at vCPU %d: %w", c.ID(), ErrState)
	}
	if vm.state == running {
		c.Pause()
		defer c.Resume()
	}
	return c.Where()
}
