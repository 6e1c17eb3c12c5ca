package vnet

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/net/pipe"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]Options{
		"multicast":      {MAC: net.MAC{1, 2, 3, 4, 5, 6}},
		"broadcast":      {MAC: net.MAC{255, 255, 255, 255, 255, 255}},
		"small MTU":      {MTU: 67},
		"large MTU":      {MTU: 65536},
		"negative MTU":   {MTU: -1500},
		"odd queue":      {QueueSize: 100},
		"large queue":    {QueueSize: 2048},
		"negative queue": {QueueSize: -256},
	} {
		near, _ := pipe.New(pipe.Options{})
		if _, err := New(near, o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestShape(t *testing.T) {
	t.Parallel()
	near, _ := pipe.New(pipe.Options{Features: net.CSum | net.HostTSO4})
	mac := net.MAC{0x52, 0x54, 0, 1, 2, 3}
	d := newDevice(t, near, Options{MAC: mac, MTU: 9000, QueueSize: 64})
	if d.ID() != virtio.Net || d.MAC() != mac {
		t.Errorf("ID %d, MAC %v", d.ID(), d.MAC())
	}
	if want := []uint16{64, 64}; !slices.Equal(d.QueueSizes(), want) {
		t.Errorf("queue sizes %d, want %d", d.QueueSizes(), want)
	}
	want := FeatureMAC | FeatureMTU | FeatureStatus | FeatureMrgRxBuf | virtio.RingIndirectDesc | virtio.RingEventIdx |
		virtio.Features(net.CSum|net.HostTSO4)
	if d.Features() != want {
		t.Errorf("features %#x, want %#x", d.Features(), want)
	}
	config := []byte{0x52, 0x54, 0, 1, 2, 3, 1, 0, 0, 0, 0x28, 0x23}
	got := bytes.Repeat([]byte{0xee}, 16)
	d.ReadConfig(got, 0)
	if !bytes.Equal(got, append(config, 0, 0, 0, 0)) {
		t.Errorf("config % x", got)
	}
	d.WriteConfig([]byte{1, 2, 3, 4}, 0)
	for _, off := range []int{0, 5, 11, 12, 1 << 40, -1} {
		got := []byte{0xee}
		d.ReadConfig(got, off)
		if off >= 0 && off < len(config) && got[0] != config[off] || (off < 0 || off >= len(config)) && got[0] != 0 {
			t.Errorf("config at %d: %#x", off, got[0])
		}
	}
	plain, _ := pipe.New(pipe.Options{})
	r := newDevice(t, plain, Options{})
	if err := r.MAC().Check(); err != nil || r.MAC()[0]&2 == 0 {
		t.Errorf("random MAC %v: %v", r.MAC(), err)
	}
	if f := r.Features(); f.Has(FeatureMTU) || net.Features(f)&net.Offloads != 0 {
		t.Errorf("features %#x", f)
	}
}

// ringModes are the feature sets under which notifications differ.
var ringModes = map[string]virtio.Features{
	"plain": all &^ (virtio.RingEventIdx | virtio.RingIndirectDesc), "event-idx": all,
}

func TestTransmit(t *testing.T) {
	t.Parallel()
	for name, want := range ringModes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := plug(t, want, 0, Options{})
			f := frame(1514, 1)
			c.send(append(slices.Clone(none), f...))                                 // one part
			c.send(none, f)                                                          // Linux without any-layout
			c.send(none[:5], none[5:11], append([]byte{0}, f[:7]...), f[7:8], f[8:]) // any other split
			for range 3 {
				if got := c.farRecv(); !bytes.Equal(got, f) {
					t.Errorf("%d bytes, want %d", len(got), len(f))
				}
			}
			if s := c.dev.Stats(); s.TxFrames != 3 || s.TxBytes != 3*1514 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestTransmitHeader checks what of the guest's header reaches the backend.
func TestTransmitHeader(t *testing.T) {
	t.Parallel()
	c := plug(t, all, 0, Options{})
	if err := c.far.SetFeatures(0, net.HeaderLen); err != nil {
		t.Fatal(err)
	}
	gso := net.Header{Flags: net.FlagNeedsCSum, GSOType: net.GSOTCPv4, HdrLen: 54, GSOSize: 1448, CSumStart: 34, CSumOffset: 16}
	sent := gso
	sent.Flags |= net.FlagDataValid // only a device may say so
	sent.NumBuffers = 7             // means nothing here
	f := frame(net.MaxFrame, 2)
	c.send(header(sent), f)
	got := c.farRecv()
	h, err := net.ParseHeader(got[:net.HeaderLen])
	gso.NumBuffers = 1 // the pipe's
	if err != nil || h != gso || !bytes.Equal(got[net.HeaderLen:], f) {
		t.Errorf("%+v, %v", h, err)
	}
}

// TestTransmitDrops has frames that go nowhere; the next good one does.
func TestTransmitDrops(t *testing.T) {
	t.Parallel()
	c := plug(t, all&^virtio.Features(net.HostTSO6), 0, Options{})
	csum := net.Header{Flags: net.FlagNeedsCSum, CSumStart: 34, CSumOffset: 16}
	outside := csum
	outside.CSumStart = 100 - 17
	tso6 := csum
	tso6.GSOType, tso6.GSOSize = net.GSOTCPv6, 1440
	good := frame(100, 3)
	c.send(none)
	c.send(none, good[:13])
	c.send(none, make([]byte, net.MaxFrame+1))
	c.send(header(outside), good)
	c.send(header(tso6), good)
	c.send(header(csum), good)
	if got := c.farRecv(); !bytes.Equal(got, good) {
		t.Errorf("%d bytes", len(got))
	}
	s := c.dev.Stats()
	if s.TxBadLength != 3 || s.TxBadHeader != 2 || s.TxFrames != 1 {
		t.Errorf("%+v", s)
	}
	if err := c.far.Close(); err != nil {
		t.Fatal(err)
	}
	c.send(none, good)
	if s := c.dev.Stats(); s.TxRefused != 1 {
		t.Errorf("%+v", s)
	}
}

func TestReceive(t *testing.T) {
	t.Parallel()
	for name, want := range ringModes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := plug(t, want, 0, Options{})
			for i := range 50 {
				f := frame(60+i, i)
				c.post(1526)
				c.farSend(f)
				c.expect(f)
			}
			if s := c.dev.Stats(); s.RxFrames != 50 || s.RxBytes != 50*60+49*50/2 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestReceiveHeader checks what of the backend's header reaches the guest.
func TestReceiveHeader(t *testing.T) {
	t.Parallel()
	c := plug(t, all, 0, Options{})
	if err := c.far.SetFeatures(0, net.HeaderLen); err != nil {
		t.Fatal(err)
	}
	want := net.Header{Flags: net.FlagNeedsCSum, GSOType: net.GSOTCPv6, HdrLen: 74, GSOSize: 1428, CSumStart: 54, CSumOffset: 16}
	f := frame(3000, 4)
	c.post(1000, 1000, 1000, 1000)
	c.farSend(append(header(want), f...))
	h, got, n := c.take()
	want.NumBuffers = 4
	if h != want || n != 4 || !bytes.Equal(got, f) {
		t.Errorf("%+v in %d buffers", h, n)
	}
}

// TestReceiveMerged spreads frames over buffers of every kind of size, among them ones that a header just fits.
func TestReceiveMerged(t *testing.T) {
	t.Parallel()
	c := plug(t, all, 0, Options{})
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		f := frame(14+r.IntN(6000), i)
		total, sizes := 0, []int{}
		for total < len(f)+net.HeaderLen {
			sizes = append(sizes, net.HeaderLen+r.IntN(1+r.IntN(3000)))
			total += sizes[len(sizes)-1]
		}
		c.post(sizes...)
		c.farSend(f)
		c.expect(f)
	}
}

// TestReceiveSpills posts too little for a frame that has arrived, and the rest later.
func TestReceiveSpills(t *testing.T) {
	t.Parallel()
	for name, want := range ringModes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := plug(t, want, 1, Options{})
			f := frame(net.MaxFrame, 5)
			c.post(4096)
			c.farSend(f)
			c.farSend(f) // returns when the device has received the first
			for range 8 {
				c.post(4096, 4096)
			}
			c.expect(f)
			c.post(40000, 40000)
			c.expect(f)
		})
	}
}

