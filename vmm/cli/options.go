package cli

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/vmm"
)

// size is a flag that takes bytes with an optional binary unit: 512M, 1.5G, 65536.
type size uint64

func (s *size) Type() string { return "size" }

func (s *size) String() string {
	for _, u := range sizeUnits {
		if u.bytes > 1 && uint64(*s) >= u.bytes && uint64(*s)%u.bytes == 0 {
			return strconv.FormatUint(uint64(*s)/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatUint(uint64(*s), 10)
}

var sizeUnits = []struct {
	name  string
	bytes uint64
}{{"T", 1 << 40}, {"G", 1 << 30}, {"M", 1 << 20}, {"K", 1 << 10}, {"", 1}}

func (s *size) Set(v string) error {
	n, err := disk.ParseNumber(v)
	if err != nil {
		return fmt.Errorf("%q is not a size: it is %w", v, err)
	}
	*s = size(n)
	return nil
}

// property is one name=value of a device option such as path=disk.img,readonly.
type property struct{ name, value string }

// properties splits a device option at its commas. A comma in a value is written twice, as in QEMU.
func properties(s string) ([]property, error) {
	var list []property
	for _, part := range splitDoubled(s) {
		name, value, _ := strings.Cut(part, "=")
		if name == "" {
			return nil, fmt.Errorf("%q has an empty property", s)
		}
		for _, p := range list {
			if p.name == name {
				return nil, fmt.Errorf("%q gives %s twice", s, name)
			}
		}
		list = append(list, property{name, value})
	}
	return list, nil
}

func splitDoubled(s string) []string {
	var parts []string
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] != ',':
			b.WriteByte(s[i])
		case i+1 < len(s) && s[i+1] == ',':
			b.WriteByte(',')
			i++
		default:
			parts = append(parts, b.String())
			b.Reset()
		}
	}
	return append(parts, b.String())
}

// parseSwitch reads the value of a property that is on when it is merely named.
func parseSwitch(p property) (bool, error) {
	switch p.value {
	case "", "on", "true", "yes":
		return true, nil
	case "off", "false", "no":
		return false, nil
	default:
		return false, fmt.Errorf("%s=%s: want on or off", p.name, p.value)
	}
}

// diskProperty reads and writes one property of a --disk option.
type diskProperty struct {
	name   string
	set    func(d *vmm.Disk, p property) error
	format func(d *vmm.Disk) string // "" leaves it out
}

