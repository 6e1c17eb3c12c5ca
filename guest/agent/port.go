package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// PortName is the name of the virtio-serial port that the agent serves.
const PortName = "dev.kvmlet.agent"

// portPatience bounds the wait for the port: the driver makes ports in the background, soon after the device.
const portPatience = 5 * time.Second

// errNoDriver reports that the machine has a virtio console and the kernel nothing that drives it.
var errNoDriver = errors.New("this kernel does not drive the virtio console by which the host talks to it: it needs " +
	"CONFIG_VIRTIO_PCI and CONFIG_VIRTIO_CONSOLE built in, not as modules")

// PCI identifiers of a virtio console (virtio 1.2, 4.1.2.1 and 5.3.1), the second of a transitional one.
const (
	virtioVendor        = "0x1af4"
	consoleDevice       = "0x1043"
	legacyConsoleDevice = "0x1003"
)

// undriven reports whether one of the PCI devices listed in dir, as in /sys/bus/pci/devices, is a virtio console that
// became no virtio device, or one that no driver has.
func undriven(dir string) bool {
	devices, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, d := range devices {
		vendor, _ := os.ReadFile(filepath.Join(d, "vendor"))
		device, _ := os.ReadFile(filepath.Join(d, "device"))
		if string(bytes.TrimSpace(vendor)) != virtioVendor {
			continue
		}
		switch string(bytes.TrimSpace(device)) {
		case consoleDevice, legacyConsoleDevice:
			if bound, _ := filepath.Glob(filepath.Join(d, "virtio*", "driver")); len(bound) == 0 {
				return true
			}
		}
	}
	return false
}

// waitPort returns the device of the virtio-serial port with the given name. A machine without any virtio console does
// not wait for one.
func waitPort(name string, patience time.Duration) (string, error) {
	events, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return "", os.NewSyscallError("open the kernel's event socket", err)
	}
	defer unix.Close(events)
	// Listening comes before looking, so that nothing is missed between.
	if err := unix.Bind(events, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return "", os.NewSyscallError("listen to the kernel's events", err)
	}
	event := make([]byte, 4096)
	for deadline := time.Now().Add(patience); ; {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, file := range names {
			if b, err := os.ReadFile(file); err == nil && string(bytes.TrimSpace(b)) == name {
				return filepath.Join("/dev", filepath.Base(filepath.Dir(file))), nil
			}
		}
		consoles, _ := filepath.Glob("/sys/bus/virtio/drivers/virtio_console/virtio*")
		left := time.Until(deadline)
		if len(consoles) == 0 && undriven("/sys/bus/pci/devices") {
			return "", errNoDriver
		}
		if len(consoles) == 0 || left <= 0 {
			return "", fmt.Errorf("no virtio-serial port %s among %d, on %d devices", name, len(names), len(consoles))
		}
		poll := []unix.PollFd{{Fd: int32(events), Events: unix.POLLIN}}
		if n, _ := unix.Poll(poll, int(left.Milliseconds())+1); n > 0 {
			_, _ = unix.Read(events, event)
		}
	}
}

// waitConnected returns when the host has its end of the port open. The driver wakes pollers of an unconnected port,
// which hangs up all the time, when that changes.
func waitConnected(port *os.File) error {
	c, err := port.SyscallConn()
	if err != nil {
		return err
	}
	var gone error
	err = c.Write(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if _, err := unix.Poll(poll, 0); err != nil && !errors.Is(err, unix.EINTR) {
			gone = os.NewSyscallError("poll", err)
			return true
		}
		return poll[0].Revents&unix.POLLHUP == 0
	})
	return errors.Join(err, gone)
}
