package vblk

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// The offsets are those of struct virtio_blk_config in linux/virtio_blk.h.
func TestConfigLayout(t *testing.T) {
	t.Parallel()
	offsets := []uintptr{0, 8, 12, 16, 18, 19, 20, 24, 25, 26, 28, 32, 33, 34, 36, 40, 44, 48, 52, 56, 57, 60, 64, 68}
	typ := reflect.TypeFor[config]()
	if typ.NumField() != len(offsets) || typ.Size() != 72 {
		t.Fatalf("%d fields, %d bytes", typ.NumField(), typ.Size())
	}
	for i, off := range offsets {
		if f := typ.Field(i); f.Offset != off {
			t.Errorf("%s at %d, want %d", f.Name, f.Offset, off)
		}
	}
	if n := len(config{}.encode()); n != 72 {
		t.Errorf("encoded in %d bytes: padding", n)
	}
}

func TestConfigContents(t *testing.T) {
	t.Parallel()
	m := newMemory(4096)
	m.limits = blk.Limits{
		PhysicalBlock: 4096, OptimalTransfer: 65536, RequestAlign: 512, MaxTransfer: 1<<20 + 512, DiscardAlign: 1536,
	}
	dev, _ := newDevice(t, m, false, Options{QueueSize: 128, NumQueues: 3})

	var p [96]byte
	dev.ReadConfig(p[:], 0)
	le := binary.LittleEndian
	for _, f := range []struct {
		name      string
		got, want uint64
	}{
		{"capacity", le.Uint64(p[0:]), 4096},
		{"size_max", uint64(le.Uint32(p[8:])), 1 << 20},
		{"seg_max", uint64(le.Uint32(p[12:])), 126},
		{"geometry", uint64(le.Uint32(p[16:])), 0},
		{"blk_size", uint64(le.Uint32(p[20:])), 512},
		{"physical_block_exp", uint64(p[24]), 3},
		{"alignment_offset", uint64(p[25]), 0},
		{"min_io_size", uint64(le.Uint16(p[26:])), 8},
		{"opt_io_size", uint64(le.Uint32(p[28:])), 128},
		{"writeback", uint64(p[32]), 1},
		{"num_queues", uint64(le.Uint16(p[34:])), 3},
		{"max_discard_sectors", uint64(le.Uint32(p[36:])), 1 << 22},
		{"max_discard_seg", uint64(le.Uint32(p[40:])), 64},
		{"discard_sector_alignment", uint64(le.Uint32(p[44:])), 3},
		{"max_write_zeroes_sectors", uint64(le.Uint32(p[48:])), 1 << 22},
		{"max_write_zeroes_seg", uint64(le.Uint32(p[52:])), 64},
		{"write_zeroes_may_unmap", uint64(p[56]), 1},
	} {
		if f.got != f.want {
			t.Errorf("%s: %d, want %d", f.name, f.got, f.want)
		}
	}
	if !bytes.Equal(p[57:], make([]byte, len(p)-57)) {
		t.Error("fields of features that are not offered, or bytes beyond the end, are not zero")
	}
}

func TestConfigAccess(t *testing.T) {
	t.Parallel()
	dev, _ := newDevice(t, newMemory(0x123456), false, Options{})
	var whole [80]byte
	dev.ReadConfig(whole[:], 0)
	for off := range 76 {
		for _, n := range []int{1, 2, 4} {
			p := bytes.Repeat([]byte{0xff}, n)
			dev.ReadConfig(p, off)
			if !bytes.Equal(p, whole[off:off+n]) {
				t.Fatalf("%d bytes at %d: %x, want %x", n, off, p, whole[off:off+n])
			}
			dev.WriteConfig(bytes.Repeat([]byte{0xff}, n), off)
		}
	}
	for _, off := range []int{-1, -1 << 63, 72, 4096, 1<<63 - 1} {
		p := []byte{1, 2, 3, 4}
		dev.ReadConfig(p, off)
		dev.WriteConfig(p, off)
		if !bytes.Equal(p, make([]byte, 4)) {
			t.Errorf("at %d: %x", off, p)
		}
	}
	var after [80]byte
	dev.ReadConfig(after[:], 0)
	if after != whole {
		t.Error("a write changed the configuration")
	}
}

