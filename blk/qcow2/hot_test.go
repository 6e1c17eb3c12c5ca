package qcow2

import (
	"context"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

var (
	_ blk.Backend          = (*Image)(nil)
	_ blk.Discarder        = (*Image)(nil)
	_ blk.ZeroWriter       = (*Image)(nil)
	_ blk.StatusReporter   = (*Image)(nil)
	_ blk.CompressedWriter = (*Image)(nil)
	_ blk.Truncater        = (*Image)(nil)
	_ blk.Backed           = (*Image)(nil)
	_ blk.StateStore       = (*Image)(nil)
	_ blk.Observer         = (*Image)(nil)
	_ blk.Resetter         = (*Image)(nil)
	_ blk.Starter          = (*Image)(nil)
)

// TestHotPath: a transfer of what has its place is one request to the file, and allocates nothing.
func TestHotPath(t *testing.T) {
	m := &memory{}
	mustCreate(t, device(t, m), CreateOptions{Size: 8 << 20})
	im := mustOpen(t, device(t, m), Options{})
	writeAt(t, im, 0, fill(1, 4<<20))
	p := fill(2, 256<<10)
	v := iov.Of(p)
	for name, f := range map[string]func(){
		"read":  func() { _, _ = im.ReadVecAt(v, 4096) },
		"write": func() { _, _ = im.WriteVecAt(v, 4096) },
	} {
		before := m.requests
		f()
		if n := m.requests - before; n != 1 {
			t.Errorf("%s: %d requests to the file, want 1", name, n)
		}
		if n := testing.AllocsPerRun(100, f); n > 0 && !hosttest.Race {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	// Clusters that get their places are written at once, not one by one.
	before := m.requests
	writeAt(t, im, 4<<20+512, fill(3, 1<<20))
	if n := m.requests - before; n != 1 {
		t.Errorf("allocating write: %d requests to the file, want 1", n)
	}
}

// TestStart: batches of transfers, some of which can be passed on.
func TestStart(t *testing.T) {
	t.Parallel()
	m := &memory{}
	mustCreate(t, device(t, m), CreateOptions{Size: 8 << 20, ClusterSize: 4096})
	im := mustOpen(t, device(t, m), Options{})
	d := device(t, im)
	writeAt(t, im, 0, fill(1, 1<<20))
	var all sync.WaitGroup
	var batch []*blk.Request
	want := append(fill(1, 1<<20), make([]byte, 1<<20)...)
	for i := range int64(128) {
		off := i * 16 << 10
		p := fill(byte(i), 5000)
		copy(want[off:], p)
		all.Add(1)
		batch = append(batch, &blk.Request{Op: blk.OpWrite, Off: off, Vec: iov.Of(p), Done: func(r *blk.Request) {
			if r.Err != nil {
				t.Error(r.Err)
			}
			all.Done()
		}})
	}
	d.Submit(context.Background(), batch)
	all.Wait()
	wantBytes(t, "read", readAt(t, im, 0, 2<<20), want)
	got := make([]byte, 2<<20)
	batch = batch[:0]
	for off := 0; off < len(got); off += 8 << 10 {
		all.Add(1)
		batch = append(batch, &blk.Request{Op: blk.OpRead, Off: int64(off), Vec: iov.Of(got[off : off+8<<10]), Done: func(r *blk.Request) {
			if r.Err != nil {
				t.Error(r.Err)
			}
			all.Done()
		}})
	}
	d.Submit(context.Background(), batch)
	all.Wait()
	wantBytes(t, "batch of reads", got, want)
	wantClean(t, im)
}

func BenchmarkRead4K(b *testing.B)  { bench(b, false) }
func BenchmarkWrite4K(b *testing.B) { bench(b, true) }

// bench transfers 4 KiB at a time, at places that have their clusters, on a file in memory.
func bench(b *testing.B, write bool) {
	m := &memory{}
	mustCreate(b, device(b, m), CreateOptions{Size: 64 << 20})
	im := mustOpen(b, device(b, m), Options{})
	writeAt(b, im, 0, fill(1, 64<<20))
	v := iov.Of(fill(2, 4096))
	b.SetBytes(4096)
	b.ReportAllocs()
	for i := int64(0); b.Loop(); i++ {
		off := i * 7919 * 4096 % (64 << 20)
		var err error
		if write {
			_, err = im.WriteVecAt(v, off)
		} else {
			_, err = im.ReadVecAt(v, off)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}
