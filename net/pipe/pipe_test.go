package pipe

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/hosttest"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/net"
)

func check(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// pair returns a cable whose ends have headers of these lengths.
func pair(tb testing.TB, depth, na, nb int) (*End, *End) {
	tb.Helper()
	a, b := New(Options{Depth: depth})
	check(tb, a.SetFeatures(0, na))
	check(tb, b.SetFeatures(0, nb))
	tb.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func TestSetFeatures(t *testing.T) {
	t.Parallel()
	a, _ := New(Options{Features: net.CSum | net.GuestCSum})
	if a.Features() != net.CSum|net.GuestCSum {
		t.Errorf("features %#x", a.Features())
	}
	check(t, a.SetFeatures(net.CSum, net.HeaderLen))
	for _, c := range []struct {
		f net.Features
		n int
	}{{net.HostTSO4, net.HeaderLen}, {0, 11}, {0, -1}} {
		if err := a.SetFeatures(c.f, c.n); !errors.Is(err, net.ErrFeatures) {
			t.Errorf("%#x, %d: %v", uint64(c.f), c.n, err)
		}
	}
}

// TestHeaders sends between ends with every combination of header lengths, cut anywhere.
func TestHeaders(t *testing.T) {
	t.Parallel()
	header := []byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
	payload := []byte("payload")
	for _, na := range []int{0, 10, 12} {
		for _, nb := range []int{0, 10, 12} {
			a, b := pair(t, 0, na, nb)
			want := append(append([]byte(nil), header[:min(na, nb, 10)]...), make([]byte, max(0, nb-min(na, nb, 10)))...)
			if nb == 12 {
				want[10], want[11] = 1, 0
			}
			want = append(want, payload...)
			sent := append(append([]byte(nil), header[:na]...), payload...)
			for cut := range sent {
				if n, err := a.Send(iov.Of(sent[:cut], sent[cut:])); n != len(sent) || err != nil {
					t.Fatal(n, err)
				}
				got := make([]byte, 40)
				n, err := b.Recv(iov.Of(got[:cut], got[cut:cut+1], got[cut+1:]))
				if err != nil || !bytes.Equal(got[:n], want) {
					t.Fatalf("%d to %d, cut at %d: % x, %v", na, nb, cut, got[:n], err)
				}
			}
		}
	}
}

// TestOrder runs frames of every size through a short cable, both ways at once.
func TestOrder(t *testing.T) {
	t.Parallel()
	a, b := pair(t, 3, 12, 0)
	const frames = 20000
	run := func(from, to *End, nf, nt int) <-chan error {
		done := make(chan error, 2)
		size := func(i int) int { return 8 + i*i%1500 }
		go func() {
			buf := make([]byte, 2000)
			for i := range frames {
				binary.LittleEndian.PutUint64(buf[nf:], uint64(i))
				if _, err := from.Send(iov.Of(buf[:nf+size(i)])); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
		go func() {
			buf := make([]byte, 2000)
			for i := range frames {
				n, err := to.Recv(iov.Of(buf))
				if err == nil && (n != nt+size(i) || binary.LittleEndian.Uint64(buf[nt:]) != uint64(i)) {
					err = errors.New("another frame")
				}
				if err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
		return done
	}
	there, back := run(a, b, 12, 0), run(b, a, 0, 12)
	for range 2 {
		check(t, <-there)
		check(t, <-back)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	a, b := pair(t, 0, 12, 12)
	if _, err := a.Send(iov.Of(make([]byte, 11))); !errors.Is(err, net.ErrHeader) {
		t.Error(err)
	}
	if _, err := a.Send(iov.Of(make([]byte, 12+net.MaxFrame+1))); !errors.Is(err, net.ErrFrameTooLong) {
		t.Error(err)
	}
	long := make([]byte, 12+net.MaxFrame)
	rand.NewChaCha8([32]byte{}).Read(long[12:])
	for range 2 {
		if n, err := a.Send(iov.Of(long)); n != len(long) || err != nil {
			t.Fatal(n, err)
		}
	}
	if _, err := b.Recv(iov.Of(make([]byte, len(long)-1))); !errors.Is(err, net.ErrFrameTooLong) {
		t.Error(err)
	}
	got := make([]byte, len(long))
	if n, err := b.Recv(iov.Of(got)); n != len(long) || err != nil || !bytes.Equal(got[12:], long[12:]) {
		t.Error(n, err)
	}
}

// wait starts an operation and returns its error when it ends.
func wait(op func(iov.Vec) (int, error)) <-chan error {
	c := make(chan error, 1)
	go func() {
		for {
			if _, err := op(iov.Of(make([]byte, 100))); err != nil {
				c <- err
				return
			}
		}
	}()
	return c
}

// TestWake interrupts Send and Recv where they wait: by deadlines past and future, and by Close on either side.
func TestWake(t *testing.T) {
	t.Parallel()
	a, b := pair(t, 1, 12, 12)
	for _, d := range []time.Duration{-time.Hour, 0, 5 * time.Millisecond} {
		send, recv := wait(a.Send), wait(a.Recv)
		check(t, a.SetDeadline(time.Now().Add(d)))
		for _, c := range []<-chan error{send, recv} {
			if err := <-c; !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%v: %v", d, err)
			}
		}
		// Also for calls that need not wait.
		check(t, a.SetDeadline(time.Unix(1, 0)))
		if _, err := a.Send(iov.Of(make([]byte, 100))); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		check(t, a.SetDeadline(time.Now().Add(time.Hour)))
		check(t, a.SetDeadline(time.Time{}))
	}
	send, recv, far := wait(a.Send), wait(a.Recv), wait(b.Send)
	check(t, a.Close())
	for c, want := range map[<-chan error]error{send: os.ErrClosed, recv: os.ErrClosed, far: io.ErrClosedPipe} {
		if err := <-c; err != want {
			t.Errorf("%v, want %v", err, want)
		}
	}
	check(t, a.Close())
	if err := a.SetDeadline(time.Time{}); err != os.ErrClosed {
		t.Error(err)
	}
	if err := <-wait(b.Recv); err != io.EOF { // after the frames that were under way
		t.Error(err)
	}
}

// TestStaleDeadline lets a timer that was set before the last deadline fire late.
func TestStaleDeadline(t *testing.T) {
	t.Parallel()
	a, b := pair(t, 1, 12, 12)
	old := time.Now().Add(time.Hour)
	check(t, a.SetDeadline(old))
	check(t, a.SetDeadline(time.Time{}))
	a.expire(old)
	if _, err := a.Send(iov.Of(make([]byte, 100))); err != nil {
		t.Error(err)
	}
	if _, err := b.Recv(iov.Of(make([]byte, 100))); err != nil {
		t.Error(err)
	}
}

func TestNoAllocations(t *testing.T) {
	a, b := pair(t, 4, 12, 0)
	in, out := iov.Of(make([]byte, 1526)), iov.Of(make([]byte, 1514))
	if n := testing.AllocsPerRun(1000, func() { transfer(t, a, b, in, out) }); n != 0 {
		t.Errorf("%v allocations for a frame", n)
	}
}

func transfer(tb testing.TB, a, b *End, in, out iov.Vec) {
	if _, err := a.Send(in); err != nil {
		tb.Fatal(err)
	}
	if _, err := b.Recv(out); err != nil {
		tb.Fatal(err)
	}
}

func BenchmarkPipe(b *testing.B) {
	x, y := pair(b, 4, 12, 12)
	buf := iov.Of(make([]byte, 1526))
	b.ReportAllocs()
	b.SetBytes(1526)
	for b.Loop() {
		transfer(b, x, y, buf, buf)
	}
}

// TestNoLeaks leaves no timer's goroutine, and none that waits.
func TestNoLeaks(t *testing.T) {
	leaks := hosttest.Leaks(t, 30*time.Second)
	for range 20 {
		a, b := New(Options{})
		done := wait(b.Recv)
		check(t, a.SetDeadline(time.Now().Add(time.Hour)))
		check(t, a.Close())
		if err := <-done; err != io.EOF {
			t.Error(err)
		}
	}
	leaks()
}
