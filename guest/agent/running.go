package agent

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// linger is how long a command's output may come from processes it left behind, after its own end.
const linger = 500 * time.Millisecond

// endOfFile is what a terminal in its usual mode reads as the end: ^D.
const endOfFile = 4

// running is a command in the guest.
type running struct {
	session *session
	id      uint32
	pid     int
	exited  <-chan syscall.WaitStatus
	wired   [channels]bool
	tty     *os.File           // the terminal's master, or nil
	pipes   [channels]*os.File // our ends; with a terminal only stdin and stdout, both tty
	in      *inbox
	out     [channels]*credit

	mu     sync.Mutex
	reaped bool // the pid may be another process's by now; guarded by mu
}

// startCommand makes the streams and starts the command. The caller sends the answer and then calls serve.
func startCommand(s *session, id uint32, sp *spec) (_ *running, err error) {
	path, err := lookPath(sp)
	if err != nil {
		return nil, err
	}
	r := &running{session: s, id: id, in: newInbox(), wired: sp.wired}
	r.out = [channels]*credit{stdout: newCredit(), stderr: newCredit()}
	var theirs [channels]*os.File
	defer func() {
		for _, f := range theirs {
			if f != nil {
				f.Close()
			}
		}
		if err != nil {
			r.closePipes()
		}
	}()
	if sp.tty {
		err = r.openTTY(sp, &theirs)
	} else {
		err = r.openPipes(sp, &theirs)
	}
	if err != nil {
		return nil, err
	}
	attr := &syscall.ProcAttr{Dir: sp.dir, Env: sp.env, Sys: &syscall.SysProcAttr{Chroot: sp.root, Setsid: true}}
	if sp.defaultEnv {
		attr.Env = os.Environ()
	}
	if attr.Dir == "" {
		attr.Dir = "/"
	}
	if u := sp.user; u != nil {
		attr.Sys.Credential = &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
	}
	if sp.tty {
		attr.Sys.Setctty, attr.Sys.Ctty = true, 0
		theirs[stdout], theirs[stderr] = theirs[stdin], theirs[stdin]
	}
	for _, f := range theirs {
		attr.Files = append(attr.Files, f.Fd())
	}
	r.pid, r.exited, err = s.sys.start(path, sp.args, attr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// openPipes connects the wired streams by pipes and the others to /dev/null.
func (r *running) openPipes(sp *spec, theirs *[channels]*os.File) error {
	for c := range theirs {
		if !sp.wired[c] {
			f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			theirs[c] = f
			continue
		}
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			return os.NewSyscallError("pipe2", err)
		}
		our, their := p[0], p[1]
		if channel(c) == stdin {
			our, their = their, our
		}
		theirs[c] = os.NewFile(uintptr(their), "pipe")
		err := unix.SetNonblock(our, true) // so that its reads have deadlines
		r.pipes[c] = os.NewFile(uintptr(our), "pipe")
		if err != nil {
			return os.NewSyscallError("set a pipe non-blocking", err)
		}
	}
	return nil
}

// openTTY makes a terminal; theirs[stdin] is its other side.
func (r *running) openTTY(sp *spec, theirs *[channels]*os.File) error {
	m, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	r.tty, r.pipes[stdin], r.pipes[stdout] = m, m, m
	var number uint32
	err = r.control(func(fd int) (err error) {
		if err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err == nil {
			number, err = unix.IoctlGetUint32(fd, unix.TIOCGPTN)
		}
		return err
	})
	if err != nil {
		return os.NewSyscallError("unlock a terminal", err)
	}
	if err := r.resize(sp.rows, sp.columns); err != nil {
		return err
	}
	theirs[stdin], err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	return err
}

func (r *running) control(f func(fd int) error) error {
	c, err := r.tty.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := c.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

func (r *running) resize(rows, columns uint16) error {
	if r.tty == nil || rows == 0 || columns == 0 {
		return nil
	}
	return r.control(func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns})
	})
}

func (r *running) closePipes() {
	for _, f := range r.pipes {
		if f != nil {
			f.Close()
		}
	}
}

