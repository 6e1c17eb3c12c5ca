package agent

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Some tests need a process of their own: it is this executable with a role in its environment.
const roleVariable = "KVMLET_AGENT_TEST_ROLE"

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		roles := map[string]func() error{"reaper": reaperRole, "network": networkRole}
		if err := roles[role](); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func playRole(t *testing.T, role string, attr *syscall.SysProcAttr) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(testContext(t), exe)
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	cmd.SysProcAttr = attr
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// PID 1 gets every orphan of the machine. It must reap those and still give each command its own status.
func TestReaper(t *testing.T) {
	t.Parallel()
	playRole(t, "reaper", nil)
}

func reaperRole() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	in := newInitSystem()
	in.watchSignals()
	var wg sync.WaitGroup
	failed := make(chan error, 1000)
	for i := range 40 {
		wg.Go(func() {
			// Each leaves orphans behind, which end before and after it.
			script := fmt.Sprintf("(true &) ; (sh -c 'sleep 0.0%d' &); exit %d", i, i)
			_, exited, err := in.start("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{Env: os.Environ()})
			if err != nil {
				failed <- err
				return
			}
			if status := <-exited; status.ExitStatus() != i {
				failed <- fmt.Errorf("command %d: status %d", i, status.ExitStatus())
			}
			if _, _, err := in.start("/no/such/program", []string{"x"}, &syscall.ProcAttr{}); !errors.Is(err, os.ErrNotExist) {
				failed <- fmt.Errorf("missing program: %w", err)
			}
		})
	}
	wg.Wait()
	close(failed)
	for err := range failed {
		return err
	}
	<-in.idle // all orphans are reaped
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.children) != 0 {
		return fmt.Errorf("%d children still in the table", len(in.children))
	}
	return nil
}

// Addresses and routes are set in a network of their own, which needs no rights where user name spaces are allowed.
func TestNetwork(t *testing.T) {
	t.Parallel()
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	playRole(t, "network", attr)
}

func networkRole() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts to this process: %w", err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount this network's /sys: %w", err)
	}
	if err := setUpNetwork(""); err != nil {
		return err
	}
	lo, err := net.InterfaceByName("lo")
	if err != nil || lo.Flags&net.FlagUp == 0 {
		return errors.Join(fmt.Errorf("lo is not up: %+v", lo), err)
	}
	if err := setUpNetwork("10.1.2.3/24"); err == nil || !strings.Contains(err.Error(), "no network interface eth0") {
		return fmt.Errorf("without eth0: %w", err)
	}
	nl, err := openRoute()
	if err != nil {
		return err
	}
	defer unix.Close(int(nl))
	for _, address := range []string{"10.1.2.3/24,10.1.2.9", "10.1.2.3/24,10.1.2.9", "fd00::3/64"} { // again is no error
		if err := nl.configure("lo", address); err != nil {
			return err
		}
	}
	addresses, err := lo.Addrs()
	if err != nil {
		return err
	}
	for _, want := range []string{"10.1.2.3/24", "fd00::3/64"} {
		found := false
		for _, a := range addresses {
			found = found || a.String() == want
		}
		if !found {
			return fmt.Errorf("%s is not among %v", want, addresses)
		}
	}
	for _, bad := range []string{
		"10.1.2.3", "10.1.2.3/33", "x/24", "10.1.2.3/24,", "10.1.2.3/24,fd00::1", "10.1.2.3/24,1.1.1.1",
	} {
		if err := nl.configure("lo", bad); err == nil {
			return fmt.Errorf("address %q: no error", bad)
		}
	}
	return nil
}

func TestParameter(t *testing.T) {
	t.Parallel()
	cmdline := "console=ttyS0 kvmlet.hostname=a xkvmlet.ip=no kvmlet.ip=10.0.0.2/24,10.0.0.1 kvmlet.hostname=b kvmlet.empty=\n"
	for name, want := range map[string]string{
		"kvmlet.hostname": "b", "kvmlet.ip": "10.0.0.2/24,10.0.0.1", "kvmlet.empty": "", "kvmlet": "", "quiet": "",
	} {
		if got := parameter(cmdline, name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

func TestFingerprintIsStable(t *testing.T) {
	t.Parallel()
	if a, b := Fingerprint(), Fingerprint(); a != b || len(a) != 64 {
		t.Errorf("%q, %q", a, b)
	}
}

// TestUndriven tells a virtio console without a driver from everything else on a PCI bus.
func TestUndriven(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		vendor, device, driver string
		want                   bool
	}{
		"no virtio_pci":         {"0x1af4", "0x1043", "", true},
		"transitional":          {"0x1af4", "0x1003", "", true},
		"no virtio_console":     {"0x1af4", "0x1043", "virtio0", true},
		"driven":                {"0x1af4", "0x1043", "virtio0/driver", false},
		"another virtio device": {"0x1af4", "0x1044", "", false},
		"another vendor's":      {"0x8086", "0x1043", "", false},
		"nothing that tells":    {"", "", "", false},
	} {
		dir := t.TempDir()
		d := filepath.Join(dir, "0000:00:01.0")
		if err := os.MkdirAll(filepath.Join(d, c.driver), 0o755); err != nil {
			t.Fatal(err)
		}
		for file, id := range map[string]string{"vendor": c.vendor, "device": c.device} {
			if err := os.WriteFile(filepath.Join(d, file), []byte(id+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := undriven(dir); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// Without the port PID 1 falls back to a shell at once if there is no virtio console at all, and after a bounded wait
// otherwise.
func TestMissingPort(t *testing.T) {
	t.Parallel()
	path, err := waitPort("dev.kvmlet.no-such-port", 0)
	if err == nil || !strings.Contains(err.Error(), "no virtio-serial port") {
		t.Errorf("%q, %v", path, err)
	}
}
