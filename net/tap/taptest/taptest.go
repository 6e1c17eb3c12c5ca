// Package taptest gives tests a network of their own, and Ethernet frames to send through it.
package taptest

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/net"
)

// Possible says what this host lacks for Namespace, as labtest.MainWhere wants to know.
func Possible() error {
	result := make(chan error)
	go func() { result <- enter() }() // ends with its thread
	return <-result
}

// enter moves the goroutine into a new network namespace, with its thread.
func enter() error {
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		return fmt.Errorf("there is no tun driver: %w (load it: modprobe tun)", err)
	}
	// Never unlocked: the runtime ends a thread whose goroutine ends like this, and does not use it for others.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("no new network namespace: %w (run the test as root)", err)
	}
	return nil
}

// Namespace moves the test's goroutine into a new network namespace, which is gone when the test ends, with all its
// devices. The goroutine keeps its thread; what other goroutines open is outside. Without the right to do so the test is
// skipped, or fails if KVMLET_REQUIRE is "all".
func Namespace(tb testing.TB) {
	tb.Helper()
	if err := enter(); err != nil {
		if os.Getenv("KVMLET_REQUIRE") == "all" {
			tb.Fatal(err)
		}
		tb.Skip(err)
	}
}

// Echo describes ICMP echo messages over IPv4 between a guest and its host.
type Echo struct {
	GuestMAC, HostMAC net.MAC
	GuestIP, HostIP   [4]byte
}

const (
	etherLen = 14
	ipLen    = 20
	icmpLen  = 8

	typeReply   = 0
	typeRequest = 8
)

// Request returns a frame in which the guest sends the host an echo request with that number and n payload bytes.
func (e Echo) Request(seq uint16, n int) []byte {
	b := make([]byte, etherLen+ipLen+icmpLen+n)
	be := binary.BigEndian
	copy(b[0:], e.HostMAC[:])
	copy(b[6:], e.GuestMAC[:])
	be.PutUint16(b[12:], unix.ETH_P_IP)

	ip := b[etherLen:]
	ip[0] = 0x45 // version 4, header of 5 words
	be.PutUint16(ip[2:], uint16(len(ip)))
	ip[8] = 64 // time to live
	ip[9] = unix.IPPROTO_ICMP
	copy(ip[12:], e.GuestIP[:])
	copy(ip[16:], e.HostIP[:])
	be.PutUint16(ip[10:], checksum(ip[:ipLen]))

	icmp := ip[ipLen:]
	icmp[0] = typeRequest
	be.PutUint16(icmp[4:], 0x1234) // identifier
	be.PutUint16(icmp[6:], seq)
	for i := range icmp[icmpLen:] {
		icmp[icmpLen+i] = byte(int(seq) + i)
	}
	be.PutUint16(icmp[2:], checksum(icmp))
	return b
}

// IsReply reports whether frame is the host's answer to Request(seq, n).
func (e Echo) IsReply(frame []byte, seq uint16, n int) bool {
	be := binary.BigEndian
	if len(frame) != etherLen+ipLen+icmpLen+n || net.MAC(frame[:6]) != e.GuestMAC || be.Uint16(frame[12:]) != unix.ETH_P_IP {
		return false
	}
	ip := frame[etherLen:]
	if ip[9] != unix.IPPROTO_ICMP || [4]byte(ip[12:16]) != e.HostIP || [4]byte(ip[16:20]) != e.GuestIP {
		return false
	}
	icmp := ip[ipLen:]
	if icmp[0] != typeReply || be.Uint16(icmp[6:]) != seq || checksum(icmp) != 0 {
		return false
	}
	for i, b := range icmp[icmpLen:] {
		if b != byte(int(seq)+i) {
			return false
		}
	}
	return true
}

// checksum is the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