// serve carries the command's streams and tells the host its end.
func (r *running) serve() {
	w := r.session.w
	var input, outputs sync.WaitGroup
	if f := r.pipes[stdin]; f != nil && r.wired[stdin] {
		input.Go(func() {
			err := drain(w, stdin, r.id, r.in, f)
			if r.tty == nil {
				f.Close()
			} else if err == nil {
				_, _ = f.Write([]byte{endOfFile})
			}
		})
	}
	for c := stdout; c < channels; c++ {
		if f := r.pipes[c]; f != nil {
			src := &leftover{f: f}
			outputs.Go(func() {
				if !r.wired[c] {
					_, _ = io.Copy(io.Discard, src) // a terminal nobody listens to must not fill up
				} else {
					pump(w, c, r.id, src, r.out[c])
				}
				if r.tty == nil {
					f.Close() // so that whoever still writes gets EPIPE
				}
			})
		}
	}
	status := r.wait()
	r.in.close(errClosed)
	_ = w.send(frameClose, stdin, r.id, nil)
	deadline := time.Now().Add(linger)
	for c := stdout; c < channels; c++ {
		if f := r.pipes[c]; f != nil {
			f.SetReadDeadline(deadline)
		}
	}
	if f := r.pipes[stdin]; f != nil {
		f.SetWriteDeadline(time.Now())
	}
	outputs.Wait()
	input.Wait()
	r.closePipes()
	_ = w.sendU32(frameExit, 0, r.id, exitWords(status)...)
	r.session.forget(r.id)
}

// wait returns when the command itself ended.
func (r *running) wait() syscall.WaitStatus {
	status := <-r.exited
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reaped = true
	return status
}

func exitWords(status syscall.WaitStatus) []uint32 {
	if status.Signaled() {
		return []uint32{uint32(128 + status.Signal()), uint32(status.Signal())}
	}
	return []uint32{uint32(status.ExitStatus()), 0}
}

// receive takes a frame from the host. It is called by the session's reader and never waits.
func (r *running) receive(f frame) error {
	switch {
	case f.typ == frameData && f.channel == stdin:
		return r.in.put(f.payload)
	case f.typ == frameCredit && f.channel != stdin:
		return r.out[f.channel].give(binary.LittleEndian.Uint32(f.payload))
	case f.typ == frameClose && f.channel != stdin:
		r.out[f.channel].close(errClosed)
		if p := r.pipes[f.channel]; p != nil && r.tty == nil {
			p.SetReadDeadline(time.Unix(1, 0)) // ends a pump that waits for output
		} else if p != nil {
			p.Close() // hangs up: SIGHUP to the command, and an end to what it writes
		}
		return nil
	case f.typ == frameSignal:
		sig := binary.LittleEndian.Uint32(f.payload)
		if sig < 1 || sig > maxSignal {
			return fmt.Errorf("signal %d: %w", sig, ErrProtocol)
		}
		r.signal(syscall.Signal(sig))
		return nil
	case f.typ == frameResize:
		size := binary.LittleEndian.Uint32(f.payload)
		_ = r.resize(uint16(size>>16), uint16(size))
		return nil
	}
	return fmt.Errorf("frame of type %d on channel %d from the host: %w", f.typ, f.channel, ErrProtocol)
}

// signal reaches the command's process group, or what is in the foreground of its terminal.
func (r *running) signal(sig syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reaped {
		return
	}
	group := r.pid
	if r.tty != nil {
		_ = r.control(func(fd int) error {
			if fg, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP); err == nil && fg > 0 {
				group = fg
			}
			return nil
		})
	}
	_ = syscall.Kill(-group, sig)
}

// abort kills the command and everything in its session, and stops its streams.
func (r *running) abort() {
	r.mu.Lock()
	if !r.reaped {
		killSession(r.pid)
	}
	r.mu.Unlock()
	r.in.close(errClosed)
	for c := stdout; c < channels; c++ {
		r.out[c].close(errClosed)
	}
	for _, f := range r.pipes {
		if f != nil {
			f.SetDeadline(time.Unix(1, 0))
		}
	}
}

// leftover reads a pipe or terminal until its end, or, after its read deadline, what is in it at that moment.
type leftover struct {
	f    *os.File
	late bool
	rest int // bytes still to read once late
}

func (l *leftover) Read(p []byte) (int, error) {
	if !l.late {
		n, err := l.f.Read(p)
		if n > 0 || err == nil {
			return n, err
		}
		if errors.Is(err, syscall.EIO) { // a terminal whose other side is closed everywhere
			return 0, io.EOF
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return 0, err
		}
	}
	c, err := l.f.SyscallConn()
	if err != nil {
		return 0, err
	}
	n := 0
	err = c.Control(func(fd uintptr) {
		if !l.late {
			l.late = true
			l.rest, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		}
		if l.rest > 0 {
			n, _ = unix.Read(int(fd), p[:min(len(p), l.rest)])
		}
	})
	if n <= 0 {
		return 0, cmp.Or(err, io.EOF)
	}
	l.rest -= n
	return n, nil
}
