package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/iov"
)

var killsFlag = flag.Int("qcow2.kills", 40, "processes that TestKill kills")

const (
	killEnv     = "KVMLET_TEST_QCOW2_KILL" // in the process to be killed: what killedProcess is told
	killWorkers = 4
	killSize    = 2 << 20 // bytes of the disk
)

// killJob is what one process does. Its workers write to slots of their own, which lie side by side, so that they share
// clusters and tables. What each does follows from the seed, so the parent knows it.
type killJob struct {
	path  string
	seed  uint64
	slot  int64 // bytes
	cache int64 // bytes of tables in memory
}

func (j killJob) String() string { return fmt.Sprintf("%d %d %d %s", j.seed, j.slot, j.cache, j.path) }

// killOp is one request. Sectors are written as a whole, with one byte.
type killOp struct {
	op     blk.Op
	off, n int64
	unmap  bool
	b      byte
}

// worker returns the requests of worker w, without end.
func (j killJob) worker(w int) func() killOp {
	r := rand.New(rand.NewPCG(j.seed, uint64(w)))
	return func() killOp {
		slot := (r.Int64N(killSize/j.slot/killWorkers)*killWorkers + int64(w)) * j.slot
		o := killOp{off: r.Int64N(j.slot/512) * 512, b: byte(1 + r.IntN(255)), unmap: r.IntN(2) == 0}
		o.n = (1 + r.Int64N((j.slot-o.off)/512)) * 512
		if r.IntN(3) == 0 {
			o.off, o.n = 0, j.slot
		}
		o.off += slot
		switch n := r.IntN(20); {
		case n < 12:
			o.op = blk.OpWrite
		case n < 14:
			o.op, o.b = blk.OpWriteZeroes, 0
		case n < 17:
			o.op, o.b = blk.OpDiscard, 0
		default:
			o.op = blk.OpFlush
		}
		return o
	}
}

func (o killOp) do(ctx context.Context, d *blk.Device) error {
	r := &blk.Request{Op: o.op, Off: o.off, Len: o.n}
	switch {
	case o.op == blk.OpWrite:
		r.Vec = iov.Of(bytes.Repeat([]byte{o.b}, int(o.n)))
	case o.op == blk.OpWriteZeroes && o.unmap:
		r.Flags = blk.MayUnmap
	}
	return d.Do(ctx, r)
}

// killReport is what the process tells its parent: that a worker is about to send its request of a number, or that this
// one, a flush, went well.
type killReport struct {
	Worker  uint8
	Flushed bool
	Number  uint32
}

// killedProcess writes to an image until it is killed.
func killedProcess(job string) error {
	var j killJob
	if _, err := fmt.Sscan(job, &j.seed, &j.slot, &j.cache, &j.path); err != nil {
		return err
	}
	f, err := raw.Open(j.path, raw.Options{})
	if err != nil {
		return err
	}
	file, err := blk.New(f, blk.Options{})
	if err != nil {
		return err
	}
	im, err := Open(file, Options{L2Cache: j.cache, RefcountCache: j.cache})
	if err != nil {
		return err
	}
	d, err := blk.New(im, blk.Options{})
	if err != nil {
		return err
	}
	parent := os.NewFile(3, "parent")
	failed := make(chan error)
	for w := range killWorkers {
		next := j.worker(w)
		go func() {
			for n := uint32(0); ; n++ {
				o := next()
				tell := func(flushed bool) error {
					// In one write, so that reports don't mix.
					p, err := binary.Append(nil, binary.LittleEndian, killReport{uint8(w), flushed, n})
					if err == nil {
						_, err = parent.Write(p)
					}
					return err
				}
				err := tell(false)
				if err == nil {
					err = o.do(context.Background(), d)
				}
				if err == nil && o.op == blk.OpFlush {
					err = tell(true)
				}
				if err != nil {
					failed <- fmt.Errorf("worker %d, request %d, %+v: %w", w, n, o, err)
				}
			}
		}()
	}
	return <-failed
}

// kill runs a process, kills it after it told so many reports, and returns how many requests each worker may have sent,
// and how many of them were flushed.
func (j killJob) kill(t *testing.T, reports int) (sent, flushed [killWorkers]int) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var said bytes.Buffer
	cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
	cmd.Env = append(os.Environ(), killEnv+"="+j.String())
	cmd.ExtraFiles = []*os.File{w}
	cmd.Stdout, cmd.Stderr = &said, &said
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() }) // it hangs
	defer timer.Stop()
	for n := 0; ; n++ {
		var k killReport
		if err := binary.Read(r, binary.LittleEndian, &k); err != nil {
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			break
		}
		if k.Flushed {
			flushed[k.Worker] = int(k.Number)
		} else {
			sent[k.Worker] = int(k.Number) + 1
		}
		if n == reports {
			_ = cmd.Process.Kill()
		}
	}
	err = cmd.Wait()
	if s, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !s.Signaled() || s.Signal() != syscall.SIGKILL {
		t.Fatalf("the process ended before it was killed: %v\n%s", err, &said)
	}
	if !timer.Stop() {
		t.Fatal("the process hung")
	}
	return sent, flushed
}

