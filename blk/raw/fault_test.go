package raw

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// openFaulty opens a file of 64 KiB, whose page n is full of n+1, with a kernel that change made different.
func openFaulty(t *testing.T, o Options, change func(*system)) *File {
	t.Helper()
	var data []byte
	for n := range 16 {
		data = append(data, bytes.Repeat([]byte{byte(n + 1)}, 4096)...)
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	sys := *linux
	change(&sys)
	f, err := openWith(&sys, path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// readAll reads the pages of f's 64 KiB at once and checks them.
func readAll(t *testing.T, f *File) {
	t.Helper()
	var wg sync.WaitGroup
	var batch []*blk.IO
	for n := range 16 {
		wg.Add(1)
		batch = append(batch, &blk.IO{Op: blk.OpRead, Vec: iov.Of(make([]byte, 1000), make([]byte, 3096)), Off: int64(n) * 4096,
			Done: func(*blk.IO) { wg.Done() }})
	}
	f.Start(batch)
	wg.Wait()
	for n, io := range batch {
		want := iov.Of(bytes.Repeat([]byte{byte(n + 1)}, 4096))
		if io.N != 4096 || io.Err != nil || iov.Mismatch(io.Vec, want) >= 0 {
			t.Errorf("page %d: %d bytes, %v", n, io.N, io.Err)
		}
	}
}

// A read that the page cache can't answer is passed on even where the reads that it can never end, because each Done starts
// another.
func TestMissAmongHits(t *testing.T) {
	t.Parallel()
	for _, aio := range []AIO{AIOThreads, AIOAuto} {
		const missed = 15 * 4096
		f := openFaulty(t, Options{AIO: aio}, func(s *system) {
			transfer := s.transfer
			s.transfer = func(fd int, op blk.Op, v iov.Vec, off int64, flags int) (int, unix.Errno) {
				if flags&unix.RWF_NOWAIT != 0 && off == missed {
					return 0, unix.EAGAIN
				}
				return transfer(fd, op, v, off, flags)
			}
		})
		const depth, most = 32, 200_000
		var over atomic.Bool
		var hits atomic.Int64
		var done sync.WaitGroup
		batch := []*blk.IO{{Op: blk.OpRead, Vec: iov.Of(make([]byte, 16)), Off: missed, Done: func(*blk.IO) {
			over.Store(true)
			done.Done()
		}}}
		for range depth {
			batch = append(batch, &blk.IO{Op: blk.OpRead, Vec: iov.Of(make([]byte, 16)), Done: func(io *blk.IO) {
				if hits.Add(1) > most || over.Load() {
					done.Done()
					return
				}
				f.Start([]*blk.IO{io})
			}})
		}
		done.Add(len(batch))
		f.Start(batch)
		done.Wait()
		if n := hits.Load(); n > most {
			t.Errorf("%v: it waited for %d others", aio, n)
		}
	}
}

func TestNoRing(t *testing.T) {
	t.Parallel()
	refuse := func(s *system) {
		s.newRing = func(*File) (*ring, error) { return nil, os.NewSyscallError("io_uring_setup", unix.EPERM) }
	}
	f := openFaulty(t, Options{}, refuse)
	if f.AIO() != AIOThreads {
		t.Errorf("auto is %v", f.AIO())
	}
	readAll(t, f)
	sys := *linux
	refuse(&sys)
	_ = f.Close()
	_, err := openWith(&sys, f.path, Options{AIO: AIOIOUring})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "aio=threads") || !strings.Contains(err.Error(), f.path) {
		t.Errorf("io_uring: %v", err)
	}
	g, err := openWith(linux, f.path, Options{AIO: AIOIOUring}) // and the failed open kept no lock
	if err != nil {
		t.Fatal(err)
	}
	if g.AIO() != AIOIOUring {
		t.Errorf("io_uring is %v", g.AIO())
	}
	_ = g.Close()
}

// The page cache answers in full, in part, not at all, or can't be asked; the engine does the rest.
func TestInlineReads(t *testing.T) {
	t.Parallel()
	for _, aio := range []AIO{AIOIOUring, AIOThreads} {
		for name, answer := range map[string]struct {
			n     int
			errno unix.Errno
			again bool // asked for every transfer
		}{
			"some":    {n: 500, again: true},
			"none":    {errno: unix.EAGAIN, again: true},
			"error":   {errno: unix.EIO, again: true},
			"refused": {errno: unix.EOPNOTSUPP},
		} {
			var mu sync.Mutex
			calls := 0
			f := openFaulty(t, Options{AIO: aio}, func(s *system) {
				s.transfer = func(fd int, op blk.Op, v iov.Vec, off int64, flags int) (int, unix.Errno) {
					mu.Lock()
					defer mu.Unlock()
					calls++
					if flags != unix.RWF_NOWAIT || op != blk.OpRead {
						t.Errorf("flags %#x, %v", flags, op)
					}
					if answer.errno != 0 {
						return 0, answer.errno
					}
					part, err := v.Slice(0, answer.n)
					if err != nil {
						t.Error(err)
					}
					return transfer(fd, op, part, off, 0) // a file system may lack RWF_NOWAIT
				}
			})
			readAll(t, f)
			readAll(t, f)
			mu.Lock()
			if want := map[bool]int{true: 32, false: 1}[answer.again]; calls != want {
				t.Errorf("%v, %s: asked %d times, want %d", aio, name, calls, want)
			}
			mu.Unlock()
		}
	}
}

// What the kernel does not take from the ring, the workers do.
func TestRingRefusesEntries(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, Options{AIO: AIOIOUring}, func(*system) {})
	f.inline.off.Store(true)
	readAll(t, f)
	fd := f.ring.mem.fd
	f.ring.mu.Lock()
	for f.ring.driven {
		f.ring.idle.Wait()
	}
	f.ring.mem.fd = -1
	f.ring.mu.Unlock()
	for range 100 { // more than there are entries
		readAll(t, f)
	}
	f.ring.mu.Lock()
	for f.ring.driven {
		f.ring.idle.Wait()
	}
	f.ring.mem.fd = fd
	if len(f.ring.free) != ringEntries || slices.ContainsFunc(f.ring.flying, func(io *blk.IO) bool { return io != nil }) {
		t.Errorf("%d entries are free", len(f.ring.free))
	}
	f.ring.mu.Unlock()
	readAll(t, f)
}

// A driver that has worked for others long enough leaves the rest to the reaper.
func TestRingHandsOver(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, Options{AIO: AIOIOUring}, func(*system) {})
	r := f.ring
	for range 200 {
		var wg sync.WaitGroup
		wg.Add(1)
		io := &blk.IO{Op: blk.OpRead, Vec: iov.Of(make([]byte, 4096)), Done: func(*blk.IO) { wg.Done() }}
		r.mu.Lock()
		for r.driven {
			r.idle.Wait()
		}
		r.queue.push([]*blk.IO{io})
		r.driven = true
		r.mu.Unlock()
		r.drive(0) // none of its rounds are left
		wg.Wait()
		if io.N != 4096 || io.Err != nil {
			t.Fatalf("%d bytes, %v", io.N, io.Err)
		}
	}
}

