package raw_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// modes are all ways to open a disk; each engine meets each cache mode.
func modes() map[string]raw.Options {
	m := map[string]raw.Options{}
	for _, c := range []raw.Cache{raw.CacheWriteback, raw.CacheNone} {
		for _, a := range []raw.AIO{raw.AIOAuto, raw.AIOIOUring, raw.AIOThreads} {
			m[fmt.Sprintf("%v,%v", c, a)] = raw.Options{Cache: c, AIO: a}
		}
	}
	return m
}

// aligned returns n bytes that suit every O_DIRECT.
func aligned(t testing.TB, n int) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, (n+4095)&^4095, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(p) })
	return p[:n]
}

// carryOut starts ios as one batch and waits until all are done.
func carryOut(f *raw.File, ios ...*blk.IO) {
	var left sync.WaitGroup
	left.Add(len(ios))
	for _, io := range ios {
		io.Done = func(*blk.IO) { left.Done() }
	}
	f.Start(ios)
	left.Wait()
}

// Many goroutines write and read back blocks of their own, in batches of all sizes; in the end the file holds what the
// last of them wrote.
func TestStartConcurrently(t *testing.T) {
	t.Parallel()
	const goroutines, blocks, block, rounds = 8, 48, 4096, 20
	for name, o := range modes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := image(t, make([]byte, goroutines*blocks*block))
			f := open(t, path, o)
			want := make([]byte, goroutines*blocks*block)
			var wg sync.WaitGroup
			for g := range goroutines {
				memory := aligned(t, 2*blocks*block)
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(g), 3))
					mine := want[g*blocks*block:][:blocks*block]
					for range rounds {
						n := 1 + rng.IntN(blocks)
						var writes, reads []*blk.IO
						for _, i := range rng.Perm(blocks)[:n] {
							w, r := memory[i*block:][:block], memory[(blocks+i)*block:][:block]
							for j := range w {
								w[j] = byte(rng.Uint32())
							}
							copy(mine[i*block:], w)
							off := int64((g*blocks + i) * block)
							half := block / 2 // 512 divides it
							writes = append(writes, &blk.IO{Op: blk.OpWrite, Vec: iov.Of(w[:half], nil, w[half:]), Off: off})
							reads = append(reads, &blk.IO{Op: blk.OpRead, Vec: iov.Of(r), Off: off})
						}
						carryOut(f, writes...)
						carryOut(f, reads...)
						for _, io := range append(writes, reads...) {
							if io.N != block || io.Err != nil {
								t.Errorf("%v at %d: %d bytes, %v", io.Op, io.Off, io.N, io.Err)
								return
							}
						}
						for _, io := range reads {
							off := int(io.Off) - g*blocks*block
							if iov.Mismatch(io.Vec, iov.Of(mine[off:][:block])) >= 0 {
								t.Errorf("block at %d reads as something else", io.Off)
								return
							}
						}
					}
				})
			}
			wg.Wait()
			if err := f.Flush(); err != nil {
				t.Error(err)
			}
			if !bytes.Equal(contents(t, path), want) {
				t.Error("the file holds something else")
			}
		})
	}
}

