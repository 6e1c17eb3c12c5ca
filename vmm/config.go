package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/guest/linux"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/net/tap"
	"github.com/kvmlet/kvmlet/vmm/pci"
	"github.com/kvmlet/kvmlet/vmm/vcpu"
)

// Config describes a VM. New checks it as a whole before it makes anything.
type Config struct {
	CPUs     int           // 1 to MaxCPUs
	Memory   uint64        // bytes, MinMemory to MaxMemory, a multiple of 2 MiB
	Template vcpu.Template // of CPU features; empty means vcpu.Host

	Kernel  *linux.Kernel // parsed; New does not close it
	Initrd  []linux.Blob  // parts of the initial RAM disk, loaded one behind the other
	Cmdline string        // the kernel's command line, which begins with BaseCmdline for most

	Disks []Disk // /dev/vda, /dev/vdb, ... in this order
	Nets  []Net  // eth0, eth1, ... in this order

	// Resources are the disks and networks if they were opened before, by OpenResources from this Config. New owns them
	// then, even if it fails. Nil: New opens them.
	Resources *Resources

	// Console takes what the guest sends on its first serial port; nil discards it. VM.Serial sends to it.
	Console io.Writer

	// AgentPort gives the guest a virtio-console with the agent's port; VM.AgentPort is the host's end.
	AgentPort bool
}

// BaseCmdline is what a Linux kernel has to be told for its VM to work as described here: Config.Console is the first
// serial port, and the end of a kernel that panics is a Panic. The kernel resets the machine at once then (panic=-1), and
// leaves the mark that tells this from a Reboot (reboot=panic_warm). A kernel that is also told reboot=warm leaves it
// always: its resets are all taken for a Reboot then, unless it has reported a panic to the panic device. One whose mode is
// set to warm at run time, in /sys/kernel/reboot, cannot be told from one that panics.
const BaseCmdline = "console=ttyS0 panic=-1 reboot=panic_warm"

// Disk is a virtio-blk device over an image, a block device of the host or an NBD export. Only Path must be set; see
// disk.Spec for what the zero values mean.
type Disk struct {
	ID       string // the serial number that the guest sees; empty: the position, such as disk0
	Path     string // a file, a block device, or an NBD URI
	Format   disk.Format
	ReadOnly bool

	Cache         disk.Cache
	AIO           raw.AIO
	Backing       disk.Backing // which backing files may be opened
	BackingFormat disk.Format  // of a backing file whose image does not say; "" refuses it
	DetectZeroes  blk.DetectZeroes
	CopyOnRead    bool

	// Throttle limits the disk; ThrottleGroup names a group that shares limits: those of the only one of its disks that
	// says them.
	Throttle      blk.Throttle
	ThrottleGroup string

	Queues int // request queues; 0 means one for each CPU, up to 16

	// Device is a disk that is open already, instead of all that tells how to open it. The VM closes it.
	Device *blk.Device
}

// Net is a virtio-net device.
type Net struct {
	ID   string
	Spec *net.Spec // the backend, such as tap=vm0
	MAC  net.MAC   // zero: a random one
}

// Backends are the kinds of network that a Net may name.
func Backends() net.Registry { return net.Registry{"tap": tap.FromSpec} }

// Errors of a bad Config that callers branch on.
var (
	ErrMemory    = errors.New("bad memory size")
	ErrCPUs      = errors.New("bad number of CPUs")
	ErrDuplicate = errors.New("used twice")
	ErrDevices   = errors.New("too many devices")
	ErrDiskID    = errors.New("bad disk id")
	ErrQueues    = errors.New("bad number of queues")
	ErrThrottle  = errors.New("bad throttle group")
	ErrNoKernel  = errors.New("no kernel to boot")
)

const (
	// memoryStep keeps guest memory fit for huge pages.
	memoryStep = 2 << 20

	// maxDevices is how many slots are left beside those of the PCI host, the agent's console and the entropy source.
	maxDevices = pci.Slots - 3

	// maxQueues is more than what any guest has CPUs for.
	maxQueues = 64

	// maxDiskID is the size of the field in which a guest sees a disk's id (virtio 1.2, 5.2.6).
	maxDiskID = 20
)

// Check reports what is wrong with c without opening or making anything, apart from what the host itself can do. What the
// guest boots from may still be missing; CheckBoot and New look at that.
func (c *Config) Check() error {
	switch {
	case c.CPUs < 1 || c.CPUs > MaxCPUs:
		return fmt.Errorf("%w: %d: want 1 to %d", ErrCPUs, c.CPUs, MaxCPUs)
	case c.Memory < MinMemory || c.Memory > MaxMemory:
		return fmt.Errorf("%w: %d MiB: want %d MiB to %d GiB", ErrMemory, c.Memory>>20, MinMemory>>20, MaxMemory>>30)
	case c.Memory%memoryStep != 0:
		return fmt.Errorf("%w: %d bytes: want a multiple of 2 MiB", ErrMemory, c.Memory)
	}
	if have := hostMemory(); c.Memory > have {
		return fmt.Errorf("%w: %d MiB: this host has %d MiB", ErrMemory, c.Memory>>20, have>>20)
	}
	if _, err := vcpu.ParseTemplate(string(c.template())); err != nil {
		return err
	}
	if n := len(c.Disks) + len(c.Nets); n > maxDevices {
		return fmt.Errorf("%w: %d disks and network cards: there is room for %d", ErrDevices, n, maxDevices)
	}
	if _, err := throttleGroups(c.Disks); err != nil {
		return err
	}
	return c.checkIDs()
}

