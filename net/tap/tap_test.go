package tap

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/net/tap/taptest"
)

// patience is how long a test waits for a frame that must come.
const patience = 30 * time.Second

var hostAddr = netip.MustParsePrefix("10.9.0.1/24")

// must returns v and fails the test on an error.
func must[T any](v T, err error) func(testing.TB) T {
	return func(tb testing.TB) T {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
		return v
	}
}

func check(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func openTap(tb testing.TB, name string, o Options) *Tap {
	tb.Helper()
	t := must(Open(name, o))(tb)
	tb.Cleanup(func() { t.Close() })
	return t
}

// exists reports whether the namespace has such an interface.
func exists(name string) bool {
	_, err := netlink.LinkByName(name)
	return err == nil
}

// echo prepares for a ping: the host knows the guest's address, so no ARP is needed.
func echo(tb testing.TB, name string) taptest.Echo {
	tb.Helper()
	link := must(netlink.LinkByName(name))(tb)
	e := taptest.Echo{
		GuestMAC: net.MAC{0x52, 0x54, 0, 0, 0, 2}, HostMAC: net.MAC(link.Attrs().HardwareAddr),
		GuestIP: [4]byte{10, 9, 0, 2}, HostIP: hostAddr.Addr().As4(),
	}
	check(tb, netlink.NeighSet(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: e.GuestIP[:], HardwareAddr: e.GuestMAC[:],
	}))
	return e
}

// recvReply receives until the answer to a ping comes; the host's network stack sends frames of its own.
func recvReply(tb testing.TB, t *Tap, headerLen int, e taptest.Echo, seq uint16, n int) {
	tb.Helper()
	check(tb, t.SetDeadline(time.Now().Add(patience)))
	b := make([]byte, headerLen+net.MaxFrame)
	for {
		got := must(t.Recv(iov.Of(b)))(tb)
		if got >= headerLen && e.IsReply(b[headerLen:got], seq, n) {
			return
		}
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	for _, name := range []string{
		"sixteen-letters-", strings.Repeat("x", 300), ".", "..", "a/b", "a b", "a:b", "a\n", "tap%d", "a\x00b",
	} {
		if _, err := Open(name, Options{}); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestFromSpecRefuses(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"tap", "tap=", "tap=a,hostip=banana", "tap=a,hostip=10.0.0.1", "tap=a,hostip=0.0.0.0/0",
		"tap=a,hostip=ff02::1/64", "tap=a,nonsense=1"} {
		spec := must(net.ParseSpec(s))(t)
		if b, err := FromSpec(spec); err == nil || b != nil {
			t.Errorf("%q: %v, %v", s, b, err)
		}
	}
}

// TestCreate makes a device with everything that there is to set, and finds it gone after Close.
func TestCreate(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	spec := must(net.ParseSpec("tap=vm0,hostip=10.9.0.1/24"))(t)
	b := must(net.Registry{"tap": FromSpec}.Open(spec))(t)
	defer b.Close()
	tap := b.(*Tap)
	if tap.Name() != "vm0" || tap.MTU() != 1500 || tap.Features() != net.Offloads {
		t.Errorf("name %q, MTU %d, features %#x", tap.Name(), tap.MTU(), tap.Features())
	}
	link := must(netlink.LinkByName("vm0"))(t)
	if link.Attrs().Flags&1 == 0 {
		t.Error("the link is down")
	}
	addrs := must(netlink.AddrList(link, netlink.FAMILY_V4))(t)
	if len(addrs) != 1 || addrs[0].IPNet.String() != "10.9.0.1/24" {
		t.Errorf("addresses %v", addrs)
	}
	for range 2 {
		check(t, b.Close())
	}
	if exists("vm0") {
		t.Error("the device is still there")
	}
	auto := openTap(t, "", Options{})
	if auto.Name() == "" || !exists(auto.Name()) {
		t.Errorf("name %q", auto.Name())
	}
}

// TestExisting opens devices that were made before: they keep what they have, and stay.
func TestExisting(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	if _, err := Open("vm0", Options{Existing: true}); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "ip tuntap add") {
		t.Errorf("%v", err)
	}
	for name, flags := range map[string]netlink.TuntapFlag{
		"vm0": netlink.TUNTAP_DEFAULTS, "vm1": netlink.TUNTAP_MULTI_QUEUE_DEFAULTS,
	} {
		link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP, Flags: flags}
		if flags == netlink.TUNTAP_MULTI_QUEUE_DEFAULTS {
			link.Queues = 1
		}
		check(t, netlink.LinkAdd(link))
		for _, f := range link.Fds {
			check(t, f.Close())
		}
		check(t, netlink.LinkSetMTU(link, 4000))
		for range 2 {
			tap := must(Open(name, Options{Existing: true, HostAddr: hostAddr}))(t)
			if tap.MTU() != 4000 {
				t.Errorf("%s: MTU %d", name, tap.MTU())
			}
			check(t, tap.Close())
		}
		if !exists(name) {
			t.Errorf("%s is gone", name)
		}
		check(t, netlink.LinkDel(link))
	}
}