// What does not go the usual way: vectors beyond IOV_MAX, empty ones, more than the ring holds, the end of the file,
// errors, and Done that starts again, often.
func TestStartOddRequests(t *testing.T) {
	t.Parallel()
	for name, o := range modes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const size = 16 << 20
			path := image(t, pattern(size))
			f := open(t, path, o)

			memory := aligned(t, size)
			var long iov.Vec
			for i := 0; i < size; i += 8192 { // 2,048 elements
				long = long.Append(memory[i:][:8192])
			}
			all := &blk.IO{Op: blk.OpRead, Vec: long}
			none := &blk.IO{Op: blk.OpWrite, Off: 4096}
			holes := &blk.IO{Op: blk.OpRead, Vec: iov.Of(nil, nil), Off: 4096}
			carryOut(f, all, none, holes)
			if all.N != size || all.Err != nil || !bytes.Equal(memory, pattern(size)) {
				t.Errorf("2,048 elements: %d bytes, %v", all.N, all.Err)
			}
			if none.N != 0 || none.Err != nil || holes.N != 0 || holes.Err != nil {
				t.Errorf("nothing at all: %v, %v", none.Err, holes.Err)
			}

			var many []*blk.IO
			for i := range size / 4096 { // 4,096 of them
				many = append(many, &blk.IO{Op: blk.OpWrite, Vec: iov.Of(memory[i*4096:][:4096]), Off: int64(i) * 4096})
			}
			carryOut(f, many...)
			for _, io := range many {
				if io.N != 4096 || io.Err != nil {
					t.Fatalf("write at %d: %d bytes, %v", io.Off, io.N, io.Err)
				}
			}

			across := &blk.IO{Op: blk.OpRead, Vec: iov.Of(memory[:8192]), Off: size - 4096}
			beyond := &blk.IO{Op: blk.OpRead, Vec: iov.Of(memory[8192:][:4096]), Off: size + 4096}
			before := &blk.IO{Op: blk.OpRead, Vec: iov.Of(memory[16384:][:4096]), Off: -1}
			carryOut(f, across, beyond, before)
			if across.N != 4096 || across.Err != nil || beyond.N != 0 || beyond.Err != nil {
				t.Errorf("at the end: %d, %v; %d, %v", across.N, across.Err, beyond.N, beyond.Err)
			}
			if before.Err == nil || !strings.Contains(before.Err.Error(), path) {
				t.Errorf("before the start: %v", before.Err)
			}

			var left atomic.Int64
			left.Store(20000)
			end := make(chan struct{})
			var busy atomic.Int64
			const chains = 8
			busy.Store(chains)
			for i := range chains {
				io := &blk.IO{Op: blk.OpRead, Vec: iov.Of(memory[i*4096:][:4096]), Off: int64(i) * 4096}
				one := []*blk.IO{io}
				io.Done = func(io *blk.IO) {
					if io.N != 4096 || io.Err != nil {
						t.Errorf("again and again: %d, %v", io.N, io.Err)
					} else if left.Add(-1) > 0 {
						f.Start(one)
						return
					}
					if busy.Add(-1) == 0 {
						close(end)
					}
				}
				f.Start(one)
			}
			<-end
		})
	}
}

func TestStartReadOnly(t *testing.T) {
	t.Parallel()
	for name, o := range modes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := image(t, pattern(4096))
			o.ReadOnly = true
			f := open(t, path, o)
			w := &blk.IO{Op: blk.OpWrite, Vec: iov.Of(aligned(t, 4096))}
			carryOut(f, w)
			if !errors.Is(w.Err, unix.EBADF) || !strings.Contains(w.Err.Error(), "write disk "+path) {
				t.Errorf("write: %v", w.Err)
			}
		})
	}
}