func TestRingResults(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, Options{}, func(*system) {})
	for _, tc := range []struct {
		errno unix.Errno
		err   error
	}{
		{unix.ECANCELED, nil}, {unix.EFAULT, nil}, {unix.EAGAIN, nil}, {unix.EINTR, nil}, {unix.EIO, unix.EIO},
	} {
		done := make(chan struct{})
		io := &blk.IO{Op: blk.OpRead, Vec: iov.Of(make([]byte, 4096)), Off: 4096, Done: func(*blk.IO) { close(done) }}
		f.fail(io, tc.errno)
		<-done
		if !errors.Is(io.Err, tc.err) || tc.err == nil && (io.N != 4096 || io.Err != nil) {
			t.Errorf("%v: %d bytes, %v", tc.errno, io.N, io.Err)
		}
	}
}

func TestAlignment(t *testing.T) {
	t.Parallel()
	dio := func(offset, memory uint32) func(int, *unix.Statx_t) error {
		return func(_ int, st *unix.Statx_t) error {
			st.Mask, st.Dio_offset_align, st.Dio_mem_align = unix.STATX_DIOALIGN, offset, memory
			return nil
		}
	}
	old := func(int, *unix.Statx_t) error { return nil } // knows nothing of STATX_DIOALIGN
	reads := func(align int) func(int, []byte, int64) (int, error) {
		return func(_ int, p []byte, _ int64) (int, error) {
			if align == 0 || len(p)%align != 0 {
				return 0, unix.EINVAL
			}
			return len(p), nil
		}
	}
	for _, tc := range []struct {
		name  string
		statx func(int, *unix.Statx_t) error
		pread func(int, []byte, int64) (int, error)
		want  int
		text  string
	}{
		{"512 by 4", dio(512, 4), nil, 512, ""},
		{"4096 by 512", dio(4096, 512), nil, 4096, ""},
		{"512 by 4096", dio(512, 4096), nil, 4096, ""},
		{"refused", dio(0, 0), nil, 0, "cache=writeback"},
		{"128 KiB", dio(128<<10, 4), nil, 0, "131072 bytes"},
		{"odd", dio(513, 4), nil, 0, "513 bytes"},
		{"trial: any", old, reads(1), 4096, ""},
		{"trial: 512", old, reads(512), 512, ""},
		{"trial: 4096", old, reads(4096), 4096, ""},
		{"trial: 64 KiB", old, reads(64 << 10), 64 << 10, ""},
		{"trial: none", old, reads(0), 0, "cache=writeback"},
		{"trial: interrupted", func(int, *unix.Statx_t) error { return unix.ENOSYS }, func() func(int, []byte, int64) (int, error) {
			calls := 0
			return func(_ int, p []byte, _ int64) (int, error) {
				if calls++; calls%2 == 1 {
					return 0, unix.EINTR
				}
				return reads(2048)(0, p, 0)
			}
		}(), 2048, ""},
		{"trial: bad sector", old, func(_ int, p []byte, _ int64) (int, error) {
			if len(p)%1024 != 0 {
				return 0, unix.EINVAL
			}
			return 0, unix.EIO
		}, 1024, ""},
	} {
		f := &File{path: "/some/disk", fd: -1, sys: &system{statx: tc.statx, pread: tc.pread}}
		got, err := f.probeAlign()
		if got != tc.want || (err != nil) != (tc.text != "") || err != nil && !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %d, %v", tc.name, got, err)
		}
	}
	f := &File{path: "/dev/some", fd: -1, device: true, sector: 4096, sys: &system{statx: old}}
	if n, err := f.probeAlign(); n != 4096 || err != nil {
		t.Errorf("device: %d, %v", n, err)
	}
	// A file system without O_DIRECT refuses the open.
	err := openError("/some/disk", Options{Cache: CacheNone}, unix.EINVAL)
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "cache=writeback") {
		t.Errorf("open: %v", err)
	}
}

