package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// deafGuest answers a client's hello and then leaves reading to the test.
func deafGuest(t *testing.T) (*Client, net.Conn, *decoder) {
	t.Helper()
	host, guest := net.Pipe()
	d := newDecoder(guest)
	go func() {
		if h, err := d.sync(); err == nil {
			guest.Write(helloBytes(h.session))
		}
	}()
	c, err := Connect(t.Context(), host)
	if err != nil {
		t.Fatal(err)
	}
	return c, guest, d
}

// Whoever asks a guest that reads nothing any more is held up no longer than its context lasts, and the connection stays
// what it was.
func TestDeafGuestHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	c, guest, _ := deafGuest(t)
	defer guest.Close()
	defer c.Close()
	reason := errors.New("enough")
	for name, do := range map[string]func(context.Context) error{
		"start":     func(ctx context.Context) error { _, err := c.Start(ctx, Command{Args: []string{"x"}}); return err },
		"power off": c.Poweroff,
		"sync":      c.Sync,
	} {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, reason)
		result := make(chan error, 1)
		go func() { result <- do(ctx) }()
		select {
		case err := <-result:
			if !errors.Is(err, reason) {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(patience):
			t.Errorf("%s: is held up", name)
		}
		cancel()
	}
	if err := c.Err(); err != nil {
		t.Errorf("the connection ended with %v", err)
	}
}

// Nor do signals wait, or what a context's end has sent. They go first when the guest reads again.
func TestSignalsDoNotWaitForTheGuest(t *testing.T) {
	t.Parallel()
	c, guest, d := deafGuest(t)
	defer guest.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		if _, err := d.next(); err == nil {
			guest.Write(frameBytes(frameStarted, 0, 1, u32Bytes(7, 0)))
		}
	}()
	p, err := c.Start(ctx, Command{Args: []string{"x"}, Stdin: readerFunc(func(b []byte) (int, error) { return len(b), nil })})
	if err != nil {
		t.Fatal(err)
	}
	// Once the first byte of the input is read, the rest of its frame is being sent.
	first := make([]byte, 1)
	if _, err := io.ReadFull(guest, first); err != nil {
		t.Fatal(err)
	}
	posted := make(chan error, 1)
	go func() { posted <- errors.Join(p.Signal(syscall.SIGUSR1), p.Resize(3, 4)) }()
	select {
	case err := <-posted:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatal("a signal waits for the guest")
	}
	cancel() // which kills the command
	d = newDecoder(io.MultiReader(bytes.NewReader(first), guest))
	var got []frameType
	for len(got) < 3 {
		f, err := d.next()
		if err != nil {
			t.Fatal(err)
		}
		if f.typ != frameData {
			got = append(got, f.typ)
		}
	}
	if want := []frameType{frameSignal, frameResize, frameSignal}; !slices.Equal(got, want) {
		t.Errorf("frames of types %v, want %v", got, want)
	}
	err = nil
	for n := 0; err == nil && n <= 2*maxPosted; n++ { // the decoder may have room for some
		err = p.Signal(syscall.SIGUSR1)
	}
	if !errors.Is(err, syscall.EAGAIN) {
		t.Errorf("signals without end: %v", err)
	}
	c.Close()
	if _, err := p.Wait(); !errors.Is(err, ErrClosed) {
		t.Errorf("wait: %v", err)
	}
}

// A command whose start nobody waits for any more, and that the guest starts all the same, is ended.
func TestLateStartIsEnded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, guest, d := deafGuest(t)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			synctest.Wait()
			cancel()
		}()
		if _, err := c.Start(ctx, Command{Args: []string{"x"}}); !errors.Is(err, context.Canceled) {
			t.Fatalf("start: %v", err)
		}
		for i, want := range []frame{
			{typ: frameStart, channel: pieceLast}, {typ: frameSignal}, {typ: frameClose, channel: stdout}, {typ: frameClose, channel: stderr},
		} {
			f, err := d.next()
			if err != nil || f.typ != want.typ || f.channel != want.channel || f.stream != 1 {
				t.Fatalf("frame %d: %+v, %v; want %+v", i, f, err, want)
			}
		}
		go io.Copy(io.Discard, guest)
		c.Close()
		guest.Close()
	})
}

// A terminal whose output cannot be shown any more is hung up, and its command learns of it.
func TestFailingTerminalIsHungUp(t *testing.T) {
	t.Parallel()
	c := connect(t)
	gone := errors.New("terminal gone")
	for script, want := range map[string]ExitStatus{
		"exec cat /dev/zero": {129, syscall.SIGHUP},
		"trap 'exit 5' HUP; echo x; while :; do sleep 1; done": {Code: 5},
	} {
		status, err := c.Run(testContext(t), Command{Args: sh(script), TTY: true, Stdout: failingWriter{gone}})
		var output *OutputError
		if status != want || !errors.As(err, &output) || output.Name != "stdout" || !errors.Is(err, gone) {
			t.Errorf("%s: %+v, %v", script, status, err)
		}
	}
}