// diskProperties are in the order in which help names them.
var diskProperties = []diskProperty{
	{
		"path", func(d *vmm.Disk, p property) error { d.Path = p.value; return nil },
		func(d *vmm.Disk) string { return d.Path },
	},
	{
		"format", func(d *vmm.Disk, p property) (err error) { d.Format, err = disk.ParseFormat(p.value); return err },
		func(d *vmm.Disk) string { return string(d.Format) },
	},
	switchProperty("readonly", func(d *vmm.Disk) *bool { return &d.ReadOnly }),
	{
		"cache", func(d *vmm.Disk, p property) (err error) { d.Cache, err = disk.ParseCache(p.value); return err },
		func(d *vmm.Disk) string { return unlessZero(d.Cache) },
	},
	{
		"aio", func(d *vmm.Disk, p property) (err error) { d.AIO, err = raw.ParseAIO(p.value); return err },
		func(d *vmm.Disk) string { return unlessZero(d.AIO) },
	},
	{
		"backing", func(d *vmm.Disk, p property) (err error) { d.Backing, err = disk.ParseBacking(p.value); return err },
		func(d *vmm.Disk) string { return unlessZero(d.Backing) },
	},
	{
		"backing-format",
		func(d *vmm.Disk, p property) (err error) {
			if d.BackingFormat, err = disk.ParseFormat(p.value); err != nil {
				return fmt.Errorf("backing-%w", err)
			}
			return nil
		},
		func(d *vmm.Disk) string { return string(d.BackingFormat) },
	},
	switchProperty("copy-on-read", func(d *vmm.Disk) *bool { return &d.CopyOnRead }),
	{
		"detect-zeroes",
		func(d *vmm.Disk, p property) (err error) {
			d.DetectZeroes, err = disk.ParseDetectZeroes(p.value)
			return err
		},
		func(d *vmm.Disk) string {
			if d.DetectZeroes == blk.DetectOff {
				return ""
			}
			return disk.DetectNames()[d.DetectZeroes]
		},
	},
	{
		"throttle",
		func(d *vmm.Disk, p property) (err error) {
			d.Throttle, err = disk.ParseThrottle(p.value)
			return err
		},
		func(d *vmm.Disk) string { return strings.ReplaceAll(unlessZero(d.Throttle), ",", ":") },
	},
	{
		"throttle-group",
		func(d *vmm.Disk, p property) error {
			if p.value == "" {
				return errors.New("throttle-group= names no group")
			}
			d.ThrottleGroup = p.value
			return nil
		},
		func(d *vmm.Disk) string { return d.ThrottleGroup },
	},
	{
		"queues",
		func(d *vmm.Disk, p property) (err error) {
			if d.Queues, err = strconv.Atoi(p.value); err != nil || d.Queues < 1 {
				return fmt.Errorf("queues=%s: want a number from 1 up", p.value)
			}
			return nil
		},
		func(d *vmm.Disk) string {
			if d.Queues == 0 {
				return ""
			}
			return strconv.Itoa(d.Queues)
		},
	},
	{
		"id", func(d *vmm.Disk, p property) error { d.ID = p.value; return nil },
		func(d *vmm.Disk) string { return d.ID },
	},
}

func switchProperty(name string, field func(d *vmm.Disk) *bool) diskProperty {
	return diskProperty{
		name, func(d *vmm.Disk, p property) (err error) { *field(d), err = parseSwitch(p); return err },
		func(d *vmm.Disk) string {
			if *field(d) {
				return "on"
			}
			return ""
		},
	}
}

// unlessZero returns how a value is written, or "" for the zero value.
func unlessZero[T interface {
	comparable
	fmt.Stringer
}](value T) string {
	var zero T
	if value == zero {
		return ""
	}
	return value.String()
}

// parseDisk reads path=F and the other diskProperties.
func parseDisk(s string) (vmm.Disk, error) {
	var d vmm.Disk
	list, err := properties(s)
	if err != nil {
		return d, err
	}
	for _, p := range list {
		i := slices.IndexFunc(diskProperties, func(known diskProperty) bool { return known.name == p.name })
		if i < 0 {
			if len(list) == 1 && p.value == "" {
				return d, fmt.Errorf("%q: want path=%s", s, s)
			}
			if d.Throttle != (blk.Throttle{}) && new(blk.Throttle).SetParam(p.name, 0) == nil {
				return d, fmt.Errorf("%s is a property of throttle=: join limits there with ':', not with ','", p.name)
			}
			return d, fmt.Errorf("unknown property %q (have %s)", p.name, diskPropertyNames())
		}
		if err := diskProperties[i].set(&d, p); err != nil {
			return d, err
		}
	}
	if d.Path == "" {
		return d, fmt.Errorf("%q names no file: want path=FILE", s)
	}
	return d, nil
}

// absoluteDisk makes the paths of d mean the same in another working directory.
func absoluteDisk(d *vmm.Disk) (err error) {
	if !disk.IsURI(d.Path) {
		if d.Path, err = absolute(d.Path); err != nil {
			return err
		}
	}
	switch d.Backing {
	case disk.Backing{}, disk.BackingOn:
		return nil
	}
	dir, err := absolute(d.Backing.String())
	d.Backing = disk.BackingBelow(dir)
	return err
}

