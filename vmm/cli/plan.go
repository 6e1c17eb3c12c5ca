package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/tail"
	"github.com/kvmlet/kvmlet/vmm"
	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

// plan is a VM to be: the options of `kvmlet run`, checked, and once prepared what it boots from.
type plan struct {
	o     *runOptions
	cfg   vmm.Config
	cards []card
	agent bool // the guest has our init, so commands run in it
	image *vmm.Image
}

// quietCmdline keeps the guest's kernel from telling a console that nobody reads what goes well.
const quietCmdline = "quiet"

// missingDisk says how a disk can be made, where that is what a VM lacks.
func (p *plan) missingDisk(err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, d := range p.cfg.Disks {
		if d.ReadOnly || d.Format == disk.QCOW2 || disk.IsURI(d.Path) {
			continue
		}
		if _, there := os.Stat(d.Path); errors.Is(there, fs.ErrNotExist) {
			return fmt.Errorf("%w (make one, for example with: kvmlet disk create %s 64M)", err, d.Path)
		}
	}
	return err
}

// newPlan checks the options. Nothing is opened or made.
func newPlan(o *runOptions) (_ *plan, err error) {
	p := &plan{o: o, agent: o.initrd == "" || len(o.command) > 0}
	if p.cfg.Template, err = vcpu.ParseTemplate(o.cpu); err != nil {
		return nil, fmt.Errorf("--cpu: %w", err)
	}
	for _, d := range o.disks {
		parsed, err := parseDisk(d)
		if err == nil {
			err = absoluteDisk(&parsed)
		}
		if err != nil {
			return nil, fmt.Errorf("--disk: %w", err)
		}
		p.cfg.Disks = append(p.cfg.Disks, parsed)
	}
	for _, n := range o.nets {
		c, err := parseNet(n)
		if err != nil {
			return nil, fmt.Errorf("--net: %w", err)
		}
		p.cards = append(p.cards, c)
		p.cfg.Nets = append(p.cfg.Nets, c.Net)
	}
	p.cfg.CPUs, p.cfg.Memory = o.cpus, uint64(o.memory)
	if err := checkHostname(o.name); err != nil {
		return nil, err
	}
	if o.timeout < 0 {
		return nil, fmt.Errorf("--timeout %v: want a positive duration", o.timeout)
	}
	if o.memory < 1<<20 {
		return nil, fmt.Errorf("--memory %d: these are bytes; with a unit it is %dM, say", o.memory, o.memory)
	}
	if err := p.cfg.Check(); err != nil {
		return nil, err
	}
	p.cfg.Cmdline = p.cmdline()
	return p, nil
}

func (p *plan) close() {
	if p.image != nil {
		_ = p.image.Close() // read-only
	}
	_ = p.cfg.Resources.Close() // of use only where no VM was made
}

// cmdline is the kernel's command line: ours first, so that the user's words win.
func (p *plan) cmdline() string {
	words := []string{vmm.BaseCmdline}
	if p.agent {
		if p.o.console == "" {
			words = append(words, quietCmdline)
		}
		words = append(words, "kvmlet.hostname="+p.o.name)
		for _, c := range p.cards {
			if ip := c.guestIP(); ip.IsValid() {
				words = append(words, fmt.Sprintf("kvmlet.ip=%v,%v", ip, c.hostIP.Addr()))
				break // the agent sets up eth0
			}
		}
	}
	if p.o.appendLine != "" {
		words = append(words, p.o.appendLine)
	}
	return strings.Join(words, " ")
}

func checkHostname(name string) error {
	ok := len(name) > 0 && len(name) <= 63
	for i, r := range name {
		alnum := r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
		ok = ok && (alnum || i > 0 && r == '-')
	}
	if !ok {
		return fmt.Errorf("--name %q: want 1 to 63 letters, digits and hyphens", name)
	}
	return nil
}

// prepare opens what the VM boots from, and makes what is missing, until a signal calls that off.
func (p *plan) prepare(ctx context.Context, signals *signals, progress *progress) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer signals.during(leaveAtSignal(cancel))()
	p.image, err = vmm.OpenImage(ctx, vmm.ImageOptions{
		Kernel: p.o.kernel, Initrd: p.o.initrd, Agent: p.agent, Progress: progress.image,
	})
	if err != nil {
		return cmp.Or(leaveError(context.Cause(ctx)), err)
	}
	p.cfg.Kernel, p.cfg.Initrd = p.image.Kernel, p.image.Initrd
	return nil
}

// powerOffGrace bounds how long a guest may take to power off when its command has ended.
const powerOffGrace = 20 * time.Second

// Of a guest's console consoleSize bytes are kept, and consoleLines lines shown if it fails.
const (
	consoleSize  = 64 << 10
	consoleLines = 25
)

