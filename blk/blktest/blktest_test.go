package blktest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/fault"
	"github.com/kvmlet/kvmlet/blk/mem"
	"github.com/kvmlet/kvmlet/iov"
)

// recorder is a testing.TB that keeps what fails, to see that a broken driver does.
type recorder struct {
	testing.TB
	mu  sync.Mutex
	log strings.Builder
}

func (r *recorder) Helper() {}

func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(&r.log, format+"\n", args...)
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Fatal(args ...any) { r.Fatalf("%s", fmt.Sprint(args...)) }

func (r *recorder) Failed() bool { return r.said() != "" }

func (r *recorder) said() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.String()
}

// broken is a driver with a fault that the model has to find.
type broken struct {
	*mem.Disk
	read     func(dst iov.Vec, off int64) (int, error)
	write    func(src iov.Vec, off int64) (int, error)
	zero     func(off, n int64) error
	discard  func(off, n int64) error
	flush    func() error
	status   func(off, n int64) (blk.Status, int64, error)
	truncate func(size int64) error
}

func (b *broken) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	if b.read != nil {
		return b.read(dst, off)
	}
	return b.Disk.ReadVecAt(dst, off)
}

func (b *broken) WriteVecAt(src iov.Vec, off int64) (int, error) {
	if b.write != nil {
		return b.write(src, off)
	}
	return b.Disk.WriteVecAt(src, off)
}

func (b *broken) WriteVecFUA(src iov.Vec, off int64) (int, error) { return b.WriteVecAt(src, off) }

func (b *broken) WriteZeroes(off, n int64, unmap bool) error {
	if b.zero != nil {
		return b.zero(off, n)
	}
	return b.Disk.WriteZeroes(off, n, unmap)
}

func (b *broken) Discard(off, n int64) error {
	if b.discard != nil {
		return b.discard(off, n)
	}
	return b.Disk.Discard(off, n)
}

func (b *broken) Flush() error {
	if b.flush != nil {
		return b.flush()
	}
	return b.Disk.Flush()
}

func (b *broken) BlockStatus(off, n int64) (blk.Status, int64, error) {
	if b.status != nil {
		return b.status(off, n)
	}
	return b.Disk.BlockStatus(off, n)
}

func (b *broken) Truncate(size int64) error {
	if b.truncate != nil {
		return b.truncate(size)
	}
	return b.Disk.Truncate(size)
}

// every returns a function that is true on each n-th call.
func every(n int64) func() bool {
	var calls atomic.Int64
	return func() bool { return calls.Add(1)%n == 0 }
}

