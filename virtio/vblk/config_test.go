package vblk

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/virtio"
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
	m.limits = blk.Limits{PhysicalBlock: 4096, OptimalTransfer: 65536}
	dev, _ := newDevice(t, m, false, Options{QueueSize: 128, NumQueues: 3})

	var p [96]byte
	dev.ReadConfig(p[:], 0)
	le := binary.LittleEndian
	for _, f := range []struct {
		name      string
		got, want uint64
	}{
		{"capacity", le.Uint64(p[0:]), 4096},
		{"size_max", uint64(le.Uint32(p[8:])), 0},
		{"seg_max", uint64(le.Uint32(p[12:])), 126},
		{"geometry", uint64(le.Uint32(p[16:])), 0},
		{"blk_size", uint64(le.Uint32(p[20:])), 512},
		{"physical_block_exp", uint64(p[24]), 3},
		{"alignment_offset", uint64(p[25]), 0},
		{"min_io_size", uint64(le.Uint16(p[26:])), 8},
		{"opt_io_size", uint64(le.Uint32(p[28:])), 128},
		{"writeback", uint64(p[32]), 0},
		{"num_queues", uint64(le.Uint16(p[34:])), 3},
	} {
		if f.got != f.want {
			t.Errorf("%s: %d, want %d", f.name, f.got, f.want)
		}
	}
	if !bytes.Equal(p[36:], make([]byte, len(p)-36)) {
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
	c := newConfig(disk, Options{QueueSize: 4, NumQueues: 1})
	if c.PhysicalBlockExp != 0 || c.MinIOSize != 1 || c.OptIOSize != 0 || c.SegMax != 2 {
		t.Errorf("%+v", c)
	}
}

func TestFeatures(t *testing.T) {
	t.Parallel()
	const always virtio.Features = 1<<2 | 1<<6 | 1<<9 | 1<<10 | 1<<28 | 1<<29
	for _, tc := range []struct {
		readOnly bool
		o        Options
		want     virtio.Features
		sizes    []uint16
	}{
		{false, Options{}, always, []uint16{256}},
		{true, Options{QueueSize: 1024}, always | 1<<5, []uint16{1024}},
		{false, Options{NumQueues: 2}, always | 1<<12, []uint16{256, 256}},
	} {
		dev, _ := newDevice(t, newMemory(1), tc.readOnly, tc.o)
		if dev.ID() != 2 || dev.Features() != tc.want || !slices.Equal(dev.QueueSizes(), tc.sizes) {
			t.Errorf("%+v: id %d, features %#x, queues %v", tc, dev.ID(), dev.Features(), dev.QueueSizes())
		}
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
		{Options{Workers: -1}, "-1 workers"},
		{Options{Workers: 1 << 20}, "1048576 workers"},
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
