package blk_test

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// starting is a Backend that carries out transfers by itself, one goroutine for each batch.
type starting struct {
	*strict
	batches atomic.Int64
	begun   atomic.Int64
	hold    chan struct{} // transfers end once it is closed; nil if at once
}

func (s *starting) Start(batch []*blk.IO) {
	s.batches.Add(1)
	s.begun.Add(int64(len(batch)))
	for _, io := range slices.Clone(batch) {
		go func() {
			if s.hold != nil {
				<-s.hold
			}
			io.Transfer(s.strict)
			io.Done(io)
		}()
	}
}

// submit gives requests to d in one batch and waits for them.
func submit(d *blk.Device, requests ...*blk.Request) {
	var done sync.WaitGroup
	done.Add(len(requests))
	for _, r := range requests {
		r.Done = func(*blk.Request) { done.Done() }
	}
	d.Submit(context.Background(), requests)
	done.Wait()
}

func write(off int64, p []byte) *blk.Request {
	return &blk.Request{Op: blk.OpWrite, Off: off, Vec: iov.Of(p)}
}

func read(off int64, p []byte) *blk.Request {
	return &blk.Request{Op: blk.OpRead, Off: off, Vec: iov.Of(p)}
}

func TestSubmit(t *testing.T) {
	t.Parallel()
	for _, async := range []bool{false, true} {
		s := newStrict(t, mib, blk.Limits{RequestAlign: 4096})
		b := &starting{strict: s}
		var d *blk.Device
		if async {
			d = newDevice(t, b, blk.Options{})
		} else {
			d = s.open(blk.Options{})
		}
		p := noise(1, mib)
		requests := []*blk.Request{
			write(0, p[:4096]),
			write(8192+512, p[8192+512:16384]), // padded
			write(mib, make([]byte, 1)),        // refused
			{Op: blk.OpFlush},
			{Op: blk.OpWriteZeroes, Off: 32768, Len: 4096},
			{Op: blk.OpDiscard, Off: 65536, Len: 4096},
			write(0, nil),
		}
		submit(d, requests...)
		for i, r := range requests {
			if want := i == 2; errors.Is(r.Err, blk.ErrRange) != want || r.Err != nil != want {
				t.Errorf("request %d: %v", i, r.Err)
			}
		}
		if !bytes.Equal(s.data[:4096], p[:4096]) || !bytes.Equal(s.data[8192+512:16384], p[8192+512:16384]) {
			t.Error("the disk holds other bytes")
		}
		got := make([]byte, 8192)
		submit(d, read(8704, got[:7168]), read(100, got[7168:]))
		if !bytes.Equal(got, slices.Concat(p[8704:15872], p[100:1124])) {
			t.Error("read other bytes")
		}
		if n := b.begun.Load(); async && n != 1 {
			t.Errorf("%d transfers went to the backend as they were, want the one that is aligned", n)
		}
		stats := d.Stats()
		if stats.Write.Ops != 4 || stats.Write.Errors != 1 || stats.Read.Ops != 2 || stats.Flush.Ops != 1 ||
			stats.Discard.Ops != 1 || stats.WriteZeroes.Bytes != 4096 {
			t.Errorf("%+v", stats)
		}
		if h := d.Latency(blk.OpWrite); h.Total() != 4 {
			t.Errorf("%d latencies of writes", h.Total())
		}
	}
}

// threadless is a Starter that a goroutine of the Device's waits for, rather than calling the backend itself.
type threadless struct{ *starting }

func (threadless) Threadless() bool { return true }