// template returns the choice of CPU features that c makes.
func (c *Config) template() vcpu.Template {
	if c.Template == "" {
		return vcpu.Host
	}
	return c.Template
}

// checkIDs finds names and files that two devices would share.
func (c *Config) checkIDs() error {
	ids, files := map[string]bool{}, map[string]bool{}
	for i := range c.Disks {
		d := &c.Disks[i]
		if err := checkDiskID(d.ID); err != nil {
			return err
		}
		if id := d.id(i); ids[id] {
			return fmt.Errorf("disk id %s: %w", id, ErrDuplicate)
		}
		ids[d.id(i)] = true
		if d.Queues < 0 || d.Queues > maxQueues {
			return fmt.Errorf("%w: disk %s: %d: want 1 to %d", ErrQueues, d.id(i), d.Queues, maxQueues)
		}
		if d.Device == nil && files[d.Path] {
			return fmt.Errorf("disk %s: %w", d.Path, ErrDuplicate)
		}
		files[d.Path] = true
	}
	taps := map[string]bool{}
	macs := map[net.MAC]bool{}
	for i := range c.Nets {
		n := &c.Nets[i]
		if id := n.id(i); ids[id] {
			return fmt.Errorf("network id %s: %w", id, ErrDuplicate)
		}
		ids[n.id(i)] = true
		if n.Spec != nil && n.Spec.Name != "" {
			if taps[n.Spec.Name] {
				return fmt.Errorf("%s %s: %w", n.Spec.Kind, n.Spec.Name, ErrDuplicate)
			}
			taps[n.Spec.Name] = true
		}
		if n.MAC != (net.MAC{}) && macs[n.MAC] {
			return fmt.Errorf("MAC address %v: %w", n.MAC, ErrDuplicate)
		}
		macs[n.MAC] = true
	}
	return nil
}

func checkDiskID(id string) error {
	if len(id) > maxDiskID {
		return fmt.Errorf("%w %q: %d characters: want %d at most", ErrDiskID, id, len(id), maxDiskID)
	}
	for i := range len(id) {
		if id[i] < ' ' || id[i] > '~' {
			return fmt.Errorf("%w %q: want printable ASCII", ErrDiskID, id)
		}
	}
	return nil
}

func (d *Disk) id(i int) string {
	if d.ID != "" {
		return d.ID
	}
	return fmt.Sprintf("disk%d", i)
}

func (n *Net) id(i int) string {
	if n.ID != "" {
		return n.ID
	}
	return fmt.Sprintf("net%d", i)
}

// hostMemory returns the host's RAM in bytes.
func hostMemory() uint64 {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return MaxMemory // sysinfo cannot fail; if it does, the reservation will tell
	}
	return si.Totalram * uint64(si.Unit)
}

// openDisks opens and locks the disks, and those of their backing files.
func openDisks(disks []Disk) (opened []*blk.Device, err error) {
	groups, err := throttleGroups(disks)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			for _, d := range opened {
				err = errors.Join(err, d.Close())
			}
		}
	}()
	for _, d := range disks {
		if d.Device != nil {
			opened = append(opened, d.Device)
			continue
		}
		s := disk.Spec{
			Path: d.Path, Format: d.Format, ReadOnly: d.ReadOnly, Cache: d.Cache, AIO: d.AIO,
			Backing: d.Backing, BackingFormat: d.BackingFormat,
			DetectZeroes: d.DetectZeroes, CopyOnRead: d.CopyOnRead, Throttle: d.Throttle,
		}
		if d.ThrottleGroup != "" {
			s.Throttle, s.Group = blk.Throttle{}, groups[d.ThrottleGroup]
		}
		dev, err := disk.Open(context.Background(), s)
		if err != nil {
			return opened, err
		}
		opened = append(opened, dev)
	}
	return opened, nil
}

// throttleGroups makes the groups that disks name.
func throttleGroups(disks []Disk) (map[string]*blk.ThrottleGroup, error) {
	groups := map[string]*blk.ThrottleGroup{}
	for _, d := range disks {
		if d.ThrottleGroup == "" || d.Throttle == (blk.Throttle{}) {
			continue
		}
		if groups[d.ThrottleGroup] != nil {
			return nil, fmt.Errorf("%w: group %s has limits from two disks", ErrThrottle, d.ThrottleGroup)
		}
		g, err := blk.NewThrottleGroup(d.Throttle)
		if err != nil {
			return nil, fmt.Errorf("throttle group %s: %w", d.ThrottleGroup, err)
		}
		groups[d.ThrottleGroup] = g
	}
	for _, d := range disks {
		if d.ThrottleGroup != "" && groups[d.ThrottleGroup] == nil {
			return nil, fmt.Errorf("%w: no disk of group %s says its limits", ErrThrottle, d.ThrottleGroup)
		}
	}
	return groups, nil
}