// TestWrongDevice opens what is there but is no tap, or is another's.
func TestWrongDevice(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	if _, err := Open("lo", Options{}); !errors.Is(err, ErrNotTap) {
		t.Errorf("%v", err)
	}
	tun := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun0"}, Mode: netlink.TUNTAP_MODE_TUN}
	check(t, netlink.LinkAdd(tun))
	if _, err := Open("tun0", Options{}); !errors.Is(err, ErrNotTap) {
		t.Errorf("%v", err)
	}
	openTap(t, "vm0", Options{})
	if _, err := Open("vm0", Options{}); !errors.Is(err, ErrBusy) {
		t.Errorf("%v", err)
	}
	if _, err := Open("vm1", Options{HostAddr: netip.MustParsePrefix("ff02::1/64")}); err == nil || exists("vm1") {
		t.Errorf("%v; device left: %v", err, exists("vm1"))
	}
}

// TestRights opens devices without any: only one that was made for this user, and is up, opens.
func TestRights(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	mine := &netlink.Tuntap{
		LinkAttrs: netlink.LinkAttrs{Name: "mine"}, Mode: netlink.TUNTAP_MODE_TAP, Owner: uint32(os.Geteuid()),
	}
	check(t, netlink.LinkAdd(mine))
	check(t, netlink.LinkSetUp(mine))
	dropCapability(t, unix.CAP_NET_ADMIN)
	openTap(t, "mine", Options{Existing: true})
	for _, o := range []Options{{}, {HostAddr: hostAddr}} {
		_, err := Open("vm0", o)
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
			t.Errorf("%v", err)
		}
	}
}

// TestRightsConfigure may attach to a device but not set its address or its link.
func TestRightsConfigure(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	mine := &netlink.Tuntap{
		LinkAttrs: netlink.LinkAttrs{Name: "mine"}, Mode: netlink.TUNTAP_MODE_TAP, Owner: uint32(os.Geteuid()),
	}
	check(t, netlink.LinkAdd(mine))
	dropCapability(t, unix.CAP_NET_ADMIN)
	for _, o := range []Options{{}, {HostAddr: hostAddr}} {
		_, err := Open("mine", o)
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
			t.Errorf("%v", err)
		}
	}
}

// dropCapability takes a right from the test's thread, which ends with the test.
func dropCapability(tb testing.TB, c int) {
	tb.Helper()
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	check(tb, unix.Capget(&h, &data[0]))
	data[c/32].Effective &^= 1 << (c % 32)
	check(tb, unix.Capset(&h, &data[0]))
}

func TestDeviceErrors(t *testing.T) {
	t.Parallel()
	for err, remedy := range map[error]string{
		unix.ENOENT: "modprobe tun", unix.ENODEV: "modprobe tun", unix.EACCES: "CAP_NET_ADMIN", unix.EMFILE: "too many open files",
	} {
		if got := deviceError(err); !errors.Is(got, err) || !strings.Contains(got.Error(), remedy) || !strings.Contains(got.Error(), device) {
			t.Errorf("%v", got)
		}
	}
}

