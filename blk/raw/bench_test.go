package raw_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/iov"
)

// load is a stream of transfers, each of one block, at offsets that go through the file by step as qemu-img bench's do.
type load struct {
	op    blk.Op
	depth int // how many are under way
	block int
	step  int64
	count int
	wait  bool // each is waited for: ReadVecAt and WriteVecAt, not Start; depth is 1 then
}

// run carries the load out and returns how long that took.
func (l load) run(b *testing.B, f *raw.File) time.Duration {
	// One buffer for all, as qemu-img bench has it: its bytes don't matter, how well it fits a cache does.
	buf, err := unix.Mmap(-1, 0, l.block, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Munmap(buf)
	var mu sync.Mutex
	started, done, off := 0, 0, int64(0)
	end := make(chan error, 1)
	next := func() (int64, bool) {
		if started == l.count {
			return 0, false
		}
		started++
		at := off
		if off += l.step; off+int64(l.block) > f.Size() {
			off = 0
		}
		return at, true
	}
	if l.wait {
		v, begin := iov.Of(buf), time.Now()
		for at, more := next(); more; at, more = next() {
			do := f.ReadVecAt
			if l.op == blk.OpWrite {
				do = f.WriteVecAt
			}
			if n, err := do(v, at); n != l.block || err != nil {
				b.Fatal(n, err)
			}
		}
		return time.Since(begin)
	}
	batch := make([]*blk.IO, l.depth)
	for i := range batch {
		io := &blk.IO{Op: l.op, Vec: iov.Of(buf)}
		io.Off, _ = next()
		one := []*blk.IO{io}
		io.Done = func(io *blk.IO) {
			mu.Lock()
			done++
			var more bool
			io.Off, more = next()
			last := done == l.count
			mu.Unlock()
			switch {
			case io.Err != nil || io.N != l.block:
				end <- fmt.Errorf("%d bytes, %w", io.N, io.Err)
			case more:
				f.Start(one)
			case last:
				end <- nil
			}
		}
		batch[i] = io
	}
	begin := time.Now()
	f.Start(batch)
	if err := <-end; err != nil {
		b.Fatal(err)
	}
	return time.Since(begin)
}

// qemu has qemu-img carry the load out on the same file.
func (l load) qemu(b *testing.B, path string, o raw.Options) time.Duration {
	aio := o.AIO
	if aio == raw.AIOAuto {
		aio = raw.AIOIOUring
	}
	args := []string{"bench", "-f", "raw", "-i", aio.String(), "-t", o.Cache.String(), "-d", strconv.Itoa(l.depth),
		"-c", strconv.Itoa(l.count), "-s", strconv.Itoa(l.block), "-S", strconv.FormatInt(l.step, 10), path}
	if l.op == blk.OpWrite {
		args = slices.Insert(args, 1, "-w")
	}
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	if err != nil {
		b.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
	m := regexp.MustCompile(`completed in ([0-9.]+) seconds`).FindSubmatch(out)
	if m == nil {
		b.Fatalf("qemu-img: %s", out)
	}
	seconds, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		b.Fatal(err)
	}
	return time.Duration(seconds * float64(time.Second))
}

// BenchmarkTransfers carries out transfers of 4 KiB here and there and of 64 KiB in order by each engine. Where qemu-img
// is installed, it does the same in turns, and x-qemu is how many times its rate ours is (medians). Run it with
// -benchtime 5x.
func BenchmarkTransfers(b *testing.B) {
	path := filepath.Join(b.TempDir(), "disk.img")
	data := pattern(1 << 20)
	file, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	for range 256 {
		if _, err := file.Write(data); err != nil {
			b.Fatal(err)
		}
	}
	if err := file.Sync(); err != nil {
		b.Fatal(err)
	}
	file.Close()
	_, lookErr := exec.LookPath("qemu-img")
	median := func(times []time.Duration) float64 {
		slices.Sort(times)
		return times[len(times)/2].Seconds()
	}
	for _, op := range []blk.Op{blk.OpRead, blk.OpWrite} {
		for _, o := range []raw.Options{
			{Cache: raw.CacheNone, AIO: raw.AIOIOUring},
			{Cache: raw.CacheNone, AIO: raw.AIOThreads},
			{Cache: raw.CacheWriteback},
			{Cache: raw.CacheWriteback, AIO: raw.AIOIOUring},
			{Cache: raw.CacheWriteback, AIO: raw.AIOThreads},
		} {
			for _, l := range []load{
				{op: op, depth: 1, block: 4096, step: 17 * 4096, count: 20000, wait: true},
				{op: op, depth: 1, block: 4096, step: 17 * 4096, count: 20000},
				{op: op, depth: 64, block: 4096, step: 17 * 4096, count: 20000},
				{op: op, depth: 64, block: 64 << 10, step: 64 << 10, count: 8000},
			} {
				if l.depth == 1 && o.Cache == raw.CacheNone {
					l.count = 5000
				}
				name := fmt.Sprintf("%s/%v/%v/%dK/depth=%d", []string{"read", "write"}[op], o.Cache, o.AIO, l.block>>10, l.depth)
				if l.wait {
					name += "/wait"
				}
				b.Run(name, func(b *testing.B) {
					var ours, theirs []time.Duration
					for b.Loop() {
						f, err := raw.Open(path, o)
						if err != nil {
							b.Fatal(err)
						}
						ours = append(ours, l.run(b, f))
						if err := f.Close(); err != nil {
							b.Fatal(err)
						}
						if lookErr == nil {
							theirs = append(theirs, l.qemu(b, path, o))
						}
					}
					b.ReportMetric(0, "ns/op")
					b.ReportMetric(float64(l.count)/median(ours), "ops/s")
					if lookErr == nil {
						b.ReportMetric(float64(l.count)/median(theirs), "qemu-ops/s")
						b.ReportMetric(median(theirs)/median(ours), "x-qemu")
					}
				})
			}
		}
	}
}
