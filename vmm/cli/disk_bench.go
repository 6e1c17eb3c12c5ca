package cli

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/iov"
)

// benchOptions are the flags of `disk bench`.
type benchOptions struct {
	disk          diskFlags
	depth         int
	count         int64
	size          size
	step, offset  size
	write         bool
	pattern       string
	flushInterval int64
	seed          uint64
	oneBuffer     bool
	asJSON, quiet bool
}

const (
	patternSequential = "sequential"
	patternRandom     = "random"
)

func newDiskBench(s streams) *cobra.Command {
	o := benchOptions{size: 4096}
	cmd := &cobra.Command{
		Use:   "bench [flags] DISK",
		Short: "Measure how fast a disk is",
		Long: `bench reads a disk, or with --write overwrites it, and keeps --depth requests under way until
--count have ended. The sequential pattern begins at --offset and goes on by --step bytes with each
request, from the end of the disk on to its beginning; the random one takes any block of the same
grid. Every --flush-interval writes one flush is sent, which does not hold up the others.

It prints requests and bytes for each second, and how long requests took.`,
		Example: `  kvmlet disk bench --cache none --pattern random test.img
  kvmlet disk bench --write --size 64K --depth 1 --flush-interval 64 --count 10000 scratch.img
  kvmlet disk bench --format qcow2 --json test.qcow2 | jq .iops`,
		Args: operands("DISK"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.disk.spec.Path, o.disk.spec.ReadOnly = args[0], !o.write
			if err := o.check(); err != nil {
				return err
			}
			if o.write {
				if err := sureOfFormat(cmd, "format", args[0]); err != nil {
					return err
				}
			}
			return interruptible(cmd.Context(), "", func(ctx context.Context) error { return o.run(ctx, s) })
		},
	}
	f := cmd.Flags()
	addFormat(cmd, &o.disk.spec.Format, "format", "f", "the disk")
	f.IntVarP(&o.depth, "depth", "d", 64, fmt.Sprintf("`NUMBER` of requests under way, 1 to %d", maxRequests))
	f.Int64VarP(&o.count, "count", "c", 75000, "`NUMBER` of requests in all")
	f.VarP(&o.size, "size", "s", "`SIZE` of a request")
	f.VarP(&o.step, "step", "S", "`BYTES` from one request to the next (default the size)")
	f.Var(&o.offset, "offset", "`BYTES` at the beginning of the disk to leave alone")
	f.BoolVarP(&o.write, "write", "w", false, "write, which destroys what the disk holds")
	f.StringVar(&o.pattern, "pattern", patternSequential, "`ORDER` of the requests: sequential or random")
	f.Int64Var(&o.flushInterval, "flush-interval", 0, "with --write: `NUMBER` of writes for each flush (default none)")
	f.Uint64Var(&o.seed, "seed", 1, "`NUMBER` that decides where a random pattern goes")
	f.IntVar(&o.disk.spec.RequestAlign, "request-align", 0,
		"treat the disk as one with blocks of `BYTES`, a power of two up to 64K (default its own)")
	f.BoolVar(&o.oneBuffer, "one-buffer", false, "let all requests share one buffer, as those of qemu-img bench do")
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	_ = cmd.RegisterFlagCompletionFunc("pattern",
		cobra.FixedCompletions([]string{patternSequential, patternRandom}, cobra.ShellCompDirectiveNoFileComp))
	o.disk.addBacking(cmd)
	o.disk.addIO(cmd)
	o.disk.addThrottle(cmd)
	addQuiet(cmd, &o.quiet)
	return cmd
}

func (o *benchOptions) check() error {
	if o.step == 0 {
		o.step = o.size
	}
	switch {
	case o.depth < 1 || o.depth > maxRequests:
		return fmt.Errorf("--depth %d: want 1 to %d", o.depth, maxRequests)
	case o.count < 1:
		return fmt.Errorf("--count %d: want 1 at least", o.count)
	case o.size < 1 || o.size > 64<<20:
		return fmt.Errorf("--size %v: want 1 byte to 64M", &o.size)
	case o.step > math.MaxInt64 || o.offset > math.MaxInt64:
		return errors.New("--step, --offset: no disk is as large as that")
	case o.pattern != patternSequential && o.pattern != patternRandom:
		return fmt.Errorf("--pattern %s: want %s or %s", o.pattern, patternSequential, patternRandom)
	case o.flushInterval < 0 || o.flushInterval > 0 && !o.write:
		return fmt.Errorf("--flush-interval %d: want 1 at least, together with --write", o.flushInterval)
	}
	return nil
}