// checkFormats refuses what looks like a mistake: an image that a guest would get as a raw disk, to write over its headers,
// because nothing was said.
func (p *plan) checkFormats() error {
	for _, d := range p.cfg.Disks {
		if d.Format == "" && beginsAsImage(d.Path) {
			return fmt.Errorf("disk %s begins as a qcow2 image does: say format=qcow2, or format=raw if it is none", d.Path)
		}
	}
	return nil
}

func diskPropertyNames() string {
	names := make([]string, len(diskProperties))
	for i, p := range diskProperties {
		names[i] = p.name
	}
	return strings.Join(names, ", ")
}

// formatDisk is the inverse of parseDisk.
func formatDisk(d vmm.Disk) string {
	var parts []string
	for _, p := range diskProperties {
		if value := p.format(&d); value != "" {
			parts = append(parts, p.name+"="+strings.ReplaceAll(value, ",", ",,"))
		}
	}
	return strings.Join(parts, ",")
}

// card is a network card as the command line describes it.
type card struct {
	vmm.Net
	hostIP netip.Prefix // the host's address on the link; zero when none was given
}

// parseNet reads tap=NAME[,mac=MAC][,hostip=IP/LEN][,existing][,id=NAME].
func parseNet(s string) (card, error) {
	var c card
	spec, err := net.ParseSpec(s)
	if err != nil {
		return c, err
	}
	if _, ok := vmm.Backends()[spec.Kind]; !ok {
		return c, fmt.Errorf("unknown kind %q: want tap=NAME", spec.Kind)
	}
	if spec.Name == "" {
		return c, fmt.Errorf("%q names no device: want %s=NAME", s, spec.Kind)
	}
	if v, ok := spec.Take("mac"); ok {
		if c.MAC, err = net.ParseMAC(v); err != nil {
			return c, err
		}
	}
	c.ID, _ = spec.Take("id")
	c.Spec = spec
	if err := checkTap(s); err != nil {
		return c, err
	}
	if v, ok := spec.Peek("hostip"); ok {
		if c.hostIP, err = netip.ParsePrefix(v); err != nil {
			return c, fmt.Errorf("hostip=%s: want an address and its prefix, such as 192.168.77.1/24", v)
		}
		if !c.guestIP().IsValid() {
			return c, fmt.Errorf("hostip=%s: the network has no address left for the guest", v)
		}
	}
	return c, nil
}

// checkTap finds mistakes that the backend would find as well, but later, and in the lab later still.
func checkTap(s string) error {
	spec, err := net.ParseSpec(s)
	if err != nil {
		return err
	}
	if len(spec.Name) >= unix.IFNAMSIZ {
		return fmt.Errorf("tap=%s: the name of a device has at most %d characters", spec.Name, unix.IFNAMSIZ-1)
	}
	for _, known := range []string{"mac", "id", "hostip", "existing"} {
		spec.Take(known)
	}
	return spec.Unknown()
}

// guestIP is the address that the guest gets on a card whose host side has one: the next in the network, or else the one
// before.
func (c *card) guestIP() netip.Prefix {
	if !c.hostIP.IsValid() {
		return netip.Prefix{}
	}
	host := c.hostIP.Addr()
	for _, a := range []netip.Addr{host.Next(), host.Prev()} {
		inside := a.IsValid() && c.hostIP.Masked().Contains(a)
		broadcast := a.Is4() && c.hostIP.Bits() < 31 && !c.hostIP.Masked().Contains(a.Next())
		network := a == c.hostIP.Masked().Addr() && c.hostIP.Bits() < host.BitLen()-1
		if inside && !broadcast && !network {
			return netip.PrefixFrom(a, c.hostIP.Bits())
		}
	}
	return netip.Prefix{}
}

// absolute makes a path one that means the same in another working directory.
func absolute(path string) (string, error) {
	p, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	if r, err := filepath.EvalSymlinks(p); err == nil {
		return r, nil
	}
	return p, nil
}
