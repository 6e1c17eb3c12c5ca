package guesttest_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/guesttest"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/net/tap/taptest"
	"github.com/kvmlet/kvmlet/vmm"
)

// endings are the ways in which guests end, from either side.
var endings = []struct {
	name string
	end  func(t *testing.T, g *guesttest.Guest)
	want vmm.Outcome
}{
	{"power-off", func(t *testing.T, g *guesttest.Guest) {
		if err := g.Poweroff(); err != nil {
			t.Fatal(err)
		}
	}, vmm.PowerOff},
	{"stop during I/O", func(t *testing.T, g *guesttest.Guest) {
		out, _ := lines(t, g.Command("/init", helperArg, "writer"))
		if !out.Scan() {
			t.Fatalf("the writer ended: %v", out.Err())
		}
		g.VM().Stop()
	}, vmm.Stopped},
	{"panic", func(t *testing.T, g *guesttest.Guest) {
		if err := g.Command("/init", helperArg, "crash").Run(); err == nil {
			t.Error("the guest survived")
		}
		if !strings.Contains(g.Console(), "Kernel panic") {
			t.Error("the console does not tell of the panic")
		}
	}, vmm.Panic},
	{"reboot", func(t *testing.T, g *guesttest.Guest) {
		if err := g.Agent().Reboot(t.Context()); err != nil {
			t.Fatal(err)
		}
	}, vmm.Reboot},
	{"stop in a pause", func(t *testing.T, g *guesttest.Guest) {
		if err := g.VM().Pause(); err != nil {
			t.Fatal(err)
		}
		g.VM().Stop()
	}, vmm.Stopped},
}

// TestNothingLeaks boots guests one after the other and ends them in all ways. What Run finds after each is what it can
// tell from the test's own; here is all that the process holds.
func TestNothingLeaks(t *testing.T) {
	const short, long = 2, 10
	boots := long
	if testing.Short() {
		boots = short
	}
	boot := func(i int) {
		e := endings[i%len(endings)]
		t.Run(e.name, func(t *testing.T) {
			taptest.Namespace(t)
			g := guesttest.Run(t, smallGuest(t))
			e.end(t, g)
			expectEnd(t, g, e.want)
		})
	}
	boot(boots - 1) // the first of all leaves what packages keep
	before := usage(t)
	for i := range boots {
		boot(i)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		runtime.GC() // memory of the heap is not what is looked for
		now := usage(t)
		if now.goroutines <= before.goroutines && now.files <= before.files && now.mappings <= before.mappings &&
			now.size < before.size+smallMemory {
			t.Logf("before %v, after %d guests %v", before, boots, now)
			return
		}
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("before %v, after %d guests %v\n%s", before, boots, now, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// smallGuest has little memory and one of each device.
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

// used is what a process holds. Anonymous mappings come and go with Go's own threads and heap, so that only their size
// tells of one that a guest's memory was.
type used struct {
	goroutines, files int
	mappings          int    // of files and the kernel's objects
	size              uint64 // of the address space, bytes
}

func (u used) String() string {
	return fmt.Sprintf("%d goroutines, %d files, %d mappings of %d MiB", u.goroutines, u.files, u.mappings, u.size>>20)
}

func usage(t *testing.T) used {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseUint(strings.Fields(string(statm))[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	u := used{goroutines: runtime.NumGoroutine(), files: len(files), size: pages * uint64(os.Getpagesize())}
	for line := range strings.Lines(string(maps)) {
		if fields := strings.Fields(line); len(fields) > 4 && fields[4] != "0" { // the inode
			u.mappings++
		}
	}
	return u
}