// Which calls Discard and WriteZeroes make, and what they remember.
func TestSpaceCalls(t *testing.T) {
	t.Parallel()
	const (
		punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
		zero  = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
		alloc = unix.FALLOC_FL_KEEP_SIZE
	)
	for _, tc := range []struct {
		name    string
		answers map[uint32]error
		do      func(f *File) error
		first   []uint32 // the calls made the first time
		second  []uint32
		want    error
	}{
		{"zeroes", nil, func(f *File) error { return f.WriteZeroes(0, 4096, false) }, []uint32{zero}, []uint32{zero}, nil},
		{"zeroes, unmap", nil, func(f *File) error { return f.WriteZeroes(0, 4096, true) }, []uint32{punch}, []uint32{punch}, nil},
		{"zeroes without ZERO_RANGE", map[uint32]error{zero: unix.EOPNOTSUPP},
			func(f *File) error { return f.WriteZeroes(0, 4096, false) },
			[]uint32{zero, punch, alloc}, []uint32{punch, alloc}, nil},
		{"zeroes, unmap, without PUNCH_HOLE", map[uint32]error{punch: unix.EOPNOTSUPP},
			func(f *File) error { return f.WriteZeroes(0, 4096, true) },
			[]uint32{punch, zero}, []uint32{zero}, nil},
		{"zeroes with nothing", map[uint32]error{punch: unix.ENOSYS, zero: unix.EOPNOTSUPP},
			func(f *File) error { return f.WriteZeroes(0, 4096, false) },
			[]uint32{zero, punch}, nil, blk.ErrUnsupported},
		{"zeroes without allocation", map[uint32]error{alloc: unix.EOPNOTSUPP, zero: unix.EOPNOTSUPP},
			func(f *File) error { return f.WriteZeroes(0, 4096, false) },
			[]uint32{zero, punch, alloc}, nil, blk.ErrUnsupported},
		{"zeroes, no space", map[uint32]error{zero: unix.ENOSPC}, func(f *File) error { return f.WriteZeroes(0, 4096, false) },
			[]uint32{zero}, []uint32{zero}, unix.ENOSPC},
		{"zeroes, refused once", map[uint32]error{zero: unix.EINVAL, punch: unix.EINVAL},
			func(f *File) error { return f.WriteZeroes(0, 4096, false) },
			[]uint32{zero, punch}, []uint32{zero, punch}, blk.ErrUnsupported},
		{"discard", nil, func(f *File) error { return f.Discard(0, 4096) }, []uint32{punch}, []uint32{punch}, nil},
		{"discard without PUNCH_HOLE", map[uint32]error{punch: unix.EOPNOTSUPP}, func(f *File) error { return f.Discard(0, 4096) },
			[]uint32{punch}, nil, blk.ErrUnsupported},
		{"discard, failure", map[uint32]error{punch: unix.EIO}, func(f *File) error { return f.Discard(0, 4096) },
			[]uint32{punch}, []uint32{punch}, unix.EIO},
		{"discard of nothing", nil, func(f *File) error { return f.Discard(0, 0) }, nil, nil, nil},
	} {
		var calls []uint32
		f := openFaulty(t, Options{}, func(s *system) {
			s.fallocate = func(_ int, mode uint32, _, _ int64) error { calls = append(calls, mode); return tc.answers[mode] }
		})
		for i, want := range [][]uint32{tc.first, tc.second, tc.first} {
			if i == 2 { // everything may be different now
				if err := f.Refresh(); err != nil {
					t.Fatal(err)
				}
			}
			calls = nil
			if err := tc.do(f); !errors.Is(err, tc.want) || err != nil && err != tc.want && !strings.Contains(err.Error(), f.path) {
				t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
			}
			if !slices.Equal(calls, want) {
				t.Errorf("%s, time %d: calls %#x, want %#x", tc.name, i, calls, want)
			}
		}
	}
}

