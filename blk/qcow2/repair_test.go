package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
)

// TestRepairSnapshots repairs images in which refcounts and copied flags disagree, as a process leaves them that was killed
// while it took or deleted snapshots in place. Disk and snapshots hold what they did.
func TestRepairSnapshots(t *testing.T) {
	t.Parallel()
	needQEMU(t)
	for _, s := range []shape{{512, Compat010, 16, false, false}, {4096, Compat11, 16, false, false}} {
		a := newAlbum(t, s)
		for _, c := range []struct {
			name  string
			spoil func(n int64, e uint64) (d int64, entry uint64) // d is added to the refcount
		}{
			{"refcounts raised, flags still set", func(_ int64, e uint64) (int64, uint64) { return 1, e }},
			{"refcounts not lowered", func(n int64, e uint64) (int64, uint64) { return n % 3, e &^ entryCopied }},
			{"flags not cleared", func(_ int64, e uint64) (int64, uint64) { return 0, e | entryCopied }},
			{"flags not set", func(_ int64, e uint64) (int64, uint64) { return 0, e &^ entryCopied }},
			{"refcounts too low", func(_ int64, e uint64) (int64, uint64) { return -1, e | entryCopied }},
		} {
			t.Run(fmt.Sprint(s, "/", c.name), func(t *testing.T) {
				t.Parallel()
				m := &memory{b: bytes.Clone(a.file)}
				im := mustOpen(t, device(t, m), Options{})
				n := int64(0)
				entry := func(e *uint64) {
					if k := kindOf(*e); k != normal && k != zeroPlaced {
						return
					}
					n++
					d, with := c.spoil(n, *e)
					if _, err := im.refs.add(int64(*e&entryOffset)>>im.cb, d); err != nil {
						t.Fatal(err)
					}
					*e = with
				}
				for i := range im.l1 {
					if im.l1[i] == 0 {
						continue
					}
					table := int64(im.l1[i] & entryOffset)
					entries, err := im.readEntries(table, int(im.cluster/8))
					if err != nil {
						t.Fatal(err)
					}
					for k := range entries {
						entry(&entries[k])
					}
					entry(&im.l1[i])
					if err := im.f.write(encodeEntries(entries), table); err != nil {
						t.Fatal(err)
					}
				}
				if err := im.f.write(encodeEntries(im.l1), int64(im.h.l1Off)); err != nil {
					t.Fatal(err)
				}
				if err := im.sync(); err != nil {
					t.Fatal(err)
				}
				if _, r := repaired(t, a, m.b); r.FixedCorruptions+r.FixedLeaks == 0 {
					t.Fatalf("repair: %+v", r)
				}
			})
		}
	}
}

// repaired puts a spoiled image of a into a file, repairs it and checks that it is what it was. found is what a check
// without a repair finds before.
func repaired(t *testing.T, a *album, spoiled []byte) (found, fixed Report) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	writeFile(t, path, spoiled)
	if out, err := tryQEMU(t, "qemu-img", "check", "-f", "qcow2", path); exitCode(err) != 2 { // corruptions
		t.Fatalf("qemu-img check finds nothing wrong: %v\n%s", err, out)
	}
	im := mustOpen(t, onDisk(t, path), Options{Repair: true})
	found, err := Check(context.Background(), im, RepairNone)
	if err != nil || found.Clean() {
		t.Fatalf("check: %+v, %v", found, err)
	}
	if fixed, err = Check(context.Background(), im, RepairAll); err != nil || !fixed.Clean() {
		t.Fatalf("repair: %+v, %v", fixed, err)
	}
	mustClose(t, im)
	qemuCheck(t, path)
	im = mustOpen(t, onDisk(t, path), Options{})
	inspect(t, "repaired", im)
	if !a.is(t, im) {
		t.Fatal("repaired, it is not what it was")
	}
	a.use(t, "repaired", im)
	mustClose(t, im)
	qemuCheck(t, path)
	return found, fixed
}

// What refers to nothing, and entries that lack what the format demands, are found as qemu-img finds them, and mended.
func TestRepairEntries(t *testing.T) {
	t.Parallel()
	needQEMU(t)
	s := shape{4096, Compat11, 16, false, false}
	a := newAlbum(t, s)
	l1Entry := func(e uint64) func(t *testing.T, im *Image) {
		return func(t *testing.T, im *Image) {
			i := slices.Index(im.l1, 0)
			if i < 0 {
				t.Fatal("no L1 entry is free")
			}
			im.l1[i] = e
			if err := im.f.write(encodeEntries(im.l1), int64(im.h.l1Off)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, spoil := range map[string]func(t *testing.T, im *Image){
		"L1, copied flag alone": l1Entry(entryCopied),
		"L1, reserved bit":      l1Entry(1),
		"L1, both":              l1Entry(entryCopied | 1<<60),
		"L1 of a snapshot": func(t *testing.T, im *Image) {
			snap := im.snaps[0]
			l1, err := im.readEntries(snap.l1Off, int(snap.l1Size))
			if err != nil {
				t.Fatal(err)
			}
			l1[0] |= 1 << 3
			if err := im.f.write(encodeEntries(l1), snap.l1Off); err != nil {
				t.Fatal(err)
			}
		},
		"snapshot's extra data": func(t *testing.T, im *Image) {
			short := *im.snaps[0]
			short.extra = short.extra[:8]
			err := im.f.write(encodeSnapshots(append([]*Snapshot{&short}, im.snaps[1:]...)), int64(im.h.snapOff))
			if err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := &memory{b: bytes.Clone(a.file)}
			im := mustOpen(t, device(t, m), Options{})
			spoil(t, im)
			if found, fixed := repaired(t, a, m.b); found.Corruptions == 0 || fixed.FixedCorruptions == 0 {
				t.Fatalf("check: %+v; repair: %+v", found, fixed)
			}
		})
	}
}
