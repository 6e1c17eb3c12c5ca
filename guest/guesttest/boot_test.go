package guesttest_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/guest/guesttest"
	"github.com/kvmlet/kvmlet/guest/image"
	"github.com/kvmlet/kvmlet/guest/linux"
	"github.com/kvmlet/kvmlet/vmm"
	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

// A small guest is up sooner.
const smallMemory = 256 << 20

func expectEnd(t *testing.T, g *guesttest.Guest, want vmm.Outcome) {
	t.Helper()
	end, err := g.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if end.Outcome != want || end.Err != nil {
		t.Errorf("the guest ended by %v (%v), want %v", end.Outcome, end.Err, want)
	}
}

// TestMPTable boots without ACPI, so the kernel knows CPUs and interrupts from the MP table alone. It reboots at the end:
// without ACPI it cannot power off.
func TestMPTable(t *testing.T) {
	g := guesttest.Run(t, guesttest.Config{CPUs: 2, Memory: smallMemory, Bare: true, Cmdline: "acpi=off"})
	info, err := g.Agent().Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.CPUs != 2 {
		t.Errorf("%d CPUs, want 2", info.CPUs)
	}
	// The agent answers, so a device on PCI works; here is how its interrupts come.
	if got := helperOutput(t, g, "acpi"); got != "0 tables" {
		t.Errorf("ACPI is not off: %s", got)
	}
	if err := g.Agent().Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	expectEnd(t, g, vmm.Reboot)
}

// TestELFKernel boots an uncompressed kernel on the baseline CPU.
func TestELFKernel(t *testing.T) {
	k, err := openPinned(t)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "vmlinux")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(k.Unpack(f), f.Close()); err != nil {
		t.Fatal(err)
	}
	g := guesttest.Run(t, guesttest.Config{Memory: smallMemory, Bare: true, Kernel: path, Template: vcpu.Baseline})
	flags := " " + helperOutput(t, g, "cpuflags") + " "
	for flag, want := range map[string]bool{"sse2": true, "hypervisor": true, "svm": false, "vmx": false} {
		if strings.Contains(flags, " "+flag+" ") != want {
			t.Errorf("the CPU's flag %s is there: %t, want %t", flag, !want, want)
		}
	}
}

// TestStubKernel boots a bzImage that only its own decompressor can unpack: its payload asks for a window that is larger
// than what the host grants.
func TestStubKernel(t *testing.T) {
	path, err := image.Kernel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := widen(b); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "vmlinuz")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := linux.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.Unpack(io.Discard); !errors.Is(err, linux.ErrUnsupported) {
		t.Fatalf("the host unpacks the kernel, or fails in another way: %v", err)
	}
	g := guesttest.Run(t, guesttest.Config{Memory: smallMemory, Bare: true, Kernel: path})
	info, err := g.Agent().Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(info.Kernel, "Linux ") {
		t.Errorf("kernel %q", info.Kernel)
	}
}

// widen makes the zstd payload of a bzImage ask for a window of 1 GiB, which changes nothing for a decoder that has all
// data at once (RFC 8878, 3.1.1.1.2: the exponent minus 10 is in the upper five bits).
func widen(bz []byte) error {
	const magic = "\x28\xb5\x2f\xfd"
	const descriptor, window = 4, 5
	i := strings.Index(string(bz), magic)
	if i < 0 || bz[i+descriptor]&(1<<5) != 0 { // Single_Segment_flag: there is no window
		return errors.New("the pinned kernel has no zstd payload with a window")
	}
	bz[i+window] = (30 - 10) << 3
	return nil
}

func openPinned(t *testing.T) (*linux.Kernel, error) {
	path, err := image.Kernel(t.Context())
	if err != nil {
		return nil, err
	}
	k, err := linux.Open(path)
	if err == nil {
		t.Cleanup(func() { k.Close() })
	}
	return k, err
}

// helperOutput runs a helper in a guest and returns what it says.
func helperOutput(t testing.TB, g *guesttest.Guest, name string) string {
	t.Helper()
	return strings.TrimSpace(run(t, g, "/init", helperArg, name))
}

// acpi tells how many ACPI tables the kernel has.
func acpi() error {
	list, err := filepath.Glob("/sys/firmware/acpi/tables/[A-Z]*")
	fmt.Println(len(list), "tables")
	return err
}

// cpuflags prints what the first CPU can do.
func cpuflags() error {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if name, value, _ := strings.Cut(s.Text(), ":"); strings.TrimSpace(name) == "flags" {
			fmt.Println(value)
			return nil
		}
	}
	return errors.New("no flags")
}
