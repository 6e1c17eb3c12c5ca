// Package lab runs commands in a machine that has hardware-like KVM, on hosts that have none: a QEMU without
// acceleration, whose emulated CPU has SVM, so that Linux inside it serves /dev/kvm by the real kvm_amd.
//
// The files in the lab are the host's: the root is the host's, read-only, with what is written kept in memory and lost
// at the end; the shares are the host's own, written through. The command runs as the lab's root, with whatever rights
// on the host's files the caller has. The lab is a test bed and protects the host's files from accidents, not from an
// attacker.
//
// Booting a lab takes some seconds. So the first one is saved once it is up, and later ones start from that state.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/agent"
)

const (
	// DefaultMemory is a lab's memory in bytes: room for a guest of 5 GiB. The host gives what is really used.
	DefaultMemory = 6 << 30

	// DefaultCPUs is how many CPUs a lab has. QEMU's emulation of SVM remembers an interrupt that VMRUN injected until
	// something else happens to the CPU, and delivers it again, whether the nested guest has interrupts on or off, if
	// another CPU's thread calls for attention in between (seen with QEMU 7.2 and 10.0). One CPU has nobody to do so.
	// It also cannot run code that another CPU is patching, as QEMU before 8.1 may.
	DefaultCPUs = 1

	// MaxCPUs is how many CPUs a lab may have.
	MaxCPUs = 64

	startTimeout = 120 * time.Second // for boot or restore, on a busy host
	leaveTimeout = 30 * time.Second  // for writing back the shares at the end

	// marker on the kernel's command line tells a program that it runs in a lab.
	marker = "kvmlet.lab"
)

var (
	// ErrNoQEMU says that the host lacks QEMU.
	ErrNoQEMU = errors.New(
		`qemu-system-x86_64 is not installed (on Debian: "apt-get install --no-install-recommends qemu-system-x86")`)

	// ErrInterrupted says that a signal ended the lab before its command did.
	ErrInterrupted = errors.New("interrupted")
)

// Size is that of a terminal, in characters.
type Size struct{ Rows, Columns uint16 }

// Config says what to run, and in what lab.
type Config struct {
	Args []string
	Env  []string // nil: this process's
	Dir  string   // empty: this process's

	// Shares are directories and files of the host that the command may change. They must exist. Sockets cannot be made
	// in them, and file locks are seen inside this lab only. CheckFile says which the lab can have.
	Shares []string

	// Inputs are files of the host that the command reads. Only those must be named that lie in /dev or /run, which the lab
	// has of its own; all others are there anyway. They must exist.
	Inputs []string

	Stdin          io.Reader
	Stdout, Stderr io.Writer
	TTY            bool // the command gets a terminal, of this size at first
	Size           Size
	Resize         <-chan Size

	// Signals go to the command. SIGINT, SIGTERM and SIGHUP end the lab at once if there is no command yet, or if too
	// many came for it.
	Signals <-chan os.Signal

	// Patience is how many of those three are too many; 0: 2.
	Patience int

	Memory int64 // bytes, a multiple of 1 MiB; 0: DefaultMemory
	CPUs   int   // 0: DefaultCPUs
	Icount bool  // the lab's clock counts instructions, 1 ns each, so that runs can be compared

	Kernel string // bzImage; empty: image.Kernel

	// Init returns an executable that calls agent.Main as PID 1. It is called only if a lab must be booted. Nil: this
	// process's executable.
	Init func(context.Context) (string, error)

	// unqueued runs the lab however many there are: tests of this package must not wait for other packages' labs.
	unqueued bool

	// Progress is told, a line at a time, what takes long. It may be nil.
	Progress func(line string)
}

// Inside reports whether this process runs in a lab.
func Inside() bool {
	cmdline, err := os.ReadFile("/proc/cmdline")
	return err == nil && strings.Contains(" "+string(cmdline), " "+marker)
}

