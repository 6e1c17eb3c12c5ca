// Package guesttest runs a VM inside "go test", as net/http/httptest runs a server:
//
//	func TestMain(m *testing.M) { guesttest.Main(m) }
//
//	func TestKernel(t *testing.T) {
//		g := guesttest.Run(t, guesttest.Config{CPUs: 2})
//		out, err := g.Command("uname", "-r").Output()
//		...
//	}
//
// The guest has the pinned kernel, the programs of kvmlet's guest image, and the test's own executable as /init, which
// is PID 1 there. Tests run in their process where KVM is hardware, and in a lab elsewhere: see package labtest.
package guesttest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/image"
	"github.com/kvmlet/kvmlet/guest/lab"
	"github.com/kvmlet/kvmlet/guest/lab/labtest"
	"github.com/kvmlet/kvmlet/guest/tail"
	"github.com/kvmlet/kvmlet/vmm"
	"github.com/kvmlet/kvmlet/vmm/kvm"
	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

// Main is for a package's TestMain, which it ends. In a guest it is PID 1; elsewhere it makes the guest image if that is
// missing and runs the tests as labtest.Main does.
func Main(m *testing.M) {
	if agent.IsInit() {
		agent.Main()
	}
	if !flag.Parsed() {
		flag.Parse()
	}
	// A lab cannot write to the host's cache, so what is missing there is made before.
	if list := flag.Lookup("test.list"); list.Value.String() == "" && !lab.Inside() && kvm.CheckHardware() != nil {
		if err := prepare(); err != nil {
			fmt.Fprintln(os.Stderr, "prepare the guests of the tests:", err)
			os.Exit(1)
		}
	}
	labtest.Main(m)
}

func prepare() error {
	last := ""
	i, err := vmm.OpenImage(context.Background(), vmm.ImageOptions{Agent: true, Progress: func(p image.Progress) {
		if p.Text != last {
			last = p.Text
			fmt.Fprintf(os.Stderr, "guest image: %s\n", last)
		}
	}})
	if err != nil {
		return err
	}
	return i.Close()
}

// Config says what a guest is like. Its zero value is a good guest.
type Config struct {
	CPUs     int           // 0: 1
	Memory   uint64        // bytes; 0: 512 MiB
	Template vcpu.Template // of CPU features; empty: vcpu.Host

	Kernel  string // a file; empty: the pinned kernel
	Cmdline string // goes behind the kernel's usual command line
	Bare    bool   // no programs but /init: the guest is up sooner

	Disks []vmm.Disk
	Nets  []vmm.Net
}

const (
	defaultMemory = 512 << 20

	cmdline = vmm.BaseCmdline + " quiet"

	// reserve is the time before a test's deadline that is kept for its end.
	reserve = 10 * time.Second

	powerOffGrace = 20 * time.Second

	// Of a guest's console consoleSize bytes are kept, and the last consoleLines lines logged if the test fails.
	consoleSize  = 64 << 10
	consoleLines = 40
)

// Guest is a VM whose agent answers. Its methods may be called from any goroutine.
type Guest struct {
	tb      testing.TB
	ctx     context.Context
	image   *vmm.Image
	vm      *vmm.VM
	agent   *agent.Client
	console *tail.Buffer
	waited  bool        // the test knows how the VM ended
	late    atomic.Bool // it did not power off in time
}

// Run boots a guest and returns when its agent answers. At the end of the test the guest is powered off and closed; the
// test fails if it did not end well or left something behind in this process. The end of a failed test's console is
// logged.
//
// The guest and its commands end when the test does, or when that runs out of time.
func Run(tb testing.TB, cfg Config) *Guest {
	tb.Helper()
	g := &Guest{tb: tb, console: tail.New(consoleSize)}
	var cancel context.CancelFunc
	g.ctx, cancel = bound(tb)
	tb.Cleanup(cancel)
	began := watch()
	tb.Cleanup(func() { g.checkLeftovers(began) })
	err := g.boot(&cfg)
	tb.Cleanup(g.close)
	if err != nil {
		g.waited = true // enough is said
		tb.Fatalf("boot a guest: %v", err)
	}
	return g
}

// errTime is the cause of a guest's end by its test's deadline.
var errTime = errors.New(labtest.NoTime)

// bound returns the test's context with its deadline, if it has one.
func bound(tb testing.TB) (context.Context, context.CancelFunc) {
	if t, ok := tb.(interface{ Deadline() (time.Time, bool) }); ok {
		if d, ok := t.Deadline(); ok {
			return context.WithDeadlineCause(tb.Context(), d.Add(-reserve), errTime)
		}
	}
	return context.WithCancel(tb.Context())
}

