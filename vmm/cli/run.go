package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmlet/kvmlet/guest/lab"
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

// defaultMemory is a guest's memory in bytes.
const defaultMemory = 512 << 20

const runLong = `run boots a VM and runs a command in it, or a shell when none is given. The command's standard
output and error come out here, separately and byte for byte, signals reach it, and its exit status
is kvmlet's. When it ends, the VM is powered off.

With no --kernel, a pinned Linux kernel is used; with no --initrd, kvmlet's own guest image, which
has the usual commands, fio and iperf3. With --initrd and no command the VM is left to that initrd's
own init, and its serial console is connected here.

Disks are /dev/vda, /dev/vdb and so on in the order given; a DISK is
  path=FILE        a disk image, or outside of the lab a block device or an NBD export such as
                   nbd+unix:///?socket=S; a comma in it is written twice
  format=FORMAT    raw (the default, whatever is in the file) or qcow2
  readonly         the guest cannot write, and others may read the file too
  cache=MODE       writeback (default), none (O_DIRECT), writethrough, directsync or unsafe
  aio=ENGINE       io_uring, threads or auto (default)
  backing=WHICH    backing files that may be opened: off (default), on, or those below a folder
  backing-format=F the format of backing files whose images do not say, raw or qcow2
  copy-on-read     keep in the image what is read from its backing file
  detect-zeroes=Z  off (default), on, or unmap: write zeroes as such, and give their space back
  throttle=LIMITS  such as iops-total=500:bps-write=10M, with -max and -max-length for bursts
  throttle-group=G a group of disks that share the limits which one of them says
  queues=N         request queues (default: one for each CPU)
  id=NAME          the serial number that the guest sees, up to 20 characters
Network cards are eth0, eth1 and so on; a NET is
  tap=NAME         a tap device of the host, made for the VM's time if there is none
  hostip=IP/LEN    gives the host's side this address, and eth0 the next one
  mac=MAC          the guest's address (default: a random one)
  existing         do not make the tap
  id=NAME          a name for it
In the lab a tap is one of the lab's, so that the VM reaches the lab and nothing beyond.

On a terminal, Ctrl-A x ends the VM, once the command is up (before, Ctrl-C does), and Ctrl-A Ctrl-A
sends one Ctrl-A. When nobody reads kvmlet's output any more, as behind "| head", COMMAND's next
write there fails or ends it by SIGPIPE (status 141), as on the host; on a terminal (-t) it is hung
up. Then the VM is powered off.

With --append reboot=warm a panic looks like a reboot and ends with 120, unless the kernel has the
pvpanic driver: a reset marked as warm is how kvmlet tells a panic otherwise.

Exit status, beside the command's own:
  120  the guest rebooted        121  triple fault          122  guest kernel panic
  123  the VM was stopped        124  --timeout ran out     125  kvmlet itself failed
  126  command not executable    127  command not found
A guest that powers itself off ends with 0, or with 125 if no command could run in it yet.`

const runExample = `  kvmlet run
  kvmlet run -- sh -c 'uname -a; nproc'
  kvmlet run --cpus 2 --memory 1G --disk path=test.img -- \
      fio --name=t --filename=/dev/vda --rw=randread --time_based --runtime=10
  kvmlet run --net tap=vm0,hostip=192.168.77.1/24 -- ping -c 3 192.168.77.1
  kvmlet run --kernel bzImage --append loglevel=7 --console - -- dmesg
  kvmlet run --accel lab --timeout 2m -- nproc`