func TestStatusRaces(t *testing.T) {
	t.Parallel()
	const data, zero = blk.StatusData, blk.StatusZero
	for _, tc := range []struct {
		name       string
		seek       func(off int64, whence int) (int64, error)
		flags      blk.StatusFlags
		run        int64
		err        error
		remembered bool
	}{
		{"unknown", func(int64, int) (int64, error) { return 0, unix.EINVAL }, data, 8192, nil, true},
		{"failure", func(int64, int) (int64, error) { return 0, unix.EIO }, 0, 0, unix.EIO, false},
		{"the end", func(int64, int) (int64, error) { return 0, unix.ENXIO }, zero, 8192, nil, false},
		{"a hole where data was found", func(off int64, _ int) (int64, error) { return off, nil }, data, 1, nil, false},
		{"the end where data was found", func(off int64, whence int) (int64, error) {
			if whence == unix.SEEK_HOLE {
				return 0, unix.ENXIO
			}
			return off, nil
		}, data, 1, nil, false},
		{"failure at the second look", func(off int64, whence int) (int64, error) {
			if whence == unix.SEEK_HOLE {
				return 0, unix.EIO
			}
			return off, nil
		}, 0, 0, unix.EIO, false},
	} {
		calls := 0
		f := openFaulty(t, Options{}, func(s *system) {
			s.seek = func(_ int, off int64, whence int) (int64, error) { calls++; return tc.seek(off, whence) }
		})
		s, run, err := f.BlockStatus(4096, 8192)
		if s.Flags&(data|zero) != tc.flags || run != tc.run || !errors.Is(err, tc.err) {
			t.Errorf("%s: %+v, %d, %v", tc.name, s, run, err)
		}
		if calls = 0; tc.remembered {
			if _, _, err := f.BlockStatus(0, 4096); err != nil || calls != 0 {
				t.Errorf("%s: asked again: %d, %v", tc.name, calls, err)
			}
		}
	}
}