// Run runs a command in a lab and waits for it. The status is valid if the error is nil, an *agent.OutputError, with which
// the command ended all the same, or an *agent.StartError, which has a shell's 126 or 127. When ctx ends, so does the lab,
// with everything in it.
func Run(ctx context.Context, cfg Config) (status agent.ExitStatus, err error) {
	if err := cfg.complete(); err != nil {
		return status, fmt.Errorf("lab: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// The signals of the time until there is a command to take them.
	started, served := make(chan *agent.Process), make(chan struct{})
	go func() {
		defer close(served)
		forward(ctx, cancel, &cfg, started)
	}()
	defer func() {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		cancel(nil)
		<-served
		var notStarted *agent.StartError
		if err != nil && !errors.As(err, &notStarted) {
			err = fmt.Errorf("lab: %w", err)
		}
	}()
	if !cfg.unqueued {
		release, err := acquireSlot(ctx, cfg.Progress)
		if err != nil {
			return status, err
		}
		defer release()
	}
	m, err := start(ctx, &cfg)
	if err != nil {
		return status, err
	}
	defer m.close()
	defer context.AfterFunc(ctx, m.kill)()
	defer m.wakeUp()()
	return m.run(ctx, &cfg, started)
}

// wakeTime bounds for how long a lab sleeps through an interrupt.
const wakeTime = 500 * time.Millisecond

// wakeUp interrupts the lab now and then until stop. QEMU's CPU thread and the one with its timers both change the set of
// the CPU's pending interrupts, the former without a lock while it emulates SVM, so that a timer's interrupt may get lost:
// its APIC has it pending, the CPU does not (seen with QEMU 10.0, once in some hundred guests). The lab's kernel waits for
// that one tick for ever, while a guest's CPU spins. With the next interrupt of any kind it gets both.
func (m *machine) wakeUp() (stop func()) {
	stopped, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(wakeTime)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				m.agent.Nudge()
			case <-stopped:
				return
			}
		}
	}()
	return func() {
		close(stopped)
		<-done
	}
}

// complete checks the configuration and fills in what is left to defaults.
func (cfg *Config) complete() (err error) {
	if len(cfg.Args) == 0 {
		return errors.New("no command given")
	}
	if cfg.Env == nil {
		cfg.Env = os.Environ()
	}
	if cfg.Dir == "" {
		if cfg.Dir, err = os.Getwd(); err != nil {
			return err
		}
	}
	if cfg.Shares, err = resolve("share", cfg.Shares); err != nil {
		return err
	}
	if cfg.Inputs, err = resolve("input", cfg.Inputs); err != nil {
		return err
	}
	cfg.Inputs = slices.DeleteFunc(cfg.Inputs, func(path string) bool { return !replaced(path) })
	if cfg.Memory == 0 {
		cfg.Memory = DefaultMemory
	}
	if cfg.Patience == 0 {
		cfg.Patience = 2
	}
	if cfg.CPUs == 0 {
		cfg.CPUs = DefaultCPUs
	}
	if cfg.Memory < 256<<20 || cfg.Memory%(1<<20) != 0 {
		return fmt.Errorf("memory of %d bytes: must be whole MiB, at least 256", cfg.Memory)
	}
	if cfg.CPUs < 0 || cfg.CPUs > MaxCPUs {
		return fmt.Errorf("%d CPUs: must be 1 to %d", cfg.CPUs, MaxCPUs)
	}
	if cfg.Progress == nil {
		cfg.Progress = func(string) {}
	}
	return nil
}

// resolve returns what files of the host are called without symbolic links, an outer directory before what is in it.
func resolve(what string, paths []string) ([]string, error) {
	var resolved []string
	for _, path := range paths {
		full, err := filepath.Abs(path)
		if err == nil {
			full, err = filepath.EvalSymlinks(full)
		}
		if err == nil {
			err = CheckFile(full)
		}
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", what, path, err)
		}
		resolved = append(resolved, full)
	}
	slices.Sort(resolved)
	return slices.Compact(resolved), nil
}

// ErrNotInLab says that the lab cannot have a file of the host.
var ErrNotInLab = errors.New("not to be had in the lab")

// CheckFile tells whether the lab can have a file or directory of the host, and if not, what to do. Its error is the
// system's if there is no such file, and ErrNotInLab otherwise.
func CheckFile(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	// A device is but a number, which means another device in the lab, or none.
	if !info.IsDir() && !info.Mode().IsRegular() {
		return fmt.Errorf("%w, which takes regular files only, no devices and pipes: copy it to a file, "+
			"or use a host whose KVM is hardware (see kvmlet probe)", ErrNotInLab)
	}
	for _, tree := range []string{"/proc", "/sys"} {
		if within(path, tree) {
			return fmt.Errorf("%w, which has a %s of its own: copy it to a file elsewhere", ErrNotInLab, tree)
		}
	}
	return nil
}

// ownTrees are those that the lab has of its own, in the place of the host's.
var ownTrees = []string{"/proc", "/sys", "/dev", "/run"}

// replaced reports whether path lies in one of them.
func replaced(path string) bool {
	return slices.ContainsFunc(ownTrees, func(tree string) bool { return within(path, tree) })
}

func within(path, tree string) bool { return path == tree || strings.HasPrefix(path, tree+"/") }

