package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmlet/kvmlet/vmm"
	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

// runOptions are the flags of `kvmlet run`, as given.
type runOptions struct {
	kernel, initrd, appendLine string
	cpus                       int
	memory                     size
	cpu                        string
	disks, nets                []string
	timeout                    time.Duration
	name                       string
	accel                      string
	console                    string
	tty                        bool
	command                    []string
}

const runLong = `run boots a VM and runs a command in it, or an interactive shell when none is given. The command's standard
output and error come out here, separately and byte for byte, signals reach it, and its exit status is kvmlet's.

With no --kernel, a pinned Linux kernel is used; with no --initrd, kvmlet's own guest image, which holds the usual
commands, fio and iperf3. Disks are /dev/vda, /dev/vdb, ... and network cards eth0, eth1, ... in the order given.
With --initrd and no command the VM is left to that initrd's own init, and its serial console is connected here.

On a terminal, Ctrl-A x ends the VM and Ctrl-A Ctrl-A sends one Ctrl-A.

Exit status, beside the command's own:
  120  the guest rebooted        121  triple fault          122  guest kernel panic
  123  the VM was stopped        124  --timeout ran out     125  kvmlet itself failed
  126  command not executable    127  command not found
A guest that powers itself off ends with 0.`

const runExample = `  kvmlet run
  kvmlet run -- sh -c 'uname -a; nproc'
  kvmlet run --cpus 2 --memory 1G --disk path=test.img -- fio --name=t --filename=/dev/vda --rw=randread --runtime=10
  kvmlet run --net tap=vm0,hostip=192.168.77.1/24 -- ping -c 3 192.168.77.1
  kvmlet run --kernel bzImage --append 'loglevel=7' --console - -- dmesg
  kvmlet run --accel lab --timeout 2m -- nproc`

func newRun(s streams) *cobra.Command {
	o := runOptions{memory: 512 << 20}
	cmd := &cobra.Command{
		Use:     "run [flags] [-- COMMAND ARG...]",
		Short:   "Boot a VM and run a command, or a shell, in it",
		Long:    runLong,
		Example: runExample,
		RunE: func(cmd *cobra.Command, args []string) error {
			if n := cmd.ArgsLenAtDash(); n > 0 || n < 0 && len(args) > 0 {
				return fmt.Errorf("unexpected argument %q: a command stands behind --, as in `kvmlet run -- uname -a`", args[0])
			}
			o.command = args
			return runVM(cmd.Context(), s, &o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.kernel, "kernel", "", "kernel `FILE`: a bzImage or an ELF vmlinux (default the pinned kernel)")
	f.StringVar(&o.initrd, "initrd", "", "initial RAM disk `FILE` (default kvmlet's guest image)")
	f.StringVar(&o.appendLine, "append", "", "words to add to the kernel's command line")
	f.IntVar(&o.cpus, "cpus", 1, fmt.Sprintf("number of CPUs, 1 to %d", vmm.MaxCPUs))
	f.Var(&o.memory, "memory", "memory, 64M to 64G")
	f.StringVar(&o.cpu, "cpu", string(vcpu.Host), "CPU `template`: host or baseline (x86-64-v2)")
	f.StringArrayVar(&o.disks, "disk", nil, "add a disk: `path=FILE[,readonly][,format=raw][,id=NAME]`")
	f.StringArrayVar(&o.nets, "net", nil, "add a network card: `tap=NAME[,mac=MAC][,hostip=IP/LEN][,existing][,id=NAME]`")
	f.DurationVar(&o.timeout, "timeout", 0, "end the VM after this time, with status 124")
	f.StringVar(&o.name, "name", "kvmlet", "the guest's host name")
	f.StringVar(&o.accel, "accel", accelAuto, "where to run: `auto`, kvm, or lab")
	f.StringVar(&o.console, "console", "", "write the guest's serial console to `FILE`, or with - to standard error")
	f.BoolVarP(&o.tty, "tty", "t", false, "give COMMAND a terminal")
	_ = cmd.RegisterFlagCompletionFunc("accel", cobra.FixedCompletions([]string{accelAuto, accelKVM, accelLab}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("cpu", cobra.FixedCompletions([]string{string(vcpu.Host), string(vcpu.Baseline)}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// runVM carries out `kvmlet run`: it checks the options, chooses the place and boots.
func runVM(ctx context.Context, s streams, o *runOptions) error {
	plan, err := newPlan(o)
	if err != nil {
		return err
	}
	defer plan.close()
	accel, why, err := chooseAccel(o.accel)
	if err != nil {
		return err
	}
	if o.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, o.timeout, errTimeout)
		defer cancel()
	}
	if accel == accelLab {
		if why != "" {
			fprintf(s.err, "kvmlet: %s, so the VM runs in the lab (QEMU without KVM, some ten times slower)\n", why)
		}
		return runInLab(ctx, s, o, plan)
	}
	return plan.boot(ctx, s)
}

// errTimeout is the cause of a VM's end by --timeout.
var errTimeout = errors.New("--timeout ran out")

// ended turns the end of a VM, or of what runs in the lab, into an exit status.
func endError(end vmm.End) error {
	switch end.Outcome {
	case vmm.PowerOff:
		return nil
	case vmm.Reboot:
		return &exitError{status: statusReboot}
	case vmm.TripleFault:
		return &exitError{statusTripleFault, errors.New("the guest's CPU shut down (triple fault)")}
	case vmm.Panic:
		return &exitError{statusPanic, errors.New("the guest's kernel panicked")}
	case vmm.Stopped:
		return &exitError{status: statusStopped}
	default:
		return &exitError{statusError, end.Err}
	}
}

// leaveError is the exit status for why a session was given up, or nil if it was not.
func leaveError(err error) error {
	switch {
	case errors.Is(err, errTimeout):
		return &exitError{statusTimeout, errTimeout}
	case errors.Is(err, errLeft):
		return &exitError{status: statusStopped}
	default:
		return nil
	}
}

// openConsole opens what --console names. The closer does nothing for standard error.
func openConsole(s streams, name string) (io.Writer, func() error, error) {
	switch name {
	case "":
		return nil, func() error { return nil }, nil
	case "-":
		return s.err, func() error { return nil }, nil
	}
	f, err := os.Create(name)
	if err != nil {
		return nil, nil, fmt.Errorf("console: %w", err)
	}
	return f, f.Close, nil
}
