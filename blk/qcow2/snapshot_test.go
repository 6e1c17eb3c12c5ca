package qcow2

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/iov"
)

// TestSnapshotsWithQEMU lets both sides use each other's snapshots.
func TestSnapshotsWithQEMU(t *testing.T) {
	eachShape(t, func(s shape) bool { return s.bits >= 8 && s.cluster <= 1<<18 }, func(t *testing.T, s shape, path string) {
		const size = 2<<20 + 512
		d := onDisk(t, path)
		mustCreate(t, d, s.create(size))
		im := mustOpen(t, d, Options{})
		one := make([]byte, size)
		scribble(t, im, one, 1, 20)
		state := fill(0x5a, 100_000)
		if _, err := im.WriteStateAt(iov.Of(state), 0); err != nil {
			t.Fatal(err)
		}
		if err := im.CreateSnapshot("one", int64(len(state)), 3*time.Second); err != nil {
			t.Fatal(err)
		}
		if err := im.CreateSnapshot("one", 0, 0); !errors.Is(err, ErrExist) {
			t.Errorf("same name again: %v", err)
		}
		two := bytes.Clone(one)
		scribble(t, im, two, 2, 20)
		wantClean(t, im)
		closeForQEMU(t, im, path, two)
		if out := qemu(t, "qemu-img", "snapshot", "-l", path); !strings.Contains(out, "one") || !strings.Contains(out, "97.7 KiB") {
			t.Errorf("qemu-img snapshot -l:\n%s", out)
		}
		qemu(t, "qemu-img", "snapshot", "-c", "two", path)
		qemu(t, "qemu-img", "snapshot", "-a", "one", path)
		wantBytes(t, "QEMU's read of one", qemuRead(t, path), one)
		qemuCheck(t, path)

		im = mustOpen(t, onDisk(t, path), Options{})
		if list := im.Snapshots(); len(list) != 2 || list[0].Name != "one" || list[1].Name != "two" || list[0].VMState != 100_000 ||
			list[0].VMClock != 3*time.Second || list[1].DiskSize != size {
			t.Fatalf("snapshots: %+v", list)
		}
		wantBytes(t, "read of one", readAt(t, im, 0, size), one)
		scribble(t, im, bytes.Clone(one), 3, 10)
		if err := im.ApplySnapshot("two"); err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "read of two", readAt(t, im, 0, size), two)
		if err := im.ApplySnapshot("one"); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 200_000)
		n, err := im.ReadStateAt(iov.Of(got), 0)
		if err != nil || n < len(state) {
			t.Fatalf("state: %d bytes, %v", n, err)
		}
		wantBytes(t, "state", got[:len(state)], state)
		wantClean(t, im)
		if err := im.DeleteSnapshot("one"); err != nil {
			t.Fatal(err)
		}
		wantClean(t, im)
		wantBytes(t, "read after delete", readAt(t, im, 0, size), one)
		if err := im.DeleteSnapshot("one"); !errors.Is(err, ErrNotExist) {
			t.Errorf("delete again: %v", err)
		}
		scribble(t, im, one, 4, 20)
		wantClean(t, im)
		closeForQEMU(t, im, path, one)
		qemu(t, "qemu-img", "snapshot", "-a", "two", path)
		wantBytes(t, "QEMU's read of two", qemuRead(t, path), two)
		qemu(t, "qemu-img", "snapshot", "-d", "two", path)
		qemuCheck(t, path)
	})
}

// TestSnapshotRefcountLimit: refcounts of one bit can't count two users; nothing must change.
func TestSnapshotRefcountLimit(t *testing.T) {
	t.Parallel()
	m := &memory{}
	mustCreate(t, device(t, m), CreateOptions{Size: 1 << 20, ClusterSize: 4096, RefcountBits: 1})
	im := mustOpen(t, device(t, m), Options{})
	writeAt(t, im, 0, fill(1, 100_000))
	if err := im.CreateSnapshot("a", 0, 0); !errors.Is(err, ErrFeature) {
		t.Errorf("snapshot: %v", err)
	}
	wantClean(t, im)
	writeAt(t, im, 50_000, fill(2, 100_000))
	wantClean(t, im)
}

// TestResizeWithQEMU grows and shrinks images with a backing file that is longer than they are.
func TestResizeWithQEMU(t *testing.T) {
	eachShape(t, anyShape, func(t *testing.T, s shape, path string) {
		d := onDisk(t, path)
		mustCreate(t, d, s.create(1<<20+512))
		im := mustOpen(t, d, Options{})
		want := fill(1, 1<<20+512)
		writeAt(t, im, 0, want)
		for _, size := range []int64{1<<20 + 1024, 700<<10 + 512, 701 << 10, 3 << 20, 512, 2 << 20} {
			if err := im.Truncate(size); err != nil {
				t.Fatal(err)
			}
			if k := int64(len(want)); size > k {
				want = append(want, make([]byte, size-k)...)
			}
			want = want[:size:size]
			wantBytes(t, "read", readAt(t, im, 0, size), want)
			writeAt(t, im, size-512, fill(9, 512))
			copy(want[size-512:], fill(9, 512))
			wantClean(t, im)
		}
		closeForQEMU(t, im, path, want)
		qemu(t, "qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", path, "1M")
		im = mustOpen(t, onDisk(t, path), Options{})
		wantClean(t, im)
		wantBytes(t, "read", readAt(t, im, 0, 1<<20), want[:1<<20])
	})
}
