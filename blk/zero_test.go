package blk_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

const mib = 1 << 20

// When writes become stable, and how.
func TestCallsOfFlush(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		options blk.Options
		noFUA   bool
		want    string
	}{
		{"plain", blk.Options{}, false, "flush, write 0+512, fua 512+512, zero 1024+512, flush, discard 0+512, flush"},
		{"no FUA", blk.Options{}, true, "flush, write 0+512, write 512+512, flush, zero 1024+512, flush, discard 0+512, flush"},
		{"writethrough", blk.Options{Writethrough: true}, false,
			"flush, fua 0+512, fua 512+512, zero 1024+512, flush, discard 0+512, flush"},
		{"ignored", blk.Options{NoFlush: true}, false, "write 0+512, write 512+512, zero 1024+512, discard 0+512"},
	} {
		s := newStrict(t, mib, blk.Limits{})
		s.noFUA = tc.noFUA
		d := s.open(tc.options)
		for _, r := range []*blk.Request{
			{Op: blk.OpFlush}, // of what was written before, by whomever
			{Op: blk.OpFlush}, // nothing to do
			{Op: blk.OpWrite, Vec: iov.Of(pattern(512))},
			{Op: blk.OpWrite, Vec: iov.Of(pattern(512)), Off: 512, Flags: blk.FUA},
			{Op: blk.OpWriteZeroes, Off: 1024, Len: 512, Flags: blk.FUA},
			{Op: blk.OpDiscard, Len: 512},
			{Op: blk.OpFlush},
			{Op: blk.OpFlush}, // nothing changed since
		} {
			if err := d.Do(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
		if got := s.took(); got != tc.want {
			t.Errorf("%s: %s; want %s", tc.name, got, tc.want)
		}
	}
}

// A write that has to be stable is, whatever becomes of it.
func TestFlushOfForcedZeroes(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		r      *blk.Request
		noZero bool
		want   string
	}{
		{&blk.Request{Op: blk.OpWrite, Vec: iov.Of(make([]byte, 4096)), Flags: blk.FUA}, false, "zero 0+4096, flush"},
		{&blk.Request{Op: blk.OpWrite, Vec: iov.Of(make([]byte, 4096)), Flags: blk.FUA}, true, "write 0+4096, flush"},
		{&blk.Request{Op: blk.OpWriteZeroes, Len: 4096, Flags: blk.FUA}, true, "write 0+4096, flush"},
	} {
		s := newStrict(t, mib, blk.Limits{})
		s.noZero = tc.noZero
		if err := s.open(blk.Options{DetectZeroes: blk.DetectOn}).Do(t.Context(), tc.r); err != nil {
			t.Fatal(err)
		}
		if got := s.took(); got != tc.want {
			t.Errorf("%s; want %s", got, tc.want)
		}
	}
}