func TestThreadless(t *testing.T) {
	t.Parallel()
	b := threadless{&starting{strict: newStrict(t, mib, blk.Limits{RequestAlign: 4096})}}
	d := newDevice(t, b, blk.Options{})
	p := pattern(1000)
	for _, tc := range []struct {
		off  int64
		n    int
		want string
	}{
		{512, 1000, "read 0+4096, write 0+4096"},
		{4000, 200, "read 0+8192, write 0+8192"}, // two blocks, in one read
		{9000, 0x2000, "read 8192+4096, read 16384+4096, write 8192+12288"},
		{4096, 500, "read 4096+4096, write 4096+4096"},
		{mib - 1, 1, "read 1044480+4096, write 1044480+4096"},
	} {
		b.begun.Store(0)
		q := noise(uint64(tc.off), tc.n)
		r := write(tc.off, q)
		submit(d, r)
		if took := b.took(); r.Err != nil || took != tc.want || !bytes.Equal(b.data[tc.off:][:tc.n], q) {
			t.Errorf("%d bytes at %d: %s, want %s (%v)", tc.n, tc.off, took, tc.want, r.Err)
		}
		if n := int(b.begun.Load()); n != strings.Count(tc.want, "+") {
			t.Errorf("%d bytes at %d: %d transfers were started", tc.n, tc.off, n)
		}
	}
	b.begun.Store(0)
	if err := d.Do(t.Context(), write(512, p)); err != nil || b.begun.Load() != 0 {
		t.Errorf("Do: %d transfers were started (%v)", b.begun.Load(), err)
	}
	before := bytes.Clone(b.data)
	for _, what := range []string{"read", "write"} {
		b.fail = func(op string) error {
			if strings.HasPrefix(op, what) {
				return errMedium
			}
			return nil
		}
		r := write(512, noise(9, 1000))
		if submit(d, r); !errors.Is(r.Err, errMedium) || !bytes.Equal(b.data, before) {
			t.Errorf("a failing %s: %v", what, r.Err)
		}
	}
	// Called off between the read and the write.
	ctx, cancel := context.WithCancel(t.Context())
	b.fail = func(string) error { cancel(); return nil }
	r := write(512, noise(9, 1000))
	done := make(chan struct{})
	r.Done = func(*blk.Request) { close(done) }
	d.Submit(ctx, []*blk.Request{r})
	if <-done; !errors.Is(r.Err, context.Canceled) || !bytes.Equal(b.data, before) {
		t.Errorf("called off: %v", r.Err)
	}
	b.fail = nil
	// Writes to parts of one block follow each other, and all of them stay.
	var all []*blk.Request
	for i := range int64(64) {
		all = append(all, write(8192+i*60, bytes.Repeat([]byte{byte(i) + 1}, 50)))
	}
	submit(d, all...)
	for i, r := range all {
		if r.Err != nil || !bytes.Equal(b.data[r.Off:][:50], r.Vec[0].Bytes()) {
			t.Errorf("write %d of one block: %v", i, r.Err)
		}
	}
}

func TestSubmitMerges(t *testing.T) {
	t.Parallel()
	p := noise(1, mib)
	for _, tc := range []struct {
		name     string
		limits   blk.Limits
		requests []*blk.Request
		calls    string
		merged   uint64
	}{
		{"side by side, in any order", blk.Limits{},
			[]*blk.Request{write(4096, p[:4096]), write(8192, p[4096:8192]), write(0, p[8192:12288])}, "write 0+12288", 2},
		{"apart", blk.Limits{}, []*blk.Request{write(0, p[:512]), write(1024, p[:512])}, "write 0+512, write 1024+512", 0},
		{"overlapping", blk.Limits{}, []*blk.Request{write(0, p[:4096]), write(2048, p[8192:12288])}, "write 0+6144", 1},
		{"within another", blk.Limits{}, []*blk.Request{write(0, p[:4096]), write(512, p[8192:8704])}, "write 0+4096", 1},
		{"beneath a later one", blk.Limits{}, []*blk.Request{write(512, p[8192:8704]), write(0, p[:4096])}, "write 0+4096", 1},
		{"three layers", blk.Limits{}, []*blk.Request{write(0, p[:4096]), write(0, p[4096:5120]), write(512, p[8192:10240])},
			"write 0+4096", 2},
		{"more than a transfer", blk.Limits{MaxTransfer: 8192},
			[]*blk.Request{write(0, p[:4096]), write(4096, p[:4096]), write(8192, p[:4096])}, "write 0+8192, write 8192+4096", 1},
		{"more than a vector", blk.Limits{MaxVec: 2},
			[]*blk.Request{write(0, p[:512]), write(512, p[:512]), write(1024, p[:512])}, "write 0+1024, write 1024+512", 1},
		{"refused", blk.Limits{}, []*blk.Request{write(mib-512, p[:512]), write(mib, p[:512])}, "write 1048064+512", 0},
		{"unaligned become aligned", blk.Limits{RequestAlign: 4096},
			[]*blk.Request{write(0, p[:1000]), write(1000, p[1000:4096])}, "write 0+4096", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newStrict(t, mib, tc.limits)
			d := s.open(blk.Options{})
			want := make([]byte, mib)
			for _, r := range tc.requests {
				_, _ = r.Vec.CopyTo(want[r.Off:min(mib, r.Off+int64(r.Vec.Size()))], 0)
			}
			submit(d, tc.requests...)
			calls := strings.Split(s.took(), ", ")
			slices.Sort(calls)
			if got := strings.Join(calls, ", "); got != tc.calls {
				t.Errorf("%s; want %s", got, tc.calls)
			}
			if !bytes.Equal(s.data, want) {
				t.Error("the disk holds other bytes")
			}
			if n := d.Stats().Write.Merged; n != tc.merged {
				t.Errorf("%d counted as merged", n)
			}
		})
	}
}