// run mounts the host's files, runs the command and writes the shares back.
func (m *machine) run(
	ctx context.Context, cfg *Config, started chan<- *agent.Process,
) (status agent.ExitStatus, err error) {
	defer func() {
		if err != nil && m.agent.Err() != nil {
			err = m.explain(err)
		}
	}()
	if err := m.enter(ctx, cfg); err != nil {
		return status, err
	}
	p, err := m.agent.Start(ctx, agent.Command{
		Args: cfg.Args, Env: cfg.Env, Dir: cfg.Dir, TTY: cfg.TTY, Rows: cfg.Size.Rows, Columns: cfg.Size.Columns,
		Stdin: cfg.Stdin, Stdout: cfg.Stdout, Stderr: cfg.Stderr,
	})
	var notStarted *agent.StartError
	switch {
	case errors.As(err, &notStarted):
		return notStarted.Status(), err
	case err != nil:
		return status, err
	}
	select {
	case started <- p:
	case <-ctx.Done():
	}
	status, err = p.Wait()
	var output *agent.OutputError
	if err != nil && !errors.As(err, &output) { // with that one the command ended all the same
		return status, err
	}
	if len(cfg.Shares) > 0 {
		ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
		defer cancel()
		err = errors.Join(err, m.agent.Sync(ctx))
	}
	return status, err
}

// forward passes signals and sizes on to the command, once it is started, until ctx ends. An interrupt before that, or
// one that is more than the command has patience for, cancels everything.
func forward(ctx context.Context, cancel context.CancelCauseFunc, cfg *Config, started <-chan *agent.Process) {
	var (
		p       *agent.Process
		size    Size // the newest that came before p
		left    = 1  // interrupts until the end of all
		signals = cfg.Signals
		resize  = cfg.Resize
	)
	for {
		select {
		case <-ctx.Done():
			return
		case p = <-started:
			left = cfg.Patience
			if size != (Size{}) {
				_ = p.Resize(size.Rows, size.Columns)
			}
		case s, ok := <-resize:
			switch {
			case !ok:
				resize = nil
			case p != nil:
				_ = p.Resize(s.Rows, s.Columns)
			default:
				size = s
			}
		case sig, ok := <-signals:
			number, _ := sig.(syscall.Signal)
			final := number == syscall.SIGINT || number == syscall.SIGTERM || number == syscall.SIGHUP
			switch {
			case !ok:
				signals = nil
			case final && left <= 1:
				cancel(ErrInterrupted)
				return
			case p != nil:
				if final {
					left--
				}
				_ = p.Signal(number)
			}
		}
	}
}

// Where the lab puts the host's files together before they become its root.
const (
	hostDir   = "/host"  // the host's root, read-only
	sharesDir = "/share" // the same, writable; out of sight once the root is switched
	layerDir  = "/layer" // a tmpfs for what is written elsewhere
	rootDir   = "/new"
)

// enter makes the host's files the lab's root.
func (m *machine) enter(ctx context.Context, cfg *Config) error {
	const transport = "trans=virtio,version=9p2000.L,msize=512000,cache="
	// What the read-only side has read once it need not ask for again; the shares' other side may change at any time.
	mounts := []agent.Mount{
		{Source: rootTag, Target: hostDir, Type: "9p", Flags: unix.MS_RDONLY, Options: transport + "loose"},
		{Source: "tmpfs", Target: layerDir, Type: "tmpfs", Options: "mode=0755"},
		{Target: layerDir + "/upper"},
		{Target: layerDir + "/work"},
		{
			Source: "overlay", Target: rootDir, Type: "overlay",
			Options: fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%[2]s/work", hostDir, layerDir),
		},
	}
	if len(cfg.Shares) > 0 {
		mounts = append(mounts, agent.Mount{Source: sharesTag, Target: sharesDir, Type: "9p", Options: transport + "mmap"})
	}
	var late []agent.Mount // into the trees that are moved
	bind := func(from, path string) {
		m := agent.Mount{Source: from + path, Target: rootDir + path, Flags: unix.MS_BIND}
		if replaced(path) {
			late = append(late, m)
		} else {
			mounts = append(mounts, m)
		}
	}
	for _, path := range cfg.Inputs {
		bind(hostDir, path)
	}
	for _, path := range cfg.Shares {
		bind(sharesDir, path)
	}
	for _, tree := range ownTrees {
		mounts = append(mounts, agent.Mount{Source: tree, Target: rootDir + tree, Flags: unix.MS_MOVE})
	}
	mounts = append(mounts, late...)
	if err := m.agent.Mount(ctx, mounts...); err != nil {
		return err
	}
	return m.agent.SwitchRoot(ctx, rootDir)
}