// may returns what each sector may hold after the process was killed, where it held disk at first.
func (j killJob) may(disk []byte, sent, flushed [killWorkers]int) [][]byte {
	may := make([][]byte, killSize/512)
	for s := range may {
		may[s] = []byte{disk[s*512]}
	}
	for w := range killWorkers {
		next := j.worker(w)
		for n := range sent[w] {
			o := next()
			for s := o.off / 512; s < (o.off+o.n)/512; s++ {
				switch {
				case o.op == blk.OpFlush:
				case n < flushed[w] && o.op != blk.OpDiscard:
					may[s] = []byte{o.b}
				default: // a discard may leave the old bytes
					may[s] = append(may[s], o.b)
				}
			}
		}
	}
	return may
}

// TestKill kills processes that write to an image, at any moment. QEMU and our own check must find it sound, whatever was
// flushed must be there, and the next process goes on with it.
func TestKill(t *testing.T) {
	if job := os.Getenv(killEnv); job != "" {
		fmt.Println(killedProcess(job))
		os.Exit(1)
	}
	t.Parallel()
	needQEMU(t)
	for _, lazy := range []bool{false, true} {
		t.Run(fmt.Sprintf("lazy=%v", lazy), func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "image")
			rnd := rand.New(rand.NewPCG(uint64(b2i(lazy)), 0))
			var disk []byte
			all := 0
			for round := range max(*killsFlag/2, 1) {
				if round%5 == 0 { // a new one
					_ = os.Remove(path)
					cluster := int64(512) << (3 * (round / 5 % 4)) // to 256 KiB
					d := onDisk(t, path)
					mustCreate(t, d, CreateOptions{Size: killSize, ClusterSize: cluster, LazyRefcounts: lazy})
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
					disk = make([]byte, killSize)
				}
				j := killJob{path: path, seed: rnd.Uint64(), slot: 4096 << (2 * rnd.IntN(3)), cache: rnd.Int64N(2)}
				sent, flushed := j.kill(t, rnd.IntN(1+rnd.IntN(2000)))
				for w := range killWorkers {
					all += sent[w]
				}
				theirs := qemuKilled(t, path, lazy, round%4 == 3)
				im := mustOpen(t, onDisk(t, path), Options{}) // repairs it where it is dirty
				if r, err := Check(context.Background(), im, RepairNone); err != nil || r.Corruptions > 0 || r.Errors > 0 {
					t.Fatalf("round %d: check: %v, %+v", round, err, r)
				}
				now := readAt(t, im, 0, killSize)
				mustClose(t, im)
				if theirs != nil {
					wantBytes(t, fmt.Sprintf("round %d, read by QEMU", round), theirs, now)
				}
				for s, may := range j.may(disk, sent, flushed) {
					sector := now[s*512:][:512]
					if !bytes.Equal(sector, fill(sector[0], 512)) || !bytes.Contains(may, sector[:1]) {
						t.Fatalf("round %d, %v: sector %d begins with %x, want one of %x all through; sent %d, flushed %d",
							round, j, s, sector[:4], may, sent, flushed)
					}
				}
				disk = now
			}
			t.Logf("%d requests", all)
		})
	}
}

// qemuKilled has QEMU check an image whose process was killed, and returns how it reads the disk if read is set. With lazy
// refcounts it has to repair it before; a copy, since ours must get along with the image as it was left.
func qemuKilled(t *testing.T, path string, lazy, read bool) []byte {
	t.Helper()
	if lazy {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		dirty := b[79]&incompatDirty != 0 // the last byte of the incompatible features
		path = filepath.Join(t.TempDir(), "copy")
		writeFile(t, path, b)
		out := qemu(t, "qemu-img", "check", "-r", "all", "-f", "qcow2", path)
		if !strings.Contains(out, "No errors were found") || !dirty && strings.Contains(out, "ERROR") {
			t.Fatalf("qemu-img check -r all (dirty: %v): %s", dirty, out)
		}
	} else if out, err := tryQEMU(t, "qemu-img", "check", "-f", "qcow2", path); err != nil && exitCode(err) != 3 { // 3: leaks
		t.Fatalf("qemu-img check: %v\n%s", err, out)
	}
	if !read {
		return nil
	}
	return qemuRead(t, path)
}
