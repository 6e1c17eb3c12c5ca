package blk_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/blktest"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// modelDisk says what the model runs on: a disk in memory, behind a Device.
type modelDisk struct {
	mem     mem.Options
	device  blk.Options
	starter bool
	backing []byte // what a backing disk holds; nil for none
	seed    uint64
}

const (
	modelSize    = 3<<17 - 512 // no multiple of the larger alignments
	modelMaxSize = 1 << 19
)

func (m modelDisk) options() blktest.Options {
	o := blktest.Options{Open: m.open, Content: m.backing, MaxSize: modelMaxSize, Ops: 60, Seed: m.seed, Timeout: time.Minute}
	if hosttest.Race {
		o.Ops = 10
	}
	return o
}

func (m modelDisk) open(tb testing.TB, wrap func(blk.Backend) blk.Backend) *blk.Device {
	tb.Helper()
	o := m.mem
	o.MaxSize = modelMaxSize
	if m.backing != nil {
		below, err := mem.New(int64(len(m.backing)), mem.Options{Limits: m.mem.Limits})
		if err != nil {
			tb.Fatal(err)
		}
		o.Backing, err = blk.New(below, blk.Options{})
		if err != nil {
			tb.Fatal(err)
		}
		if _, err := o.Backing.WriteVecAt(iov.Of(m.backing), 0); err != nil {
			tb.Fatal(err)
		}
	}
	var b blk.Backend
	var err error
	if m.starter {
		b, err = mem.NewAsync(modelSize, o, 3, 1)
	} else {
		b, err = mem.New(modelSize, o)
	}
	if err != nil {
		tb.Fatal(err)
	}
	d, err := blk.New(wrap(b), m.device)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

// TestModel runs the model on disks in memory with every combination of limits.
func TestModel(t *testing.T) {
	seed := uint64(0)
	for i, align := range []int{1, 512, 4096, 65536} {
		for j, memory := range []int{1, min(align, 512)} {
			if j > 0 && memory == 1 {
				continue
			}
			for k, vec := range []int{0, 3} {
				for l, transfer := range []int64{0, 128 << 10} {
					for _, starter := range []bool{false, true} {
						seed += 100
						limits := blk.Limits{
							RequestAlign: align, MemoryAlign: memory, MaxVec: vec, MaxTransfer: transfer,
							Cluster: 4096 << (4 * (k ^ l)),
						}
						if (i+j+k+l)%2 == 1 {
							limits.DiscardAlign, limits.MaxDiscard = 3*int64(align), 15*int64(align)
							limits.ZeroAlign, limits.MaxZero = 5*int64(align), 20*int64(align)
						}
						m := modelDisk{
							mem:     mem.Options{Limits: limits},
							starter: starter,
							seed:    seed,
						}
						if !starter { // with it, a write would not go to the starter
							m.device.DetectZeroes = blk.DetectZeroes((i + j + k) % 3)
						}
						name := fmt.Sprintf("align=%d,memory=%d,vec=%d,transfer=%d,starter=%v", align, memory, vec, transfer, starter)
						t.Run(name, func(t *testing.T) { blktest.Run(t, m.options()) })
					}
				}
			}
		}
	}
}

// TestModelOverlay runs it on overlays, which copy on read or not.
func TestModelOverlay(t *testing.T) {
	for _, copyOnRead := range []bool{false, true} {
		for i, align := range []int{1, 512, 4096, 65536} {
			for _, cluster := range []int64{512, 4096, 65536} {
				m := modelDisk{
					mem:     mem.Options{Limits: blk.Limits{RequestAlign: align, Cluster: cluster, MaxVec: 3 * (i % 2)}},
					device:  blk.Options{CopyOnRead: copyOnRead, DetectZeroes: blk.DetectZeroes(i % 3)},
					backing: bytes.Repeat([]byte("backing"), 30_000)[:modelSize/2&^511],
					seed:    uint64(cluster) + uint64(align),
				}
				t.Run(fmt.Sprintf("align=%d,cluster=%d,copy=%v", align, cluster, copyOnRead), func(t *testing.T) {
					blktest.Run(t, m.options())
				})
			}
		}
	}
}

// FuzzModel is TestModel for as long as the fuzzer runs, with limits that it picks.
func FuzzModel(f *testing.F) {
	blktest.Fuzz(f, func(limits uint64) blktest.Options {
		pick := func(n uint64) int { defer func() { limits /= n }(); return int(limits % n) }
		align := 1 << pick(17)
		most := max(align, 4096) // with less, a request takes so many calls that with faults none would go well
		m := modelDisk{starter: pick(2) == 1}
		m.mem.Limits = blk.Limits{
			RequestAlign: align, MemoryAlign: min(1<<pick(14), align),
			MaxVec: pick(6), MaxTransfer: int64(most * pick(9)),
			DiscardAlign: int64(align * pick(6)), ZeroAlign: int64(align * pick(6)),
			MaxDiscard: int64(most * pick(20)), MaxZero: int64(most * pick(20)), Cluster: 512 << pick(9),
		}
		m.device = blk.Options{DetectZeroes: blk.DetectZeroes(pick(3)), CopyOnRead: pick(2) == 1}
		if pick(2) == 1 {
			m.backing = bytes.Repeat([]byte("backing"), 30_000)[:modelSize/2&^511]
		}
		return m.options()
	})
}
