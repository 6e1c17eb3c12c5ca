// Package blktest tests drivers of the block layer, as testing/fstest tests file systems: random requests of every kind
// through a blk.Device, compared byte for byte with a plain array.
//
// Every test is a number of runs, and each run follows from a seed, which is printed when it fails; run again with
// -blk.seed to see it again. With one goroutine a run repeats exactly. With several, each goroutine repeats what it does,
// and how they mix is the scheduler's.
package blktest

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/fault"
	"github.com/kvmlet/kvmlet/guest/hosttest"
)

var (
	opsFlag  = flag.Int("blk.ops", 0, "requests in each run of blktest's model; 0 means what the test says")
	seedFlag = flag.Uint64("blk.seed", 0, "the only seed that blktest's model runs with; 0 means those that the test says")
)

// Options says what is tested.
type Options struct {
	// Open makes a new disk, with all bytes as in Content. It passes one of its drivers, the one to be made to fail,
	// through wrap, which returns it as it is in runs without faults. The disk is closed at the end of the run.
	Open func(tb testing.TB, wrap func(blk.Backend) blk.Backend) *blk.Device

	// Content is what the disk holds at first. Where it is shorter than the disk the rest is zeroes.
	Content []byte

	// MaxSize is the size in bytes up to which the disk may grow; it shrinks and grows at random. 0: it keeps its size.
	MaxSize int64

	SizeUnit int64 // sizes that it is given are multiples of it; 0 means blk.SectorSize

	Ops     int           // requests of each goroutine in a run; 0 means 300
	Workers int           // goroutines; 0 means 4
	Seeds   int           // runs of each kind; 0 means 1
	Seed    uint64        // what seeds begin with: other disks see other requests where this differs
	Timeout time.Duration // after which a run hangs; 0 means two minutes

	NoFaults bool // leave out the runs with faults

	// Injected reports whether err may come of a fault below the disk, where a driver on the way down says it in words of
	// its own, as one does that talks to a server. Nil where every driver wraps the errors of those below it.
	Injected func(err error) bool

	// After is called at the end of each run that went well, when the disk is closed, with the bytes that it held; faults
	// says whether there were some. It looks at what is left: files, images, servers.
	After func(tb testing.TB, want []byte, faults bool)
}

func (o *Options) complete() {
	def := func(n *int, value int) {
		if *n == 0 {
			*n = value
		}
	}
	def(&o.Ops, 300)
	def(&o.Workers, 4)
	def(&o.Seeds, 1)
	if o.SizeUnit == 0 {
		o.SizeUnit = blk.SectorSize
	}
	if o.Timeout == 0 {
		o.Timeout = 2 * time.Minute
	}
	if *opsFlag > 0 {
		o.Ops = *opsFlag
	}
}

// patience is how long goroutines that are about to end may take. Tests of broken drivers have less.
var patience = defaultPatience

const defaultPatience = 10 * time.Second

// kinds are the kinds of runs.
var kinds = []struct {
	name   string
	alone  bool // one goroutine
	faults bool
	run    func(r *run)
}{
	{"sequential", true, false, (*run).apart},
	{"sequential-faults", true, true, (*run).apart},
	{"concurrent", false, false, (*run).apart},
	{"concurrent-faults", false, true, (*run).apart},
	{"overlapping", false, false, (*run).together},
	{"overlapping-faults", false, true, (*run).together},
}

// Run tests a driver in all ways, as subtests of t. They don't run beside others, so that leaks can be counted.
func Run(t *testing.T, o Options) {
	t.Helper()
	o.complete()
	for i, k := range kinds {
		if k.faults && o.NoFaults {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			if *seedFlag != 0 {
				start(t, o, *seedFlag, k.alone, k.faults, k.run)
				return
			}
			for n := range o.Seeds {
				start(t, o, o.Seed+uint64(n*len(kinds)+i), k.alone, k.faults, k.run)
			}
		})
	}
}