func newRun(s streams) *cobra.Command {
	o := runOptions{memory: defaultMemory}
	cmd := &cobra.Command{
		Use:     "run [flags] [-- COMMAND ARG...]",
		Short:   "Boot a VM and run a command, or a shell, in it",
		Long:    runLong,
		Example: runExample,
		RunE: func(cmd *cobra.Command, args []string) error {
			if n := cmd.ArgsLenAtDash(); n > 0 || n < 0 && len(args) > 0 {
				return fmt.Errorf("unexpected argument %q: a command stands behind --, as in `kvmlet run -- uname -a`", args[0])
			}
			for _, name := range []string{"kernel", "initrd", "console"} {
				// A script's variable that is unset, say: to boot something else then would help nobody.
				if f := cmd.Flags().Lookup(name); f.Changed && f.Value.String() == "" {
					return fmt.Errorf("--%s: it is empty", name)
				}
			}
			if len(args) > 0 && args[0] == "" {
				return errors.New("the command's name is empty")
			}
			o.command = args
			outliveReaders()
			return runVM(cmd.Context(), s, &o)
		},
	}
	o.addFlags(cmd)
	for flag, values := range map[string][]string{
		"accel": {accelAuto, accelKVM, accelLab},
		"cpu":   {string(vcpu.Host), string(vcpu.Baseline)},
	} {
		_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	return cmd
}

func (o *runOptions) addFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.kernel, "kernel", "", "kernel `FILE`: a bzImage or an ELF vmlinux (default the pinned kernel)")
	f.StringVar(&o.initrd, "initrd", "", "initial RAM disk `FILE` (default kvmlet's guest image)")
	f.StringVar(&o.appendLine, "append", "", "`WORDS` to add to the kernel's command line")
	f.IntVar(&o.cpus, "cpus", 1, fmt.Sprintf("`NUMBER` of CPUs, 1 to %d", vmm.MaxCPUs))
	f.Var(&o.memory, "memory", "memory, a `SIZE` from 64M to 64G in steps of 2M")
	f.StringVar(&o.cpu, "cpu", string(vcpu.Host), "CPU `TEMPLATE`: host or baseline (x86-64-v2)")
	f.StringArrayVar(&o.disks, "disk", nil, "add a `DISK`, such as path=test.img,readonly; may be repeated")
	f.StringArrayVar(&o.nets, "net", nil, "add a network card on a `NET`, such as tap=vm0; may be repeated")
	f.DurationVar(&o.timeout, "timeout", 0, "end the VM this `TIME` after kvmlet's start, such as 90s or 5m, with status 124")
	f.StringVar(&o.name, "name", "kvmlet", "the guest's host `NAME`")
	f.StringVar(&o.accel, "accel", accelAuto, "`WHERE` to run: kvm, lab, or auto, which is kvm where that is hardware")
	f.StringVar(&o.console, "console", "", "write the guest's serial console to `FILE`, or with - to standard error")
	f.BoolVarP(&o.tty, "tty", "t", false, "give COMMAND a terminal")
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
		return plan.runInLab(ctx, s, why)
	}
	return plan.boot(ctx, s)
}

// errTimeout is the cause of a VM's end by --timeout.
var errTimeout = errors.New("--timeout ran out")

// endError turns the end of a VM into an exit status.
func endError(end vmm.End) error {
	switch end.Outcome {
	case vmm.PowerOff:
		return nil
	case vmm.Reboot:
		return &exitError{statusReboot, errors.New("the guest rebooted, which ends the VM")}
	case vmm.TripleFault:
		return &exitError{statusTripleFault, errors.New("the guest's CPU shut down (triple fault)")}
	case vmm.Panic:
		return &exitError{statusPanic, errors.New("the guest's kernel panicked")}
	case vmm.Stopped:
		return &exitError{statusStopped, errLeft}
	default:
		return &exitError{statusError, end.Err}
	}
}

// leaveError is the exit status for why a session was given up, or nil if it was not.
func leaveError(err error) error {
	switch {
	case errors.Is(err, errTimeout):
		return &exitError{statusTimeout, errTimeout}
	case errors.Is(err, errLeft), errors.Is(err, lab.ErrInterrupted):
		return &exitError{statusStopped, errLeft}
	default:
		return nil
	}
}

// showCPUs tells where the CPUs of a VM stand that ran out of time, or hangs, while it is there.
func showCPUs(s streams, vm *vmm.VM, err error) {
	var ee *exitError
	if !errors.As(err, &ee) || ee.status != statusTimeout && !errors.Is(err, errStuck) {
		return
	}
	traces, err := vm.Trace(context.Background())
	if err != nil {
		return // it has ended by itself
	}
	for _, t := range traces {
		fprintf(s.err, "kvmlet: %v\n", &t)
	}
}

// openConsole opens what --console names. The closer does nothing for standard error.
func (p *plan) openConsole(s streams) (io.Writer, func() error, error) {
	switch p.o.console {
	case "":
		return nil, func() error { return nil }, nil
	case "-":
		return &ifRead{w: s.err}, func() error { return nil }, nil
	}
	f, err := p.createConsole()
	if err != nil {
		return nil, nil, err
	}
	return f, f.Close, nil
}

// createConsole makes or empties the file that --console names, unless the VM lives from it.
func (p *plan) createConsole() (_ *os.File, err error) {
	name := p.o.console
	defer func() {
		if err != nil {
			err = fmt.Errorf("--console: %w", err)
		}
	}()
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	own := []string{p.o.kernel, p.o.initrd}
	for _, d := range p.cfg.Disks {
		own = append(own, d.Path)
	}
	for _, path := range own {
		if other, err := os.Stat(path); err == nil && os.SameFile(info, other) {
			return nil, fmt.Errorf("%s is the VM's disk, kernel or initrd, and would be overwritten", name)
		}
	}
	if info.Mode().IsRegular() {
		err = f.Truncate(0)
	}
	return f, err
}
