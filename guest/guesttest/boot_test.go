package guesttest_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	stdnet "net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/guesttest"
	"github.com/kvmlet/kvmlet/guest/image"
	"github.com/kvmlet/kvmlet/guest/linux"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/net/tap/taptest"
	"github.com/kvmlet/kvmlet/vmm"
	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

// boots are guests that have something of their own, and the ways in which guests end, from either side.
var boots = []struct {
	name   string
	config func(t *testing.T, c *guesttest.Config) // changes smallGuest's; may be nil
	look   func(t *testing.T, g *guesttest.Guest)  // may be nil
	end    func(t *testing.T, g *guesttest.Guest)  // makes it end
	want   vmm.Outcome
}{
	{"power-off", nil, nil, powerOff, vmm.PowerOff},
	{"stop during I/O", nil, startWriter, stop, vmm.Stopped},
	{"panic", nil, nil, crashKernel, vmm.Panic},
	{"reboot without ACPI and MSI", twoCPUsByMPTable, findsTwoCPUs, reboot, vmm.Reboot},
	{"stop in a pause", nil, nil, stopPaused, vmm.Stopped},
	{"ELF kernel on the baseline CPU", elfKernel, hasBaselineCPU, powerOff, vmm.PowerOff},
	{"bzImage that unpacks itself", stubKernel, nil, stop, vmm.Stopped},
	{"5 GiB", fiveGiB, usesFiveGiB, powerOff, vmm.PowerOff},
	{"reboot without MSI", noMSI, usesINTx, reboot, vmm.Reboot},
	{"stop", nil, nil, stop, vmm.Stopped},
}

// TestBoots boots guests one after the other and ends them in all ways. What guesttest finds after each is what it can
// tell from the test's own; here is also that they leave nothing at all behind in the process.
func TestBoots(t *testing.T) {
	list := boots
	if testing.Short() {
		list = list[:2]
	}
	var before used
	for i, b := range list {
		t.Run(b.name, func(t *testing.T) {
			taptest.Namespace(t)
			c := smallGuest(t)
			if b.config != nil {
				b.config(t, &c)
			}
			g := guesttest.Run(t, c)
			if usage(t).large == 0 {
				t.Error("the guest's memory is not among the mappings that are looked at")
			}
			if b.look != nil {
				b.look(t, g)
			}
			b.end(t, g)
			switch end, err := g.Wait(); {
			case err != nil:
				t.Fatal(err)
			case end.Outcome != b.want || end.Err != nil:
				t.Errorf("the guest ended by %v (%v), want %v", end.Outcome, end.Err, b.want)
			}
		})
		if i == 0 {
			before = usage(t) // with what packages make once and keep
		}
	}
	checkUsage(t, before)
}

// smallGuest is up soon, and has one of each device.
func smallGuest(t *testing.T) guesttest.Config {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	spec, err := net.ParseSpec("tap=vm0")
	if err != nil {
		t.Fatal(err)
	}
	return guesttest.Config{
		Memory: smallMemory, Bare: true, Disks: []vmm.Disk{{Path: disk}}, Nets: []vmm.Net{{Spec: spec}},
	}
}

const smallMemory = 256 << 20

func powerOff(t *testing.T, g *guesttest.Guest) {
	if err := g.Poweroff(); err != nil {
		t.Fatal(err)
	}
}

