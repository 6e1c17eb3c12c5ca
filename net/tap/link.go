package tap

import (
	"errors"
	"fmt"
	stdnet "net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// device is where tap devices are opened.
const device = "/dev/net/tun"

// rights is what to do about missing ones.
const rights = "run as root, or give the binary CAP_NET_ADMIN: setcap cap_net_admin+ep FILE"

// flags are what every device is opened with: Ethernet frames, without the protocol field, with a virtio-net header.
const flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR

// existing returns the flags with which to attach to name. A device that was made for several queues must be opened as
// such, though one is enough. It reports a device that is something else than a tap, and one that is missing but must
// exist.
func existing(name string, must bool) (uint16, error) {
	if name == "" && !must {
		return flags, nil
	}
	link, err := netlink.LinkByName(name)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		if must {
			return 0, fmt.Errorf("%w (make it first: ip tuntap add dev NAME mode tap user USER)", os.ErrNotExist)
		}
		return flags, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look the interface up: %w", err)
	}
	tuntap, ok := link.(*netlink.Tuntap)
	if !ok || tuntap.Mode != netlink.TUNTAP_MODE_TAP {
		return 0, fmt.Errorf("%w: %s (choose another name)", ErrNotTap, kind(link))
	}
	if tuntap.Flags&netlink.TUNTAP_MULTI_QUEUE != 0 {
		return flags | unix.IFF_MULTI_QUEUE, nil
	}
	return flags, nil
}

// kind describes a link that is no tap.
func kind(link netlink.Link) string {
	if _, ok := link.(*netlink.Tuntap); ok {
		return "it is a tun device, which carries no Ethernet frames"
	}
	return "its type is " + link.Type()
}

// deviceError explains a failure to open /dev/net/tun.
func deviceError(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("open %s: %w (load the driver: modprobe tun)", device, err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("open %s: %w (%s)", device, err, rights)
	}
	return fmt.Errorf("open %s: %w", device, err)
}

// attach ties fd to the device called name, which is created if it does not exist, and returns its name.
func attach(fd int, name string, flags uint16) (string, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrName, err)
	}
	ifr.SetUint16(flags)
	switch err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); {
	case err == nil:
		return ifr.Name(), nil
	case errors.Is(err, unix.EBUSY):
		return "", fmt.Errorf("%w: %w (stop that process, or choose another name)", ErrBusy, err)
	case errors.Is(err, os.ErrPermission):
		return "", fmt.Errorf("attach to the device: %w (%s; or make a device for this user: "+
			"ip tuntap add dev NAME mode tap user USER)", err, rights)
	case errors.Is(err, unix.EINVAL):
		return "", fmt.Errorf("attach to the device: %w (it exists with other properties, or the kernel has no IFF_VNET_HDR)", err)
	}
	return "", fmt.Errorf("attach to the device: %w", err)
}

// configure sets the link up and adds addr, unless both are so already, and returns the MTU.
func configure(name string, addr netip.Prefix) (int, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("look the interface up: %w", err)
	}
	if addr.IsValid() {
		if err := addAddr(link, addr); err != nil {
			return 0, err
		}
	}
	if link.Attrs().Flags&stdnet.FlagUp == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return 0, configError("set the link up", err)
		}
	}
	return link.Attrs().MTU, nil
}

func addAddr(link netlink.Link, addr netip.Prefix) error {
	ip := &stdnet.IPNet{IP: addr.Addr().AsSlice(), Mask: stdnet.CIDRMask(addr.Bits(), addr.Addr().BitLen())}
	have, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list the addresses: %w", err)
	}
	for _, a := range have {
		if a.IPNet.String() == ip.String() {
			return nil
		}
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ip}); err != nil {
		return configError("add the address "+addr.String(), err)
	}
	return nil
}

func configError(what string, err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%s: %w (%s)", what, err, rights)
	}
	return fmt.Errorf("%s: %w", what, err)
}
