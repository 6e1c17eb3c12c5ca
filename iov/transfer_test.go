package iov

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/hosttest"
)

// scattered returns a Vec of count elements that do not overlap, a third of them empty, over fresh memory, and its size.
func scattered(rng *rand.Rand, count, longest int) Vec {
	v := make(Vec, 0, count)
	for range count {
		n := 0
		if rng.IntN(3) > 0 {
			n = 1 + rng.IntN(longest)
		}
		v = v.Append(make([]byte, n))
	}
	return v
}

func random(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func flatten(t *testing.T, v Vec) []byte {
	t.Helper()
	b := make([]byte, v.Size())
	if n, err := v.CopyTo(b, 0); n != len(b) || err != nil {
		t.Fatalf("CopyTo = %d, %v", n, err)
	}
	return b
}

func tempFile(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestFile(t *testing.T) {
	t.Parallel()
	f := tempFile(t)
	fd := int(f.Fd())
	rng := rand.New(rand.NewPCG(1, 1))
	for _, count := range []int{0, 1, 2, 1023, 1024, 1025, 2000, 5000} {
		src := scattered(rng, count, 50)
		data := random(rng, src.Size())
		if _, err := src.CopyFrom(0, data); err != nil {
			t.Fatal(err)
		}
		off := rng.Int64N(10000)
		if n, err := WriteAt(fd, src, off); n != len(data) || err != nil {
			t.Fatalf("WriteAt of %d elements = %d, %v, want %d", count, n, err, len(data))
		}
		got := make([]byte, len(data))
		if _, err := f.ReadAt(got, off); err != nil && count > 0 || !bytes.Equal(got, data) {
			t.Fatalf("the file does not hold what %d elements wrote: %v", count, err)
		}
		dst := scattered(rng, 3*count, 50) // of another shape, and mostly larger
		if err := f.Truncate(off + int64(len(data))); err != nil {
			t.Fatal(err)
		}
		n, err := ReadAt(fd, dst, off)
		if want := min(len(data), dst.Size()); n != want || err != nil {
			t.Fatalf("ReadAt of %d elements = %d, %v, want %d", len(dst), n, err, want)
		}
		if got := flatten(t, dst); !bytes.Equal(got[:n], data[:n]) || !Of(got[n:]).IsZero() {
			t.Fatalf("ReadAt of %d elements gives other bytes", len(dst))
		}
	}
}

// More empty elements than one call takes must not look like the end of the file.
func TestFileEmptyElements(t *testing.T) {
	t.Parallel()
	f := tempFile(t)
	if _, err := f.WriteString("abcdef"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 6)
	v := make(Vec, 3000).Append(b[:2])
	v = append(v, make(Vec, 3000)...).Append(b[2:])
	if n, err := ReadAt(int(f.Fd()), v, 0); n != 6 || err != nil || string(b) != "abcdef" {
		t.Errorf("ReadAt = %d, %v, %q", n, err, b)
	}
}

func TestFileErrors(t *testing.T) {
	t.Parallel()
	f := tempFile(t)
	v := Of([]byte("abc"))
	for _, off := range []int64{-1, math.MinInt64, math.MaxInt64, math.MaxInt64 - 2} {
		if n, err := ReadAt(int(f.Fd()), v, off); n != 0 || !errors.Is(err, ErrRange) {
			t.Errorf("ReadAt(%d) = %d, %v, want ErrRange", off, n, err)
		}
		if n, err := WriteAt(int(f.Fd()), v, off); n != 0 || !errors.Is(err, ErrRange) {
			t.Errorf("WriteAt(%d) = %d, %v, want ErrRange", off, n, err)
		}
	}
	if n, err := ReadAt(-1, v, 0); n != 0 || !errors.Is(err, unix.EBADF) || !strings.Contains(err.Error(), "preadv") {
		t.Errorf("ReadAt of a bad descriptor = %d, %v", n, err)
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	if n, err := WriteAt(int(full.Fd()), v, 0); n != 0 || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("WriteAt to /dev/full = %d, %v", n, err)
	}
}

// The kernel moves at most 2^31-4096 bytes in one call and cuts an element to do so.
func TestFileShortTransfers(t *testing.T) {
	t.Parallel()
	fd, err := unix.MemfdCreate("iov", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	const piece, pieces = 4<<20 + 12, 520 // 2.03 GiB of holes, which cost the host nothing
	const size = piece * pieces
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	shared := make([]byte, piece)
	last := make([]byte, piece)
	v := make(Vec, 0, pieces)
	for range pieces - 1 {
		v = v.Append(shared)
	}
	v = v.Append(last)
	mark := []byte("the last bytes")
	if _, err := unix.Pwrite(fd, mark, size-int64(len(mark))); err != nil {
		t.Fatal(err)
	}
	if n, err := ReadAt(fd, v, 0); n != size || err != nil || !bytes.HasSuffix(last, mark) {
		t.Errorf("ReadAt of %d bytes = %d, %v", size, n, err)
	}
	null, err := os.OpenFile("/dev/null", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if n, err := WriteAt(int(null.Fd()), v, 0); n != size || err != nil {
		t.Errorf("WriteAt of %d bytes = %d, %v", size, n, err)
	}
}

// However little each call moves, the calls together cover every byte once and in order, within the kernel's limits.
func TestWindows(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 3))
	for range 300 {
		v := scattered(rng, rng.IntN(2500), 20)
		size := v.Size()
		off := rng.IntN(size + 1)
		n := rng.IntN(size - off + 1)
		elems := slices.Clone(v)
		i, skip, err := v.seek(off)
		if err != nil {
			t.Fatal(err)
		}
		want, _ := v.Slice(off, n)
		tr := transfer{rest: v[i:], skip: skip, left: n}
		var got Vec
		for tr.left > 0 {
			w := tr.window()
			k := w.Size()
			if len(w) == 0 || len(w) > MaxElems || k == 0 || k > tr.left {
				t.Fatalf("a window of %d elements and %d bytes with %d to go", len(w), k, tr.left)
			}
			if len(w) < MaxElems && k < tr.left {
				t.Fatalf("a window of only %d elements leaves %d bytes", len(w), tr.left-k)
			}
			k = 1 + rng.IntN(k)
			part, err := w.Slice(0, k)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, part...)
			tr.advance(k)
		}
		tr.release()
		// Short transfers divide got more finely than want: compare byte by byte.
		a, b := addrs(got), addrs(want)
		if !slices.Equal(a, b) {
			t.Fatalf("the windows cover %d bytes, want %d, or others", len(a), len(b))
		}
		if !slices.Equal(v, elems) {
			t.Fatal("the vector itself changed")
		}
	}
}

func addrs(v Vec) []uintptr {
	var out []uintptr
	for _, r := range v {
		for i := range uintptr(r.Len()) {
			out = append(out, r.addr()+i)
		}
	}
	return out
}

func socketpair(t *testing.T, kind int) (a, b int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(fds[0])
		unix.Close(fds[1])
	})
	return fds[0], fds[1]
}

