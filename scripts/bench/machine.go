package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/image"
)

// The files of a kit.
const (
	kvmletFile = "kvmlet"
	initrdFile = "initrd"
)

// missing is the program that no guest has.
const missing = "/missing"

const (
	startPatience = time.Minute
	bootPatience  = 5 * time.Minute
)

// machine is a VM to measure: one of the two VMMs with its arguments.
type machine struct {
	name string
	args []string
	// answer returns when the guest's agent has answered that it cannot run the missing program.
	answer func(ctx context.Context, p *process) error
}

// process is a VMM that runs.
type process struct {
	cmd    *exec.Cmd
	stderr *os.File // what it prints
	port   *os.File // our end of its descriptor 3
}

// sample is what one round found.
type sample struct {
	Machine string
	Entry   time.Duration // from exec to the first guest instruction
	Answer  time.Duration `json:",omitempty"` // from exec to the agent's answer; 0: not waited for
	Memory  footprint
	Phases  []phase `json:",omitempty"`
}

// machines are the two, kvmlet first.
func machines(ctx context.Context, o *options, kit string) ([]*machine, error) {
	k := &machine{name: "kvmlet", answer: printed, args: []string{
		filepath.Join(kit, kvmletFile), "run", "--accel", "kvm", "--cpus", fmt.Sprint(o.cpus),
		"--memory", fmt.Sprintf("%dM", o.memory), "--",
	}}
	if o.cmdline == "" {
		cat := exec.CommandContext(ctx, k.args[0], append(k.args[1:], "cat", "/proc/cmdline")...)
		cat.Stderr = os.Stderr
		b, err := cat.Output()
		if err != nil {
			return nil, fmt.Errorf("boot kvmlet's guest: %w", err)
		}
		o.cmdline = string(bytes.TrimSpace(b))
	}
	k.args = append(k.args, missing)
	store, err := image.OpenStore("")
	if err != nil {
		return nil, err
	}
	kernel, err := store.Kernel(ctx)
	if err != nil {
		return nil, err
	}
	q := &machine{name: "QEMU microvm", answer: asked, args: []string{
		"qemu-system-x86_64",
		"-machine", "microvm,acpi=on,x-option-roms=off,pit=off,pic=off,rtc=off,auto-kernel-cmdline=off",
		"-bios", "qboot.rom", "-accel", "kvm", "-cpu", "host",
		"-smp", fmt.Sprint(o.cpus), "-m", fmt.Sprintf("%dM", o.memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", kernel, "-initrd", filepath.Join(kit, initrdFile), "-append", o.cmdline,
		"-serial", "null",
		"-chardev", "socket,id=agent,fd=3",
		"-device", "virtio-serial-device", "-device", "virtserialport,chardev=agent,name=" + agent.PortName,
		"-device", "virtio-rng-device",
	}}
	return []*machine{k, q}, nil
}

// start executes the VMM.
func (m *machine) start(ctx context.Context) (_ *process, err error) {
	p := &process{cmd: exec.CommandContext(ctx, m.args[0], m.args[1:]...)}
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
		if err != nil {
			p.close()
		}
	}()
	stderr, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.stderr, theirs = stderr, append(theirs, w)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	far := os.NewFile(uintptr(fds[1]), "port")
	p.port, theirs = os.NewFile(uintptr(fds[0]), "port"), append(theirs, far)
	p.cmd.Stderr, p.cmd.ExtraFiles = w, []*os.File{far}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt is for us alone
	return p, p.cmd.Start()
}

// close kills the VMM, whatever it does.
func (p *process) close() {
	if p.cmd.Process != nil {
		_ = p.cmd.Process.Kill() // it may have ended
		_ = p.cmd.Wait()
	}
	for _, f := range []*os.File{p.stderr, p.port} {
		if f != nil {
			f.Close()
		}
	}
}

// printed waits for kvmlet to print the answer.
func printed(_ context.Context, p *process) error {
	s, err := bufio.NewReader(p.stderr).ReadString('\n')
	if err == nil && !strings.Contains(s, missing) {
		err = errors.New(strings.TrimSpace(s))
	}
	return err
}

// asked asks the agent at QEMU's socket.
func asked(ctx context.Context, p *process) error {
	c, err := agent.Connect(ctx, p.port)
	if err != nil {
		b, _ := io.ReadAll(io.LimitReader(p.stderr, 4096)) // QEMU's own words, if it ended
		return fmt.Errorf("%w %s", err, b)
	}
	_, err = c.Start(ctx, agent.Command{Args: []string{missing}})
	var no *agent.StartError
	if !errors.As(err, &no) {
		return fmt.Errorf("start a program that does not exist: %w", err)
	}
	return nil
}

// round starts the VMM once. With boot it waits for the agent and reads the memory, too.
func (m *machine) round(ctx context.Context, t *trace, o *options, boot bool) (s sample, err error) {
	s.Machine = m.name
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", m.name, err)
		}
	}()
	if err := t.begin(); err != nil {
		return s, err
	}
	p, err := m.start(ctx)
	if err != nil {
		return s, err
	}
	defer p.close()
	ctx, cancel := context.WithTimeout(ctx, bootPatience)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = p.cmd.Process.Kill() })()
	answered := make(chan error, 1)
	var answeredAt time.Duration
	if boot {
		go func() {
			err := m.answer(ctx, p)
			if err == nil {
				answeredAt, err = now()
				err = errors.Join(err, p.cmd.Process.Signal(syscall.SIGSTOP)) // memory is read as it is now
			}
			answered <- err
		}()
	}
	defer func() { err = errors.Join(err, t.end()) }()
	pid := p.cmd.Process.Pid
	start, events, err := t.first(pid, startPatience)
	if err != nil {
		return s, err
	}
	s.Entry = events[len(events)-1].at - start
	s.Phases = phases(start, events)
	if !boot {
		return s, nil
	}
	if err := <-answered; err != nil {
		return s, err
	}
	if answeredAt, err = t.without(answeredAt, startPatience); err != nil {
		return s, err
	}
	s.Answer = answeredAt - start
	s.Memory, err = readFootprint(pid, int64(o.memory)<<20)
	return s, err
}

// qemuVersion is the first line that QEMU says about itself, without its packager's words.
func qemuVersion(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "--version").Output()
	if err != nil {
		return "QEMU"
	}
	first, _, _ := strings.Cut(string(out), " (")
	return strings.TrimSpace(strings.Replace(first, "emulator version ", "", 1))
}
