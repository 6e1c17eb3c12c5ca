package cli

import (
	"math"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/mem"
)

// The sequential pattern goes around the disk. Whatever size and step are, each request has room.
func TestBenchSequence(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name                     string
		disk, size, step, offset int64
		want                     []int64 // places of the first requests
		all                      int     // how many requests meet each place of the grid of sizes once; 0: some never are
	}{
		{"side by side", 4 << 12, 4096, 4096, 0, []int64{0, 4096, 8192, 12288, 0}, 4},
		{"stride", 8 << 12, 4096, 5 << 12, 0, []int64{0, 5 << 12, 2 << 12, 7 << 12, 4 << 12}, 8},
		{"stride longer than the disk", 8 << 12, 4096, 11 << 12, 0, []int64{0, 3 << 12, 6 << 12, 1 << 12}, 8},
		{"every other", 4 << 12, 4096, 8192, 0, []int64{0, 8192, 0}, 0},
		{"overlapping", 4096, 2048, 1024, 0, []int64{0, 1024, 2048, 0}, 0},
		{"odd", 10240, 3000, 2000, 0, []int64{0, 2000, 4000, 6000, 0}, 0},
		{"behind an offset", 8192, 1024, 1024, 5 << 10, []int64{5 << 10, 6 << 10, 7 << 10, 5 << 10}, 0},
		{"one place", 4096, 4096, 512, 0, []int64{0, 0}, 1},
		{"step of more than 32 bits", 1 << 20, 512, math.MaxInt64 - 511, 0, []int64{0, 1<<20 - 512, 1<<20 - 1024}, 2048},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m, err := mem.New(tc.disk, mem.Options{})
			if err != nil {
				t.Fatal(err)
			}
			d, err := blk.New(m, blk.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			o := benchOptions{
				depth: 1, count: 5000, size: size(tc.size), step: size(tc.step), offset: size(tc.offset), pattern: patternSequential,
			}
			b, err := o.bench(d)
			if err != nil {
				t.Fatal(err)
			}
			defer b.buffers.Close()
			b.ctx = t.Context()
			slot := &b.slots[0]
			seen := map[int64]bool{}
			for i := range int(o.count) {
				if !slot.aim() {
					t.Fatalf("request %d is the last one", i)
				}
				at := slot.r.Off
				if i < len(tc.want) && at != tc.want[i] {
					t.Fatalf("request %d at %d, want %d", i, at, tc.want[i])
				}
				if at < tc.offset || at > tc.disk-tc.size {
					t.Fatalf("request %d at %d has no room", i, at)
				}
				if i < tc.all && (at%tc.size != 0 || seen[at]) {
					t.Fatalf("request %d is at %d again, or off the grid", i, at)
				}
				seen[at] = true
			}
		})
	}
}

func TestBenchBuffers(t *testing.T) {
	t.Parallel()
	b, err := newBenchBuffers(3, 5000)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for i := range 3 {
		p := b.at(i)
		if len(p) != 5000 || cap(p) != 5000 || p[0] == 0 || p[4999] == 0 {
			t.Errorf("buffer %d: %d bytes, room for %d", i, len(p), cap(p))
		}
	}
	if _, err := newBenchBuffers(1024, 64<<20); err == nil {
		t.Error("64 GiB of buffers")
	}
}
