package main

import (
	"debug/elf"
	"debug/gosym"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// milestones are functions of kvmlet in the order in which a start reaches them.
var milestones = []string{
	"runtime.schedinit",
	"runtime.main",
	"main.main",
	"vmm/cli.newRoot",
	"vmm/cli.runVM",
	"vmm.OpenImage",
	"guest/image.(*Store).Kernel",
	"guest/linux.openFile",
	"guest/linux.(*Kernel).SetUnpacked",
	"vmm.(*Image).addAgent",
	"guest/image.Initramfs",
	"guest/image.(*Store).Init",
	"vmm.New",
	"vmm/kvm.Open",
	"guest/memory.New",
	"guest/linux.Load",
	"guest/linux.readAll",
	"guest/linux.(*loader).finish",
	"vmm/kvm.(*System).CreateVM",
	"vmm/kvm.(*VM).CreateIRQChip",
	"vmm/kvm.(*VM).CreatePIT",
	"vmm.newInterrupts",
	"vmm.addMemory",
	"vmm.(*VM).addPlatform",
	"vmm.(*VM).addVirtio",
	"vmm/kvm.(*System).SupportedCPUID",
	"vmm/kvm.(*VM).CreateVCPU",
	"vmm/vcpu.(*VCPU).SetCPUID",
	"vmm/vcpu.(*VCPU).Reset",
	"vmm/vcpu.(*VCPU).SetEntry",
	"vmm.(*VM).Start",
	"vmm/vcpu.(*VCPU).loop",
	"vmm/kvm.(*VCPU).Run",
}

// phase is the time from one milestone to the next.
type phase struct {
	Name string // the milestone at its start; the first is the exec
	Took time.Duration
}

const (
	module      = "github.com/kvmlet/kvmlet/"
	probeGroup  = "kvmlet_bench"
	probePrefix = "m" // and the milestone's number
)

// probes makes an event for each milestone of the program at path and has t record them. The caller removes them again.
func (t *trace) probes(path string) (remove func() error, err error) {
	offsets, err := functionOffsets(path)
	if err != nil {
		return nil, err
	}
	const list = "uprobe_events"
	all := filepath.Join(tracefs, list)
	var b strings.Builder
	for i, name := range milestones {
		off, ok := offsets[name]
		if !ok {
			off, ok = offsets[module+name]
		}
		if !ok { // inlined or gone: its time counts to the milestone before
			fmt.Fprintf(os.Stderr, "bench: kvmlet has no function %s\n", name)
			continue
		}
		fmt.Fprintf(&b, "p:%s/%s%d %s:%#x\n", probeGroup, probePrefix, i, path, off)
	}
	f, err := os.OpenFile(all, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return nil, err
	}
	for l := range strings.Lines(b.String()) { // the kernel takes one a write
		if _, e := f.WriteString(l); e != nil {
			err = errors.Join(err, fmt.Errorf("probe %s: %w", strings.TrimSpace(l), e))
		}
	}
	enable := filepath.Join("events", probeGroup, "enable")
	remove = func() error {
		err := t.set(enable, "0")
		for i := range milestones {
			_, e := fmt.Fprintf(f, "-:%s/%s%d\n", probeGroup, probePrefix, i)
			if !errors.Is(e, os.ErrNotExist) {
				err = errors.Join(err, e)
			}
		}
		return errors.Join(err, f.Close())
	}
	if err == nil {
		err = t.set(enable, "1")
	}
	if err != nil {
		return nil, errors.Join(err, remove())
	}
	return remove, nil
}

// functionOffsets returns where in the file each function of a Go program begins. It reads the table that the runtime
// needs for tracebacks, which is there without a symbol table, too.
func functionOffsets(path string) (map[string]uint64, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, table := f.Section(".text"), f.Section(".gopclntab")
	if text == nil || table == nil {
		return nil, fmt.Errorf("%s: not a Go program", path)
	}
	data, err := table.Data()
	if err != nil {
		return nil, err
	}
	symbols, err := gosym.NewTable(nil, gosym.NewLineTable(data, text.Addr))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	offsets := make(map[string]uint64, len(symbols.Funcs))
	for _, fn := range symbols.Funcs {
		offsets[fn.Name] = fn.Entry - text.Addr + text.Offset
	}
	return offsets, nil
}

// phases turns the events of one start into phases. A milestone that is reached again, as for a second CPU, counts to
// the one before it.
func phases(start time.Duration, events []event) []phase {
	var list []phase
	name, since := "exec", start
	seen := map[string]bool{}
	for _, e := range events {
		var i int
		probe := true
		if _, err := fmt.Sscanf(e.name, probePrefix+"%d", &i); err != nil || i < 0 || i >= len(milestones) {
			probe = false
		}
		if seen[e.name] || !probe && e.name != "kvm_entry" {
			continue
		}
		seen[e.name] = true
		list = append(list, phase{name, e.at - since})
		since = e.at
		if probe {
			name = milestones[i]
		}
	}
	return list
}
