package blk

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// rw is a request of a scenario: its range, and whether it serialises.
type rw struct {
	start, end int64
	serialise  bool
}

// Requests begin one after the other and stay. Each waits exactly for the earlier ones that it overlaps where one of both
// serialises, and goes on when the last of those has ended.
func TestTrackerOrder(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		begun []rw
		waits []bool
	}{
		{"apart", []rw{{0, 4096, true}, {4096, 8192, true}}, []bool{false, false}},
		{"two that pass", []rw{{0, 4096, false}, {0, 4096, false}}, []bool{false, false}},
		{"padded behind plain", []rw{{0, 8192, false}, {4096, 8192, true}}, []bool{false, true}},
		{"plain behind padded", []rw{{0, 4096, true}, {512, 1024, false}}, []bool{false, true}},
		{"chain", []rw{{0, 4096, true}, {0, 8192, true}, {4096, 12288, true}}, []bool{false, true, true}},
		{"one overlaps two", []rw{{0, 4096, true}, {4096, 8192, true}, {2048, 6144, false}}, []bool{false, false, true}},
		{"behind one that waits", []rw{{0, 4096, true}, {0, 8192, false}, {4096, 8192, false}}, []bool{false, true, false}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var tr tracker
				requests := make([]tracked, len(tc.begun))
				begun := make([]atomic.Bool, len(tc.begun))
				for i, r := range tc.begun {
					go func() {
						if err := tr.begin(t.Context(), &requests[i], r.start, r.end, r.serialise); err != nil {
							t.Error(err)
						}
						begun[i].Store(true)
					}()
					synctest.Wait()
					if begun[i].Load() == tc.waits[i] {
						t.Errorf("request %d: waits is %v", i, !begun[i].Load())
					}
				}
				for i := range requests {
					if !begun[i].Load() {
						t.Fatalf("request %d still waits though all before it have ended", i)
					}
					tr.end(&requests[i])
					synctest.Wait()
				}
				if tr.first != nil || tr.last != nil || tr.serialising != 0 {
					t.Error("something stays in the tracker")
				}
			})
		})
	}
}

func TestTrackerCancelled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var tr tracker
		var first, second, third tracked
		if err := tr.begin(t.Context(), &first, 0, 4096, true); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 2)
		go func() { result <- tr.begin(ctx, &second, 0, 8192, true) }()
		synctest.Wait()
		go func() { result <- tr.begin(t.Context(), &third, 4096, 8192, false) }()
		synctest.Wait()
		if tr.tryBegin(new(tracked), 0, 1, false) {
			t.Error("tryBegin passed a request that has the range for itself")
		}
		cancel()
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Errorf("the cancelled request: %v", err)
		}
		// The one that waited only for it goes on.
		if err := <-result; err != nil {
			t.Error(err)
		}
		tr.end(&first)
		tr.end(&third)
	})
}

// Random requests on few blocks from many goroutines: nothing deadlocks, and no two that must not overlap are under way
// at once.
func TestTrackerUnderLoad(t *testing.T) {
	t.Parallel()
	var tr tracker
	var mu sync.Mutex
	var running []*rw
	var done sync.WaitGroup
	for seed := range uint64(8) {
		done.Go(func() {
			random := rand.New(rand.NewPCG(seed, 1))
			var entry tracked
			for range 2000 {
				start := random.Int64N(16)
				r := &rw{start, start + 1 + random.Int64N(8), random.IntN(2) == 0}
				if err := tr.begin(t.Context(), &entry, r.start, r.end, r.serialise); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for _, o := range running {
					if (o.serialise || r.serialise) && o.start < r.end && r.start < o.end {
						t.Errorf("%+v and %+v at once", *o, *r)
					}
				}
				running = append(running, r)
				mu.Unlock()

				mu.Lock()
				running = slices.DeleteFunc(running, func(o *rw) bool { return o == r })
				mu.Unlock()
				tr.end(&entry)
			}
		})
	}
	done.Wait()
}