// What reaches the backend for which write of zeroes. Its units need not be powers of two (QEMU's iotest 177).
func TestCallsOfWriteZeroes(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		limits blk.Limits
		noZero bool
		off, n int64
		flags  blk.Flags
		want   string
	}{
		{"as it comes", blk.Limits{}, false, 1, 3, 0, "zero 1+3"},
		{"unmap", blk.Limits{}, false, 0, mib, blk.MayUnmap, "unmap 0+1048576"},
		{"fua", blk.Limits{}, false, 0, mib, blk.FUA, "zero 0+1048576, flush"},
		{"head and tail", blk.Limits{RequestAlign: 4096}, false, 512, 3 * 4096, 0,
			"read 0+4096, write 0+4096, zero 4096+8192, read 12288+4096, write 12288+4096"},
		{"within a block", blk.Limits{RequestAlign: 4096}, false, 512, 512, 0, "read 0+4096, write 0+4096"},
		{"across an edge", blk.Limits{RequestAlign: 4096}, false, 3584, 1024, 0, "read 0+8192, write 0+8192"},
		{"units", blk.Limits{RequestAlign: 512, ZeroAlign: 15 * 512}, false, 512, 40 * 512, 0,
			"zero 512+7168, zero 7680+7680, zero 15360+5632"},
		{"maximum", blk.Limits{RequestAlign: 512, ZeroAlign: 1024, MaxZero: 2560}, false, 0, 6144, 0,
			"zero 0+2048, zero 2048+2048, zero 4096+2048"},
		{"maximum below the unit", blk.Limits{RequestAlign: 512, ZeroAlign: 4096, MaxZero: 1024}, false, 0, 2048, 0,
			"zero 0+1024, zero 1024+1024"},
		{"written out", blk.Limits{RequestAlign: 4096}, true, 0, 2*mib + 4096, 0,
			"write 0+1048576, write 1048576+1048576, write 2097152+4096"},
		{"written out, not aligned", blk.Limits{RequestAlign: 4096}, true, 512, mib, 0,
			"read 0+4096, write 0+4096, write 4096+1044480, read 1048576+4096, write 1048576+4096"},
		{"written out in transfers", blk.Limits{MaxTransfer: 512 << 10}, true, 0, mib, 0,
			"write 0+524288, write 524288+524288"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newStrict(t, 4*mib, tc.limits)
			s.noZero = tc.noZero
			copy(s.data, noise(1, len(s.data)))
			want := bytes.Clone(s.data)
			clear(want[tc.off : tc.off+tc.n])
			if err := s.open(blk.Options{}).WriteZeroes(t.Context(), tc.off, tc.n, tc.flags); err != nil {
				t.Fatal(err)
			}
			if got := s.took(); got != tc.want {
				t.Errorf("%s; want %s", got, tc.want)
			}
			if !bytes.Equal(s.data, want) {
				t.Error("the disk holds other bytes")
			}
		})
	}
}

func TestWriteZeroesNoFallback(t *testing.T) {
	t.Parallel()
	s := newStrict(t, mib, blk.Limits{})
	s.noZero = true
	d := s.open(blk.Options{})
	err := d.WriteZeroes(t.Context(), 0, mib, blk.NoFallback)
	if !errors.Is(err, blk.ErrUnsupported) || s.took() != "" {
		t.Errorf("%v", err)
	}
	if d.Stats().LastError != nil {
		t.Error("counted as an error of the backend")
	}
}

// Ranges that don't cover whole blocks lose what they don't cover; no block is discarded in part.
func TestCallsOfDiscard(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		size   int64
		limits blk.Limits
		off, n int64
		want   string
	}{
		{"as it comes", mib, blk.Limits{}, 1, 3, "discard 1+3"},
		{"within a block", mib, blk.Limits{RequestAlign: 4096}, 512, 512, ""},
		{"across an edge", mib, blk.Limits{RequestAlign: 4096}, 512, 4096, ""},
		{"whole blocks", mib, blk.Limits{RequestAlign: 4096}, 512, 12288, "discard 4096+8192"},
		{"units", 32 * mib, blk.Limits{RequestAlign: 512, DiscardAlign: 15 * mib}, 1024, 31 * mib,
			"discard 1024+15727616, discard 15728640+15728640, discard 31457280+1049600"},
		{"maximum", mib, blk.Limits{RequestAlign: 512, MaxDiscard: 512 << 10}, 0, mib, "discard 0+524288, discard 524288+524288"},
		{"to the end", 12288 - 512, blk.Limits{RequestAlign: 4096}, 4096, 8192 - 512, "discard 4096+8192"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newStrict(t, tc.size, tc.limits)
			d := s.open(blk.Options{})
			if err := d.Discard(t.Context(), tc.off, tc.n); err != nil {
				t.Fatal(err)
			}
			if got := s.took(); got != tc.want {
				t.Errorf("%s; want %s", got, tc.want)
			}
			s.noDiscard = true
			if err := d.Discard(t.Context(), tc.off, tc.n); err != nil {
				t.Errorf("a hint that can't be taken is an error: %v", err)
			}
		})
	}
}

