package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/tail"
)

const (
	qemuProgram = "qemu-system-x86_64"

	rootTag, sharesTag = "root", "shares"

	// cpuModel has SVM. XSAVE and what needs it must be hidden: QEMU's emulation does not intercept XSETBV, so nested
	// guests would see sizes in CPUID leaf 0xD that disagree with XCR0. The others QEMU 7.2 would only warn of.
	cpuModel = "EPYC,-xsave,-xsavec,-avx,-avx2,-f16c,-fma,-fxsr-opt,-misalignsse,-osvw,-topoext,-nrip-save"

	// kernelCommandLine: the emulated TSC needs no watching, and a panic ends the machine. Nor does the timer need the
	// kernel's test, which wants ticks within some milliseconds and on a busy host gets them later.
	kernelCommandLine = "console=ttyS0 quiet tsc=reliable no_timer_check panic=-1 mitigations=off kvmlet.hostname=lab " + marker

	// icountCommandLine lets every timer of the lab expire with its tick. Where the clock counts instructions, a timer
	// that expires between the injection of an interrupt into a nested guest and the guest's next exit makes QEMU inject
	// it again, while the guest's interrupts are off: it waits for its own spinlock for ever. A guest's timers expire
	// with the lab's tick then, so what they make KVM inject is over long before the next.
	icountCommandLine = " highres=off nohz=off"
)

// hardware is what makes up a lab; saved states are good for the same only.
type hardware struct {
	qemu   string // path
	memory int64
	cpus   int
	icount bool
}

// commandLine returns the kernel's.
func (h *hardware) commandLine() string {
	if h.icount {
		return kernelCommandLine + icountCommandLine
	}
	return kernelCommandLine
}

// arguments returns QEMU's, for a machine whose RAM is the given backend. The descriptors are those of our sockets.
func (h *hardware) arguments(ram string, monitor, agentPort, console int) []string {
	accel := "tcg,thread=multi"
	if h.icount {
		accel = "tcg,thread=single"
	}
	share := "none" // a caller without rights cannot give files away, nor can its lab
	if os.Geteuid() == 0 {
		share = "passthrough"
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,memory-backend=ram", "-accel", accel, "-cpu", cpuModel,
		"-smp", fmt.Sprint(h.cpus), "-m", fmt.Sprintf("%dM", h.memory>>20),
		"-object", fmt.Sprintf("%s,id=ram,size=%d", ram, h.memory),
		"-chardev", fmt.Sprintf("socket,id=monitor,fd=%d", monitor), "-mon", "chardev=monitor,mode=control",
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", console), "-serial", "chardev:console",
		"-device", "virtio-serial-pci",
		"-chardev", fmt.Sprintf("socket,id=agent,fd=%d", agentPort),
		"-device", "virtserialport,chardev=agent,name=" + agent.PortName,
		"-fsdev", "local,id=root,path=/,readonly=on,multidevs=remap,security_model=none",
		"-device", "virtio-9p-pci,fsdev=root,mount_tag=" + rootTag,
		"-fsdev", "local,id=shares,path=/,multidevs=remap,security_model=" + share,
		"-device", "virtio-9p-pci,fsdev=shares,mount_tag=" + sharesTag,
	}
	if h.icount {
		args = append(args, "-icount", "shift=0,sleep=off")
	}
	return args
}

// machine is a QEMU that runs.
type machine struct {
	agent   *agent.Client // set by connect
	port    *os.File      // the agent's, until connect
	monitor *monitor
	console *tail.Buffer // what the kernel printed
	stderr  *tail.Buffer // what QEMU printed
	kill    func()
	exited  chan struct{}
	reading sync.WaitGroup // of the console
	closing sync.Once
}

// launch starts QEMU, which is killed when ctx ends before launch returns. extra goes behind the hardware's arguments.
func launch(ctx context.Context, h *hardware, ram string, extra ...string) (*machine, error) {
	var ours, theirs [3]*os.File // monitor, agent, console
	closeAll := func(files []*os.File) {
		for _, f := range files {
			f.Close() // a nil file's Close does nothing
		}
	}
	for i := range ours {
		var err error
		if ours[i], theirs[i], err = socketPair(); err != nil {
			closeAll(append(ours[:], theirs[:]...))
			return nil, err
		}
	}
	m := &machine{port: ours[1], console: tail.New(tailSize), stderr: tail.New(tailSize), exited: make(chan struct{})}
	const first = 3 // the number of ExtraFiles[0]
	cmd := exec.Command(h.qemu, append(h.arguments(ram, first, first+1, first+2), extra...)...)
	cmd.ExtraFiles = theirs[:]
	cmd.Stdout, cmd.Stderr = m.stderr, m.stderr
	cmd.Dir = "/"
	// A terminal's interrupt is for us: QEMU would end before the command had a chance.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// The kernel sends the death signal when the thread that forked ends, so that thread is kept.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // its sockets' end tells the same
			close(m.exited)
		}
	}()
	err := <-started
	closeAll(theirs[:])
	if err != nil {
		closeAll(ours[:])
		return nil, fmt.Errorf("start %s: %w", h.qemu, err)
	}
	m.kill = func() { _ = cmd.Process.Kill() }
	defer context.AfterFunc(ctx, m.kill)()
	m.reading.Go(func() {
		defer ours[2].Close()
		_, _ = io.Copy(m.console, ours[2])
	})
	if m.monitor, err = openMonitor(ours[0]); err != nil {
		return nil, m.explain(cmp.Or(context.Cause(ctx), err))
	}
	return m, nil
}

// socketPair returns both ends of a stream socket: ours, which does not block threads, and one for a child.
func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, os.NewSyscallError("set a socket non-blocking", err)
	}
	return os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket"), nil
}

// connect waits for the agent in the machine.
func (m *machine) connect(ctx context.Context) (err error) {
	port := m.port
	m.port = nil
	m.agent, err = agent.Connect(ctx, port)
	if err != nil {
		return m.explain(cmp.Or(context.Cause(ctx), err))
	}
	return nil
}

// close ends the machine at once and waits for it. It may be called several times and while others use the machine.
func (m *machine) close() {
	m.kill()
	<-m.exited
	m.reading.Wait()
	m.closing.Do(func() {
		if m.agent != nil {
			m.agent.Close()
		}
		if m.port != nil {
			m.port.Close()
		}
		if m.monitor != nil {
			m.monitor.close()
		}
	})
}

// explain ends the machine and adds what it and its kernel said last to err.
func (m *machine) explain(err error) error {
	m.close()
	var notes strings.Builder
	for _, part := range []struct {
		name string
		tail *tail.Buffer
	}{{"QEMU", m.stderr}, {"the lab's kernel", m.console}} {
		if text := strings.TrimSpace(part.tail.String()); text != "" {
			fmt.Fprintf(&notes, "\nlast words of %s:\n%s", part.name, text)
		}
	}
	return fmt.Errorf("%w%s", err, notes.String())
}

// tailSize is how much is kept of what QEMU, and the lab's kernel, say.
const tailSize = 4096

var errGone = errors.New("QEMU ended")
