package vblk

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/virtio/queue"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

// slow is a Backend whose transfers take some time, and a thread for as long, as those of a disk do.
type slow struct {
	blk.Backend
	time time.Duration
}

func (s slow) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	ts := unix.NsecToTimespec(int64(s.time))
	if err := unix.Nanosleep(&ts, nil); err != nil && err != unix.EINTR {
		return 0, err
	}
	return s.Backend.ReadVecAt(dst, off)
}

// BenchmarkRandomRead reads 4 KiB at random places of a raw file, which the page cache holds, from kick to interrupt. The
// driver keeps depth requests in flight and does as Linux does: it takes what is used, adds as much, and asks for an
// interrupt where there is nothing.
func BenchmarkRandomRead(b *testing.B) {
	for _, tc := range []struct {
		name  string
		delay time.Duration
	}{{"cached", 0}, {"100us", 100 * time.Microsecond}} {
		for _, depth := range []int{1, 4, 32} {
			b.Run(fmt.Sprintf("%s/depth=%d", tc.name, depth), func(b *testing.B) { benchmarkRead(b, depth, tc.delay) })
		}
	}
}

func benchmarkRead(b *testing.B, depth int, delay time.Duration) {
	const blocks = 64 << 20 / 4096
	path := filepath.Join(b.TempDir(), "disk")
	if err := os.WriteFile(path, pattern(blocks*4096, 0), 0o600); err != nil {
		b.Fatal(err)
	}
	var backend blk.Backend
	backend, err := raw.Open(path, raw.Options{})
	if err != nil {
		b.Fatal(err)
	}
	if delay > 0 {
		backend = slow{backend, delay}
	}
	disk, err := blk.New(backend, blk.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer disk.Close()
	dev, err := New(disk, Options{})
	if err != nil {
		b.Fatal(err)
	}
	d := queuetest.New(b, 256, queuetest.Options{EventIdx: true, Indirect: true})
	defer dev.Reset()
	event, err := queue.NewEvent()
	if err != nil {
		b.Fatal(err)
	}
	defer event.Close()
	s := &interrupt{event}
	runtime.LockOSThread() // as a virtual CPU has a thread
	defer runtime.UnlockOSThread()
	if err := dev.Activate(FeatureFlush, []*queue.Queue{d.Queue}, s); err != nil {
		b.Fatal(err)
	}

	var sectors [][]byte
	for i := range depth {
		h := d.Alloc(16, 16)
		copy(d.Bytes(h, 16), header(0, 0))
		sectors = append(sectors, d.Bytes(h+8, 8))
		d.SetDesc(uint16(i), d.Table(
			queuetest.Desc{Addr: h, Len: 16, Flags: queuetest.FlagNext, Next: 1},
			queuetest.Desc{Addr: d.Alloc(4096, 4096), Len: 4096, Flags: queuetest.FlagNext | queuetest.FlagWrite, Next: 2},
			queuetest.Desc{Addr: d.Alloc(1, 1), Len: 1, Flags: queuetest.FlagWrite},
		))
	}
	rng := rand.New(rand.NewPCG(1, 1))
	add := func(i uint16) {
		binary.LittleEndian.PutUint64(sectors[i], uint64(rng.IntN(blocks)*8))
		d.MakeAvailable(i)
	}
	// run carries out n requests.
	taken := uint16(0)
	run := func(n int) {
		added := 0
		for ; added < min(n, depth); added++ {
			add(uint16(added))
		}
		d.Kick()
		for done := 0; done < n; {
			if d.UsedIdx() == taken {
				d.SetUsedEvent(taken)
				if d.UsedIdx() == taken {
					s.await(b)
				}
				continue
			}
			for d.UsedIdx() != taken {
				id, _ := d.UsedElem(taken)
				taken++
				done++
				if added < n {
					add(uint16(id))
					added++
				}
			}
			d.Kick()
		}
	}
	run(20 * depth) // lists grow once
	b.SetBytes(4096)
	b.ReportAllocs()
	b.ResetTimer()
	before := cpuTime(b)
	run(b.N)
	b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
}

// cpuTime returns the CPU time of this process, which other load on the machine changes less than the time of day.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// interrupt is a transport that signals an eventfd, as one does that KVM makes an interrupt of.
type interrupt struct{ event *queue.Event }

func (s *interrupt) NotifyQueue(int) error { return s.event.Signal() }
func (s *interrupt) NotifyConfig() error   { return nil }
func (s *interrupt) NeedsReset()           {}

// await waits for an interrupt on the caller's thread.
func (s *interrupt) await(b *testing.B) {
	p := []unix.PollFd{{Fd: int32(s.event.FD()), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(p, -1); err == nil {
			break
		} else if err != unix.EINTR {
			b.Fatal(err)
		}
	}
	if err := s.event.Wait(); err != nil {
		b.Fatal(err)
	}
}
