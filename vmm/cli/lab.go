package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/image"
	"github.com/kvmlet/kvmlet/guest/lab"
	"github.com/kvmlet/kvmlet/vmm"
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
		Long: `lab runs a command in a QEMU machine without acceleration whose emulated CPU has SVM, so that
Linux's own kvm_amd serves /dev/kvm there. The files in it are this host's; what is written to them
is kept in memory and lost at the end, but for what lies in a --share, which is the host's own.
Standard output and error come out here, separately and byte for byte, signals reach the command,
and its exit status is kvmlet's. When nobody reads the output any more, the command's next write
there fails or ends it by SIGPIPE, as on the host.

The first lab is booted, which takes some seconds, and kept; later ones start from there. The lab
keeps accidents away from this host's files, not attackers.

With --tty, Ctrl-A x stops the lab, with everything in it, once the command is up (before, Ctrl-C
does); Ctrl-A Ctrl-A sends one Ctrl-A.`,
		Example: `  kvmlet lab -- ls -l /dev/kvm
  kvmlet lab --share . -- ./kvmlet run --accel kvm -- uname -a
  go test -exec 'kvmlet lab --share . --' ./vmm`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) == 0:
				return errors.New("no command given: it stands behind --, as in `kvmlet lab -- ls -l /dev/kvm`")
			case args[0] == "":
				return errors.New("the command's name is empty")
			case lab.Inside():
				return errNested
			case o.cpus < 1 || o.cpus > lab.MaxCPUs:
				return fmt.Errorf("--cpus %d: want 1 to %d", o.cpus, lab.MaxCPUs)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			outliveReaders()
			cfg := lab.Config{Args: args, Shares: o.shares, Memory: int64(o.memory), CPUs: o.cpus, Icount: o.icount}
			tty := o.tty && s.interactive()
			return runLab(cmd.Context(), s, cfg, labView{tty: tty, escape: tty})
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the command's name is the command's, also without --
	f.StringArrayVar(&o.shares, "share", nil, "let the command change this `DIR` or file of the host; may be repeated")
	f.Var(&o.memory, "memory", "the lab's memory, a `SIZE`; the host gives what is used of it")
	f.IntVar(&o.cpus, "cpus", lab.DefaultCPUs, fmt.Sprintf("`NUMBER` of the lab's CPUs, 1 to %d", lab.MaxCPUs))
	f.BoolVar(&o.icount, "icount", false, "let the lab's clock count instructions instead of time")
	f.BoolVarP(&o.tty, "tty", "t", false, "give the command a terminal")
	return cmd
}

// errNested refuses what would take minutes to boot, to no use.
var errNested = errors.New("this is a lab already, in which KVM is as on hardware: run the command as it is")

// runInLab carries out `kvmlet run` by running it in the lab, where KVM is as on hardware, and tells why, unless it was
// asked for. What can be checked here is, so that mistakes do not cost a boot.
func (p *plan) runInLab(ctx context.Context, s streams, why string) (err error) {
	inputs, err := p.labInputs()
	if err == nil {
		err = p.checkFormats()
	}
	if err != nil {
		return err
	}
	// A lock taken in the lab does not reach the host's file system, so the disks are locked from here, byte for byte: two
	// programs must not have an image open. A tap is the lab's.
	disks := p.cfg
	disks.Nets, disks.Disks = nil, nil
	for _, d := range p.cfg.Disks {
		disks.Disks = append(disks.Disks, vmm.Disk{Path: d.Path, ReadOnly: d.ReadOnly})
	}
	if p.cfg.Resources, err = vmm.OpenResources(&disks); err != nil {
		return p.missingDisk(err)
	}
	signals := takeSignals()
	defer signals.release()
	progress := newProgress(s.err)
	err = p.prepare(ctx, signals, progress) // in the lab the cache is read-only
	progress.close()
	if err != nil {
		return err
	}
	if err := p.cfg.CheckBoot(); err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find kvmlet's own program: %w", err)
	}
	args, shares, err := p.labCommand(exe)
	if err != nil {
		return err
	}
	if why != "" {
		fprintf(s.err, "kvmlet: %s, so the VM runs in the lab, which is slower (see kvmlet probe)\n", why)
	}
	cfg := lab.Config{
		Args: args, Shares: shares, Inputs: inputs, Memory: labMemory(p.cfg.Memory), CPUs: lab.DefaultCPUs,
		Patience: labPatience,
	}
	return runLab(ctx, s, cfg, labView{
		vm:      true,
		tty:     s.interactive() && (p.o.tty || len(p.o.command) == 0),
		started: "Booting the VM in the lab",
	})
}