// TestReceiveNeverFits has a driver whose whole queue is too small for a frame: it is dropped, and smaller ones arrive.
func TestReceiveNeverFits(t *testing.T) {
	t.Parallel()
	c := plug(t, all, 0, Options{QueueSize: 4})
	c.post(500, 500, 500, 500)
	c.farSend(frame(2000, 6))
	f := frame(1900, 7)
	c.farSend(f)
	c.expect(f)
	if s := c.dev.Stats(); s.RxTooLong != 1 || s.RxFrames != 1 {
		t.Errorf("%+v", s)
	}
}

// TestReceiveUnmerged has a driver that wants each frame in one buffer.
func TestReceiveUnmerged(t *testing.T) {
	t.Parallel()
	c := plug(t, all&^FeatureMrgRxBuf, 0, Options{})
	c.post(100, 2000)
	c.farSend(frame(100-net.HeaderLen+1, 8))
	short, long := frame(100-net.HeaderLen, 9), frame(1500, 10)
	c.farSend(short)
	c.farSend(long)
	c.expect(short)
	c.expect(long)
	if s := c.dev.Stats(); s.RxTooLong != 1 {
		t.Errorf("%+v", s)
	}
}

// TestReceiveAboveMTU has a backend whose frames are longer than the MTU that the driver was told: only one that shall
// still be segmented may pass. A driver that did not ask gets them all.
func TestReceiveAboveMTU(t *testing.T) {
	t.Parallel()
	const mtu = 1000
	for name, want := range map[string]virtio.Features{"told": all, "not told": all &^ FeatureMTU} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := plug(t, want, 0, Options{MTU: mtu})
			if err := c.far.SetFeatures(0, net.HeaderLen); err != nil {
				t.Fatal(err)
			}
			for range 5 {
				c.post(4000)
			}
			long, most, tso := frame(18+mtu+1, 1), frame(18+mtu, 2), frame(3000, 3)
			c.farSend(append(header(net.Header{}), long...))
			c.farSend(append(header(net.Header{GSOType: net.GSOECN}), long...))
			c.farSend(append(header(net.Header{}), most...))
			c.farSend(append(header(net.Header{
				Flags: net.FlagNeedsCSum, GSOType: net.GSOTCPv4, HdrLen: 54, GSOSize: 946, CSumStart: 34, CSumOffset: 16,
			}), tso...))
			dropped := uint64(2)
			if name == "not told" {
				c.expect(long)
				c.expect(long)
				dropped = 0
			}
			c.expect(most)
			c.expect(tso)
			if s := c.dev.Stats(); s.RxTooLong != dropped || s.RxFrames != 4-dropped {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestReceiveResumes runs the driver out of buffers with the backend full, again and again, and goes on each time: no
// wake-up is lost, no frame either (CVE-2020-16843, firecracker #2057).
func TestReceiveResumes(t *testing.T) {
	t.Parallel()
	for name, want := range ringModes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := plug(t, want, 4, Options{QueueSize: 8})
			const frames = 2000
			var sent atomic.Int32
			done := later(func() error {
				for i := range frames {
					if _, err := c.far.Send(iov.Of(frame(60+i%100, i))); err != nil {
						return err
					}
					sent.Add(1)
				}
				return nil
			})
			for i := 0; i < frames; {
				batch := min(1+i%8, frames-i)
				for range batch {
					c.post(200)
				}
				for range batch {
					c.expect(frame(60+i%100, i))
					i++
				}
				if ahead := int(sent.Load()) - i; ahead > 4 {
					t.Fatalf("%d frames have left the backend without a buffer", ahead-4)
				}
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestBothWays sends at random in both directions at once.
func TestBothWays(t *testing.T) {
	t.Parallel()
	c := plug(t, all, 16, Options{})
	const frames = 3000
	size := func(i int) int { return 14 + (i*i*31)%9000 }
	out := later(func() error {
		for i := range frames {
			if _, err := c.far.Send(iov.Of(frame(size(i), i))); err != nil {
				return err
			}
		}
		return nil
	})
	in := later(func() error {
		b := make([]byte, 10000)
		for i := range frames {
			n, err := c.far.Recv(iov.Of(b))
			if err != nil {
				return err
			}
			if !bytes.Equal(b[:n], frame(size(i), i)) {
				return errors.New("frames differ")
			}
		}
		return nil
	})
	for i := range frames {
		for c.rx.InFlight() < 20 {
			c.post(600)
		}
		c.tx.Add([][]byte{none, frame(size(i), i)}, nil)
		c.tx.Kick()
		c.expect(frame(size(i), i))
		for c.tx.InFlight() > 100 {
			c.tx.Wait()
		}
	}
	for _, err := range []error{<-out, <-in} {
		if err != nil {
			t.Error(err)
		}
	}
	for c.tx.InFlight() > 0 { // a frame is counted when the backend has taken it, before its chain comes back
		c.tx.Wait()
	}
	if s := c.dev.Stats(); s.RxFrames != frames || s.TxFrames != frames {
		t.Errorf("%+v", s)
	}
}

// TestDirty has a dirty log see the pages of received frames, and of a buffer that a dropped frame may have changed.
func TestDirty(t *testing.T) {
	t.Parallel()
	near, far := pipe.New(pipe.Options{})
	c := &card{tb: t, dev: newDevice(t, near, Options{}), far: far}
	c.start(virtio.VersionOne) // no merging: a frame that does not fit its buffer is dropped
	log := c.rx.Mem.EnableDirty()
	defer log.Close()
	const page = 4096
	buf := c.rx.Alloc(4*page, page)
	used := c.rx.Config.Device
	for _, tc := range []struct {
		drop, frame int
		want        []uint64
	}{
		{0, page, []uint64{0, 1}},
		{0, 60, []uint64{0}},
		{3 * page, 60, []uint64{0, 1, 2}},
	} {
		c.rx.SetDesc(0, queuetest.Desc{Addr: buf, Len: 3 * page, Flags: queuetest.FlagWrite})
		before := c.rx.UsedIdx()
		c.rx.MakeAvailable(0)
		c.rx.Kick()
		if tc.drop > 0 {
			c.farSend(frame(tc.drop, 1))
		}
		c.farSend(frame(tc.frame, 2))
		for deadline := time.Now().Add(queuetest.Timeout); c.rx.UsedIdx() == before; runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatal("no frame")
			}
		}
		want := []uint64{used}
		for _, p := range tc.want {
			want = append(want, buf+p*page)
		}
		want = queuetest.Pages(want...)
		var got []uint64
		for deadline := time.Now().Add(queuetest.Timeout); !slices.Equal(got, want); runtime.Gosched() {
			got = queuetest.Pages(append(got, queuetest.Dirty(t, c.rx.Mem, log)...)...)
			got = slices.DeleteFunc(got, func(addr uint64) bool { return addr >= c.tx.Config.Desc }) // when the sender sleeps
			if time.Now().After(deadline) {
				t.Fatalf("frame of %d bytes: pages %#x, want %#x", tc.frame, got, want)
			}
		}
	}
}