// boot runs the VM on this host's KVM.
func (p *plan) boot(ctx context.Context, s streams) (err error) {
	if err := p.checkFormats(); err != nil {
		return err
	}
	if p.cfg.Resources, err = vmm.OpenResources(&p.cfg); err != nil {
		return p.missingDisk(err)
	}
	if err := haveKVM(); err != nil { // before an image is made for nothing
		return err
	}
	signals := takeSignals()
	defer signals.release()
	progress := newProgress(s.err)
	defer progress.close()
	if err := p.prepare(ctx, signals, progress); err != nil {
		return err
	}
	progress.busy("Booting the VM")
	w, closeConsole, err := p.openConsole(s)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeConsole()) }()
	if !p.agent {
		progress.close()
		return p.bootConsole(ctx, s, signals, w)
	}
	console := tail.New(consoleSize)
	p.cfg.Console, p.cfg.AgentPort = console, true
	if w != nil {
		p.cfg.Console = io.MultiWriter(console, w)
	}
	vm, err := vmm.New(&p.cfg)
	if err != nil {
		return err
	}
	status, err := p.command(ctx, s, signals, vm, progress)
	showCPUs(s, vm, err)
	if closed := vm.Close(); err == nil {
		err = closed
	}
	if err == nil && status == 0 {
		return nil
	}
	var ee *exitError
	if w == nil && errors.As(err, &ee) && ee.failed() {
		if last := margin(excerpt(console.Lines(consoleSize))); last != "" {
			fprintf(s.err, "kvmlet: the guest's console ended with\n%s", last)
		}
	}
	if err == nil {
		err = &exitError{status: status}
	}
	return err
}

// command starts the VM, waits for its agent, runs the command and powers the guest off. progress ends with the boot.
func (p *plan) command(
	ctx context.Context, s streams, signals *signals, vm *vmm.VM, progress *progress,
) (int, error) {
	if err := vm.Start(); err != nil {
		return 0, err
	}
	// Whatever is waited for below ends when the VM does, with what comes through its port.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := signals.during(leaveAtSignal(cancel))
	client, err := agent.Connect(ctx, vm.AgentPort())
	progress.close()
	stop()
	if err != nil {
		return 0, cmp.Or(p.why(ctx, vm, err), errSilent)
	}
	defer client.Close()

	sess := session{streams: s, signals: signals, args: p.o.command, tty: p.o.tty}
	switch {
	case len(sess.args) > 0:
	case s.interactive():
		sess.args, sess.dir, sess.tty = []string{"bash"}, "/root", true
		fprintf(s.err, "kvmlet: a shell in the VM; exit ends it, and so does Ctrl-A x at any time\n")
	default:
		sess.args = []string{"sh"}
	}
	status, err := sess.run(ctx, client)
	var output *agent.OutputError
	if err != nil && !errors.As(err, &output) {
		return 0, p.why(ctx, vm, err)
	}
	end := ending{agent: client, vm: vm, signals: signals, err: s.err, grace: powerOffGrace}
	if status, err = end.powerOff(ctx, status); err != nil {
		return 0, err
	}
	if output != nil && !readerGone(output) {
		return 0, &exitError{statusError, output}
	}
	return status, nil
}

// ending is a guest whose command has ended.
type ending struct {
	agent interface{ Poweroff(context.Context) error }
	vm    interface {
		Wait(context.Context) (vmm.End, error)
	}
	signals *signals
	err     io.Writer
	grace   time.Duration
}

// errStuck says that a guest was stopped because it did not power off.
var errStuck = errors.New("the guest did not power off, and was stopped; what it had not written to its disks is lost")

// powerOff ends the guest its own way, so that its disks are whole, and returns its command's status. A guest that does not
// end in time, or is no longer waited for, is left running.
func (e *ending) powerOff(ctx context.Context, status int) (int, error) {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), e.grace,
		fmt.Errorf("%w (the command's status was %d)", errStuck, status))
	defer cancel()
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	told := false
	defer e.signals.during(func(sig os.Signal) {
		if e.signals.exhausted(sig) {
			leave(errLeft)
		} else if wantsEnd(sig) && !told {
			told = true
			fprintf(e.err, "kvmlet: the guest is powering off, for %v at most; %d interrupts stop it at once\n", e.grace, patience)
		}
	})()
	refused := e.agent.Poweroff(ctx)
	how, err := e.vm.Wait(ctx)
	switch {
	case err != nil:
		err = context.Cause(ctx)
		return 0, cmp.Or(leaveError(err), error(&exitError{statusError, err}))
	case how.Outcome != vmm.PowerOff:
		return 0, endError(how)
	case refused != nil:
		return 0, nil // it was ending before we asked, and its command with it
	default:
		return status, nil
	}
}

// errSilent says that a guest powered itself off in good order, but too soon to be asked for anything.
var errSilent error = &exitError{statusError, errors.New("the guest powered off before its agent answered")}

// why finds the reason for an error behind a session that broke off: the VM's own end, the user's wish, or err. It is nil
// for a guest that powered itself off.
func (p *plan) why(ctx context.Context, vm *vmm.VM, err error) error {
	if e := leaveError(context.Cause(ctx)); e != nil {
		return e
	}
	if e := leaveError(err); e != nil {
		return e
	}
	// The agent's connection may be gone an instant before the VM is.
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if end, waitErr := vm.Wait(grace); waitErr == nil {
		return endError(end)
	}
	return &exitError{statusError, err}
}

// excerpt is what is shown of a console: its last lines, or those of a panic from its first words on.
func excerpt(lines []string) []string {
	from := max(0, len(lines)-consoleLines)
	for i, l := range lines {
		if strings.Contains(l, "Kernel panic - not syncing") {
			from = min(from, i)
			break
		}
	}
	return lines[from:min(len(lines), from+consoleLines)]
}

// margin puts one in front of each line that is not empty, and makes it printable: a terminal must not obey the guest.
func margin(lines []string) string {
	var b strings.Builder
	for _, l := range lines {
		if l != "" {
			fmt.Fprintf(&b, "  | %s\n", strings.Map(printable, l))
		}
	}
	return b.String()
}

// printable is r, or a question mark where a terminal may do something else than show r.
func printable(r rune) rune {
	if unicode.IsPrint(r) || r == '\t' {
		return r
	}
	return '?'
}