// A forced write whose flush fails takes the flushes after it along: the kernel tells of the failure only once.
func TestForcedWriteFails(t *testing.T) {
	t.Parallel()
	v := iov.Of(bytes.Repeat([]byte{9}, 4096))
	for _, tc := range []struct {
		name   string
		answer func(fd int, v iov.Vec, off int64) (int, unix.Errno)
		o      Options
		err    error
		sticky bool
	}{
		{"unsupported", func(int, iov.Vec, int64) (int, unix.Errno) { return 0, unix.EOPNOTSUPP }, Options{}, blk.ErrUnsupported, false},
		{"flush fails", func(int, iov.Vec, int64) (int, unix.Errno) { return 0, unix.EIO }, Options{}, unix.EIO, true},
		{"write fails", func(int, iov.Vec, int64) (int, unix.Errno) { return 0, unix.EBADF }, Options{ReadOnly: true}, unix.EBADF, false},
		{"short", func(int, iov.Vec, int64) (int, unix.Errno) { return 512, 0 }, Options{}, nil, false},
	} {
		calls := 0
		f := openFaulty(t, tc.o, func(s *system) {
			s.transfer = func(fd int, _ blk.Op, v iov.Vec, off int64, flags int) (int, unix.Errno) {
				if calls++; calls == 1 {
					return 0, unix.EINTR
				}
				if flags != unix.RWF_DSYNC {
					t.Errorf("flags %#x", flags)
				}
				return tc.answer(fd, v, off)
			}
		})
		if _, err := f.WriteVecFUA(v, 4096); !errors.Is(err, tc.err) {
			t.Errorf("%s: %v", tc.name, err)
		}
		if err := f.Flush(); (err != nil) != tc.sticky {
			t.Errorf("%s: flush: %v", tc.name, err)
		}
		if _, err := f.WriteVecFUA(v, 4096); !errors.Is(err, tc.err) {
			t.Errorf("%s: second: %v", tc.name, err)
		}
		if tc.err == blk.ErrUnsupported && calls != 2 {
			t.Errorf("%s: asked again", tc.name)
		}
		if tc.err == nil {
			got := iov.Of(make([]byte, 4096))
			if _, err := f.ReadVecAt(got, 4096); err != nil || iov.Mismatch(got, v) >= 0 {
				t.Errorf("%s: not written: %v", tc.name, err)
			}
		}
	}
}

func TestSizeRefused(t *testing.T) {
	t.Parallel()
	sys := *linux
	calls := 0
	sys.ftruncate = func(int, int64) error {
		if calls++; calls%2 == 1 {
			return unix.EINTR
		}
		return unix.EFBIG
	}
	f := openFaulty(t, Options{}, func(s *system) { s.ftruncate = sys.ftruncate })
	if err := f.Truncate(1 << 62); !errors.Is(err, unix.EFBIG) || !strings.Contains(err.Error(), f.path) || f.Size() != 64<<10 {
		t.Errorf("truncate: %v, size %d", err, f.Size())
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := createWith(t.Context(), &sys, path, 1<<62, CreateOptions{}); !errors.Is(err, unix.EFBIG) ||
		!strings.Contains(err.Error(), "file system") || !strings.Contains(err.Error(), path) {
		t.Errorf("create: %v", err)
	}
	sys.ftruncate, sys.fallocate = linux.ftruncate, func(int, uint32, int64, int64) error { return unix.EOPNOTSUPP }
	err := createWith(t.Context(), &sys, path, 4096, CreateOptions{Preallocation: PreallocFalloc})
	if !errors.Is(err, unix.EOPNOTSUPP) || !strings.Contains(err.Error(), "preallocation=off") {
		t.Errorf("create: %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file is left: %v", err)
	}
}
