package vnet

import (
	"bytes"
	"testing"

	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// TestMalformed has chains after which only a reset helps, and then resets and goes on.
func TestMalformed(t *testing.T) {
	t.Parallel()
	outside := queuetest.Desc{Addr: 1 << 60, Len: 64}
	for name, bad := range map[string]func(c *card){
		"transmit outside memory":  func(c *card) { c.tx.SetDesc(0, outside); c.tx.MakeAvailable(0); c.tx.Kick() },
		"transmit without header":  func(c *card) { c.tx.Add([][]byte{none[:11]}, nil); c.tx.Kick() },
		"transmit writable":        func(c *card) { c.tx.Add(nil, [][]byte{make([]byte, 100)}); c.tx.Kick() },
		"transmit index far ahead": func(c *card) { c.tx.SetAvailIdx(9999); c.tx.Kick() },
		"receive outside memory":   func(c *card) { c.rx.SetDesc(0, outside); c.rx.MakeAvailable(0); c.rx.Kick() },
		"receive without room":     func(c *card) { c.post(net.HeaderLen - 1) },
		"receive readable":         func(c *card) { c.rx.Add([][]byte{make([]byte, 2000)}, nil); c.rx.Kick() },
		"receive in many parts": func(c *card) {
			desc := queuetest.Desc{Addr: c.rx.Alloc(64, 64), Len: 1, Flags: queuetest.FlagWrite | queuetest.FlagNext}
			table := make([]queuetest.Desc, maxSegments+1)
			for i := range table {
				table[i], table[i].Next = desc, uint16(i+1)
			}
			table[len(table)-1].Flags = queuetest.FlagWrite
			c.rx.SetDesc(0, c.rx.Table(table...))
			c.rx.MakeAvailable(0)
			c.rx.Kick()
		},
		"receive late": func(c *card) { // while the device waits for more buffers for a frame
			c.post(100)
			c.farSend(frame(5000, 1))
			c.farSend(frame(60, 1))
			c.post(net.HeaderLen - 1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := plug(t, all, 1, Options{})
			bad(c)
			c.wantReset()
			c.reset()
			c.start(all)
			c.works(1)
		})
	}
}

// FuzzTransmit puts any bytes, cut into any parts, into a transmit chain.
func FuzzTransmit(f *testing.F) {
	f.Add([]byte{}, uint16(1))
	f.Add(none, uint16(12))
	f.Add(append(bytes.Clone(none), frame(60, 1)...), uint16(7))
	tso := net.Header{Flags: net.FlagNeedsCSum, GSOType: net.GSOTCPv4 | net.GSOECN, GSOSize: 10, CSumStart: 34, CSumOffset: 16}
	f.Add(append(header(tso), frame(200, 2)...), uint16(100))
	tso.CSumStart = 0xffff
	f.Add(append(header(tso), frame(200, 2)...), uint16(3))
	f.Fuzz(func(t *testing.T, data []byte, cut uint16) {
		c := plug(t, all, 64, Options{})
		var parts [][]byte
		step := max(int(cut), 1+len(data)/200)
		for rest := data; len(rest) > 0; {
			n := min(step, len(rest))
			parts, rest = append(parts, rest[:n]), rest[n:]
		}
		if len(data) >= net.HeaderLen {
			c.send(parts...)
			if s := c.dev.Stats(); s.TxFrames+s.TxBadLength+s.TxBadHeader != 1 {
				t.Errorf("%+v", s)
			} else if s.TxFrames == 1 && !bytes.Equal(c.farRecv(), data[net.HeaderLen:]) {
				t.Error("another frame arrived")
			}
		} else if len(data) > 0 {
			c.tx.Add(parts, nil)
			c.tx.Kick()
			c.wantReset()
			c.reset()
			c.start(all)
		}
		c.works(1)
	})
}

// FuzzReceive receives a frame of any length into buffers of any sizes.
func FuzzReceive(f *testing.F) {
	f.Add(uint16(60), []byte{100})
	f.Add(uint16(60000), []byte{1, 255, 0, 7})
	f.Add(uint16(0), []byte{})
	f.Fuzz(func(t *testing.T, n uint16, sizes []byte) {
		c := plug(t, all, 1, Options{})
		want := frame(int(n), 1)
		room := 0
		for _, s := range sizes[:min(len(sizes), 200)] {
			size := net.HeaderLen + int(s)*16
			c.post(size)
			room += size
		}
		c.farSend(want)
		for room < len(want)+net.HeaderLen {
			c.post(3000)
			room += 3000
		}
		c.expect(want)
	})
}
