package legacy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// gate is a writer that takes a chunk only when it is let through.
type gate struct {
	pass   chan struct{}
	mu     sync.Mutex
	got    []byte
	writes int
}

func newGate() *gate { return &gate{pass: make(chan struct{})} }

func (g *gate) Write(p []byte) (int, error) {
	<-g.pass
	g.mu.Lock()
	defer g.mu.Unlock()
	g.got = append(g.got, p...)
	g.writes++
	return len(p), nil
}

func TestSerialOutput(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		close(g.pass)
		s := NewSerial(COM1Port, g, nil)
		want := make([]byte, 40000)
		for i := range want {
			want[i] = byte(i * 7)
			for s.get(regLSR)&lsrEmpty == 0 {
				synctest.Wait()
			}
			s.put(regData, want[i])
		}
		if err := s.Flush(t.Context()); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(g.got, want) {
			t.Errorf("%d bytes came out, not the %d that went in", len(g.got), len(want))
		}

		// The first byte goes out at once; those that follow within the pause go together.
		time.Sleep(3 * outputPause)
		synctest.Wait()
		writes := g.writes
		for range 10 {
			s.put(regData, '2')
			synctest.Wait()
		}
		time.Sleep(outputPause)
		synctest.Wait()
		if n := g.writes - writes; n != 2 {
			t.Errorf("10 bytes made %d writes, want 2", n)
		}
		if err := s.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if s.Dropped() != 0 {
			t.Errorf("%d dropped", s.Dropped())
		}
	})
}

func TestSerialOutputBackPressure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		irq := &pin{t: t}
		s := NewSerial(COM1Port, g, irq.set)
		var want []byte
		send := func(b byte) { s.put(regData, b); want = append(want, b) }
		send('a')
		synctest.Wait() // the goroutine is stuck with this byte
		n := 0
		for ; s.get(regLSR)&lsrEmpty != 0; n++ {
			send(byte(n))
		}
		if n != outputSize-fifoSize+1 {
			t.Errorf("transmitter busy after %d bytes, want %d", n, outputSize-fifoSize+1)
		}
		// A driver that saw the transmitter empty just before has 15 more on their way.
		for i := range fifoSize - 1 {
			send(byte(i))
		}
		if s.Dropped() != 0 {
			t.Errorf("%d dropped", s.Dropped())
		}
		s.put(regData, 'z') // one too many
		if s.Dropped() != 1 {
			t.Errorf("%d dropped, want 1", s.Dropped())
		}
		s.put(regIER, ierTHRE)
		irq.want(false, 0)
		if st := s.State(); !st.THREPending {
			t.Error("the interrupt to come is not in the state")
		}

		close(g.pass)
		synctest.Wait()
		time.Sleep(outputPause)
		synctest.Wait()
		irq.want(true, 1)
		wantByte(t, "LSR", s.get(regLSR), lsrEmpty)
		if err := s.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(g.got, want) {
			t.Errorf("%d bytes came out, not the %d that went in", len(g.got), len(want))
		}
	})
}

func TestSerialFlush(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		s := NewSerial(COM1Port, g, nil)
		if err := s.Flush(t.Context()); err != nil {
			t.Error("nothing to flush:", err)
		}
		s.put(regData, 'x')
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := s.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error("flush to a stuck writer:", err)
		}
		go func() { g.pass <- struct{}{} }()
		if err := s.Flush(t.Context()); err != nil || string(g.got) != "x" {
			t.Errorf("flushed %q, %v", g.got, err)
		}
		s.put(regData, 'y')
		close(g.pass)
		if err := s.Close(t.Context()); err != nil || string(g.got) != "xy" {
			t.Errorf("closed with %q, %v", g.got, err)
		}
		s.put(regData, 'z')
		if s.Dropped() != 1 {
			t.Errorf("%d dropped after Close, want 1", s.Dropped())
		}
		if err := s.Close(t.Context()); err != nil {
			t.Error("second close:", err)
		}
		if err := s.Flush(t.Context()); err != nil {
			t.Error("flush after close:", err)
		}
	})
}

// late is a writer that fails in the end.
type late chan struct{}

func (l late) Write([]byte) (int, error) {
	<-l
	return 0, io.ErrClosedPipe
}

// TestSerialCloseGivesUp closes a port whose writer does not return, and lets that return later.
func TestSerialCloseGivesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := make(late)
		irq := &pin{t: t}
		s := NewSerial(COM1Port, w, irq.set)
		s.put(regIER, ierTHRE)
		s.put(regData, 'a')
		synctest.Wait() // the goroutine is stuck with this byte
		for s.get(regLSR)&lsrEmpty != 0 {
			s.put(regData, 'b')
		}
		lost := s.host.queued
		rises := irq.rises.Load()
		flushed := make(chan error)
		go func() { flushed <- s.Flush(t.Context()) }()
		synctest.Wait()

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		for range 2 { // the second time at once
			if err := s.Close(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("close: %v", err)
			}
		}
		if err := <-flushed; err != nil {
			t.Errorf("flush: %v", err)
		}
		close(w) // the goroutine has to end here, and to leave the port alone
		<-s.host.done
		if err := s.Close(t.Context()); err != nil || s.Dropped() != lost {
			t.Errorf("%d dropped, want %d; closed again: %v", s.Dropped(), lost, err)
		}
		irq.want(irq.level.Load(), rises)
	})
}

type failing struct {
	n   int
	err error
}

func (f failing) Write(p []byte) (int, error) { return min(f.n, len(p)), f.err }

