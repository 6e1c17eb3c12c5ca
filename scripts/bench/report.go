package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/scripts/internal/measure"
)

// findings are what one host, or one lab, found.
type findings struct {
	Kernel  string // of the machine that measured
	QEMU    string // its version
	CPUs    int
	Cmdline string    // of the guests' kernel
	Load    [2]string // before and after
	Samples []sample
	Phases  []phase `json:",omitempty"`
}

// gather carries out the rounds on this machine.
func gather(ctx context.Context, o *options, kit string, r rounds) (_ *findings, err error) {
	f := &findings{CPUs: runtime.NumCPU(), Kernel: release(), QEMU: qemuVersion(ctx)}
	vms, err := machines(ctx, o, kit)
	if err != nil {
		return nil, err
	}
	f.Cmdline = o.cmdline
	t, err := openTrace(o.counted)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	for _, m := range vms { // puts programs and files into the page cache
		if _, err := m.round(ctx, t, o, false); err != nil {
			return nil, err
		}
	}
	f.Load[0] = measure.Load()
	for i := range r.boots + r.starts {
		order := slices.Clone(vms)
		if i%2 != 0 {
			slices.Reverse(order)
		}
		for _, m := range order {
			s, err := m.round(ctx, t, o, i < r.boots)
			if err != nil {
				return nil, err
			}
			what := "start"
			if i < r.boots {
				what = "boot"
			}
			fmt.Fprintf(os.Stderr, "bench: %s %d: %-12s first instruction %v, answer %v\n",
				what, i+1, m.name, s.Entry, s.Answer)
			s.Phases = nil
			f.Samples = append(f.Samples, s)
		}
	}
	f.Load[1] = measure.Load()
	if r.phases {
		f.Phases, err = measurePhases(ctx, t, o, vms[0], filepath.Join(kit, kvmletFile), r.starts)
	}
	return f, err
}

// measurePhases returns the medians of some starts that are slowed by probes.
func measurePhases(
	ctx context.Context, t *trace, o *options, m *machine, program string, n int,
) (list []phase, err error) {
	remove, err := t.probes(program)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	took := map[string][]time.Duration{}
	for range n {
		s, err := m.round(ctx, t, o, false)
		if err != nil {
			return nil, err
		}
		list = s.Phases
		for _, p := range s.Phases {
			took[p.Name] = append(took[p.Name], p.Took)
		}
	}
	for i, p := range list {
		list[i].Took = measure.Median(took[p.Name])
	}
	return list, nil
}

func release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// of returns what get finds in the samples of a machine, without zeros: rounds that did not look.
func (f *findings) of(machine string, get func(*sample) int64) (values []int64) {
	for i := range f.Samples {
		if s := &f.Samples[i]; s.Machine == machine && get(s) != 0 {
			values = append(values, get(s))
		}
	}
	return values
}

// The quantities of a sample.
func entry(s *sample) int64  { return int64(s.Entry) }
func answer(s *sample) int64 { return int64(s.Answer) }
func total(s *sample) int64  { return s.Memory.Total }
func anon(s *sample) int64   { return s.Memory.Anon }

// report prints the tables, as Markdown.
func report(w io.Writer, o *options, where string, timed, counted *findings) error {
	var b strings.Builder
	fmt.Fprintf(&b, "VM: %d CPU(s), %d MiB. Times: medians in %s, %d CPUs, Linux %s, %s; load %s before, %s after.\n",
		o.cpus, o.memory, where, timed.CPUs, timed.Kernel, timed.QEMU, timed.Load[0], timed.Load[1])
	fmt.Fprintf(&b, "Instructions: medians in a lab whose one CPU counts them. Load of this host now: %s.\n\n", measure.Load())
	b.WriteString("| | kvmlet | QEMU microvm | ratio | aim | rounds, spread |\n|---|--:|--:|--:|--:|---|\n")
	for _, r := range []struct {
		what   string
		from   *findings
		get    func(*sample) int64
		format func(int64) string
		aim    string
	}{
		{"exec to first guest instruction, time", timed, entry, milliseconds, "0.33"},
		{"exec to first guest instruction, instructions", counted, entry, millions, "0.33"},
		{"exec to the agent's answer, time", timed, answer, milliseconds, "1.00"},
		{"exec to the agent's answer, instructions", counted, answer, millions, "1.00"},
		{"the VMM's own memory, resident", timed, total, mebibytes, "0.33"},
		{"of it not backed by files", timed, anon, mebibytes, ""},
	} {
		ours, theirs := r.from.of("kvmlet", r.get), r.from.of("QEMU microvm", r.get)
		if len(ours) == 0 || len(theirs) == 0 {
			continue
		}
		a, b2 := measure.Median(ours), measure.Median(theirs)
		fmt.Fprintf(&b, "| %s | %s | %s | %.2f | %s | %d; %s, %s |\n", r.what, r.format(a), r.format(b2),
			float64(a)/float64(b2), r.aim, len(ours), spread(ours, r.format), spread(theirs, r.format))
	}
	writePhases(&b, timed.Phases, counted.Phases)
	_, err := io.WriteString(w, b.String())
	return err
}

func spread(values []int64, format func(int64) string) string {
	return format(slices.Min(values)) + " to " + format(slices.Max(values))
}

func milliseconds(v int64) string { return fmt.Sprintf("%.1f ms", float64(v)/1e6) }
func millions(v int64) string     { return fmt.Sprintf("%.1f M", float64(v)/1e6) } // the counting clock's nanosecond
func mebibytes(v int64) string    { return fmt.Sprintf("%.1f MiB", float64(v)/(1<<20)) }

// writePhases prints where kvmlet's time goes.
func writePhases(b *strings.Builder, timed, counted []phase) {
	if len(timed) == 0 {
		return
	}
	instructions := map[string]time.Duration{}
	for _, p := range counted {
		instructions[p.Name] = p.Took
	}
	b.WriteString("\nkvmlet from exec to the first guest instruction, slowed by probes. " +
		"A row lasts from the entry of its function to that of the next.\n\n")
	b.WriteString("| from | time | instructions |\n|---|--:|--:|\n")
	for _, p := range timed {
		fmt.Fprintf(b, "| %s | %s | %.2f M |\n", p.Name, milliseconds(int64(p.Took)), float64(instructions[p.Name])/1e6)
	}
}
