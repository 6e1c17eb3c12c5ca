package cli

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/vmm"
)

// size is a flag that takes bytes with an optional binary unit: 512M, 2G, 65536.
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
	t := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(v), "B"), "I")
	for _, u := range sizeUnits {
		digits, ok := strings.CutSuffix(t, u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 64)
		if err != nil || n > ^uint64(0)/u.bytes {
			break
		}
		*s = size(n * u.bytes)
		return nil
	}
	return fmt.Errorf("%q is not a size: want a number of bytes, or one with K, M, G or T behind it", v)
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

// parseDisk reads path=F[,readonly][,format=raw][,id=NAME].
func parseDisk(s string) (vmm.Disk, error) {
	var d vmm.Disk
	list, err := properties(s)
	if err != nil {
		return d, err
	}
	for _, p := range list {
		switch p.name {
		case "path":
			d.Path = p.value
		case "id":
			d.ID = p.value
		case "readonly":
			if d.ReadOnly, err = parseSwitch(p); err != nil {
				return d, err
			}
		case "format":
			if p.value != "raw" {
				return d, fmt.Errorf("format=%s: have raw", p.value)
			}
		default:
			if len(list) == 1 && p.value == "" {
				return d, fmt.Errorf("%q: want path=%s", s, s)
			}
			return d, fmt.Errorf("unknown property %q (have path, readonly, format, id)", p.name)
		}
	}
	if d.Path == "" {
		return d, fmt.Errorf("%q names no file: want path=FILE", s)
	}
	return d, nil
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

// formatDisk is the inverse of parseDisk.
func formatDisk(d vmm.Disk) string {
	s := "path=" + strings.ReplaceAll(d.Path, ",", ",,")
	if d.ReadOnly {
		s += ",readonly"
	}
	if d.ID != "" {
		s += ",id=" + strings.ReplaceAll(d.ID, ",", ",,")
	}
	return s
}