// labInputs are the files that the VM reads and does not write. It fails if the lab cannot have one of the VM's files.
func (p *plan) labInputs() (inputs []string, err error) {
	for _, d := range p.cfg.Disks {
		if disk.IsURI(d.Path) {
			return nil, fmt.Errorf("disk %s: the lab has no way to an NBD server (use a file, or a host with hardware KVM)", d.Path)
		}
		if err := lab.CheckFile(d.Path); errors.Is(err, lab.ErrNotInLab) { // all else is said better where it is opened
			return nil, fmt.Errorf("disk %s: %w", d.Path, err)
		}
		if d.ReadOnly {
			inputs = append(inputs, d.Path)
		}
	}
	for _, path := range []string{p.o.kernel, p.o.initrd} {
		if path == "" {
			continue
		}
		if path, err = absolute(path); err != nil {
			return nil, err
		}
		inputs = append(inputs, path)
	}
	return inputs, nil
}

// labCommand is the command that means in the lab what p means here, and the files that it writes. The console's is made.
func (p *plan) labCommand(exe string) (args, shares []string, err error) {
	o := p.o
	args = []string{
		exe, "run", "--accel", accelKVM, "--cpus", strconv.Itoa(o.cpus), "--memory", o.memory.String(),
		"--cpu", o.cpu, "--name", o.name, "--append", o.appendLine,
	}
	for _, d := range p.cfg.Disks {
		args = append(args, "--disk", formatDisk(inLab(d)))
		if !d.ReadOnly {
			shares = append(shares, d.Path)
		}
	}
	for _, n := range o.nets {
		args = append(args, "--net", n)
	}
	for _, f := range [][2]string{{"--kernel", o.kernel}, {"--initrd", o.initrd}} {
		if f[1] == "" {
			continue
		}
		path, err := absolute(f[1])
		if err != nil {
			return nil, nil, err
		}
		args = append(args, f[0], path)
	}
	if path := o.console; path != "" {
		if path != "-" && path != os.DevNull { // which is there as well
			if path, err = p.createShared(); err != nil {
				return nil, nil, err
			}
			shares = append(shares, path)
		}
		args = append(args, "--console", path)
	}
	if o.tty {
		args = append(args, "--tty")
	}
	return append(append(args, "--"), o.command...), shares, nil
}

// inLab is d as the lab has it: its file system knows no O_DIRECT, and is the host's page cache's in any case.
func inLab(d vmm.Disk) vmm.Disk {
	switch d.Cache {
	case disk.CacheNone:
		d.Cache = disk.CacheWriteback
	case disk.CacheDirectSync:
		d.Cache = disk.CacheWritethrough
	}
	return d
}

// labMemory is the memory of a lab for a VM of the given size: the usual, so that the kept lab serves, or what it takes.
func labMemory(vm uint64) int64 {
	const own = 1 << 30 // for the lab's kernel, its files in memory and the VMM
	if need := int64(vm) + own; need > lab.DefaultMemory {
		return need
	}
	return lab.DefaultMemory
}

// createShared makes an empty file of the console's for the lab to write to and returns its absolute path.
func (p *plan) createShared() (string, error) {
	f, err := p.createConsole()
	if err != nil {
		return "", err
	}
	if err := f.Close(); err != nil {
		return "", fmt.Errorf("--console: %w", err)
	}
	return filepath.Abs(p.o.console)
}

// labPatience is how many interrupts end a lab with a VM at once. They go to the kvmlet in there before, which stops the
// VM at the third; if it does not, something is wrong with the lab.
const labPatience = patience + 2

