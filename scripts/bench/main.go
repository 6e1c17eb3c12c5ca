// Bench measures what a VM costs to start, kvmlet's beside QEMU's, and prints a table for README.
//
//	go run ./scripts/bench [-starts 11] [-boots 3] [-cpus 1] [-memory 512] [-phases] [-lab]
//
// Both VMMs get the same kernel, the same initramfs with kvmlet's agent as PID 1, the same command line, CPUs and
// memory, and the same devices: a serial port whose output is discarded, a virtio console with the agent's port, a
// virtio entropy source. kvmlet runs as a user has it: `kvmlet run -- COMMAND`. QEMU gets its microvm machine with what
// makes it start fastest: qboot for firmware, no option ROMs, PIC, PIT, RTC, default devices or configuration files. The
// kernel has no PVH entry, which is the only way in which QEMU takes an unpacked kernel, so QEMU gets the bzImage.
//
// The rounds of the two alternate, after one of each that warms the page cache; the figures are medians. Measured are
//
//   - the time from exec to the first guest instruction: from the tracepoint sched_process_exec to the first kvm_entry
//     of one of the process's threads. Nothing is traced afterwards. QEMU's first instruction is its firmware's.
//   - the time from exec to the agent's first answer: the guest's agent is asked to run a program that does not exist
//     and says so. That is one exchange after its first message, the hello, and is seen from outside of both VMMs alike:
//     kvmlet prints the answer; on QEMU's socket this program asks, with the same client that kvmlet has inside.
//   - the VMM's own memory at that moment: the process is stopped, and the Rss of all its mappings in smaps summed up,
//     but for the guest's RAM.
//
// The first two are also given in instructions: the sum of what the VMM, the kernel with its KVM and the guest executed.
// They are counted in a lab (see `kvmlet lab`) whose clock is its instruction counter, so the load of the machine does
// not change them; the time in which its one CPU was idle is taken off. Where KVM is hardware and tracefs may be used the
// times are this host's; elsewhere, or with -lab, they come from an ordinary lab.
//
// -phases also shows where kvmlet's time goes until the first guest instruction, by uprobes on its functions.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/kvmlet/kvmlet/guest/lab"
	"github.com/kvmlet/kvmlet/scripts/internal/measure"
	"github.com/kvmlet/kvmlet/vmm"
	"github.com/kvmlet/kvmlet/vmm/kvm"
)

type options struct {
	rounds
	counted bool // this machine's clock counts instructions
	cpus    int
	memory  int    // MiB
	lab     bool   // even if this host would do
	kit     string // set in the lab: where everything lies ready

	// The kernel's command line, as kvmlet makes it; empty: to be found out by booting a guest.
	cmdline string
}

// rounds say what one host, or one lab, measures.
type rounds struct {
	starts int // until the first guest instruction
	boots  int // until the agent answers
	phases bool
}

func main() {
	var o options
	flag.IntVar(&o.starts, "starts", 11, "measure so many starts up to the first guest instruction")
	flag.IntVar(&o.boots, "boots", 3, "measure so many boots up to the agent's answer")
	flag.IntVar(&o.cpus, "cpus", 1, "the VM's CPUs")
	flag.IntVar(&o.memory, "memory", 512, "the VM's memory in `MiB`")
	flag.BoolVar(&o.counted, "counted", false, "the clock counts instructions: for the lab's side")
	flag.BoolVar(&o.phases, "phases", false, "show where kvmlet's time goes")
	flag.BoolVar(&o.lab, "lab", false, "measure times in the lab even if this host's KVM is hardware")
	flag.StringVar(&o.kit, "kit", "", "measure here, with what lies ready in `DIR`, and print JSON: for the lab's side")
	flag.StringVar(&o.cmdline, "cmdline", "", "the kernel's command `LINE`, which spares a boot: for the lab's side")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	run := orchestrate
	if o.kit != "" {
		run = measureHere
	}
	if err := run(ctx, &o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// orchestrate prepares a kit, has it measured twice and prints the tables.
func orchestrate(ctx context.Context, o *options) error {
	if flag.NArg() > 0 || o.starts < 1 || o.boots < 0 {
		return errors.New("want no arguments, one start at least, and no negative numbers")
	}
	dir, err := os.MkdirTemp("", "kvmlet-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := prepare(ctx, dir); err != nil {
		return err
	}
	where := "the lab"
	var timed *findings
	if why := unfit(); o.lab || why != "" {
		timed, err = inLab(ctx, o, dir, o.rounds, false)
	} else {
		where = "this host"
		timed, err = gather(ctx, o, dir, o.rounds)
	}
	if err != nil {
		return err
	}
	o.cmdline = timed.Cmdline
	few := rounds{starts: min(o.starts, 5), boots: min(o.boots, 3), phases: o.phases} // counts hardly vary
	counted, err := inLab(ctx, o, dir, few, true)
	if err != nil {
		return err
	}
	return report(os.Stdout, o, where, timed, counted)
}

// prepare puts into dir what is measured: kvmlet as `make build` makes it, the kernel and one initramfs with kvmlet as
// its init.
func prepare(ctx context.Context, dir string) (err error) {
	program := filepath.Join(dir, kvmletFile)
	if err := measure.Build(ctx, program); err != nil {
		return err
	}
	i, err := vmm.OpenImage(ctx, vmm.ImageOptions{Agent: true, Init: program})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, i.Close()) }()
	var parts []io.Reader
	for _, b := range i.Initrd {
		padding := make([]byte, -b.Size()&3)
		parts = append(parts, io.NewSectionReader(b, 0, b.Size()), bytes.NewReader(padding))
	}
	f, err := os.Create(filepath.Join(dir, initrdFile))
	if err != nil {
		return err
	}
	_, err = io.Copy(f, io.MultiReader(parts...))
	return errors.Join(err, f.Close())
}

// inLab has a lab measure the kit in dir. With icount its one CPU's clock counts instructions.
func inLab(ctx context.Context, o *options, dir string, r rounds, icount bool) (*findings, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	cfg := lab.Config{
		Args: []string{
			self, "-kit", dir, fmt.Sprintf("-starts=%d", r.starts), fmt.Sprintf("-boots=%d", r.boots),
			fmt.Sprintf("-phases=%v", r.phases), fmt.Sprintf("-cpus=%d", o.cpus), fmt.Sprintf("-memory=%d", o.memory),
			"-cmdline=" + o.cmdline, fmt.Sprintf("-counted=%v", icount),
		},
		Stdout:   &out,
		Stderr:   os.Stderr,
		Signals:  signals,
		Icount:   icount,
		Init:     func(context.Context) (string, error) { return filepath.Join(dir, kvmletFile), nil },
		Progress: func(line string) { fmt.Fprintln(os.Stderr, "bench:", line) },
	}
	if icount {
		cfg.CPUs = 1
	}
	status, err := lab.Run(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if status.Code != 0 {
		return nil, fmt.Errorf("measuring in the lab failed with status %d", status.Code)
	}
	f := new(findings)
	if err := json.Unmarshal(out.Bytes(), f); err != nil {
		return nil, fmt.Errorf("the lab's findings: %w", err)
	}
	return f, nil
}

// measureHere is the lab's side of inLab.
func measureHere(ctx context.Context, o *options) error {
	f, err := gather(ctx, o, o.kit, o.rounds)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(f)
}

// unfit says why times cannot be measured on this host, or nothing if they can.
func unfit() string {
	if err := kvm.CheckHardware(); err != nil {
		return err.Error()
	}
	t, err := openTrace(false)
	if err != nil {
		return err.Error()
	}
	return errString(t.close())
}

func errString(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