// Fuzz lets go test's fuzzing pick kinds and seeds, and options, which are what options makes of a number. It runs for as
// long as that runs.
func Fuzz(f *testing.F, options func(n uint64) Options) {
	f.Helper()
	for i := range kinds {
		f.Add(uint64(1), uint8(i), uint64(i)<<32)
	}
	f.Fuzz(func(t *testing.T, seed uint64, kind uint8, n uint64) {
		o := options(n)
		o.complete()
		k := kinds[int(kind)%len(kinds)]
		if k.faults && o.NoFaults {
			return
		}
		start(t, o, seed, k.alone, k.faults, k.run)
	})
}

// start makes a disk, runs f on it, and checks what is left behind.
func start(tb testing.TB, o Options, seed uint64, alone, faults bool, f func(r *run)) {
	tb.Helper()
	leaks := hosttest.Leaks(tb, patience)
	r := &run{tb: tb, o: o, seed: seed, rand: rand.New(rand.NewPCG(seed, 0)), random: randomBlock()}
	if alone {
		r.o.Workers = 1
	}
	wrap := func(b blk.Backend) blk.Backend { return b }
	if faults {
		wrap = r.wrap
	}
	r.dev = o.Open(tb, wrap)
	r.ctx, r.cancel = context.WithCancel(context.Background())
	defer r.cancel()
	if tb.Failed() {
		return
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.init()
		f(r)
	}()
	timer := time.NewTimer(o.Timeout)
	defer timer.Stop()
	select {
	case <-ended:
	case <-timer.C:
		r.hung()
	}
	r.clearFaults()
	if err := r.dev.Close(); err != nil {
		tb.Errorf("seed %d: close: %v", seed, err)
	}
	if o.After != nil && !tb.Failed() {
		o.After(tb, r.model[:r.size], faults)
		if tb.Failed() {
			tb.Logf("seed %d", seed)
		}
	}
	leaks()
}

// hung ends the test: with what every goroutine does, which says more than the deadline of go test.
func (r *run) hung() {
	var b strings.Builder
	_ = pprof.Lookup("goroutine").WriteTo(&b, 2)
	r.tb.Fatalf("seed %d: the run did not end in %v\n%s", r.seed, r.o.Timeout, b.String())
}

// wrap puts faults in front of b.
func (r *run) wrap(b blk.Backend) blk.Backend {
	r.faults = fault.New(b, fault.Options{Seed: r.seed})
	if _, ok := b.(blk.Starter); ok {
		return r.faults.Async()
	}
	return r.faults
}

// errInjected is what injected faults return.
var errInjected = fmt.Errorf("blktest: injected fault")

// addFaults sets the rules of a run, other ones for each seed.
func (r *run) addFaults() {
	if r.faults == nil {
		return
	}
	often := func(p float64) float64 { return p * (0.2 + 1.6*r.rand.Float64()) }
	for _, rule := range []fault.Rule{
		{Op: fault.OpRead, Probability: often(0.02), Err: errInjected},
		{Op: fault.OpRead, Probability: often(0.02), Err: errInjected, Short: true, Keep: 8192},
		{Op: fault.OpWrite, Probability: often(0.03), Err: errInjected},
		{Op: fault.OpWrite, Probability: often(0.03), Err: errInjected, Short: true, Keep: r.rand.Int64N(1 << 16)},
		{Op: fault.OpFlush, Probability: often(0.1), Err: errInjected},
		{Op: fault.OpZero, Probability: often(0.1), Err: errInjected, Short: true, Keep: r.rand.Int64N(1 << 17)},
		{Op: fault.OpZero, Probability: often(0.2), Err: blk.ErrUnsupported},
		{Op: fault.OpDiscard, Probability: often(0.1), Err: errInjected, Short: true, Keep: r.rand.Int64N(1 << 17)},
		{Op: fault.OpDiscard, Probability: often(0.1), Err: blk.ErrUnsupported},
		{Op: fault.OpStatus, Probability: often(0.05), Err: errInjected},
		{Op: fault.OpTruncate, Probability: often(0.2), Err: errInjected},
		{Probability: often(0.1), MaxDelay: 300 * time.Microsecond},
	} {
		if r.rand.IntN(5) > 0 {
			r.faults.Add(rule)
		}
	}
}

func (r *run) clearFaults() {
	if r.faults != nil {
		r.faults.Clear()
	}
}