func (o *benchOptions) run(ctx context.Context, s streams) (err error) {
	d, err := disk.Open(ctx, o.disk.spec)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	b, err := o.bench(d)
	if err != nil {
		return err
	}
	defer b.buffers.Close()
	progress, done := workProgress(s, o.quiet, "Measuring "+o.disk.spec.Path)
	err = b.run(ctx, progress)
	done()
	if err != nil {
		return err
	}
	return b.print(s)
}

// bench is one measurement. Nothing in it allocates while requests are under way.
type bench struct {
	o       *benchOptions
	d       *blk.Device
	buffers *benchBuffers
	slots   []benchSlot
	ends    sync.WaitGroup // of the slots
	blocks  uint64         // places that a request may have on the grid of steps
	around  uint64         // bytes after which the sequential pattern begins anew

	next     atomic.Int64 // requests that were begun
	finished atomic.Int64
	flushes  atomic.Int64 // of these, how many were flushes
	failed   atomic.Pointer[error]
	ctx      context.Context
	elapsed  time.Duration
}

// benchSlot is one of the requests that are kept under way.
type benchSlot struct {
	b     *bench
	r     blk.Request
	batch [1]*blk.Request
	vec   iov.Vec
	rand  rand.PCG
}

func (o *benchOptions) bench(d *blk.Device) (*bench, error) {
	room := d.Size() - int64(o.offset) - int64(o.size)
	if room < 0 {
		return nil, fmt.Errorf("disk %s: its %d bytes have no room for %v at byte %v",
			o.disk.spec.Path, d.Size(), &o.size, &o.offset)
	}
	b := &bench{o: o, d: d, slots: make([]benchSlot, min(int64(o.depth), o.count))}
	b.blocks = uint64(room)/uint64(o.step) + 1
	// On from the end at a place where a request has room, whatever the step is: places are multiples of unit.
	unit := gcd(uint64(o.step), uint64(o.size))
	b.around = (uint64(room)/unit + 1) * unit
	var err error
	buffers := len(b.slots)
	if o.oneBuffer {
		buffers = 1
	}
	if b.buffers, err = newBenchBuffers(buffers, int(o.size)); err != nil {
		return nil, err
	}
	for i := range b.slots {
		t := &b.slots[i]
		t.b, t.vec, t.batch[0] = b, iov.Of(b.buffers.at(i%buffers)), &t.r
		t.rand.Seed(o.seed, uint64(i))
		t.r.Done = t.done
	}
	return b, nil
}

func gcd(a, b uint64) uint64 {
	for b > 0 {
		a, b = b, a%b
	}
	return a
}

func (b *bench) run(ctx context.Context, progress func(done, total int64)) error {
	b.ctx = ctx
	stop := make(chan struct{})
	var watch sync.WaitGroup
	if progress != nil {
		watch.Go(func() {
			t := time.NewTicker(barRefresh)
			defer t.Stop()
			for {
				select {
				case <-t.C:
					progress(min(b.finished.Load(), b.o.count), b.o.count)
				case <-stop:
					return
				}
			}
		})
	}
	began := time.Now()
	b.ends.Add(len(b.slots))
	if len(b.slots) == 1 { // what waits for each of its requests needs no engine
		b.slots[0].loop()
	} else {
		b.begin()
	}
	b.ends.Wait()
	b.elapsed = time.Since(began)
	close(stop)
	watch.Wait()
	if err := b.failed.Load(); err != nil {
		return *err
	}
	return ctx.Err()
}

// loop carries out all requests one by one.
func (t *benchSlot) loop() {
	for more := t.aim(); more; more = t.ended(&t.r) || t.aim() {
		t.r.Err = t.b.d.Do(t.b.ctx, &t.r)
	}
}

// begin starts the first request of every slot.
func (b *bench) begin() {
	first := make([]*blk.Request, 0, len(b.slots))
	for i := range b.slots {
		if b.slots[i].aim() {
			first = append(first, &b.slots[i].r)
		}
	}
	b.d.Submit(b.ctx, first)
}

