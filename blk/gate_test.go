package blk

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

func TestGateSections(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var g gate
		ctx := t.Context()
		if err := g.enter(ctx); err != nil {
			t.Fatal(err)
		}
		var shut atomic.Bool
		go func() {
			if err := g.shut(ctx); err != nil {
				t.Error(err)
			}
			shut.Store(true)
		}()
		synctest.Wait()
		if shut.Load() {
			t.Fatal("shut while a request is inside")
		}
		g.leave()
		synctest.Wait()
		if !shut.Load() {
			t.Fatal("not shut though nobody is inside")
		}
		if err := g.shut(ctx); err != nil { // nested: at once
			t.Fatal(err)
		}

		var entered atomic.Bool
		go func() {
			if err := g.enter(ctx); err != nil {
				t.Error(err)
			}
			entered.Store(true)
		}()
		g.open()
		synctest.Wait()
		if entered.Load() {
			t.Fatal("entered during a section")
		}
		g.open()
		synctest.Wait()
		if !entered.Load() {
			t.Fatal("still waiting after the last section")
		}
		g.leave()
	})
}

func TestGateCancelled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var g gate
		if err := g.enter(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 2)
		go func() { result <- g.shut(ctx) }()
		synctest.Wait()
		go func() { result <- g.enter(ctx) }()
		synctest.Wait()
		cancel()
		for range 2 {
			if err := <-result; !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
		}
		// The section that was given up does not keep anybody out.
		if !g.tryEnter() {
			t.Error("the gate stays shut")
		}
		g.leave()
		g.leave()
		// Nor does the next one wait for what it waited for.
		if err := g.shut(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestGateClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var g gate
		if err := g.shut(t.Context()); err != nil {
			t.Fatal(err)
		}
		waiting := make(chan error, 1)
		go func() { waiting <- g.enter(t.Context()) }()
		synctest.Wait()
		if !g.close() || g.close() {
			t.Error("close: want true, then false")
		}
		if err := <-waiting; !errors.Is(err, ErrClosed) {
			t.Errorf("a request that waited: %v", err)
		}
		if err := g.shut(t.Context()); !errors.Is(err, ErrClosed) {
			t.Errorf("shut after close: %v", err)
		}
		g.open() // the section of before ends, and the gate stays closed
		if err := g.enter(t.Context()); !errors.Is(err, ErrClosed) {
			t.Errorf("enter after close: %v", err)
		}
	})
}

// Many requests and many sections: no section ever sees a request, and all of them end.
func TestGateUnderLoad(t *testing.T) {
	t.Parallel()
	var g gate
	var inside, sections atomic.Int64
	var done sync.WaitGroup
	for range 4 {
		done.Go(func() {
			for range 3000 {
				if err := g.enter(t.Context()); err != nil {
					t.Error(err)
					return
				}
				inside.Add(1)
				if sections.Load() != 0 {
					t.Error("a request is inside during a section")
				}
				inside.Add(-1)
				g.leave()
			}
		})
		done.Go(func() {
			for range 300 {
				if err := g.shut(t.Context()); err != nil {
					t.Error(err)
					return
				}
				sections.Add(1)
				if inside.Load() != 0 {
					t.Error("a section sees a request inside")
				}
				sections.Add(-1)
				g.open()
			}
		})
	}
	done.Wait()
}