// A file that ends in the middle of a block.
func TestStartAtOddEnd(t *testing.T) {
	t.Parallel()
	const size = 3*4096 + 123
	for name, o := range modes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := image(t, pattern(size))
			f := open(t, path, o)
			if f.Size() != 3*4096+512 {
				t.Fatalf("size %d", f.Size())
			}
			p := aligned(t, 16384)
			io := &blk.IO{Op: blk.OpRead, Vec: iov.Of(p[:4096], p[4096:8192], p[8192:])}
			carryOut(f, io)
			if io.N != size || io.Err != nil || !bytes.Equal(p[:size], pattern(size)) {
				t.Errorf("started: %d, %v", io.N, io.Err)
			}
			if n, err := f.ReadVecAt(iov.Of(p[:4096], p[4096:8192]), 8192); n != size-8192 || err != nil ||
				!bytes.Equal(p[:size-8192], pattern(size)[8192:]) {
				t.Errorf("waited for: %d, %v", n, err)
			}
			if o.Cache != raw.CacheNone {
				return
			}
			// The unit of writes is a block, so the file grows to whole ones; the disk does with Refresh.
			align := f.Limits().RequestAlign
			if align < 512 || f.Limits().MemoryAlign < 512 {
				t.Fatalf("limits %+v", f.Limits())
			}
			off := int64(size / align * align)
			if n, err := f.WriteVecAt(iov.Of(p[:align]), off); n != align || err != nil {
				t.Fatalf("write: %d, %v", n, err)
			}
			info, err := os.Stat(path)
			if err != nil || info.Size() != off+int64(align) || f.Size() != 3*4096+512 {
				t.Errorf("file of %d bytes, disk of %d", info.Size(), f.Size())
			}
			if err := f.Refresh(); err != nil || f.Size() != off+int64(align) {
				t.Errorf("refresh: %v, %d bytes", err, f.Size())
			}
		})
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	for _, want := range []raw.AIO{raw.AIOAuto, raw.AIOIOUring, raw.AIOThreads} {
		if got, err := raw.ParseAIO(want.String()); got != want || err != nil {
			t.Errorf("%v: %v, %v", want, got, err)
		}
	}
	if _, err := raw.ParseAIO("native"); err == nil || err.Error() != "aio=native: want auto, io_uring or threads" {
		t.Errorf("native: %v", err)
	}
	for _, want := range []raw.Preallocation{raw.PreallocOff, raw.PreallocFalloc, raw.PreallocFull} {
		if got, err := raw.ParsePreallocation(want.String()); got != want || err != nil {
			t.Errorf("%v: %v, %v", want, got, err)
		}
	}
	if s := raw.AIO(9).String(); s != "unknown (9)" {
		t.Error(s)
	}
}

// openFiles returns what the descriptors of this process are.
func openFiles(t *testing.T) map[string]int {
	t.Helper()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]int{}
	for _, e := range dir {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			m[target]++
		}
	}
	return m
}

// Not parallel: it counts what the process has.
func TestCloseLeavesNothing(t *testing.T) {
	for name, o := range modes() {
		t.Run(name, func(t *testing.T) {
			path := image(t, pattern(1<<20))
			p := aligned(t, 256*4096)
			before := openFiles(t)
			for range 20 {
				f, err := raw.Open(path, o)
				if err != nil { // the lock of the round before is gone
					t.Fatal(err)
				}
				var ios []*blk.IO
				for i := range 256 {
					ios = append(ios, &blk.IO{Op: blk.Op(i % 2), Vec: iov.Of(p[i*4096:][:4096]), Off: int64(i) * 4096})
				}
				carryOut(f, ios...)
				if err := f.Close(); err != nil {
					t.Fatal(err)
				}
			}
			for what, n := range openFiles(t) {
				if n > before[what] && (strings.Contains(what, "uring") || strings.Contains(what, "eventfd") || what == path) {
					t.Errorf("%d of %s left open", n-before[what], what)
				}
			}
			hosttest.Ended(t, "raw.(*", 10*time.Second)
			maps, err := os.ReadFile("/proc/self/maps")
			if err != nil || strings.Contains(string(maps), "io_uring") {
				t.Errorf("a ring is still mapped: %v", err)
			}
		})
	}
}

func TestStartDoesNotAllocate(t *testing.T) {
	for name, o := range modes() {
		f := open(t, image(t, pattern(1<<20)), o)
		p := aligned(t, 64*4096)
		done := make(chan struct{}, 64)
		for _, op := range []blk.Op{blk.OpRead, blk.OpWrite} {
			for _, depth := range []int{1, 64} {
				var ios []*blk.IO
				for i := range depth {
					ios = append(ios, &blk.IO{Op: op, Vec: iov.Of(p[i*4096:][:4096]), Off: int64(i) * 4096,
						Done: func(*blk.IO) { done <- struct{}{} }})
				}
				// The runtime may make a worker's goroutine anew: after a garbage collection, and always under the race
				// detector.
				n := 1.0
				for try := 0; try < 5 && n != 0 && !hosttest.Race; try++ {
					n = testing.AllocsPerRun(50, func() {
						f.Start(ios)
						for range ios {
							<-done
						}
					})
				}
				if n != 0 && !hosttest.Race {
					t.Errorf("%s: %v of %d: %v allocations", name, op, depth, n)
				}
			}
		}
	}
}