func TestSetFeaturesRefuses(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	tap := openTap(t, "vm0", Options{})
	for _, c := range []struct {
		f net.Features
		n int
	}{{1 << 40, net.HeaderLen}, {net.GuestTSO4, net.HeaderLen}, {net.CSum, net.NoHeaderLen}, {0, 11}, {0, -1}} {
		if err := tap.SetFeatures(c.f, c.n); !errors.Is(err, net.ErrFeatures) {
			t.Errorf("%#x, %d: %v", uint64(c.f), c.n, err)
		}
	}
	check(t, tap.SetFeatures(net.Offloads, net.HeaderLen))
	check(t, tap.Close())
	if err := tap.SetFeatures(0, net.HeaderLen); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
}

// TestPing sends requests to the host and receives its answers, with every length of header, cut anywhere.
func TestPing(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	tap := openTap(t, "vm0", Options{HostAddr: hostAddr})
	e := echo(t, "vm0")
	for _, headerLen := range []int{net.HeaderLen, net.NoHeaderLen, net.ShortHeaderLen} {
		check(t, tap.SetFeatures(0, headerLen))
		for i, size := range []int{0, 1, 56, 1472} {
			seq := uint16(100*headerLen + i)
			f := append(make([]byte, headerLen), e.Request(seq, size)...)
			cut := 1 + i*7
			if n := must(tap.Send(iov.Of(f[:cut], nil, f[cut:cut+1], f[cut+1:])))(t); n != len(f) {
				t.Errorf("sent %d of %d", n, len(f))
			}
			recvReply(t, tap, headerLen, e, seq, size)
		}
	}
}

// TestOffload has the host send to a guest that completes checksums: the header says so.
func TestOffload(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	tap := openTap(t, "vm0", Options{HostAddr: hostAddr})
	echo(t, "vm0")
	sock := must(unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0))(t)
	defer unix.Close(sock)
	for f, want := range map[net.Features]uint8{net.GuestCSum: net.FlagNeedsCSum, 0: 0} {
		check(t, tap.SetFeatures(f, net.HeaderLen))
		check(t, unix.Sendto(sock, []byte("payload"), 0, &unix.SockaddrInet4{Addr: [4]byte{10, 9, 0, 2}, Port: 9}))
		check(t, tap.SetDeadline(time.Now().Add(patience)))
		b := make([]byte, net.HeaderLen+net.MaxFrame)
		for {
			n := must(tap.Recv(iov.Of(b)))(t)
			if !bytes.HasSuffix(b[:n], []byte("payload")) {
				continue
			}
			h := must(net.ParseHeader(b[:net.HeaderLen]))(t)
			if h.Flags&net.FlagNeedsCSum != want {
				t.Errorf("offloads %#x: header %+v", uint64(f), h)
			}
			break
		}
	}
}

// TestTooLong receives into too small a buffer, down to the last byte, and then into one that fits.
func TestTooLong(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	tap := openTap(t, "vm0", Options{HostAddr: hostAddr})
	e := echo(t, "vm0")
	req := append(make([]byte, net.HeaderLen), e.Request(1, 1000)...)
	must(tap.Send(iov.Of(req)))(t)
	must(tap.Send(iov.Of(req)))(t)
	check(t, tap.SetDeadline(time.Now().Add(patience)))
	small := make([]byte, len(req)-1)
	for {
		_, err := tap.Recv(iov.Of(small[:9], small[9:]))
		if errors.Is(err, net.ErrFrameTooLong) {
			break
		}
		check(t, err)
	}
	recvReply(t, tap, net.HeaderLen, e, 1, 1000)
}

// TestQueueFills lets the device's queue overflow: afterwards frames come again.
func TestQueueFills(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	tap := openTap(t, "vm0", Options{HostAddr: hostAddr})
	e := echo(t, "vm0")
	for i := range 3000 { // more than the device's queue holds
		must(tap.Send(iov.Of(append(make([]byte, net.HeaderLen), e.Request(uint16(i), 100)...))))(t)
	}
	recvReply(t, tap, net.HeaderLen, e, 0, 100)
	b := make([]byte, 2000)
	for {
		check(t, tap.SetDeadline(time.Now().Add(50*time.Millisecond)))
		if _, err := tap.Recv(iov.Of(b)); err != nil {
			break
		}
	}
	check(t, tap.SetDeadline(time.Time{}))
	must(tap.Send(iov.Of(append(make([]byte, net.HeaderLen), e.Request(5000, 100)...))))(t)
	recvReply(t, tap, net.HeaderLen, e, 5000, 100)
}