func TestFindsFaults(t *testing.T) {
	seldom := every(40)
	stop := make(chan struct{}) // ends what hangs or leaks, when all is over
	t.Cleanup(func() { close(stop) })
	const concurrent, sequential = "concurrent", "sequential"
	for _, tt := range []struct {
		name string
		kind string
		want string // part of what is said
		make func(b *broken)
	}{
		{"nothing", sequential, "", func(*broken) {}},
		{"nothing", concurrent, "", func(*broken) {}},
		{"lost write", sequential, "byte ", func(b *broken) {
			b.write = func(src iov.Vec, off int64) (int, error) {
				if seldom() {
					return src.Size(), nil
				}
				return b.Disk.WriteVecAt(src, off)
			}
		}},
		{"lost last byte", concurrent, "byte ", func(b *broken) {
			b.write = func(src iov.Vec, off int64) (int, error) {
				n := src.Size()
				if n > 1 && seldom() {
					src, _ = src.Slice(0, n-1)
				}
				_, err := b.Disk.WriteVecAt(src, off)
				return n, err
			}
		}},
		{"byte too many", concurrent, "byte ", func(b *broken) {
			b.write = func(src iov.Vec, off int64) (int, error) {
				n := src.Size()
				if off+int64(n) < b.Size() && seldom() {
					src = append(iov.Vec{}, src...).Append([]byte{0})
				}
				_, err := b.Disk.WriteVecAt(src, off)
				return n, err
			}
		}},
		{"source changed", sequential, "changed the bytes that it wrote from", func(b *broken) {
			b.write = func(src iov.Vec, off int64) (int, error) {
				n, err := b.Disk.WriteVecAt(src, off)
				if p := src[len(src)-1].Bytes(); len(p) > 0 && seldom() {
					p[0]++
				}
				return n, err
			}
		}},
		{"zeroes that are none", sequential, "byte ", func(b *broken) {
			b.zero = func(int64, int64) error { return nil }
		}},
		{"discard of too much", concurrent, "byte ", func(b *broken) {
			b.discard = func(off, n int64) error { return b.Disk.WriteZeroes(max(off-1, 0), n, true) }
		}},
		{"discard with garbage", sequential, "nobody wrote", func(b *broken) {
			b.discard = func(off, n int64) error {
				p := make([]byte, n)
				for i := range p {
					p[i] = 7
				}
				_, err := b.Disk.WriteVecAt(iov.Of(p), off)
				return err
			}
		}},
		{"status", sequential, "said to be zeroes", func(b *broken) {
			b.status = func(_, n int64) (blk.Status, int64, error) {
				return blk.Status{Flags: blk.StatusZero | blk.StatusAllocated}, n, nil
			}
		}},
		{"shared blocks", concurrent, "byte ", func(b *broken) { // reads and writes back 512 bytes, and says nothing of it
			b.write = func(src iov.Vec, off int64) (int, error) {
				start, n := off&^511, int64(src.Size())
				p := make([]byte, min((off+n+511)&^511, b.Size())-start)
				if _, err := b.Disk.ReadVecAt(iov.Of(p), start); err != nil {
					return 0, err
				}
				runtime.Gosched()
				_, _ = src.CopyTo(p[off-start:], 0)
				_, err := b.Disk.WriteVecAt(iov.Of(p), start)
				return int(n), err
			}
		}},
		{"error", sequential, "unexpected error: no luck", func(b *broken) {
			b.flush = func() error { return fmt.Errorf("no luck") }
		}},
		{"hang", concurrent, "the run did not end in", func(b *broken) {
			b.flush = func() error { <-stop; return nil }
		}},
		{"leak", sequential, "goroutines,", func(b *broken) {
			b.flush = func() error {
				go func() { <-stop }()
				return nil
			}
		}},
		{"resize to the wrong size", sequential, "the size is", func(b *broken) {
			b.truncate = func(size int64) error { return b.Disk.Truncate(max(size-512, 0)) }
		}},
		{"old bytes after a resize", sequential, "nobody wrote", func(b *broken) {
			b.truncate = func(size int64) error {
				old := b.Size()
				if err := b.Disk.Truncate(size); err != nil || size <= old {
					return err
				}
				_, err := b.Disk.WriteVecAt(iov.Of([]byte{1}), old)
				return err
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := Options{
				Ops: 400, MaxSize: 1 << 18,
				Open: func(tb testing.TB, wrap func(blk.Backend) blk.Backend) *blk.Device {
					m, err := mem.New(1<<17, mem.Options{MaxSize: 1 << 18, Limits: blk.Limits{Cluster: 4096}})
					if err != nil {
						t.Fatal(err)
					}
					b := &broken{Disk: m}
					tt.make(b)
					d, err := blk.New(wrap(b), blk.Options{})
					if err != nil {
						t.Fatal(err)
					}
					return d
				},
			}
			o.complete()
			switch tt.name { // those that have to run out of time
			case "hang":
				o.Timeout = 300 * time.Millisecond
			case "leak":
				patience = 100 * time.Millisecond
				defer func() { patience = defaultPatience }()
			}
			r := &recorder{TB: t}
			for seed := uint64(1); seed <= 10 && !r.Failed(); seed++ {
				done := make(chan struct{})
				go func() { // Fatalf ends it
					defer close(done)
					start(r, o, seed, tt.kind == sequential, false, (*run).apart)
				}()
				<-done
			}
			if said := r.said(); tt.want == "" && said != "" || !strings.Contains(said, tt.want) {
				t.Errorf("want %q; the model said: %.2000s", tt.want, said)
			}
		})
	}
}

// TestRepeats checks that a run with one goroutine is the same each time, down to the calls of the driver.
func TestRepeats(t *testing.T) {
	calls := func(seed uint64) string {
		var log strings.Builder
		o := Options{
			Ops: 200, MaxSize: 1 << 18,
			Open: func(tb testing.TB, wrap func(blk.Backend) blk.Backend) *blk.Device {
				m, err := mem.New(1<<17, mem.Options{MaxSize: 1 << 18, Limits: blk.Limits{RequestAlign: 4096}})
				if err != nil {
					t.Fatal(err)
				}
				d, err := blk.New(wrap(&broken{Disk: m, write: func(src iov.Vec, off int64) (int, error) {
					fmt.Fprintln(&log, off, src.Size())
					return m.WriteVecAt(src, off)
				}}), blk.Options{})
				if err != nil {
					t.Fatal(err)
				}
				return d
			},
		}
		o.complete()
		start(t, o, seed, true, false, (*run).apart)
		return log.String()
	}
	a, b, c := calls(1), calls(1), calls(2)
	if a != b || a == c || a == "" {
		t.Errorf("the same seed gives the same: %v; another seed gives another: %v", a == b, a != c)
	}
}

// kept is a disk that outlives its Device.
type kept struct{ *mem.Disk }

func (kept) Close() error { return nil }

// translator gives errors other names, as a driver does that talks to a server.
type translator struct {
	*fault.Disk
	err error
}

func (d translator) Flush() error {
	if d.Disk.Flush() != nil {
		return d.err
	}
	return nil
}

// TestHooks looks at what runs leave in disks that outlive them.
func TestHooks(t *testing.T) {
	const size, unit = 1 << 17, 4096
	var m *mem.Disk
	translated := fmt.Errorf("said by the server")
	runs := [2]int{}
	Run(t, Options{
		MaxSize: 2 * size, SizeUnit: unit, Ops: 100,
		Open: func(tb testing.TB, wrap func(blk.Backend) blk.Backend) *blk.Device {
			var err error
			if m, err = mem.New(size, mem.Options{MaxSize: 2 * size}); err != nil {
				tb.Fatal(err)
			}
			b := wrap(kept{m})
			if f, ok := b.(*fault.Disk); ok {
				b = translator{f, translated}
			}
			d, err := blk.New(b, blk.Options{})
			if err != nil {
				tb.Fatal(err)
			}
			return d
		},
		Injected: func(err error) bool { return errors.Is(err, translated) },
		After: func(tb testing.TB, want []byte, faults bool) {
			got := make([]byte, m.Size())
			if _, err := m.ReadVecAt(iov.Of(got), 0); err != nil || !bytes.Equal(got, want) || len(got)%unit != 0 {
				tb.Errorf("%v: the disk has %d bytes, or others than the model", err, len(got))
			}
			if faults {
				runs[1]++
			} else {
				runs[0]++
			}
			if err := m.Close(); err != nil {
				tb.Error(err)
			}
		},
	})
	if runs != [2]int{3, 3} {
		t.Errorf("%d runs without faults, %d with: want 3 of each", runs[0], runs[1])
	}
}

func TestArena(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	a := newArena()
	for range 300 {
		a.reset()
		for range maxVecs {
			n := 1 + r.IntN(maxVec)
			if v := a.vec(r, n); v.Size() != n {
				t.Fatalf("vector of %d bytes, want %d", v.Size(), n)
			}
		}
		if !a.intact() {
			t.Fatal("guards are not intact")
		}
	}
	g := a.guards[len(a.guards)-1]
	a.mem[g.at]++
	if a.intact() {
		t.Error("a changed guard is not noticed")
	}
}

func TestMismatch(t *testing.T) {
	old, at := []byte("abcdef"), span{10, 6}
	for _, tt := range []struct {
		got     string
		changes []change
		good    bool
	}{
		{"abcdef", nil, true},
		{"abcdeX", nil, false},
		{"abXYef", []change{{span: span{12, 2}, data: []byte("XY")}}, true},
		{"abXdef", []change{{span: span{12, 2}, data: []byte("XY")}}, true},
		{"abXdef", []change{{span: span{12, 2}, data: []byte("XY"), sure: true}}, false},
		{"abXYef", []change{{span: span{12, 2}, data: []byte("XY"), sure: true}}, true},
		{"abXYYf", []change{{span: span{12, 2}, data: []byte("XY"), sure: true}}, false},
		{"ab\x00Xef", []change{{span: span{12, 2}, sure: true}, {span: span{13, 1}, data: []byte("X"), sure: true}}, true},
		{"abc\x00ef", []change{{span: span{12, 2}}}, true},
		{"XYcdeZ", []change{{span: span{0, 100}, data: []byte("..........XYYYYZ" + strings.Repeat(".", 84))}}, true},
	} {
		if bad := mismatch([]byte(tt.got), at, old, tt.changes); (bad == "") != tt.good {
			t.Errorf("%q: %q", tt.got, bad)
		}
	}
}
