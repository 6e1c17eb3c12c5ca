// Package tap is the network backend on a Linux tap device: what the guest sends, the host's network stack receives on
// an interface of its own, and the other way round (Documentation/networking/tuntap.rst in Linux).
package tap

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/net"
)

// Errors that Open returns, wrapped, for callers to branch on. Others wrap what the system said: os.ErrPermission where
// rights are missing, os.ErrNotExist where there is no tun driver or no such device.
var (
	ErrName   = errors.New("not a valid interface name")
	ErrBusy   = errors.New("in use by another process")
	ErrNotTap = errors.New("exists and is not a tap device")
)

// features are the offloads of every tap device with a virtio-net header. Towards the host none of them needs a word;
// towards the guest they are switched on by TUNSETOFFLOAD.
const features = net.Offloads

// Options say how Open treats the device. The zero value is right for most.
type Options struct {
	// HostAddr is an address with its prefix for the host's side of the device; the zero Prefix leaves the addresses
	// alone.
	HostAddr netip.Prefix

	// Existing opens only a device that was made before, and fails where there is none.
	Existing bool
}

// Tap is an open tap device. A device that Open created goes away with Close; one that was there before stays.
type Tap struct {
	name   string
	mtu    int
	file   *os.File
	conn   syscall.RawConn
	closed atomic.Bool

	skip   int // bytes of header in front of the caller's frame: not 0 only if the negotiated length is
	rx, tx transfer
}

var _ net.Backend = (*Tap)(nil)

// transfer is the state of Recv or of Send: what they hand to step, which is made once, as a closure per frame would be
// garbage per frame.
type transfer struct {
	vec    iov.Vec
	header [net.ShortHeaderLen]byte // stands in for the header while the negotiated length is 0
	spill  [1]byte                  // behind a receive buffer: written only by a frame that is too long
	n      int
	err    error
	step   func(fd uintptr) bool // one attempt; false: wait and try again
}

func (t *transfer) init(op func(fd int, v iov.Vec) (int, error)) {
	t.step = func(fd uintptr) bool {
		t.n, t.err = op(int(fd), t.vec)
		return t.err != unix.EAGAIN
	}
}

// Open opens the tap device with that name, creates it if there is none, and sets its link up. An empty name lets the
// kernel choose one. To create a device, set its link or an address needs CAP_NET_ADMIN; a device made for this user
// beforehand, whose link is up, needs no rights.
func Open(name string, o Options) (*Tap, error) {
	if err := checkName(name); err != nil {
		return nil, fmt.Errorf("tap %q: %w", name, err)
	}
	t, err := open(name, o)
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w", name, err)
	}
	return t, nil
}

// FromSpec opens the device that a description such as tap=vm0,hostip=192.168.77.1/24 names. It is a net.OpenFunc. The
// options are hostip=ADDRESS/BITS, as Options.HostAddr, and existing, as Options.Existing.
func FromSpec(s *net.Spec) (net.Backend, error) {
	var o Options
	if v, ok := s.Take("hostip"); ok {
		addr, err := netip.ParsePrefix(v)
		if err != nil || addr.Addr().IsUnspecified() || addr.Addr().IsMulticast() {
			return nil, fmt.Errorf("%w: hostip=%s: want a host's address and its prefix, as in 192.168.77.1/24", net.ErrSpec, v)
		}
		o.HostAddr = addr
	}
	_, o.Existing = s.Take("existing")
	if err := s.Unknown(); err != nil {
		return nil, err
	}
	if s.Name == "" {
		return nil, fmt.Errorf("%w: tap needs a name, as in tap=vm0", net.ErrSpec)
	}
	t, err := Open(s.Name, o)
	if err != nil {
		return nil, err // not a nil *Tap in the interface
	}
	return t, nil
}

// checkName applies the kernel's rules for interface names (dev_valid_name in net/core/dev.c), and leaves out '%', which
// asks for a number.
func checkName(name string) error {
	switch {
	case len(name) >= unix.IFNAMSIZ:
		return fmt.Errorf("%w: longer than %d bytes", ErrName, unix.IFNAMSIZ-1)
	case name == "." || name == "..", strings.ContainsAny(name, "/:% \t\n\v\f\r\x00"):
		return fmt.Errorf("%w: it must not be . or .., nor contain a slash, colon, percent sign or space", ErrName)
	}
	return nil
}

func open(name string, o Options) (*Tap, error) {
	flags, err := existing(name, o.Existing)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, deviceError(err)
	}
	name, err = attach(fd, name, flags)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	t := &Tap{name: name}
	t.rx.init(iov.Read)
	t.tx.init(iov.Write)
	if t.mtu, err = configure(name, o.HostAddr); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	// Only now: a descriptor without a device behind it cannot be polled.
	t.file = os.NewFile(uintptr(fd), device)
	if t.conn, err = t.file.SyscallConn(); err == nil {
		err = t.SetFeatures(0, net.HeaderLen)
	}
	if err != nil {
		_ = t.file.Close()
		return nil, err
	}
	return t, nil
}

