package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// shutdownGrace is how long processes get after SIGTERM, and again after SIGKILL.
	shutdownGrace = 2 * time.Second

	// clockSlack is how far the guest's clock may be off before the host's hello sets it.
	clockSlack = 50 * time.Millisecond
)

// IsInit reports whether this process is PID 1 and should call Main instead of what it was built for.
func IsInit() bool { return os.Getpid() == 1 }

// initial is what a guest has mounted before any command runs.
var initial = []Mount{
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, ""},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, ""},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"},
	{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
}

// Main is a guest's PID 1. It mounts what programs expect, sets the host name (kvmlet.hostname= on the kernel's command
// line) and addresses (lo; eth0 by kvmlet.ip=ADDRESS/LENGTH[,GATEWAY]), and serves the host through the port PortName.
// Without that port it runs a shell on the console, at whose end the machine powers off. SIGUSR2 and SIGRTMIN+4 power
// off, SIGTERM, SIGINT and SIGRTMIN+5 reboot. It does not return.
func Main() {
	in := newInitSystem()
	logf := func(format string, args ...any) { fmt.Fprintf(os.Stderr, "kvmlet init: "+format+"\n", args...) }
	for _, err := range in.setUp() {
		logf("%v", err)
	}
	in.watchSignals()
	err := in.servePort()
	if errors.Is(err, errNoDriver) {
		// The host waits for the agent, and would for ever. A power-off would look like success; that PID 1 ends is a
		// panic, whose own words, of which level 0 lets none through, would bury ours.
		logf("%v", err)
		_ = os.WriteFile("/proc/sys/kernel/printk", []byte("0"), 0)
		os.Exit(1)
	}
	logf("%v; a shell on the console instead", err)
	if err := in.consoleShell(); err != nil {
		logf("%v", err)
	}
	if begin, err := in.shutdown(false); err == nil { // else the shell ended because of a shutdown
		begin()
	}
	select {}
}

// initSystem is PID 1's system.
type initSystem struct {
	started, ready time.Duration // by bootClock

	mu       sync.Mutex // also held from fork until the child is in the table
	children map[int]chan<- syscall.WaitStatus
	closing  bool          // no more commands
	idle     chan struct{} // gets a token when the last child was reaped
}

func newInitSystem() *initSystem {
	return &initSystem{
		started: bootClock(), children: make(map[int]chan<- syscall.WaitStatus), idle: make(chan struct{}, 1),
	}
}

// setUp makes the usual surroundings. A failure is reported and leaves that part out.
func (in *initSystem) setUp() (failed []error) {
	try := func(err error) {
		if err != nil {
			failed = append(failed, err)
		}
	}
	syscall.Umask(0o022)
	for _, m := range initial {
		if err := mount(m); !errors.Is(err, syscall.EBUSY) { // busy: the kernel or the image did it
			try(err)
		}
	}
	if console, err := os.OpenFile("/dev/console", os.O_RDWR|syscall.O_NOCTTY, 0); err == nil {
		for fd := range 3 {
			try(os.NewSyscallError("dup3", unix.Dup3(int(console.Fd()), fd, 0)))
		}
		console.Close()
	}
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2",
	} {
		if err := os.Symlink(target, name); !errors.Is(err, os.ErrExist) {
			try(err)
		}
	}
	for name, value := range map[string]string{"PATH": defaultPath, "HOME": "/root", "TERM": "linux"} {
		try(os.Setenv(name, value))
	}
	try(os.MkdirAll("/root", 0o700))
	try(os.NewSyscallError("setrlimit", unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1024, Max: 1 << 20})))
	cmdline, err := os.ReadFile("/proc/cmdline")
	try(err)
	try(setHostname(parameter(string(cmdline), "kvmlet.hostname")))
	try(setUpNetwork(parameter(string(cmdline), "kvmlet.ip")))
	return failed
}