func TestDetectZeroes(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		mode blk.DetectZeroes
		off  int64
		want string
	}{
		{blk.DetectOff, 4096, "write 4096+8192"},
		{blk.DetectOn, 4096, "zero 4096+8192"},
		{blk.DetectUnmap, 4096, "unmap 4096+8192"},
		{blk.DetectUnmap, 512, "read 0+4096, write 0+4096, unmap 4096+4096, read 8192+4096, write 8192+4096"},
	} {
		s := newStrict(t, mib, blk.Limits{RequestAlign: 4096})
		d := s.open(blk.Options{DetectZeroes: tc.mode})
		if _, err := d.WriteVecAt(iov.Of(make([]byte, 100), make([]byte, 8092)), tc.off); err != nil {
			t.Fatal(err)
		}
		if got := s.took(); got != tc.want {
			t.Errorf("mode %d: %s; want %s", tc.mode, got, tc.want)
		}
		p := make([]byte, 8192)
		p[8191] = 1
		if _, err := d.WriteVecAt(iov.Of(p), 4096); err != nil {
			t.Fatal(err)
		}
		if got := s.took(); got != "write 4096+8192" {
			t.Errorf("mode %d, not all zero: %s", tc.mode, got)
		}
	}
}

// layered returns a disk of clusters of 64 KiB over a backing disk that is shorter and holds noise.
func layered(t *testing.T, size, below int64, o blk.Options) (d *blk.Device, s *strict, base []byte) {
	t.Helper()
	b := newStrict(t, below, blk.Limits{})
	base = noise(9, int(below))
	copy(b.data, base)
	s = newStrict(t, size, blk.Limits{RequestAlign: 512, Cluster: 64 << 10})
	s.gap = make([]byte, (size+(64<<10)-1)/(64<<10))
	s.base = b.open(blk.Options{ReadOnly: true})
	return s.open(o), s, base
}