func TestTopologyWithoutPreferences(t *testing.T) {
	t.Parallel()
	disk, err := blk.New(newMemory(1), blk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	c := newConfig(disk, Options{QueueSize: 4, NumQueues: 1, LogicalBlock: 512})
	if c.SizeMax != 4<<20 || c.DiscardSectorAlign != 1 || c.PhysicalBlockExp != 0 || c.MinIOSize != 1 || c.OptIOSize != 0 || c.SegMax != 2 {
		t.Errorf("%+v", c)
	}
}

func TestFeatures(t *testing.T) {
	t.Parallel()
	const always virtio.Features = 1<<1 | 1<<2 | 1<<6 | 1<<9 | 1<<10 | 1<<11 | 1<<28 | 1<<29
	const writable = always | 1<<13 | 1<<14
	for _, tc := range []struct {
		readOnly bool
		o        Options
		want     virtio.Features
		sizes    []uint16
	}{
		{false, Options{}, writable, []uint16{256}},
		{true, Options{QueueSize: 1024}, always | 1<<5, []uint16{1024}},
		{false, Options{NumQueues: 2}, writable | 1<<12, []uint16{256, 256}},
	} {
		dev, _ := newDevice(t, newMemory(1), tc.readOnly, tc.o)
		if dev.ID() != 2 || dev.Features() != tc.want || !slices.Equal(dev.QueueSizes(), tc.sizes) {
			t.Errorf("%+v: id %d, features %#x, queues %v", tc, dev.ID(), dev.Features(), dev.QueueSizes())
		}
	}
}

// plain hides what a memory can do beside reading and writing.
type plain struct{ blk.Backend }

// A disk that can't discard doesn't offer to; zeroes it takes anyway, as that saves the guest sending them.
func TestFeaturesOfPlainDisk(t *testing.T) {
	t.Parallel()
	disk, err := blk.New(plain{newMemory(8)}, blk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := New(disk, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if f := dev.Features() & (FeatureDiscard | FeatureWriteZeroes); f != FeatureWriteZeroes {
		t.Errorf("features %#x", f)
	}
	var p [configSize]byte
	dev.ReadConfig(p[:], 0)
	want := slices.Concat(make([]byte, 12), []byte{0, 0, 64, 0, 64, 0, 0, 0, 0}, make([]byte, 15))
	if !bytes.Equal(p[36:], want) {
		t.Errorf("configuration from 36 on: %v", p[36:])
	}
}

// A larger logical block is the unit of the topology, and the disk ends with a whole one. Requests keep their sectors.
func TestLogicalBlock(t *testing.T) {
	t.Parallel()
	m := newMemory(31)
	m.limits = blk.Limits{PhysicalBlock: 16384, OptimalTransfer: 65536}
	r := start(t, setup{memory: m, Options: Options{LogicalBlock: 4096}})
	var p [configSize]byte
	r.dev.ReadConfig(p[:], 0)
	le := binary.LittleEndian
	if le.Uint64(p[0:]) != 24 || le.Uint32(p[20:]) != 4096 || p[24] != 2 || le.Uint16(p[26:]) != 4 || le.Uint32(p[28:]) != 16 ||
		le.Uint32(p[44:]) != 8 {
		t.Errorf("configuration %v", p)
	}
	r.alive()
	m.limits.PhysicalBlock = 512
	disk, err := blk.New(m, blk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if c := newConfig(disk, Options{QueueSize: 4, LogicalBlock: 4096}); c.PhysicalBlockExp != 0 || c.MinIOSize != 1 {
		t.Errorf("%+v", c)
	}
}

// How the cache begins, and what a driver that may can make of it (virtio 1.2, 5.2.5.2).
func TestWritebackField(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		f      virtio.Features
		before byte // what the driver reads once it has negotiated
		zero   byte // after it wrote 0
		one    byte // after it wrote 1
	}{
		{0, 0, 0, 0},
		{FeatureFlush, 1, 1, 1},
		{FeatureConfigWCE, 0, 0, 1},
		{FeatureFlush | FeatureConfigWCE, 1, 0, 1},
	} {
		dev, _ := newDevice(t, newMemory(8), false, Options{})
		read := func() byte {
			var p [1]byte
			dev.ReadConfig(p[:], atWriteback)
			return p[0]
		}
		dev.WriteConfig([]byte{0}, atWriteback) // not negotiated yet
		if read() != 1 {
			t.Errorf("%#x: written too early", tc.f)
		}
		dev.Negotiated(tc.f)
		got := []byte{read()}
		dev.WriteConfig([]byte{0}, atWriteback)
		got = append(got, read())
		for off := range atWriteback { // wide accesses, which touch other fields as well
			dev.WriteConfig(bytes.Repeat([]byte{7}, atWriteback-off), off)
		}
		if read() != got[1] {
			t.Errorf("%#x: an access beside the field changed it", tc.f)
		}
		dev.WriteConfig([]byte{9, 9, 9, 9}, atWriteback-2)
		got = append(got, read())
		if want := []byte{tc.before, tc.zero, tc.one}; !bytes.Equal(got, want) {
			t.Errorf("%#x: writeback %v, want %v", tc.f, got, want)
		}
		// What was written before DRIVER_OK stays.
		dev.WriteConfig([]byte{0}, atWriteback)
		if err := dev.Activate(tc.f, make([]*queue.Queue, 1), nil); err != nil {
			t.Fatal(err)
		}
		if read() != tc.zero {
			t.Errorf("%#x: activation changed the field", tc.f)
		}
		if err := dev.Reset(); err != nil {
			t.Fatal(err)
		}
		if read() != 1 {
			t.Errorf("%#x: writethrough after a reset", tc.f)
		}
	}
}

// A disk that is written through whatever the driver says does not claim otherwise.
func TestWritethroughDisk(t *testing.T) {
	t.Parallel()
	disk, err := blk.New(newMemory(8), blk.Options{Writethrough: true})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := New(disk, Options{})
	if err != nil {
		t.Fatal(err)
	}
	dev.Negotiated(FeatureFlush | FeatureConfigWCE)
	dev.WriteConfig([]byte{1}, atWriteback)
	var p [1]byte
	if dev.ReadConfig(p[:], atWriteback); p[0] != 0 {
		t.Error("it shows a cache")
	}
}

// A driver is told of a new size; whoever reads meanwhile reads a size that was true under its generation.
func TestResize(t *testing.T) {
	t.Parallel()
	r := start(t, setup{Options: Options{LogicalBlock: 1024}})
	state := func() (sectors uint64, generation uint8) {
		for {
			var p [8]byte
			before := r.dev.ConfigGeneration()
			r.dev.ReadConfig(p[:], 0)
			if r.dev.ConfigGeneration() == before {
				return binary.LittleEndian.Uint64(p[:]), before
			}
		}
	}
	for _, step := range []struct {
		to, sectors uint64
		changes     int
		generation  uint8
	}{{128, 128, 1, 1}, {64, 64, 2, 2}, {64, 64, 2, 2}, {65, 64, 2, 2}, {67, 66, 3, 3}} {
		if err := r.disk.Truncate(t.Context(), int64(step.to)*512); err != nil {
			t.Fatal(err)
		}
		if s, g := state(); s != step.sectors || g != step.generation || r.transport.ConfigChanges() != step.changes {
			t.Errorf("%d sectors: reads as %d, generation %d, %d notifications", step.to, s, g, r.transport.ConfigChanges())
		}
	}
	if status, _ := r.request(typeIn, 64, nil, space(1024)); status != statusOK {
		t.Errorf("read of what was added: status %d", status)
	}
	if status, _ := r.request(typeIn, 66, nil, space(1024)); status != statusIOErr {
		t.Errorf("read beyond: status %d", status)
	}

	// Nobody to tell: the configuration changes all the same.
	if err := r.dev.Reset(); err != nil {
		t.Fatal(err)
	}
	if err := r.disk.Truncate(t.Context(), 1024); err != nil {
		t.Fatal(err)
	}
	if s, g := state(); s != 2 || g != 4 || r.transport.ConfigChanges() != 3 {
		t.Errorf("after a reset: %d sectors, generation %d, %d notifications", s, g, r.transport.ConfigChanges())
	}
}

// checked is a transport that must not be called after the end of a reset.
type checked struct {
	signal
	over atomic.Bool
	late atomic.Bool
}

func (c *checked) NotifyConfig() error {
	runtime.Gosched()
	if c.over.Load() {
		c.late.Store(true)
	}
	return nil
}

// Resizes, reads of the configuration, activations and resets come at any time.
func TestResizeRaces(t *testing.T) {
	t.Parallel()
	dev, disk := newDevice(t, newMemory(64), false, Options{})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	loop := func(f func()) {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					f()
				}
			}
		})
	}
	for i := range int64(2) {
		size := 512 * (i + 1)
		loop(func() {
			size ^= 1024
			if err := disk.Truncate(t.Context(), size); err != nil {
				t.Error(err)
			}
		})
	}
	loop(func() {
		var p [8]byte
		dev.ReadConfig(p[:], 0)
		if n := binary.LittleEndian.Uint64(p[:]); n != 64 && n > 3 {
			t.Errorf("capacity %d", n)
		}
		dev.WriteConfig([]byte{1}, atWriteback)
		dev.ConfigGeneration()
	})
	for range 300 {
		tr := &checked{}
		if err := dev.Activate(dev.Features(), make([]*queue.Queue, 1), tr); err != nil {
			t.Fatal(err)
		}
		runtime.Gosched()
		if err := dev.Reset(); err != nil {
			t.Fatal(err)
		}
		tr.over.Store(true)
		if tr.late.Load() {
			t.Fatal("notified after a reset")
		}
	}
	close(stop)
	wg.Wait()
	var p [8]byte
	dev.ReadConfig(p[:], 0)
	if n := binary.LittleEndian.Uint64(p[:]); n != uint64(disk.Size())/512 {
		t.Errorf("capacity %d at the end, disk of %d bytes", n, disk.Size())
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	disk, err := blk.New(newMemory(1), blk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		o    Options
		text string
	}{
		{Options{QueueSize: 2}, "queue size 2"},
		{Options{QueueSize: 255}, "queue size 255"},
		{Options{QueueSize: 65536}, "queue size 65536"},
		{Options{QueueSize: -256}, "queue size -256"},
		{Options{NumQueues: -1}, "-1 queues"},
		{Options{NumQueues: 1025}, "1025 queues"},
		{Options{LogicalBlock: 256}, "256 bytes"},
		{Options{LogicalBlock: 1536}, "1536 bytes"},
		{Options{LogicalBlock: 8192}, "8192 bytes"},
		{Options{ID: strings.Repeat("x", 21)}, "20 bytes"},
		{Options{ID: "tab\there"}, "printable"},
		{Options{ID: "caf\u00e9"}, "printable"},
		{Options{ID: "nul\x00"}, "printable"},
	} {
		if dev, err := New(disk, tc.o); dev != nil || err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%+v: %v", tc.o, err)
		}
	}
}