func (g *Guest) boot(cfg *Config) (err error) {
	if g.image, err = openImage(g.ctx, cfg); err != nil {
		return err
	}
	c := vmm.Config{
		CPUs: max(cfg.CPUs, 1), Memory: cfg.Memory, Template: cfg.Template,
		Kernel: g.image.Kernel, Initrd: g.image.Initrd, Cmdline: strings.TrimSpace(cmdline + " " + cfg.Cmdline),
		Disks: cfg.Disks, Nets: cfg.Nets, Console: g.console, AgentPort: true,
	}
	if c.Memory == 0 {
		c.Memory = defaultMemory
	}
	if g.vm, err = vmm.New(&c); err != nil {
		return err
	}
	if err := g.vm.Start(); err != nil {
		return err
	}
	if g.agent, err = agent.Connect(g.ctx, g.vm.AgentPort()); err == nil {
		return nil
	}
	select {
	case <-g.vm.Ended():
		end, _ := g.vm.Wait(context.Background())
		return fmt.Errorf("before its agent answered: %w", endError(end))
	default:
		return err
	}
}

func openImage(ctx context.Context, cfg *Config) (*vmm.Image, error) {
	o := vmm.ImageOptions{Kernel: cfg.Kernel, Agent: !cfg.Bare}
	if cfg.Bare {
		exe, err := os.Executable()
		if err != nil {
			return nil, err
		}
		if o.Initrd, err = image.Init(ctx, exe); err != nil {
			return nil, err
		}
	}
	return vmm.OpenImage(ctx, o)
}

// VM returns the machine. Stop it to pull its plug; Run's cleanup closes it.
func (g *Guest) VM() *vmm.VM { return g.vm }

// Agent returns the connection to the guest's agent.
func (g *Guest) Agent() *agent.Client { return g.agent }

// Console returns the last 64 KiB of what the guest sent to its first serial port.
func (g *Guest) Console() string { return g.console.String() }

// Wait returns how the guest ended, once it did. That end is not held against the test, whichever it is.
func (g *Guest) Wait() (vmm.End, error) {
	end, err := g.vm.Wait(g.ctx)
	if err != nil {
		return end, fmt.Errorf("wait for the guest's end: %w", context.Cause(g.ctx))
	}
	g.waited = true
	return end, nil
}

// Poweroff has the guest end its processes, write back and unmount its file systems and power off, and waits for it.
func (g *Guest) Poweroff() error {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(g.ctx), powerOffGrace,
		fmt.Errorf("the guest did not power off in %v", powerOffGrace))
	defer cancel()
	if err := g.agent.Poweroff(ctx); err != nil {
		g.late.Store(ctx.Err() != nil)
		return err
	}
	end, err := g.vm.Wait(ctx)
	if err != nil {
		g.late.Store(true)
		return context.Cause(ctx)
	}
	g.waited = true
	if end.Outcome != vmm.PowerOff {
		return endError(end)
	}
	return nil
}

func endError(e vmm.End) error {
	if e.Err != nil {
		return fmt.Errorf("the guest ended by %v: %w", e.Outcome, e.Err)
	}
	return fmt.Errorf("the guest ended by %v", e.Outcome)
}

// close ends what boot began, as far as it came.
func (g *Guest) close() {
	g.tb.Helper()
	if g.agent != nil {
		select {
		case <-g.vm.Ended():
			if end, _ := g.vm.Wait(context.Background()); !g.waited && end.Outcome != vmm.Stopped {
				g.tb.Error(endError(end))
			}
		default:
			if g.outOfTime() { // none is left to wait for it once more
				break
			}
			if err := g.Poweroff(); err != nil {
				g.tb.Error(err)
			}
		}
	}
	if g.vm != nil && g.outOfTime() {
		g.logCPUs()
	}
	if g.tb.Failed() && context.Cause(g.ctx) == errTime {
		g.tb.Log(labtest.NoTime)
	}
	if g.agent != nil {
		_ = g.agent.Close() // whose port cannot fail to close
	}
	if g.vm != nil {
		if err := g.vm.Close(); err != nil {
			g.tb.Errorf("close the guest: %v", err)
		}
	}
	if g.image != nil {
		_ = g.image.Close() // read-only
	}
	if lines := g.console.Lines(consoleLines); g.tb.Failed() && len(lines) > 0 {
		g.tb.Logf("the guest's console ended with\n%s", strings.Join(lines, "\n"))
	}
}

// outOfTime reports whether the test failed with a guest that did not do in time what it was asked.
func (g *Guest) outOfTime() bool {
	return g.tb.Failed() && (g.late.Load() || context.Cause(g.ctx) == errTime)
}

// logCPUs tells where the CPUs of a guest stand that may hang, if it has not ended.
func (g *Guest) logCPUs() {
	g.tb.Helper()
	traces, err := g.vm.Trace(context.Background())
	if err != nil {
		return // it ended
	}
	var text strings.Builder
	hung := false
	for _, t := range traces {
		fmt.Fprintf(&text, "\n\t%v", &t)
		hung = hung || t.Deaf()
	}
	g.tb.Logf("the guest's CPUs when time was over:%s", text.String())
	if hung && lab.Inside() {
		g.tb.Log(labtest.Hung)
	}
}