func TestSerialOutputError(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		w    failing
		want error
		lost uint64 // of bcd
	}{{failing{1, io.ErrClosedPipe}, io.ErrClosedPipe, 3}, {failing{1, nil}, io.ErrShortWrite, 2}} {
		synctest.Test(t, func(t *testing.T) {
			s := NewSerial(COM1Port, tc.w, nil)
			s.WritePort(COM1Port, []byte{'a'})
			synctest.Wait()
			s.put(regData, 'b')
			s.put(regData, 'c')
			s.put(regData, 'd')
			if err := s.Flush(t.Context()); !errors.Is(err, tc.want) {
				t.Errorf("flush: %v, want %v", err, tc.want)
			}
			// From here on the guest talks to a wall, and does not notice.
			for range 2 * outputSize {
				s.put(regData, 'e')
			}
			wantByte(t, "LSR", s.get(regLSR), lsrEmpty)
			if got := s.Dropped(); got != tc.lost+2*outputSize {
				t.Errorf("%d dropped, want %d", got, tc.lost+2*outputSize)
			}
			if err := s.Close(t.Context()); !errors.Is(err, tc.want) {
				t.Errorf("close: %v, want %v", err, tc.want)
			}
		})
	}
}

func TestSerialInput(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		irq := &pin{t: t}
		s := NewSerial(COM1Port, nil, irq.set)
		s.put(regIER, ierData)
		s.put(regIIR, fcrEnable|0x80)
		text := make([]byte, 5000)
		for i := range text {
			text[i] = byte(i * 11)
		}
		done := make(chan error)
		go func() {
			n, err := s.Write(text)
			if n != len(text) {
				t.Errorf("wrote %d", n)
			}
			done <- err
		}()
		synctest.Wait()
		wantByte(t, "LSR before the guest listens", s.get(regLSR), lsrEmpty)
		s.put(regIIR, fcrEnable|fcrReset|0x80) // as a driver's start-up does; nothing is lost by it
		s.put(regMCR, mcrDTR|mcrRTS)
		var got []byte
		for len(got) < len(text) {
			synctest.Wait()
			wantByte(t, "IIR", s.get(regIIR), iirFIFO|iirData)
			if !irq.level.Load() {
				t.Fatal("no interrupt")
			}
			for s.get(regLSR)&lsrData != 0 {
				got = append(got, s.get(regData))
			}
			if len(got) == 160 {
				// Flow control: with RTS low, and in loopback, the FIFO is not filled again.
				for _, mcr := range []byte{mcrDTR, mcrRTS | mcrLoop} {
					s.put(regMCR, mcr)
					synctest.Wait()
					for s.get(regLSR)&lsrData != 0 {
						got = append(got, s.get(regData))
					}
					synctest.Wait()
					wantByte(t, "LSR while the line is held", s.get(regLSR), lsrEmpty)
				}
				s.put(regMCR, mcrRTS)
			}
			if left := len(text) - len(got); left < 8 {
				break
			}
		}
		synctest.Wait()
		for s.get(regLSR)&lsrData != 0 {
			got = append(got, s.get(regData))
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got, text) {
			t.Errorf("received %d bytes, not the %d sent", len(got), len(text))
		}
		irq.want(false, irq.rises.Load())
	})
}

// TestSerialInputWakes covers what lets a waiting Write go on.
func TestSerialInputWakes(t *testing.T) {
	t.Parallel()
	for name, act := range map[string]func(s *Serial){
		"read":    func(s *Serial) { s.get(regData) },
		"reset":   func(s *Serial) { s.put(regIIR, 0); s.put(regIIR, fcrEnable) },
		"enable":  func(s *Serial) { s.put(regIIR, fcrEnable) },
		"restore": func(s *Serial) { _ = s.Restore(SerialState{MCR: mcrRTS}) },
	} {
		synctest.Test(t, func(t *testing.T) {
			s := NewSerial(COM1Port, nil, nil)
			s.put(regMCR, mcrRTS)
			n := make(chan int)
			go func() { w, _ := s.Write([]byte("ab")); n <- w }()
			synctest.Wait()
			act(s)
			if w := <-n; w != 2 {
				t.Errorf("%s: %d bytes written", name, w)
			}
			wantByte(t, name, s.get(regData), 'b')
		})
	}
	synctest.Test(t, func(t *testing.T) {
		s := NewSerial(COM1Port, nil, nil)
		s.put(regMCR, mcrRTS)
		go func() { synctest.Wait(); s.Close(t.Context()) }()
		if n, err := s.Write([]byte("ab")); n != 1 || !errors.Is(err, os.ErrClosed) {
			t.Errorf("write ended by Close: %d, %v", n, err)
		}
		if n, err := s.Write([]byte("ab")); n != 0 || !errors.Is(err, os.ErrClosed) {
			t.Errorf("write after Close: %d, %v", n, err)
		}
	})
}

// TestSerialConcurrent is for the race detector: two vCPUs, a terminal and a snapshot at once.
func TestSerialConcurrent(t *testing.T) {
	t.Parallel()
	var w bytes.Buffer
	s := NewSerial(COM1Port, &w, (&pin{t: t}).set)
	s.put(regIIR, fcrEnable)
	s.put(regMCR, mcrRTS)
	s.put(regIER, ierTHRE|ierData)
	const n = 2000
	var senders, all sync.WaitGroup
	for range 2 {
		senders.Go(func() {
			for range n {
				s.put(regData, 'x')
				s.get(regIIR)
			}
		})
	}
	stop := make(chan struct{})
	all.Go(func() { _, _ = s.Write(make([]byte, n)) })
	all.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				s.get(regData)
				s.State()
			}
		}
	})
	senders.Wait()
	if err := s.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	close(stop)
	all.Wait()
	if got := uint64(w.Len()) + s.Dropped(); got != 2*n {
		t.Errorf("%d bytes accounted for, want %d", got, 2*n)
	}
}