func reboot(t *testing.T, g *guesttest.Guest) {
	if err := g.Agent().Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func stop(_ *testing.T, g *guesttest.Guest) { g.VM().Stop() }

func stopPaused(t *testing.T, g *guesttest.Guest) {
	if err := g.VM().Pause(); err != nil {
		t.Fatal(err)
	}
	g.VM().Stop()
}

func crashKernel(t *testing.T, g *guesttest.Guest) {
	if err := g.Command("/init", helperArg, "crash").Run(); err == nil {
		t.Error("the guest survived")
	}
	if !strings.Contains(g.Console(), "Kernel panic") {
		t.Error("the console does not tell of the panic")
	}
}

func startWriter(t *testing.T, g *guesttest.Guest) {
	out, _ := lines(t, g.Command("/init", helperArg, "writer"))
	if !out.Scan() {
		t.Fatalf("the writer ended: %v", out.Err())
	}
}

// twoCPUsByMPTable leaves the kernel nothing but the MP table to learn of CPUs and interrupts, those of the devices' pins
// among them. It cannot power off then.
func twoCPUsByMPTable(t *testing.T, c *guesttest.Config) {
	noMSI(t, c)
	c.CPUs, c.Cmdline = 2, c.Cmdline+" acpi=off"
}

func findsTwoCPUs(t *testing.T, g *guesttest.Guest) {
	info, err := g.Agent().Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.CPUs != 2 {
		t.Errorf("%d CPUs, want 2", info.CPUs)
	}
	if got := helperOutput(t, g, "acpi"); got != "0 tables" {
		t.Errorf("ACPI is not off: %s", got)
	}
	usesINTx(t, g)
}

// The link of guests that use their card.
const hostAddress, guestAddress = "192.168.79.1", "192.168.79.2"

// noMSI leaves the devices nothing but the interrupt pins of PCI.
func noMSI(t *testing.T, c *guesttest.Config) {
	spec, err := net.ParseSpec("tap=vm0,hostip=" + hostAddress + "/24")
	if err != nil {
		t.Fatal(err)
	}
	c.Nets = []vmm.Net{{Spec: spec}}
	c.Cmdline = "pci=nomsi kvmlet.ip=" + guestAddress + "/24"
}

// usesINTx has the guest use its disk and its card, and then finds every device's interrupts at the I/O APIC.
func usesINTx(t *testing.T, g *guesttest.Guest) {
	if got := helperOutput(t, g, "disk"); got != "64 blocks" {
		t.Errorf("the disk: %s", got)
	}
	// A socket is of the network that its maker's thread is in, which is this test's.
	server, err := stdnet.Listen("tcp4", hostAddress+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	echoed := make(chan error, 1)
	go func() {
		conn, err := server.Accept()
		if err == nil {
			_, err = io.Copy(conn, conn)
			conn.Close()
		}
		echoed <- err
	}()
	if got := strings.TrimSpace(run(t, g, "/init", helperArg, "echo", server.Addr().String())); got != "1048576 bytes" {
		t.Errorf("the card: %s", got)
	}
	if err := <-echoed; err != nil {
		t.Error(err)
	}
	table := helperOutput(t, g, "interrupts")
	if strings.Contains(table, "MSI") {
		t.Errorf("there are MSIs:\n%s", table)
	}
	for i := range 4 { // disk, card, entropy and console
		line := regexp.MustCompile(fmt.Sprintf(`(?m)^ *\d+: .*IO-APIC .*\bvirtio%d\b`, i)).FindString(table)
		if line == "" {
			t.Errorf("no interrupt of virtio%d at the I/O APIC:\n%s", i, table)
		}
	}
}

func elfKernel(t *testing.T, c *guesttest.Config) {
	k, err := linux.Open(pinnedKernel(t))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	c.Kernel, c.Template = filepath.Join(t.TempDir(), "vmlinux"), vcpu.Baseline
	f, err := os.Create(c.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(k.Unpack(f), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func hasBaselineCPU(t *testing.T, g *guesttest.Guest) {
	flags := " " + helperOutput(t, g, "cpuflags") + " "
	for flag, want := range map[string]bool{"sse2": true, "hypervisor": true, "svm": false, "vmx": false} {
		if strings.Contains(flags, " "+flag+" ") != want {
			t.Errorf("the CPU's flag %s is there: %t, want %t", flag, !want, want)
		}
	}
}

// stubKernel changes the pinned kernel so that only its own decompressor can unpack it: the payload asks for a window
// that is larger than what the host grants.
func stubKernel(t *testing.T, c *guesttest.Config) {
	b, err := os.ReadFile(pinnedKernel(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := widen(b); err != nil {
		t.Fatal(err)
	}
	c.Kernel = filepath.Join(t.TempDir(), "vmlinuz")
	if err := os.WriteFile(c.Kernel, b, 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := linux.Open(c.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.Unpack(io.Discard); !errors.Is(err, linux.ErrUnsupported) {
		t.Fatalf("the host unpacks the kernel, or fails in another way: %v", err)
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

func pinnedKernel(t *testing.T) string {
	t.Helper()
	path, err := image.Kernel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return path
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

// disk writes blocks all over the disk and reads them back, past the cache.
func disk() error {
	f, err := os.OpenFile("/dev/vda", os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	const blocks, size = 64, 4096
	page, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	content := func(i int) []byte { return bytes.Repeat([]byte{byte(i), 1, 2, 3}, size/4) }
	for i := range blocks {
		copy(page, content(i))
		if _, err := f.WriteAt(page, int64(i*size)); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	for i := range blocks {
		if _, err := f.ReadAt(page, int64(i*size)); err != nil {
			return err
		}
		if !bytes.Equal(page, content(i)) {
			return fmt.Errorf("block %d differs", i)
		}
	}
	fmt.Println(blocks, "blocks")
	return nil
}

// echo sends bytes to the server that its argument names, and wants them back.
func echo() error {
	conn, err := stdnet.Dial("tcp4", os.Args[3])
	if err != nil {
		return err
	}
	defer conn.Close()
	sent := random(3, 1<<20)
	failed := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		failed <- errors.Join(err, conn.(*stdnet.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(conn)
	if err := errors.Join(err, <-failed); err != nil {
		return err
	}
	if !bytes.Equal(got, sent) {
		return fmt.Errorf("%d bytes came back, and not those that were sent", len(got))
	}
	fmt.Println(len(got), "bytes")
	return nil
}

// interrupts prints what uses which.
func interrupts() error {
	table, err := os.ReadFile("/proc/interrupts")
	fmt.Printf("%s", table)
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