// parameter returns the value of the last NAME=VALUE of a kernel command line, or "".
func parameter(cmdline, name string) (value string) {
	for _, word := range strings.Fields(cmdline) {
		if v, ok := strings.CutPrefix(word, name+"="); ok {
			value = v
		}
	}
	return value
}

func setHostname(name string) error {
	if name == "" {
		name = "kvmlet"
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("set the host name to %q: %w", name, err)
	}
	return nil
}

// mount does one mount(2), making the target if there is none.
func mount(m Mount) error {
	if _, err := os.Lstat(m.Target); errors.Is(err, os.ErrNotExist) {
		if err := makeTarget(m); err != nil {
			return err
		}
	}
	if m.Source == "" && m.Type == "" && m.Flags == 0 {
		return nil
	}
	if err := unix.Mount(m.Source, m.Target, m.Type, m.Flags, m.Options); err != nil {
		return fmt.Errorf("mount %s (type %s, options %q) on %s: %w", m.Source, m.Type, m.Options, m.Target, err)
	}
	return nil
}

// makeTarget makes what m is mounted on: a file for a file that is bound there, else a directory.
func makeTarget(m Mount) error {
	if m.Flags&unix.MS_BIND != 0 {
		source, err := os.Stat(m.Source)
		if err != nil {
			return err
		}
		if !source.IsDir() {
			if err := os.MkdirAll(filepath.Dir(m.Target), 0o755); err != nil {
				return err
			}
			f, err := os.OpenFile(m.Target, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return err
			}
			return f.Close()
		}
	}
	return os.MkdirAll(m.Target, 0o755)
}

// watchSignals reaps children and takes the requests that others send to PID 1.
func (in *initSystem) watchSignals() {
	const rtmin = 34 // as libc counts
	children, requests := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	signal.Notify(requests, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGTERM, syscall.SIGINT,
		syscall.Signal(rtmin+4), syscall.Signal(rtmin+5))
	go func() {
		for range children {
			in.reap()
		}
	}()
	go func() {
		for sig := range requests {
			reboot := sig == syscall.SIGTERM || sig == syscall.SIGINT || sig == syscall.Signal(rtmin+5)
			if begin, err := in.shutdown(reboot); err == nil {
				begin()
			}
		}
	}()
}

// reap collects every child that ended, hands the status of those we started to their waiter, and drops orphans'.
func (in *initSystem) reap() {
	in.mu.Lock()
	defer in.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil: // ECHILD
			select {
			case in.idle <- struct{}{}:
			default:
			}
			return
		case pid == 0:
			return
		default:
			if exited := in.children[pid]; exited != nil {
				delete(in.children, pid)
				exited <- status // has room for it
			}
		}
	}
}

func (in *initSystem) start(
	path string, args []string, attr *syscall.ProcAttr,
) (int, <-chan syscall.WaitStatus, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closing {
		return 0, nil, errors.New("the machine is shutting down")
	}
	pid, err := syscall.ForkExec(path, args, attr)
	if err != nil {
		return 0, nil, err
	}
	exited := make(chan syscall.WaitStatus, 1)
	in.children[pid] = exited
	return pid, exited, nil
}

// greet sets the clock, which a restored guest has wrong, and gives the kernel random bytes no other copy of it has.
func (in *initSystem) greet(h *hello) {
	now := time.Unix(0, h.clock)
	if off := time.Until(now); off > clockSlack || off < -clockSlack {
		tv := unix.NsecToTimeval(h.clock)
		_ = unix.Settimeofday(&tv) // without it only time stamps are off
	}
	random, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer random.Close()
	const addToCount, reseed = 0x40045201, 0x5207 // RNDADDTOENTCNT, RNDRESEEDCRNG of linux/random.h
	if _, err := random.Write(h.seed[:]); err == nil {
		_ = unix.IoctlSetPointerInt(int(random.Fd()), addToCount, 8*seedLen)
		_ = unix.IoctlSetInt(int(random.Fd()), reseed, 0)
	}
}

func (in *initSystem) ended(err error) {
	fmt.Fprintln(os.Stderr, "kvmlet init: session with the host cut off:", err)
}