// Where requests that became one fail, each gets the answer that it would have had alone.
func TestMergedFailure(t *testing.T) {
	t.Parallel()
	s := newStrict(t, mib, blk.Limits{})
	s.fail = func(call string) error {
		if call == "write 0+1536" || call == "write 512+512" {
			return errMedium
		}
		return nil
	}
	d := s.open(blk.Options{})
	requests := []*blk.Request{write(0, pattern(512)), write(512, pattern(512)), write(1024, pattern(512))}
	submit(d, requests...)
	for i, r := range requests {
		if errors.Is(r.Err, errMedium) != (i == 1) {
			t.Errorf("request %d: %v", i, r.Err)
		}
	}
	if stats := d.Stats(); stats.Write.Ops != 3 || stats.Write.Errors != 1 || stats.Write.Bytes != 1024 {
		t.Errorf("%+v", stats.Write)
	}
}

func TestPlug(t *testing.T) {
	t.Parallel()
	b := &starting{strict: newStrict(t, mib, blk.Limits{})}
	d := newDevice(t, b, blk.Options{})
	var done sync.WaitGroup
	d.Plug()
	d.Plug()
	for i := range int64(8) {
		done.Add(1)
		r := write(i*4096, pattern(4096))
		r.Done = func(*blk.Request) { done.Done() }
		d.Submit(t.Context(), []*blk.Request{r})
	}
	d.Unplug()
	if b.took() != "" || b.batches.Load() != 0 {
		t.Error("something went to the backend while plugged")
	}
	d.Unplug()
	done.Wait()
	if got := b.took(); got != "write 0+32768" {
		t.Errorf("%s", got)
	}
}

// A request that is under way holds up a drain, one that comes during the section waits for its end, and all have an end.
func TestDrainHoldsSubmitted(t *testing.T) {
	t.Parallel()
	b := &starting{strict: newStrict(t, mib, blk.Limits{}), hold: make(chan struct{})}
	d := newDevice(t, b, blk.Options{})
	var early, late sync.WaitGroup
	early.Add(1)
	late.Add(1)
	r := write(0, pattern(512))
	r.Done = func(*blk.Request) { early.Done() }
	d.Submit(t.Context(), []*blk.Request{r})
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := d.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("drained with a request under way: %v", err)
	}
	close(b.hold)
	early.Wait()
	undrain, err := blk.DrainAll(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	b.took()
	second := write(512, pattern(512))
	second.Done = func(*blk.Request) { late.Done() }
	d.Submit(t.Context(), []*blk.Request{second})
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.Do(cancelled, read(0, make([]byte, 512))); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled request: %v", err)
	}
	if b.took() != "" {
		t.Error("a request reached the backend during a section")
	}
	undrain()
	late.Wait()
	if second.Err != nil || b.took() != "write 512+512" {
		t.Errorf("%v", second.Err)
	}
}