// On a full socket Send stops without an error and goes on later from where it was; Recv likewise on an empty one.
func TestSocketPartial(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t, unix.SOCK_STREAM|unix.SOCK_NONBLOCK)
	if err := unix.SetsockoptInt(a, unix.SOL_SOCKET, unix.SO_SNDBUF, 4096); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(4, 4))
	src, dst := scattered(rng, 3000, 200), scattered(rng, 5000, 200)
	data := random(rng, src.Size())
	if _, err := src.CopyFrom(0, data); err != nil {
		t.Fatal(err)
	}
	const from, to, tail = 777, 55, 99 // where the bytes lie in src and dst
	n := len(data) - from - tail
	sent, received, sends, blocked := 0, 0, 0, 0
	for received < n {
		k, err := Send(a, src, from+sent, n-sent)
		if k == 0 && n > sent {
			if err != unix.EAGAIN {
				t.Fatalf("Send on a full socket: %v, want EAGAIN", err)
			}
			blocked++
		} else if err != nil {
			t.Fatal(err)
		}
		sent += k
		sends++
		if sends%2 == 0 { // so that every other Send finds the socket full
			k, err = Recv(b, dst, to+received, n-received)
			if err != nil && err != unix.EAGAIN || (err != nil) != (k == 0) {
				t.Fatalf("Recv = %d, %v", k, err)
			}
			received += k
		}
	}
	if sent != n || blocked == 0 {
		t.Errorf("%d bytes sent of %d, %d times blocked", sent, n, blocked)
	}
	got := flatten(t, dst)
	if !bytes.Equal(got[to:to+n], data[from:from+n]) || !Of(got[:to], got[to+n:]).IsZero() {
		t.Error("other bytes arrived")
	}
	if k, err := Recv(b, dst, 0, 1); k != 0 || err != unix.EAGAIN {
		t.Errorf("Recv on an empty socket = %d, %v, want EAGAIN", k, err)
	}
}