func TestCopyOnRead(t *testing.T) {
	t.Parallel()
	const cluster = 64 << 10
	d, s, base := layered(t, 16*cluster, 16*cluster, blk.Options{CopyOnRead: true})
	got := make([]byte, 1000)
	read := func(off int64) {
		t.Helper()
		if _, err := d.ReadVecAt(iov.Of(got), off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, base[off:off+1000]) {
			t.Errorf("read at %d: other bytes", off)
		}
	}
	read(cluster + 100)
	if calls := s.took(); calls != "read 65536+65536, write 65536+65536" {
		t.Errorf("first read: %s", calls)
	}
	read(cluster + 200)
	if calls := s.took(); calls != "read 65536+1536" {
		t.Errorf("second read: %s", calls)
	}
	read(2*cluster - 500) // half of it is here already
	if calls := s.took(); calls != "read 130560+512, read 131072+65536, write 131072+65536" {
		t.Errorf("a read across: %s", calls)
	}
	if !bytes.Equal(s.data[cluster:3*cluster], base[cluster:3*cluster]) {
		t.Error("what was copied differs")
	}

	// A request can ask for it on a disk that does not copy by itself; a read-only one never does.
	for _, readOnly := range []bool{false, true} {
		d, s, _ := layered(t, 4*cluster, 4*cluster, blk.Options{ReadOnly: readOnly})
		r := &blk.Request{Op: blk.OpRead, Vec: iov.Of(got), Off: 0, Flags: blk.CopyOnRead}
		if err := d.Do(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		if copied := s.gap[0] != 0; copied == readOnly {
			t.Errorf("read-only %v: copied %v", readOnly, copied)
		}
	}
}

func TestCopyOnReadOfZeroes(t *testing.T) {
	t.Parallel()
	d, s, _ := layered(t, mib, mib, blk.Options{CopyOnRead: true})
	s.base = newStrict(t, mib, blk.Limits{}).open(blk.Options{})
	if _, err := d.ReadVecAt(iov.Of(make([]byte, 512)), 0); err != nil {
		t.Fatal(err)
	}
	if calls := s.took(); calls != "read 0+65536, zero 0+65536" {
		t.Errorf("%s", calls)
	}
}

func TestStatusAbove(t *testing.T) {
	t.Parallel()
	const cluster = 64 << 10
	d, s, _ := layered(t, 4*cluster, 2*cluster, blk.Options{})
	s.gap[1] = 1
	own, below := blk.StatusData|blk.StatusAllocated, blk.StatusData|blk.StatusAllocated
	for _, tc := range []struct {
		base      *blk.Device
		off, n    int64
		want      blk.StatusFlags
		depth     int
		run       int64
		allocated bool
	}{
		{nil, 0, 4 * cluster, below, 1, cluster, true},
		{nil, cluster + 5, 4*cluster - cluster - 5, own, 0, cluster - 5, true},
		{nil, 2 * cluster, 2 * cluster, blk.StatusZero | blk.StatusAllocated, 1, 2 * cluster, true},
		{s.base, 0, 4 * cluster, 0, -1, cluster, false},
		{s.base, 2 * cluster, cluster, 0, -1, cluster, false},
	} {
		got, depth, run, err := d.StatusAbove(t.Context(), tc.base, tc.off, tc.n)
		if err != nil || got.Flags != tc.want || depth != tc.depth || run != tc.run {
			t.Errorf("%d+%d: %+v at %d for %d, %v; want %+v", tc.off, tc.n, got, depth, run, err, tc)
		}
		allocated, run, err := d.AllocatedAbove(t.Context(), tc.base, tc.off, tc.n)
		if err != nil || allocated != tc.allocated || run != tc.run {
			t.Errorf("%d+%d: allocated %v for %d, %v", tc.off, tc.n, allocated, run, err)
		}
	}
	if _, _, err := d.BlockStatus(t.Context(), 4*cluster, 1); !errors.Is(err, blk.ErrRange) {
		t.Errorf("beyond the end: %v", err)
	}
}

func TestMakeZero(t *testing.T) {
	t.Parallel()
	d, s, _ := layered(t, mib, 512<<10, blk.Options{})
	if err := d.MakeZero(t.Context(), blk.MayUnmap); err != nil {
		t.Fatal(err)
	}
	if calls := s.took(); calls != "unmap 0+524288, flush" {
		t.Errorf("%s", calls) // what lies beyond the backing disk is zero already
	}
	got := make([]byte, mib)
	if _, err := d.ReadVecAt(iov.Of(got), 0); err != nil || !bytes.Equal(got, make([]byte, mib)) {
		t.Errorf("the disk is not zero: %v", err)
	}
}

// Writes of compressed data go to the backend a cluster at a time, and nothing else does.
func TestWriteCompressed(t *testing.T) {
	t.Parallel()
	c := &compressing{strict: newStrict(t, 160<<10, blk.Limits{Cluster: 64 << 10})}
	d := newDevice(t, c, blk.Options{})
	src := noise(2, 160<<10)
	write := func(off, n int64) error {
		return d.Do(t.Context(), &blk.Request{
			Op: blk.OpWrite, Flags: blk.Compressed, Off: off,
			Vec: cutUp(rand.New(rand.NewPCG(1, 1)), src[off:off+n], 5000),
		})
	}
	if err := write(0, 160<<10); err != nil || c.took() != "compressed 0+65536, compressed 65536+65536, compressed 131072+32768" {
		t.Errorf("%v", err)
	}
	if !bytes.Equal(c.data, src) {
		t.Error("the disk holds other bytes")
	}
	for _, r := range [][2]int64{{512, 64 << 10}, {0, 512}, {64 << 10, 64<<10 + 512}} {
		if err := write(r[0], r[1]); !errors.Is(err, blk.ErrRange) || c.took() != "" {
			t.Errorf("%d+%d: %v", r[0], r[1], err)
		}
	}
	plain := newStrict(t, 64<<10, blk.Limits{Cluster: 64 << 10}).open(blk.Options{})
	err := plain.Do(t.Context(), &blk.Request{Op: blk.OpWrite, Flags: blk.Compressed, Vec: iov.Of(src[:64<<10])})
	if !errors.Is(err, blk.ErrUnsupported) {
		t.Errorf("a backend that can't: %v", err)
	}
}

type compressing struct{ *strict }

func (c *compressing) WriteCompressed(src iov.Vec, off int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.transfer("compressed", src, off); err != nil {
		return err
	}
	_, err := c.put(src, off)
	return err
}
