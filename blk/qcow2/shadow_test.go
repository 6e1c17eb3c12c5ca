package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
)

// trouble says what goes wrong with a file.
type trouble uint8

const (
	noTrouble trouble = iota
	oneFails          // one change
	allFail           // a change and all that follow
	noRoom            // the file gets no more space
)

func (w trouble) String() string {
	return [...]string{"no trouble", "one fails", "all fail", "no room"}[w]
}

// troubled is a file whose n-th change fails: a write, a flush, a new length. Of a write that fails half the sectors are
// there. With noRoom only those that need space are counted, and fail: writes to sectors that were never written.
type troubled struct {
	memory
	kind  trouble
	after int // so many changes go well
	count int
	space map[int64]bool // sectors that were written
}

// newTroubled makes a file of b, which is all space that it has.
func newTroubled(b []byte) *troubled {
	f := &troubled{space: make(map[int64]bool)}
	f.b = bytes.Clone(b)
	for s := range int64(len(b)+511) / 512 {
		f.space[s] = true
	}
	return f
}

// fails counts a change and reports whether it fails.
func (f *troubled) fails() bool {
	f.count++
	return f.kind != noTrouble && f.count > f.after && (f.kind != oneFails || f.count == f.after+1)
}

// fired reports whether something has failed.
func (f *troubled) fired() bool { return f.count > f.after }

func (f *troubled) WriteVecAt(src iov.Vec, off int64) (int, error) {
	n := int64(src.Size())
	fresh := false
	for s := off / 512; s <= (off+n-1)/512; s++ {
		fresh = fresh || !f.space[s]
	}
	if (f.kind != noRoom || fresh) && f.fails() {
		half, err := src.Slice(0, int(n/2&^511))
		if err == nil && f.kind != noRoom {
			_, _ = f.memory.WriteVecAt(half, off)
		}
		return 0, errFault
	}
	for s := off / 512; s <= (off+n-1)/512; s++ {
		f.space[s] = true
	}
	return f.memory.WriteVecAt(src, off)
}

func (f *troubled) Flush() error {
	if f.kind != noRoom && f.fails() {
		return errFault
	}
	return nil
}

func (f *troubled) Truncate(size int64) error {
	if size > int64(len(f.b)) && f.kind != noRoom && f.fails() { // a hole needs no space
		return errFault
	}
	return f.memory.Truncate(size)
}

// album is an image with snapshots that share clusters and tables, and what they hold.
type album struct {
	file  []byte // as it was closed
	disk  []byte
	names []string
	snaps map[string][]byte
}

const (
	albumSize  = 160 << 10
	albumState = 3000 // bytes of VM state that snapshot b has
)

