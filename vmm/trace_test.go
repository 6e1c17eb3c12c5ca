package vmm

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/vmm/kvm"
	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

func TestTraceRecognisesDeafCPUs(t *testing.T) {
	const on, off = 0x246, 0x46
	spin := vcpu.Where{RIP: 0x1000, RFLAGS: off}
	for name, c := range map[string]struct {
		odd  vcpu.Where // is seen once
		n    int
		want bool
	}{
		"always deaf":           {spin, traceLooks, true},
		"at other places":       {vcpu.Where{RIP: 0x1004, RFLAGS: off}, traceLooks, true},
		"interrupts on once":    {vcpu.Where{RIP: 0x1000, RFLAGS: on}, traceLooks, false},
		"in a program once":     {vcpu.Where{RIP: 0x1000, RFLAGS: off, CPL: 3}, traceLooks, false},
		"halted once":           {vcpu.Where{RIP: 0x1000, RFLAGS: off, Waits: kvm.MPHalted}, traceLooks, false},
		"not started":           {vcpu.Where{Waits: kvm.MPUninitialized}, traceLooks, false},
		"enough looks":          {spin, traceEnough, true},
		"too few looks":         {spin, traceEnough - 1, false},
		"not looked at, almost": {spin, 1, false},
	} {
		tr := Trace{CPU: 1, Looks: []vcpu.Where{c.odd}}
		for len(tr.Looks) < c.n {
			tr.Looks = append(tr.Looks, spin)
		}
		if tr.Deaf() != c.want || strings.Contains(tr.String(), "hangs") != c.want {
			t.Errorf("%s: %t, want %t: %v", name, tr.Deaf(), c.want, &tr)
		}
	}
	if none := (&Trace{}); none.Deaf() || !strings.Contains(none.String(), "not looked at") {
		t.Errorf("without a look: %v", none)
	}
}

// TestTrace looks at payloads that spin and that do not.
func TestTrace(t *testing.T) {
	for _, c := range []struct {
		name string
		code code
		rip  uint64 // at all looks
		deaf bool
		want string
	}{
		{"cli; jmp", code{0xFA}.spin(), codeBase + 1, true, "vCPU 0 runs at RIP 0x200001, RFLAGS 0x2, CPL 0"},
		{"sti; jmp", code{0xFB}.spin(), codeBase + 1, false, "vCPU 0 runs at RIP 0x200001, RFLAGS 0x202, CPL 0"},
		{"cli; hlt", code{0xFA, 0xF4}.spin(), codeBase + 2, false, "vCPU 0 is halted at RIP 0x200002, RFLAGS 0x2, CPL 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			vm, _ := build(t, c.code)
			if _, err := vm.Trace(t.Context()); !errors.Is(err, ErrState) {
				t.Errorf("before Start: %v", err)
			}
			if err := vm.Start(); err != nil {
				t.Fatal(err)
			}
			traces, err := vm.Trace(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(traces) != 1 || len(traces[0].Looks) != traceLooks {
				t.Fatalf("%v", traces)
			}
			tr := &traces[0]
			// The first look may come before the first instruction.
			for _, w := range tr.Looks[1:] {
				if w.RIP != c.rip {
					t.Errorf("at %#x, want %#x", w.RIP, c.rip)
				}
			}
			if tr.Deaf() != c.deaf || !strings.HasPrefix(tr.String(), c.want) {
				t.Errorf("%v", tr)
			}

			if err := vm.Pause(); err != nil {
				t.Fatal(err)
			}
			over, cancel := context.WithCancel(t.Context())
			cancel()
			if traces, err := vm.Trace(over); err != nil || len(traces[0].Looks) != 1 || vm.state != pausedState {
				t.Errorf("a look at a paused VM: %v, %v, state %d", traces, err, vm.state)
			}
			vm.Stop()
			if _, err := vm.Trace(t.Context()); !errors.Is(err, ErrState) {
				t.Errorf("after the end: %v", err)
			}
		})
	}
}
