package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/image"
	"github.com/kvmlet/kvmlet/guest/lab"
)

type labOptions struct {
	shares []string
	memory size
	cpus   int
	icount bool
	tty    bool
}

func newLab(s streams) *cobra.Command {
	o := labOptions{memory: lab.DefaultMemory}
	cmd := &cobra.Command{
		Use:   "lab [flags] -- COMMAND ARG...",
		Short: "Run a command in a machine that has hardware-like KVM, on a host that has none",
		Long: `lab runs a command in a QEMU machine without acceleration whose emulated CPU has SVM, so that Linux's own kvm_amd
serves /dev/kvm there. The files in it are this host's, read-only; what is written is kept in memory and lost at
the end, but for what lies in a --share, which is the host's own. Standard output and error come out here,
separately and byte for byte, signals reach the command, and its exit status is kvmlet's.

The first lab is booted, which takes some seconds, and kept; later ones start from there.`,
		Example: `  kvmlet lab -- ls -l /dev/kvm
  kvmlet lab --share . -- ./kvmlet run --accel kvm -- uname -a
  go test -exec 'kvmlet lab --share . --' ./vmm`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("no command given: it stands behind --, as in `kvmlet lab -- ls -l /dev/kvm`")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg := lab.Config{Args: args, Shares: o.shares, Memory: int64(o.memory), CPUs: o.cpus, Icount: o.icount}
			return runLab(cmd.Context(), s, cfg, o.tty)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the command's name is the command's, also without --
	f.StringArrayVar(&o.shares, "share", nil, "let the command change this `DIR` or file of the host")
	f.Var(&o.memory, "memory", "the lab's memory; the host gives what is used")
	f.IntVar(&o.cpus, "cpus", lab.DefaultCPUs, "the lab's CPUs")
	f.BoolVar(&o.icount, "icount", false, "let the lab's clock count instructions instead of time")
	f.BoolVarP(&o.tty, "tty", "t", false, "give the command a terminal")
	return cmd
}

// runInLab carries out `kvmlet run` by running it in the lab, where KVM is as on hardware. What the plan checked is
// checked again there; here it keeps mistakes from costing a boot.
func runInLab(ctx context.Context, s streams, o *runOptions, p *plan) error {
	// A lock taken in the lab does not reach the host's file system, so the disks are locked from here.
	var shares []string
	for _, d := range p.cfg.Disks {
		f, err := raw.Open(d.Path, raw.Options{ReadOnly: d.ReadOnly})
		if err != nil {
			return err
		}
		defer closeDisk(f)
		if !d.ReadOnly {
			shares = append(shares, d.Path)
		}
	}
	if err := p.prepare(ctx, s); err != nil { // in the lab the cache is read-only
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find kvmlet's own program: %w", err)
	}
	args := []string{exe, "run", "--accel", accelKVM, "--cpus", strconv.Itoa(o.cpus), "--memory", o.memory.String(),
		"--cpu", o.cpu, "--name", o.name}
	for _, d := range p.cfg.Disks {
		args = append(args, "--disk", formatDisk(d))
	}
	for _, n := range o.nets {
		args = append(args, "--net", n)
	}
	for flag, path := range map[string]string{"--kernel": o.kernel, "--initrd": o.initrd} {
		if path == "" {
			continue
		}
		if path, err = absolute(path); err != nil {
			return err
		}
		args = append(args, flag, path)
	}
	if o.appendLine != "" {
		args = append(args, "--append", o.appendLine)
	}
	if o.console != "" {
		path := o.console
		if path != "-" {
			if path, err = createShared(path); err != nil {
				return err
			}
			shares = append(shares, path)
		}
		args = append(args, "--console", path)
	}
	tty := o.tty || len(o.command) == 0 && isTerminal(s.in)
	if o.tty {
		args = append(args, "--tty")
	}
	if len(o.command) > 0 {
		args = append(append(args, "--"), o.command...)
	}
	cfg := lab.Config{Args: args, Shares: shares, Memory: labMemory(uint64(o.memory)), CPUs: lab.DefaultCPUs}
	return runLab(ctx, s, cfg, tty)
}

func closeDisk(b blk.Backend) { _ = b.Close() } // nothing was written through it

// labMemory is the memory of a lab for a VM of the given size: the usual, so that the kept lab serves, or what it takes.
func labMemory(vm uint64) int64 {
	const own = 1 << 30 // for the lab's kernel, its files in memory and the VMM
	if need := int64(vm) + own; need > lab.DefaultMemory {
		return need
	}
	return lab.DefaultMemory
}

// createShared makes an empty file for the lab to write to and returns its absolute path.
func createShared(path string) (string, error) {
	f, err := os.Create(path)
	if err != nil {
		return "", fmt.Errorf("console: %w", err)
	}
	if err := f.Close(); err != nil {
		return "", fmt.Errorf("console: %w", err)
	}
	return filepath.Abs(path)
}

// runLab connects a lab to our streams and turns its end into an exit status.
func runLab(ctx context.Context, s streams, cfg lab.Config, tty bool) error {
	progress := newProgress(s.err)
	defer progress.close()
	store, err := image.OpenStore("")
	if err != nil {
		return err
	}
	if cfg.Kernel, err = store.Kernel(ctx); err != nil {
		return err
	}
	cfg.Stdin, cfg.Stdout, cfg.Stderr = s.in, s.out, s.err
	cfg.Progress = progress.text

	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	cfg.Signals = signals

	if tty && isTerminal(s.in) {
		restore, err := rawTerminal(s.in)
		if err != nil {
			return err
		}
		defer restore()
		resize, stop := terminalSizes(s.out)
		defer stop()
		cfg.TTY, cfg.Resize = true, resize
	}
	status, err := lab.Run(ctx, cfg)
	var start *agent.StartError
	switch {
	case errors.As(err, &start):
		return &exitError{status.Code, err}
	case err != nil:
		if e := leaveError(context.Cause(ctx)); e != nil {
			return e
		}
		return err
	case status.Code != 0:
		return &exitError{status: status.Code}
	default:
		return nil
	}
}

// terminalSizes sends the size of a terminal now and whenever it changes.
func terminalSizes(f *os.File) (<-chan lab.Size, func()) {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	changed <- syscall.SIGWINCH
	sizes, done := make(chan lab.Size), make(chan struct{})
	go func() {
		for {
			select {
			case <-done:
				return
			case <-changed:
			}
			w, h, err := term.GetSize(int(f.Fd()))
			if err != nil {
				continue
			}
			select {
			case sizes <- lab.Size{Rows: uint16(h), Columns: uint16(w)}:
			case <-done:
				return
			}
		}
	}()
	return sizes, func() { signal.Stop(changed); close(done) }
}