// aim sets up the next request of the slot. It returns false when there is none, and the slot has ended.
func (t *benchSlot) aim() bool {
	b := t.b
	n := b.next.Add(1)
	if n > b.o.count || b.failed.Load() != nil || b.ctx.Err() != nil {
		b.ends.Done()
		return false
	}
	var at int64
	if b.o.pattern == patternRandom {
		at = int64(t.rand.Uint64()%b.blocks) * int64(b.o.step)
	} else {
		hi, lo := bits.Mul64(uint64(n-1), uint64(b.o.step))
		at = int64(bits.Rem64(hi, lo, b.around))
	}
	t.r.Op, t.r.Vec = blk.OpRead, t.vec
	if b.o.write {
		t.r.Op = blk.OpWrite
	}
	t.r.Off = int64(b.o.offset) + at
	return true
}

// done begins what follows a request that has ended.
func (t *benchSlot) done(r *blk.Request) {
	if t.ended(r) || t.aim() {
		t.b.d.Submit(t.b.ctx, t.batch[:])
	}
}

// ended takes note of a request that has ended. It returns true if a flush is due, which it has set up then.
func (t *benchSlot) ended(r *blk.Request) bool {
	b := t.b
	if r.Err != nil {
		err := r.Err
		b.failed.CompareAndSwap(nil, &err)
	}
	if r.Op == blk.OpFlush {
		b.flushes.Add(1)
		return false
	}
	if n := b.finished.Add(1); b.o.flushInterval == 0 || n%b.o.flushInterval != 0 || r.Err != nil {
		return false
	}
	r.Op, r.Vec = blk.OpFlush, nil
	return true
}

// benchResult is what `disk bench --json` prints. Latencies are in microseconds, right to a fifth.
type benchResult struct {
	Filename string             `json:"filename"`
	Format   disk.Format        `json:"format"`
	Cache    string             `json:"cache"`
	AIO      string             `json:"aio"`
	Write    bool               `json:"write"`
	Pattern  string             `json:"pattern"`
	Depth    int                `json:"depth"`
	Size     int64              `json:"size"`
	Count    int64              `json:"count"`
	Flushes  int64              `json:"flushes"`
	Seconds  float64            `json:"seconds"`
	IOPS     float64            `json:"iops"`
	Bytes    float64            `json:"bytes-per-second"`
	Latency  map[string]float64 `json:"latency-us"`
}

// quantiles are the parts of all requests whose latency is told.
var quantiles = []struct {
	name string
	q    float64
}{{"p50", 0.5}, {"p90", 0.9}, {"p99", 0.99}, {"p99.9", 0.999}, {"max", 1}}

func (b *bench) print(s streams) error {
	o, op := b.o, blk.OpRead
	if o.write {
		op = blk.OpWrite
	}
	h := b.d.Latency(op)
	us := func(t time.Duration) float64 { return float64(t) / float64(time.Microsecond) }
	seconds := b.elapsed.Seconds()
	r := benchResult{
		Filename: o.disk.spec.Path, Format: o.disk.spec.Format, Cache: o.disk.spec.Cache.String(), AIO: o.disk.spec.AIO.String(),
		Write: o.write, Pattern: o.pattern, Depth: o.depth, Size: int64(o.size), Count: o.count, Flushes: b.flushes.Load(),
		Seconds: seconds, IOPS: float64(o.count) / seconds, Bytes: float64(o.count) * float64(o.size) / seconds,
		Latency: map[string]float64{"mean": us(h.Mean())},
	}
	for _, q := range quantiles {
		r.Latency[q.name] = us(h.Quantile(q.q))
	}
	if o.asJSON {
		return printJSON(s, r)
	}
	verb := "reads"
	if o.write {
		verb = "writes"
	}
	fprintf(s.answer, "%d %s of %v, %s, depth %d: %.3f s\n", r.Count, verb, &o.size, r.Pattern, r.Depth, seconds)
	fprintf(s.answer, "%.0f requests and %.1f MiB per second\n", r.IOPS, r.Bytes/(1<<20))
	fprintf(s.answer, "latency: mean %v", h.Mean().Round(100*time.Nanosecond))
	for _, q := range quantiles {
		fprintf(s.answer, ", %s %v", q.name, h.Quantile(q.q).Round(100*time.Nanosecond))
	}
	fprintf(s.answer, "\n")
	return nil
}