// Name returns the interface's name.
func (t *Tap) Name() string { return t.name }

// MTU returns the interface's MTU at the time of Open, for the guest to use the same.
func (t *Tap) MTU() int { return t.mtu }

// Features returns the offloads that the device can do.
func (t *Tap) Features() net.Features { return features }

// SetFeatures fixes the offloads towards the guest and the length of the header.
func (t *Tap) SetFeatures(f net.Features, headerLen int) error {
	if f&^features != 0 || f != f.Complete() {
		return fmt.Errorf("tap %s: offloads %#x: %w", t.name, uint64(f), net.ErrFeatures)
	}
	skip := 0
	switch headerLen {
	case net.NoHeaderLen:
		// The device always has a header. One that the caller does not see must not say anything.
		if skip = net.ShortHeaderLen; f != 0 {
			return fmt.Errorf("tap %s: offloads need a header: %w", t.name, net.ErrFeatures)
		}
	case net.ShortHeaderLen, net.HeaderLen:
	default:
		return fmt.Errorf("tap %s: header of %d bytes: %w", t.name, headerLen, net.ErrFeatures)
	}
	if err := t.negotiate(f, headerLen+skip); err != nil {
		return err
	}
	t.skip = skip
	return nil
}

// negotiate tells the kernel.
func (t *Tap) negotiate(f net.Features, size int) error {
	var ioctlErr error
	err := t.conn.Control(func(fd uintptr) {
		if ioctlErr = unix.IoctlSetPointerInt(int(fd), unix.TUNSETVNETHDRSZ, size); ioctlErr != nil {
			ioctlErr = fmt.Errorf("tap %s: set the header length to %d: %w", t.name, size, ioctlErr)
			return
		}
		if ioctlErr = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, offloads(f)); ioctlErr != nil {
			ioctlErr = fmt.Errorf("tap %s: set the offloads to %#x: %w", t.name, offloads(f), ioctlErr)
		}
	})
	if err != nil {
		return t.waitError(err)
	}
	return ioctlErr
}

// offloads returns f as TUNSETOFFLOAD wants it: what the reader of the descriptor, the guest, accepts.
func offloads(f net.Features) int {
	n := 0
	for _, m := range [...]struct {
		f net.Features
		n int
	}{
		{net.GuestCSum, unix.TUN_F_CSUM},
		{net.GuestTSO4, unix.TUN_F_TSO4},
		{net.GuestTSO6, unix.TUN_F_TSO6},
		{net.GuestECN, unix.TUN_F_TSO_ECN},
	} {
		if f&m.f != 0 {
			n |= m.n
		}
	}
	return n
}

// Send writes one frame. It waits while the device takes none. Errors are the kernel's, for example EIO while the link
// is down and EINVAL for a header that it does not accept.
func (t *Tap) Send(frame iov.Vec) (int, error) {
	x := &t.tx
	x.vec = append(x.vec[:0].Append(x.header[:t.skip]), frame...)
	if err := t.conn.Write(x.step); err != nil {
		return 0, t.waitError(err)
	}
	if x.err != nil {
		return 0, x.err // as it is: a guest can cause it with every frame, and nobody reads the text
	}
	return x.n - t.skip, nil
}

// Recv waits for a frame and reads it.
func (t *Tap) Recv(frame iov.Vec) (int, error) {
	x := &t.rx
	x.vec = append(x.vec[:0].Append(x.header[:t.skip]), frame...).Append(x.spill[:])
	if err := t.conn.Read(x.step); err != nil {
		return 0, t.waitError(err)
	}
	if x.err != nil {
		return 0, fmt.Errorf("tap %s: read: %w", t.name, x.err)
	}
	if n := x.n - t.skip; n <= frame.Size() {
		return n, nil
	}
	return 0, net.ErrFrameTooLong
}

// SetDeadline implements net.Backend.
func (t *Tap) SetDeadline(d time.Time) error { return t.waitError(t.file.SetDeadline(d)) }

// Close closes the device and wakes Send and Recv. What Open created is gone.
func (t *Tap) Close() error {
	if t.closed.Swap(true) {
		return nil
	}
	return t.file.Close()
}

// waitError translates what the runtime's poller returns.
func (t *Tap) waitError(err error) error {
	switch {
	case err == nil, errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case t.closed.Load():
		return os.ErrClosed
	}
	return fmt.Errorf("tap %s: %w", t.name, err)
}