func TestSocketShutdown(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t, unix.SOCK_STREAM)
	v := Of(make([]byte, 3), make([]byte, 7))
	if n, err := Send(a, Of([]byte("hel"), []byte("lo")), 1, 4); n != 4 || err != nil {
		t.Fatalf("Send = %d, %v", n, err)
	}
	if err := unix.Shutdown(a, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	if n, err := Recv(b, v, 2, 4); n != 4 || err != nil || string(flatten(t, v)[2:6]) != "ello" {
		t.Errorf("Recv of all there is = %d, %v", n, err)
	}
	if n, err := Recv(b, v, 0, 5); n != 0 || err != io.EOF {
		t.Errorf("Recv after the end = %d, %v, want EOF", n, err)
	}
	if n, err := Recv(b, v, 10, 0); n != 0 || err != nil {
		t.Errorf("Recv of nothing = %d, %v", n, err)
	}
	if n, err := Send(b, v, 0, 6); n != 6 || err != nil {
		t.Fatalf("Send the other way = %d, %v", n, err)
	}
	if err := unix.Shutdown(b, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	if n, err := Recv(a, v, 0, 10); n != 6 || err != io.EOF {
		t.Errorf("Recv across the end = %d, %v, want 6, EOF", n, err)
	}
	if n, err := Send(a, v, 0, 1); n != 0 || !errors.Is(err, unix.EPIPE) {
		t.Errorf("Send after shutdown = %d, %v, want EPIPE", n, err)
	}
}

func TestSocketRange(t *testing.T) {
	t.Parallel()
	v := Of(make([]byte, 10))
	for _, c := range [][2]int{{-1, 1}, {0, -1}, {0, 11}, {11, 0}, {5, 6}, {math.MaxInt, math.MaxInt}, {1, math.MaxInt}} {
		if n, err := Send(-1, v, c[0], c[1]); n != 0 || !errors.Is(err, ErrRange) {
			t.Errorf("Send(%d, %d) = %d, %v, want ErrRange", c[0], c[1], n, err)
		}
		if n, err := Recv(-1, v, c[0], c[1]); n != 0 || !errors.Is(err, ErrRange) {
			t.Errorf("Recv(%d, %d) = %d, %v, want ErrRange", c[0], c[1], n, err)
		}
	}
}

// A signal to the thread that waits in the kernel must not end the transfer. With a receive timeout set, the kernel does
// not restart the call by itself (signal(7)).
func TestSocketInterrupted(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t, unix.SOCK_STREAM)
	if err := unix.SetsockoptTimeval(b, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 600}); err != nil {
		t.Fatal(err)
	}
	v := Of(make([]byte, 1), make([]byte, 2))
	for name, recv := range map[string]func() (int, error){
		"Recv": func() (int, error) { return Recv(b, v, 0, 3) },
		"Read": func() (int, error) { return Read(b, v) },
	} {
		tid := make(chan int)
		result := make(chan error, 1)
		go func() {
			runtime.LockOSThread() // and let the thread end with the goroutine
			tid <- unix.Gettid()
			n, err := recv()
			if err == nil && n != 3 {
				err = fmt.Errorf("only %d bytes", n)
			}
			result <- err
		}()
		thread := <-tid
		for range 5 {
			waitInCall(t, thread, result)
			if err := unix.Tgkill(unix.Getpid(), thread, unix.SIGURG); err != nil { // Go's own signal, harmless
				t.Fatal(err)
			}
		}
		waitInCall(t, thread, result)
		if _, err := unix.Write(a, []byte("abc")); err != nil {
			t.Fatal(err)
		}
		if err := <-result; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// waitInCall returns once the thread sleeps in recvmsg or readv.
func waitInCall(t *testing.T, thread int, result chan error) {
	t.Helper()
	for {
		call, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", thread))
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
			t.Fatalf("the call ended early: %v", <-result)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, nr := range []int{unix.SYS_RECVMSG, unix.SYS_READV} {
			if bytes.HasPrefix(call, fmt.Appendf(nil, "%d ", nr)) {
				return
			}
		}
		select {
		case err := <-result:
			t.Fatalf("the call ended early: %v", err)
		default:
			runtime.Gosched()
		}
	}
}

// Read and Write keep messages whole, one system call each.
func TestMessages(t *testing.T) {
	t.Parallel()
	a, b := socketpair(t, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK)
	dst := Of(make([]byte, 2), nil, make([]byte, 30))
	if n, err := Read(b, dst); n != 0 || err != unix.EAGAIN {
		t.Errorf("Read of nothing = %d, %v, want EAGAIN", n, err)
	}
	for _, msg := range []string{"one", "three"} {
		if n, err := Write(a, Of([]byte(msg[:1]), []byte(msg[1:]))); n != len(msg) || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
	}
	for _, msg := range []string{"one", "three"} {
		if n, err := Read(b, dst); n != len(msg) || err != nil || string(flatten(t, dst)[:n]) != msg {
			t.Errorf("Read = %d, %v, want %q", n, err, msg)
		}
	}
	if n, err := Read(b, make(Vec, 2)); n != 0 || err != nil {
		t.Errorf("Read into nothing = %d, %v", n, err)
	}
	if _, err := Write(-1, Of([]byte("x"))); !errors.Is(err, unix.EBADF) {
		t.Errorf("Write to a bad descriptor: %v", err)
	}

	one := []byte{7}
	many := make(Vec, 0, 5000)
	for range MaxElems {
		many = append(many.Append(one), Range{}, Range{}) // only a third of them counts
	}
	if n, err := Write(a, many); n != MaxElems || err != nil {
		t.Errorf("Write of %d elements = %d, %v", len(many), n, err)
	}
	if n, err := Read(b, Of(make([]byte, 4096))); n != MaxElems || err != nil {
		t.Errorf("Read = %d, %v", n, err)
	}
	many = many.Append(one)
	if n, err := Write(a, many); n != 0 || !errors.Is(err, ErrTooMany) {
		t.Errorf("Write of %d elements = %d, %v, want ErrTooMany", len(many), n, err)
	}
	if n, err := Read(b, many); n != 0 || !errors.Is(err, ErrTooMany) {
		t.Errorf("Read into %d elements = %d, %v, want ErrTooMany", len(many), n, err)
	}
}

func TestTransfersDoNotAllocate(t *testing.T) {
	f := tempFile(t)
	fd := int(f.Fd())
	a, b := socketpair(t, unix.SOCK_STREAM|unix.SOCK_NONBLOCK)
	buf := make([]byte, 3000)
	v := make(Vec, 0, len(buf))
	for i := range buf {
		v = v.Append(buf[i : i+1])
	}
	ops := map[string]func(){
		"WriteAt": func() { _, _ = WriteAt(fd, v, 0) },
		"ReadAt":  func() { _, _ = ReadAt(fd, v, 0) },
		"whole": func() {
			_, _ = Send(a, v, 0, 3000)
			_, _ = Recv(b, v, 0, 3000)
		},
		"message": func() {
			_, _ = Write(a, v[:100])
			_, _ = Read(b, v[:100])
		},
		"EAGAIN": func() { _, _ = Read(b, v[:100]) },
	}
	if !hosttest.Race {
		w := Of(buf[:1000], buf[1000:])
		ops["cut"] = func() {
			_, _ = Send(a, w, 500, 1000)
			_, _ = Recv(b, w, 1, 1000)
		}
	}
	for name, op := range ops {
		if allocs := testing.AllocsPerRun(50, op); allocs != 0 {
			t.Errorf("%s: %v allocations, want none", name, allocs)
		}
	}
}