// Requests of any offset and length, through the Device that sees to the alignment.
func TestThroughDevice(t *testing.T) {
	t.Parallel()
	const size, rounds = 256<<10 + 512, 400
	for name, o := range modes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := image(t, pattern(size))
			f, err := raw.Open(path, o)
			if err != nil {
				t.Fatal(err)
			}
			d, err := blk.New(f, blk.Options{})
			if err != nil {
				t.Fatal(err)
			}
			want := pattern(size)
			rng := rand.New(rand.NewPCG(5, 8))
			for range rounds {
				off := rng.IntN(size)
				n := rng.IntN(min(size-off, 20000)) + 1
				p := make([]byte, n)
				r := blk.Request{Off: int64(off), Vec: iov.Of(p[:n/3], p[n/3:])}
				switch rng.IntN(3) {
				case 0:
					r.Op = blk.OpRead
				case 1:
					r.Op = blk.OpWrite
					r.Flags = blk.Flags(rng.IntN(2)) * blk.FUA
					for i := range p {
						p[i] = byte(rng.Uint32())
					}
					copy(want[off:], p)
				case 2:
					r.Op, r.Len, r.Vec = blk.OpWriteZeroes, int64(n), nil
					r.Flags = blk.Flags(rng.IntN(2)) * blk.MayUnmap
					clear(want[off:][:n])
				}
				done := make(chan struct{})
				r.Done = func(*blk.Request) { close(done) }
				d.Submit(t.Context(), []*blk.Request{&r})
				<-done
				if r.Err != nil || r.Op == blk.OpRead && !bytes.Equal(p, want[off:][:n]) {
					t.Fatalf("%v of %d bytes at %d: %v", r.Op, n, off, r.Err)
				}
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			got := contents(t, path)
			if len(got) < size || !bytes.Equal(got[:size], want) {
				t.Errorf("the file of %d bytes holds something else", len(got))
			}
		})
	}
}

// The kernel takes back what a thread has started when the thread ends, as those of vCPUs do.
func TestStartFromThreadsThatEnd(t *testing.T) {
	t.Parallel()
	const threads, depth, block = 32, 16, 4096
	for name, o := range modes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := image(t, make([]byte, threads*depth*block))
			f := open(t, path, o)
			memory := aligned(t, threads*depth*block)
			copy(memory, pattern(len(memory)))
			var left sync.WaitGroup
			var ios []*blk.IO
			for i := range threads * depth {
				left.Add(1)
				ios = append(ios, &blk.IO{Op: blk.OpWrite, Vec: iov.Of(memory[i*block:][:block]), Off: int64(i) * block,
					Done: func(*blk.IO) { left.Done() }})
			}
			for i := range threads {
				go func() {
					runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
					f.Start(ios[i*depth:][:depth])
				}()
			}
			left.Wait()
			for _, io := range ios {
				if io.N != block || io.Err != nil {
					t.Errorf("write at %d: %d, %v", io.Off, io.N, io.Err)
				}
			}
			if !bytes.Equal(contents(t, path), pattern(len(memory))) {
				t.Error("the file holds something else")
			}

			// Reads that wait for the medium, most of them when their thread is gone.
			cold, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer cold.Close()
			if err := errors.Join(cold.Sync(), unix.Fadvise(int(cold.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
				t.Fatal(err)
			}
			clear(memory)
			left.Add(len(ios))
			for i := range threads {
				mine := ios[i*depth:][:depth]
				for _, io := range mine {
					io.Op = blk.OpRead
				}
				go func() {
					runtime.LockOSThread()
					f.Start(mine)
				}()
			}
			left.Wait()
			for _, io := range ios {
				if io.N != block || io.Err != nil {
					t.Errorf("read at %d: %d, %v", io.Off, io.N, io.Err)
				}
			}
			if !bytes.Equal(memory, pattern(len(memory))) {
				t.Error("the disk reads as something else")
			}
		})
	}
}