// labView is how a command in the lab looks on our terminal.
type labView struct {
	vm      bool   // it is a kvmlet that runs the VM
	tty     bool   // it has the terminal for itself
	escape  bool   // Ctrl-A x there means us, not the command
	started string // what is shown from its start to its first output
}

// errLabLeft is the cause of a lab's end by Ctrl-A x.
var errLabLeft = errors.New("the lab was stopped")

// runLab connects a lab to our streams and turns its end into an exit status.
func runLab(ctx context.Context, s streams, cfg lab.Config, v labView) (err error) {
	progress := newProgress(s.err)
	defer progress.close()
	store, err := image.OpenStore("")
	if err != nil {
		return err
	}
	if cfg.Kernel, err = store.Kernel(ctx); err != nil {
		return err
	}
	progress.busy("Starting the lab")
	cfg.Progress = progress.text
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	cfg.Signals = signals

	// Until there is a command, the terminal is as usual, and Ctrl-C means us. The first read says that it was started.
	started := func() {
		if v.started != "" {
			progress.busy(v.started)
		}
	}
	if v.tty {
		cfg.TTY = true
		cfg.Size = terminalSize(s.out)
		resize, stop := terminalSizes(s.out)
		defer stop()
		cfg.Resize = resize
		raw := &lateTerminal{f: s.in}
		defer raw.restore()
		started = func() {
			progress.close()
			raw.set()
		}
	}
	cfg.Stdin = &firstRead{r: s.in, before: started}
	if v.escape {
		var leave context.CancelCauseFunc
		ctx, leave = context.WithCancelCause(ctx)
		defer leave(nil)
		cfg.Stdin = &escapeReader{r: cfg.Stdin, leave: func() { leave(errLabLeft) }}
	}
	cfg.Stdout, cfg.Stderr = progress.before(s.out), progress.before(s.err)
	status, err := lab.Run(ctx, cfg)
	var start *agent.StartError
	if readerGone(err) {
		err = nil // the status is there
	}
	switch {
	case errors.As(err, &start):
		return &exitError{status.Code, err}
	case err != nil:
		if v.tty {
			fprintf(s.out, "\r\n") // off the command's line
		}
		if errors.Is(err, errLabLeft) {
			return &exitError{statusStopped, errLabLeft}
		}
		return cmp.Or(leaveError(context.Cause(ctx)), leaveError(err), err)
	case v.vm && status.Signal != 0:
		// It was not ready for the signal yet, and so had no VM.
		if wantsEnd(status.Signal) {
			return &exitError{statusStopped, errLeft}
		}
		return fmt.Errorf("the VM's process in the lab was killed (%v)", status.Signal)
	case status.Code != 0:
		return &exitError{status: status.Code}
	default:
		return nil
	}
}

// firstRead calls before ahead of the first Read.
type firstRead struct {
	r      io.Reader
	before func()
	once   sync.Once
}

func (f *firstRead) Read(p []byte) (int, error) {
	f.once.Do(f.before)
	return f.r.Read(p)
}

// lateTerminal is a terminal that becomes raw while others use it, unless they have finished by then.
type lateTerminal struct {
	f *os.File

	mu   sync.Mutex
	undo func()
	over bool
}

func (t *lateTerminal) set() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over || t.undo != nil {
		return
	}
	if undo, err := rawTerminal(t.f); err == nil { // a terminal that is gone shows in what is read from it
		t.undo = undo
	}
}

func (t *lateTerminal) restore() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	if t.undo != nil {
		t.undo()
	}
}

// terminalSize is a terminal's size now, or that of the terminals of old.
func terminalSize(f *os.File) lab.Size {
	w, h, err := term.GetSize(int(f.Fd()))
	if err != nil || w <= 0 || h <= 0 {
		return lab.Size{Rows: 24, Columns: 80}
	}
	return lab.Size{Rows: uint16(h), Columns: uint16(w)}
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
			select {
			case sizes <- terminalSize(f):
			case <-done:
				return
			}
		}
	}()
	return sizes, func() { signal.Stop(changed); close(done) }
}