func newAlbum(t *testing.T, s shape) *album {
	m := &memory{}
	mustCreate(t, device(t, m), s.create(albumSize))
	im := mustOpen(t, device(t, m), Options{})
	a := &album{disk: make([]byte, albumSize), snaps: make(map[string][]byte)}
	write := func(off, n int64, b byte) {
		writeAt(t, im, off, fill(b, n))
		copy(a.disk[off:], fill(b, n))
	}
	// Clusters that a snapshot leaves at the end are the first free ones, and lie in front of all that the others have.
	write(0, 2000, 'x')
	if err := im.CreateSnapshot("x", 0, 0); err != nil {
		t.Fatal(err)
	}
	write(0, albumSize-20_000, 1) // the end has no tables
	for i, name := range []string{"a", "b", "c"} {
		state := 0
		if name == "b" {
			state = albumState
			if _, err := im.WriteStateAt(iov.Of(fill('s', albumState)), 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := im.WriteCompressed(iov.Of(fill('z', s.cluster)), int64(i)*s.cluster); err != nil {
			t.Fatal(err)
		}
		copy(a.disk[int64(i)*s.cluster:], fill('z', s.cluster))
		if err := im.CreateSnapshot(name, int64(state), 0); err != nil {
			t.Fatal(err)
		}
		a.names, a.snaps[name] = append(a.names, name), bytes.Clone(a.disk)
		write(int64(i)*40_000+10_000, 9000, byte(i+2))
	}
	if err := im.DeleteSnapshot("x"); err != nil {
		t.Fatal(err)
	}
	mustClose(t, im)
	a.file = bytes.Clone(m.b)
	return a
}

// changes are what may go wrong half-way, each with what the album is like afterwards.
var changes = []struct {
	name string
	do   func(im *Image) error
	then func(a *album)
}{
	{"create", func(im *Image) error { return im.CreateSnapshot("d", 0, 0) },
		func(a *album) { a.names, a.snaps["d"] = append(a.names, "d"), a.disk }},
	{"apply", func(im *Image) error { return im.ApplySnapshot("a") }, func(a *album) { a.disk = a.snaps["a"] }},
	{"delete first", func(im *Image) error { return im.DeleteSnapshot("a") }, func(a *album) { a.names = []string{"b", "c"} }},
	{"delete last", func(im *Image) error { return im.DeleteSnapshot("c") }, func(a *album) { a.names = []string{"a", "b"} }},
	{"state", func(im *Image) error { _, err := im.WriteStateAt(iov.Of(fill('t', 40_000)), 0); return err }, func(*album) {}},
	{"grow", func(im *Image) error { return im.Truncate(4 * albumSize) },
		func(a *album) { a.disk = append(bytes.Clone(a.disk), make([]byte, 3*albumSize)...) }},
}

// eachChange runs f for all that may go wrong half-way, in images of both versions.
func eachChange(t *testing.T, f func(t *testing.T, s shape, change int, before, after *album)) {
	for _, s := range []shape{
		{512, Compat010, 16, false, false}, {512, Compat11, 16, false, false}, {1024, Compat11, 64, true, false},
		{4096, Compat010, 16, false, false},
	} {
		if testing.Short() && s.cluster > 512 {
			continue
		}
		before := newAlbum(t, s)
		for i, c := range changes {
			if c.name == "grow" && s.compat == Compat010 { // refused
				continue
			}
			after := &album{disk: before.disk, names: append([]string(nil), before.names...), snaps: map[string][]byte{}}
			for name, b := range before.snaps {
				after.snaps[name] = b
			}
			c.then(after)
			t.Run(fmt.Sprint(s, "/", c.name), func(t *testing.T) {
				t.Parallel()
				f(t, s, i, before, after)
			})
		}
	}
}

// is reports whether an image has the album's snapshots and its disk.
func (a *album) is(t *testing.T, im *Image) bool {
	t.Helper()
	var names []string
	for _, s := range im.Snapshots() {
		names = append(names, s.Name)
	}
	return fmt.Sprint(names) == fmt.Sprint(a.names) && im.Size() == int64(len(a.disk)) && bytes.Equal(readAt(t, im, 0, im.Size()), a.disk)
}

// inspect wants that an image is free of contradictions and lost clusters.
func inspect(t *testing.T, what string, im *Image) {
	t.Helper()
	if r, err := Check(context.Background(), im, RepairNone); err != nil || !r.Clean() {
		t.Fatalf("%s: check: %d corruptions, %d leaks, %d errors, %v\n%s", what, r.Corruptions, r.Leaks, r.Errors, err,
			strings.Join(r.Problems[:min(len(r.Problems), 5)], "\n"))
	}
}

// use goes on with an image that holds the album: writes, takes, applies and deletes snapshots, which hold what they did.
func (a *album) use(t *testing.T, what string, im *Image) {
	t.Helper()
	disk := bytes.Clone(a.disk)
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	writeAt(t, im, 30_000, fill('w', 50_000))
	copy(disk[30_000:], fill('w', 50_000))
	do(im.CreateSnapshot("more", 0, 0))
	for _, name := range a.names {
		do(im.ApplySnapshot(name))
		wantBytes(t, what+": snapshot "+name, readAt(t, im, 0, im.Size()), a.snaps[name])
		if name == "b" {
			state := make([]byte, albumState)
			_, err := im.ReadStateAt(iov.Of(state), 0)
			do(err)
			wantBytes(t, what+": VM state", state, fill('s', albumState))
		}
		writeAt(t, im, 20_000, fill('v', 10_000))
	}
	do(im.ApplySnapshot("more"))
	wantBytes(t, what+": what was written since", readAt(t, im, 0, im.Size()), disk)
	do(im.DeleteSnapshot("more"))
	writeAt(t, im, 0, fill('u', 60_000))
	do(im.Flush())
	inspect(t, what+": used", im)
}

// qemuCheckOf has qemu-img check the bytes of an image.
func qemuCheckOf(t *testing.T, what string, b []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	writeFile(t, path, b)
	if out, err := tryQEMU(t, "qemu-img", "check", "-f", "qcow2", path); err != nil {
		t.Fatalf("%s: qemu-img check: %v\n%s", what, err, out)
	}
}

// TestChangesFail has snapshots and sizes change while the file fails, at each place where it can. The image is as it was
// before, at once and opened again, and goes on.
func TestChangesFail(t *testing.T) {
	t.Parallel()
	needQEMU(t)
	eachChange(t, func(t *testing.T, _ shape, change int, before, after *album) {
		c := changes[change]
		images := 0
		for _, kind := range []trouble{oneFails, allFail, noRoom} {
			for n := 0; ; n += 1 + 4*b2i(hosttest.Race) {
				what := fmt.Sprintf("%s after %d changes", kind, n)
				f := newTroubled(before.file)
				im := mustOpen(t, device(t, f), Options{})
				f.kind, f.after = kind, n
				err := c.do(im)
				fired := f.fired()
				f.kind = noTrouble
				if !fired {
					if err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					break
				}
				album := before
				if err == nil { // it got along without
					album = after
				}
				if !album.is(t, im) {
					t.Fatalf("%s: %v: neither snapshots nor disk may change", what, err)
				}
				if im.broken.Load() {
					if kind != allFail {
						t.Fatalf("%s: the image is not written any more: %v", what, err)
					}
					_ = im.Close()
					f = newTroubled(f.b)
					im = mustOpen(t, device(t, f), Options{})
					if !album.is(t, im) {
						album = after
					}
					if !album.is(t, im) {
						t.Fatalf("%s: opened again, it is neither what it was nor what it was to be", what)
					}
				}
				inspect(t, what, im)
				if c.name != "state" { // entries may be in memory only
					asLeft := mustOpen(t, device(t, &memory{b: bytes.Clone(f.b)}), Options{ReadOnly: true})
					inspect(t, what+": as the file is", asLeft)
					if !album.is(t, asLeft) {
						t.Fatalf("%s: %v: the file differs from what is in memory", what, err)
					}
				}
				if images++; images%8 == change && !hosttest.Race {
					qemuCheckOf(t, what, f.b)
				}
				album.use(t, what, im)
				mustClose(t, im)
				im = mustOpen(t, device(t, newTroubled(f.b)), Options{})
				inspect(t, what+": opened again", im)
				mustClose(t, im)
			}
		}
		t.Logf("%d images", images)
	})
}

// TestChangesKilled kills the process while snapshots and sizes change, and cuts the host's power. The image is what it was
// before or what it was to be, without contradictions.
func TestChangesKilled(t *testing.T) {
	t.Parallel()
	needQEMU(t)
	eachChange(t, func(t *testing.T, s shape, change int, before, after *album) {
		r := &recorder{}
		r.b = bytes.Clone(before.file)
		im := mustOpen(t, device(t, r), Options{})
		r.start()
		if err := changes[change].do(im); err != nil {
			t.Fatal(err)
		}
		rnd := rand.New(rand.NewPCG(uint64(change), uint64(s.cluster)))
		for k := 0; k <= r.at(); k += 1 + 4*b2i(hosttest.Race) {
			for cut := range 3 {
				what, b := fmt.Sprintf("killed before change %d of %d", k, r.at()), r.killed(k)
				if cut > 0 {
					what, b = fmt.Sprintf("power cut before change %d of %d", k, r.at()), r.powerCut(k, rnd)
				}
				b = bytes.Clone(b)
				if !s.lazy && changes[change].name != "state" { // a write, that may lose clusters
					raw := mustOpen(t, device(t, &memory{b: bytes.Clone(b)}), Options{ReadOnly: true})
					inspect(t, what, raw)
					if k%6 == change && cut < 2 && !hosttest.Race {
						qemuCheckOf(t, what, b)
					}
				}
				im := mustOpen(t, device(t, &memory{b: b}), Options{})
				album := before
				if !album.is(t, im) {
					album = after
				}
				if !album.is(t, im) {
					t.Fatalf("%s: neither what it was nor what it was to be", what)
				}
				if cut < 2 {
					album.use(t, what, im)
				}
				mustClose(t, im)
			}
		}
	})
}

// TestChangesOfLongTables kills the process while a new refcount table must be longer than the old one, and while an L1
// table needs more clusters than one refcount block covers.
func TestChangesOfLongTables(t *testing.T) {
	t.Parallel()
	const size = 3 << 20
	shape := shape{512, Compat11, 64, false, false} // 64 clusters a block, 64 blocks a cluster of the table
	check := func(t *testing.T, what string, b []byte, n int64, want []byte) *Image {
		t.Helper()
		im := mustOpen(t, device(t, &memory{b: bytes.Clone(b)}), Options{ReadOnly: true})
		inspect(t, what, im)
		wantBytes(t, what, readAt(t, im, 0, n), want)
		return im
	}
	t.Run("refcount table", func(t *testing.T) {
		t.Parallel()
		const begin = 13 << 10 // so that the data does not end with an L2 table
		longer := func(end int64) bool {
			r := &recorder{}
			mustCreate(t, device(t, r), shape.create(size))
			im := mustOpen(t, device(t, r), Options{})
			want := append(make([]byte, begin), fill(7, end-begin)...)
			writeAt(t, im, begin, want[begin:])
			if err := im.settle(); err != nil {
				t.Fatal(err)
			}
			clusters := im.h.rtClusters
			r.start()
			if err := im.CreateSnapshot("a", 0, 0); err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, im)
			for k := 0; k <= r.at(); k += 1 + r.at()/4 {
				check(t, fmt.Sprintf("%d bytes, killed before change %d", end, k), r.killed(k), end, want)
			}
			check(t, fmt.Sprintf("%d bytes, with a snapshot", end), r.b, end, want)
			if im.h.rtClusters == clusters {
				return false
			}
			qemuCheckOf(t, fmt.Sprintf("%d bytes, with a snapshot", end), r.b)
			return true
		}
		const coarse = 16 << 10
		for end := int64(1900 << 10); end < 2<<20; end += coarse {
			if !longer(end) {
				continue
			}
			// By clusters: at some length, it is the refcount table itself for which it is too short.
			for e := end - coarse; e < end && !hosttest.Race && !testing.Short(); e += shape.cluster {
				longer(e)
			}
			return
		}
		t.Error("no refcount table became longer")
	})
	t.Run("L1 table", func(t *testing.T) {
		t.Parallel()
		r := &recorder{}
		mustCreate(t, device(t, r), shape.create(size))
		im := mustOpen(t, device(t, r), Options{})
		want := fill(7, size/2)
		writeAt(t, im, 0, want)
		if err := im.CreateSnapshot("a", 0, 0); err != nil {
			t.Fatal(err)
		}
		r.start()
		const large = 300 << 20
		for _, step := range []struct {
			do   func() error
			size int64
		}{
			{func() error { return im.Truncate(large) }, large},
			{func() error { return im.CreateSnapshot("large", 0, 0) }, large},
			{func() error { return im.ApplySnapshot("a") }, size},
			{func() error { return im.ApplySnapshot("large") }, large},
			{func() error { return im.DeleteSnapshot("large") }, large},
			{func() error { return im.Truncate(size) }, size},
		} {
			if err := step.do(); err != nil || im.Size() != step.size {
				t.Fatalf("%v, a disk of %d bytes, want %d", err, im.Size(), step.size)
			}
		}
		seen := 0
		for k := 0; k <= r.at(); k += 1 + r.at()/20 {
			im := check(t, fmt.Sprintf("killed before change %d", k), r.killed(k), size/2, want)
			seen += b2i(im.Size() == large)
		}
		if seen == 0 {
			t.Error("the disk was never large")
		}
		mustClose(t, im)
		qemuCheckOf(t, "at the end", r.b)
	})
}