// Whoever has drained a disk need not fear the Done of a request either.
func TestDrainWaitsForDone(t *testing.T) {
	t.Parallel()
	for _, async := range []bool{false, true} {
		var b blk.Backend = newStrict(t, mib, blk.Limits{})
		if async {
			b = &starting{strict: newStrict(t, mib, blk.Limits{})}
		}
		d := newDevice(t, b, blk.Options{})
		called, goOn := make(chan struct{}), make(chan struct{})
		r := write(0, pattern(512))
		r.Done = func(*blk.Request) {
			close(called)
			<-goOn
		}
		d.Submit(t.Context(), []*blk.Request{r})
		<-called
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		if err := d.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("asynchronous %v: drained while Done was running: %v", async, err)
		}
		cancel()
		close(goOn)
		if err := d.Drain(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// Requests that wait when the disk is closed get an answer.
func TestCloseAnswersSubmitted(t *testing.T) {
	t.Parallel()
	d := newStrict(t, mib, blk.Limits{}).open(blk.Options{})
	if err := d.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	answers := make(chan error, 2)
	for range 2 {
		r := write(0, pattern(512))
		r.Off = mib / 2
		r.Done = func(r *blk.Request) { answers <- r.Err }
		d.Submit(t.Context(), []*blk.Request{r})
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-answers; !errors.Is(err, blk.ErrClosed) {
			t.Errorf("%v", err)
		}
	}
}

func TestSubmitDoesNotAllocate(t *testing.T) {
	b := newMemory(1 << 20)
	d := newDevice(t, &inline{b}, blk.Options{})
	batch := make([]*blk.Request, 16)
	for i := range batch {
		batch[i] = read(int64(i)*8192, make([]byte, 4096))
		batch[i].Done = func(*blk.Request) {}
	}
	adjacent := make([]*blk.Request, 16)
	for i := range adjacent {
		adjacent[i] = write(int64(i)*4096, make([]byte, 4096))
		adjacent[i].Done = func(*blk.Request) {}
	}
	for name, requests := range map[string][]*blk.Request{"apart": batch, "merged": adjacent} {
		d.Submit(t.Context(), requests)
		if n := testing.AllocsPerRun(100, func() { d.Submit(t.Context(), requests) }); n >= 1 && !hosttest.Race {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// inline is a Starter that is done when Start returns.
type inline struct{ *memory }

func (s *inline) Start(batch []*blk.IO) {
	for _, io := range batch {
		io.Transfer(s.memory)
		io.Done(io)
	}
}

// However many requests a guest has under way, few of them are with the backend, since each may take a thread there.
func TestSubmittedAtOnce(t *testing.T) {
	t.Parallel()
	const requests, most = 1000, 64
	b := &crowd{memory: newMemory(mib), goOn: make(chan struct{})}
	d := newDevice(t, b, blk.Options{})
	var done sync.WaitGroup
	done.Add(requests)
	batch := make([]*blk.Request, requests)
	for i := range batch {
		batch[i] = &blk.Request{Op: blk.OpWriteZeroes, Off: int64(i) * 512, Len: 512, Done: func(*blk.Request) { done.Done() }}
	}
	d.Submit(t.Context(), batch)
	for b.inside.Load() < most {
		runtime.Gosched()
	}
	close(b.goOn)
	done.Wait()
	if n := b.most.Load(); n > most {
		t.Errorf("%d at once", n)
	}
	for i, r := range batch {
		if r.Err != nil {
			t.Errorf("request %d: %v", i, r.Err)
		}
	}
}

// crowd is a Backend that counts who is in it.
type crowd struct {
	*memory
	inside, most atomic.Int64
	goOn         chan struct{}
}

func (c *crowd) WriteZeroes(int64, int64, bool) error {
	n := c.inside.Add(1)
	for most := c.most.Load(); n > most && !c.most.CompareAndSwap(most, n); most = c.most.Load() {
	}
	<-c.goOn
	c.inside.Add(-1)
	return nil
}

// Writes that were merged and have to be tried one by one keep their order.
func TestMergedFailureKeepsOrder(t *testing.T) {
	t.Parallel()
	for range 100 {
		s := newStrict(t, mib, blk.Limits{})
		failed := false
		s.fail = func(string) error {
			if !failed {
				failed = true
				return errMedium
			}
			return nil
		}
		d := s.open(blk.Options{})
		first, second := bytes.Repeat([]byte{1}, 4096), bytes.Repeat([]byte{2}, 4096)
		requests := []*blk.Request{write(512, first), write(0, second)}
		submit(d, requests...)
		if requests[0].Err != nil || requests[1].Err != nil {
			t.Fatal(requests[0].Err, requests[1].Err)
		}
		if !bytes.Equal(s.data[:4608], append(second, first[:512]...)) {
			t.Fatal("the write that was submitted first stays")
		}
	}
}

func TestCloseAnswersPlugged(t *testing.T) {
	t.Parallel()
	d := newStrict(t, mib, blk.Limits{}).open(blk.Options{})
	answers := make(chan error, 2)
	submitOne := func() {
		r := write(0, pattern(512))
		r.Done = func(r *blk.Request) { answers <- r.Err }
		d.Submit(t.Context(), []*blk.Request{r})
	}
	d.Plug()
	submitOne()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	submitOne()
	for range 2 {
		if err := <-answers; !errors.Is(err, blk.ErrClosed) {
			t.Errorf("%v", err)
		}
	}
	d.Unplug()
}