func (in *initSystem) info() (Info, error) {
	i, err := readInfo()
	i.InitStarted, i.AgentReady = in.started, in.ready
	return i, err
}

func (in *initSystem) sync() error {
	unix.Sync()
	return nil
}

func (in *initSystem) mount(mounts []Mount) error {
	for _, m := range mounts {
		if err := mount(m); err != nil {
			return err
		}
	}
	return nil
}

// switchRoot moves dir's mount over /. Chrooting to that changes the root for good, so that user name spaces, which a
// chroot forbids, work there.
func (in *initSystem) switchRoot(dir string) error {
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("enter %s: %w", dir, err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move %s to /: %w", dir, err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change the root to %s: %w", dir, err)
	}
	return unix.Chdir("/")
}

func (in *initSystem) shutdown(reboot bool) (func(), error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closing {
		return nil, errors.New("the machine is shutting down already")
	}
	in.closing = true
	return func() { go in.halt(reboot) }, nil
}

// halt ends everything: TERM and HUP (shells ignore TERM), a grace, KILL, write back, unmount, power off.
func (in *initSystem) halt(reboot bool) {
	for _, sigs := range [][]syscall.Signal{{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGCONT}, {syscall.SIGKILL}} {
		select {
		case <-in.idle: // from before
		default:
		}
		for _, sig := range sigs {
			_ = syscall.Kill(-1, sig)
		}
		in.reap() // there may be nobody at all
		select {
		case <-in.idle:
		case <-time.After(shutdownGrace):
		}
	}
	unix.Sync()
	unmountAll()
	unix.Sync()
	how := unix.LINUX_REBOOT_CMD_POWER_OFF
	if reboot {
		how = unix.LINUX_REBOOT_CMD_RESTART
	}
	fmt.Fprintln(os.Stderr, "kvmlet init:", os.NewSyscallError("reboot", unix.Reboot(how)))
}

// unmountAll unmounts what it can, newest first, and makes the rest read-only.
func unmountAll() {
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for _, line := range slices.Backward(strings.Split(string(table), "\n")) {
		fields := strings.Fields(line)
		if len(fields) < 3 || slices.Contains([]string{"rootfs", "devtmpfs", "proc", "sysfs"}, fields[2]) {
			continue
		}
		target := unescape.Replace(fields[1])
		if unix.Unmount(target, 0) != nil {
			_ = unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
		}
	}
}

// consoleShell runs a shell on the machine's console and returns when it ends.
func (in *initSystem) consoleShell() error {
	name := "/dev/console"
	if active, err := os.ReadFile("/sys/class/tty/console/active"); err == nil {
		if names := strings.Fields(string(active)); len(names) > 0 {
			name = filepath.Join("/dev", names[len(names)-1])
		}
	}
	tty, err := os.OpenFile(name, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer tty.Close()
	fd := tty.Fd()
	attr := &syscall.ProcAttr{
		Dir: "/root", Env: os.Environ(), Files: []uintptr{fd, fd, fd},
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: true},
	}
	for _, shell := range []string{"/bin/bash", "/bin/sh", "/bbin/gosh", "/bbin/sh"} {
		_, exited, startErr := in.start(shell, []string{shell}, attr)
		if startErr == nil {
			<-exited
			return nil
		}
		err = fmt.Errorf("start %s: %w", shell, startErr)
	}
	return fmt.Errorf("no shell: %w", err)
}

// servePort serves the host on the agent's port for as long as there is one. It returns why there is not.
func (in *initSystem) servePort() error {
	for {
		path, err := waitPort(PortName, portPatience)
		if err != nil {
			return err
		}
		port, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		if in.ready == 0 {
			in.ready = bootClock()
		}
		for err = nil; err == nil; err = waitConnected(port) {
			if err = serve(port, in); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				break
			}
		}
		port.Close()
		fmt.Fprintf(os.Stderr, "kvmlet init: %s: %v\n", path, err)
	}
}
