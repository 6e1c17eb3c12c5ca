package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// setUpNetwork brings lo up and, where address is not empty, gives eth0 that: ADDRESS/LENGTH[,GATEWAY].
func setUpNetwork(address string) error {
	nl, err := openRoute()
	if err != nil {
		return err
	}
	defer unix.Close(int(nl))
	err = nl.linkUp("lo")
	if address == "" {
		return err
	}
	return errors.Join(err, nl.configure("eth0", address))
}

// route is a rtnetlink socket.
type route int

func openRoute() (route, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, os.NewSyscallError("open a netlink socket", err)
	}
	return route(fd), nil
}

func (r route) configure(name, address string) error {
	fail := func(err error) error { return fmt.Errorf("give %s the address %q: %w", name, address, err) }
	addr, gw, hasGateway := strings.Cut(address, ",")
	prefix, err := netip.ParsePrefix(addr)
	if err != nil {
		return fail(err)
	}
	var gateway netip.Addr
	if hasGateway {
		if gateway, err = netip.ParseAddr(gw); err != nil {
			return fail(err)
		}
		if gateway.Is4() != prefix.Addr().Is4() {
			return fail(errors.New("the gateway is of the other family"))
		}
	}
	if err := r.linkUp(name); err != nil {
		return fail(err)
	}
	index, err := interfaceIndex(name)
	if err != nil {
		return fail(err)
	}
	// struct ifaddrmsg: family, prefix length, flags, scope (u8 each), index u32.
	family := addressFamily(prefix.Addr())
	body := []byte{family, byte(prefix.Bits()), unix.IFA_F_NODAD, 0}
	body = binary.NativeEndian.AppendUint32(body, index)
	body = appendAttribute(body, unix.IFA_LOCAL, prefix.Addr().AsSlice())
	body = appendAttribute(body, unix.IFA_ADDRESS, prefix.Addr().AsSlice())
	if err := r.do(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body); err != nil {
		return fail(err)
	}
	if !hasGateway {
		return nil
	}
	// struct rtmsg: family, destination and source lengths, tos, table, protocol, scope, type (u8 each), flags u32.
	body = []byte{
		family, 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0,
	}
	body = appendAttribute(body, unix.RTA_GATEWAY, gateway.AsSlice())
	body = appendAttribute(body, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, index))
	if err := r.do(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body); err != nil {
		return fail(err)
	}
	return nil
}

func addressFamily(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func (r route) linkUp(name string) error {
	index, err := interfaceIndex(name)
	if err != nil {
		return err
	}
	// struct ifinfomsg: family u8, pad u8, type u16, index i32, flags u32, change u32.
	body := make([]byte, 4, 16)
	body = binary.NativeEndian.AppendUint32(body, index)
	body = binary.NativeEndian.AppendUint32(body, unix.IFF_UP)
	body = binary.NativeEndian.AppendUint32(body, unix.IFF_UP)
	if err := r.do(unix.RTM_NEWLINK, 0, body); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	return nil
}

func interfaceIndex(name string) (uint32, error) {
	b, err := os.ReadFile("/sys/class/net/" + name + "/ifindex")
	if err != nil {
		return 0, fmt.Errorf("no network interface %s: %w", name, err)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 31)
	return uint32(n), err
}

func appendAttribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	for len(b)%unix.NLMSG_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}

// do sends one request and returns what the kernel answers.
func (r route) do(kind uint16, flags uint16, body []byte) error {
	// struct nlmsghdr: length u32, type u16, flags u16, sequence u32, port u32.
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	b = append(b, make([]byte, 8)...)
	b = append(b, body...)
	if err := unix.Sendto(int(r), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("send to netlink", err)
	}
	answer := make([]byte, 4096)
	n, err := unix.Read(int(r), answer)
	if err != nil {
		return os.NewSyscallError("read from netlink", err)
	}
	// struct nlmsgerr: the header, then i32 error, 0 for success.
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return errors.New("netlink gave no answer")
	}
	if errno := -int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])); errno != 0 {
		return syscall.Errno(errno)
	}
	return nil
}