// TestWake interrupts a Recv that waits: by a deadline, again after it, and by Close.
func TestWake(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	tap := openTap(t, "vm0", Options{})
	recv := func() <-chan error {
		c := make(chan error, 1)
		go func() {
			b := make([]byte, 2000)
			for {
				if _, err := tap.Recv(iov.Of(b)); err != nil {
					c <- err
					return
				}
			}
		}()
		return c
	}
	for range 3 {
		c := recv()
		check(t, tap.SetDeadline(time.Unix(1, 0)))
		if err := <-c; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%v", err)
		}
		check(t, tap.SetDeadline(time.Time{}))
	}
	c := recv()
	check(t, tap.Close())
	if err := <-c; err != os.ErrClosed {
		t.Errorf("%v", err)
	}
	if _, err := tap.Send(iov.Of(make([]byte, 100))); err != os.ErrClosed {
		t.Errorf("%v", err)
	}
	if err := tap.SetDeadline(time.Time{}); err != os.ErrClosed {
		t.Errorf("%v", err)
	}
}

// TestDeviceGoes loses the device, or its link, while it is open.
func TestDeviceGoes(t *testing.T) {
	t.Parallel()
	taptest.Namespace(t)
	tap := openTap(t, "vm0", Options{})
	link := must(netlink.LinkByName("vm0"))(t)
	check(t, netlink.LinkSetDown(link))
	if _, err := tap.Send(iov.Of(make([]byte, 100))); !errors.Is(err, unix.EIO) {
		t.Errorf("%v", err)
	}
	check(t, netlink.LinkSetUp(link))
	must(tap.Send(iov.Of(make([]byte, 100))))(t)
	check(t, netlink.LinkDel(link))
	check(t, tap.SetDeadline(time.Now().Add(patience)))
	if _, err := tap.Recv(iov.Of(make([]byte, 2000))); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

func TestNoAllocations(t *testing.T) {
	taptest.Namespace(t)
	tap := openTap(t, "vm0", Options{HostAddr: hostAddr})
	e := echo(t, "vm0")
	req := iov.Of(append(make([]byte, net.HeaderLen), e.Request(1, 500)...))
	b := make([]byte, 2000)
	buf := iov.Of(b[:12], b[12:])
	if n := testing.AllocsPerRun(200, func() {
		if _, err := tap.Send(req); err != nil {
			t.Fatal(err)
		}
		for {
			if n, err := tap.Recv(buf); err != nil {
				t.Fatal(err)
			} else if e.IsReply(b[net.HeaderLen:max(n, net.HeaderLen)], 1, 500) {
				return
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations for a frame each way", n)
	}
}

func BenchmarkPing(b *testing.B) {
	taptest.Namespace(b)
	tap := openTap(b, "vm0", Options{HostAddr: hostAddr})
	e := echo(b, "vm0")
	req := iov.Of(append(make([]byte, net.HeaderLen), e.Request(1, 1000)...))
	buf := iov.Of(make([]byte, 2000))
	b.ReportAllocs()
	b.SetBytes(2 * int64(req.Size()))
	for b.Loop() {
		must(tap.Send(req))(b)
		must(tap.Recv(buf))(b)
	}
}

// TestNoLeaks opens devices in every way that works and that fails, and looks at what is left.
func TestNoLeaks(t *testing.T) {
	taptest.Namespace(t)
	openTap(t, "busy", Options{})
	round := func() {
		check(t, must(Open("vm0", Options{HostAddr: hostAddr}))(t).Close())
		for name, o := range map[string]Options{
			"busy": {}, "lo": {}, "vm1": {HostAddr: netip.MustParsePrefix("ff02::1/64")}, "vm2": {Existing: true},
		} {
			if _, err := Open(name, o); err == nil {
				t.Fatalf("%s: opened", name)
			}
		}
	}
	round()
	leaks := hosttest.Leaks(t, 30*time.Second)
	for range 20 {
		round()
	}
	leaks()
}
