package raw_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/blktest"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/guest/hosttest"
)

const (
	modelSize    = 3 << 17
	modelMaxSize = 1 << 19
)

// modelFile says what the model runs on: a file in dir, opened in one of all ways.
type modelFile struct {
	dir    string
	file   raw.Options
	device blk.Options
	size   int64 // of the file, which need not be whole sectors
	unit   int64 // of its size; 0 means sectors
	seed   uint64
}

func (m modelFile) options() blktest.Options {
	content := pattern(int(m.size))
	path := filepath.Join(m.dir, "disk")
	o := blktest.Options{
		Content: content,
		MaxSize: modelMaxSize, SizeUnit: m.unit, Ops: 60, Seed: m.seed, Timeout: time.Minute,
		Open: func(tb testing.TB, wrap func(blk.Backend) blk.Backend) *blk.Device {
			tb.Helper()
			if err := os.WriteFile(path, content, 0o600); err != nil {
				tb.Fatal(err)
			}
			f, err := raw.Open(path, m.file)
			if err != nil {
				tb.Fatal(err)
			}
			d, err := blk.New(wrap(f), m.device)
			if err != nil {
				tb.Fatal(err)
			}
			return d
		},
		// What the file holds, byte for byte. Past the end of the disk there may be the rest of a block, of zeroes.
		After: func(tb testing.TB, want []byte, _ bool) {
			tb.Helper()
			got, err := os.ReadFile(path)
			if err != nil {
				tb.Fatal(err)
			}
			n := min(len(got), len(want))
			if !bytes.Equal(got[:n], want[:n]) || !zero(got[n:]) || !zero(want[n:]) || len(got) > len(want)+(64<<10) {
				tb.Errorf("the file, of %d bytes, does not hold what the disk held, %d bytes", len(got), len(want))
			}
		},
	}
	if hosttest.Race {
		o.Ops = 15
	}
	return o
}

// ends chooses where the disk ends: anywhere where the end can be written, else with a block. A write past the page cache
// is one of whole blocks, by which a file with another end grows (raw.Open).
func (m *modelFile) ends() {
	m.unit = int64(max(m.device.RequestAlign, blk.SectorSize))
	if m.file.Cache == raw.CacheNone {
		m.unit = max(m.unit, 4096)
	}
	m.size -= m.unit
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// modelDir is a folder that the model runs in.
type modelDir struct {
	name, path string
	direct     bool // files there can be opened with O_DIRECT; those in memory can't with every kernel
}

// modelDirs returns folders on the file system of temporary files and on one in memory.
func modelDirs(tb testing.TB) []modelDir {
	tb.Helper()
	memory := fmt.Sprintf("/dev/shm/kvmlet-raw-test-%d", os.Getpid())
	if err := os.Mkdir(memory, 0o700); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(memory) })
	dirs := []modelDir{{name: "file", path: tb.TempDir()}, {name: "tmpfs", path: memory}}
	for i := range dirs {
		path := filepath.Join(dirs[i].path, "probe")
		if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
			tb.Fatal(err)
		}
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		switch {
		case err == nil:
			dirs[i].direct = true
			_ = unix.Close(fd)
		case !errors.Is(err, unix.EINVAL):
			tb.Fatal(err)
		}
	}
	return dirs
}

// TestModel compares files with a plain array, opened in all ways.
func TestModel(t *testing.T) {
	seed := uint64(0)
	for _, dir := range modelDirs(t) {
		for _, c := range []raw.Cache{raw.CacheWriteback, raw.CacheNone} {
			for i, a := range []raw.AIO{raw.AIOIOUring, raw.AIOThreads} {
				for j, align := range []int{0, 512, 4096} { // a file is data or a hole by 4096 bytes
					seed += 100
					if c == raw.CacheNone && !dir.direct {
						t.Logf("%s: no O_DIRECT there", dir.name)
						continue
					}
					m := modelFile{
						dir: dir.path, size: modelSize, seed: seed,
						file:   raw.Options{Cache: c, AIO: a},
						device: blk.Options{RequestAlign: align},
					}
					m.ends()
					if j == 1 {
						m.device.DetectZeroes = blk.DetectZeroes(1 + i)
						m.device.Writethrough = i == 1
					}
					t.Run(fmt.Sprintf("%s,%v,%v,align=%d", dir.name, c, a, align), func(t *testing.T) {
						blktest.Run(t, m.options())
					})
				}
			}
		}
	}
}

// TestModelOddSize runs the model on a file that does not end with a sector. Only one that keeps its size has such an end
// for long.
func TestModelOddSize(t *testing.T) {
	o := modelFile{dir: t.TempDir(), size: modelSize - 77}.options()
	o.MaxSize = 0
	blktest.Run(t, o)
}

// FuzzModel is TestModel for as long as the fuzzer runs, opened as it picks.
func FuzzModel(f *testing.F) {
	dirs := modelDirs(f)
	blktest.Fuzz(f, func(n uint64) blktest.Options {
		pick := func(k uint64) int { defer func() { n /= k }(); return int(n % k) }
		dir := dirs[pick(uint64(len(dirs)))]
		m := modelFile{dir: dir.path, size: modelSize}
		m.file.AIO = raw.AIO(pick(3))
		if pick(2) == 1 && dir.direct {
			m.file.Cache = raw.CacheNone
		}
		m.device.RequestAlign = 1 << pick(13)
		m.device.DetectZeroes = blk.DetectZeroes(pick(3))
		m.device.Writethrough = pick(8) == 7
		m.ends()
		return m.options()
	})
}
