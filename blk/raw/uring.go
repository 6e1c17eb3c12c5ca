package raw

import (
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

const (
	// ringEntries is how many transfers of one disk the kernel has at a time; further ones queue here. There are twice
	// as many completion entries, so that those never overflow.
	ringEntries = 256

	// ringRounds is how often a goroutine that came to start a transfer goes on submitting and completing those of
	// others. Then the reaper takes over.
	ringRounds = 16

	// ringChunk is how many completions, at most, are taken before what their Done starts is submitted. Of those that
	// came together one is taken, then two, then four: the medium, which may have nothing left to do, has work again at
	// once and ever more of it, while Done is called for the others.
	ringChunk = 16
)

// ring is the io_uring engine.
//
// One goroutine at a time drives the ring: it submits all that is queued with one system call, takes the completions
// that are there, calls Done, and begins again until nothing is left to do. The goroutine that calls start becomes the
// driver if there is none; else it leaves its transfers to the driver. So what several goroutines start at once, and
// what Done starts, goes to the kernel in one batch, and Done never calls itself by way of start.
//
// While nobody drives, a completion signals an eventfd, on which the reaper waits with the help of Go's poller, which
// takes no thread; the reaper then drives. While somebody does, the signal is off.
type ring struct {
	file *File
	mem  *ringMemory

	mu     sync.Mutex
	idle   sync.Cond // driven became false
	driven bool
	queue  fifo // started, not yet in the ring

	// The driver's own, as the memory's entries and indexes are.
	flying []*blk.IO // by their number in the ring: what the kernel has, which the garbage collector can't see there
	free   []uint32  // numbers that no transfer has
	chunk  uint32    // how many completions to take next, ringChunk at most

	efd    int
	wake   *os.File      // owns efd
	reaped chan struct{} // closed when the reaper has ended
}

// newRing sets up an engine for the file f, whose pool does what the ring can't.
func newRing(f *File) (*ring, error) {
	mem, err := newRingMemory(ringEntries)
	if err != nil {
		return nil, err
	}
	efd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		mem.close()
		return nil, os.NewSyscallError("eventfd", err)
	}
	r := &ring{
		file: f, mem: mem, chunk: 1, efd: efd, wake: os.NewFile(uintptr(efd), "io_uring eventfd"), reaped: make(chan struct{}),
	}
	r.idle.L = &r.mu
	for i := range uint32(len(mem.sqes)) {
		r.free = append(r.free, i)
	}
	r.flying = make([]*blk.IO, len(r.free))
	conn, err := r.wake.SyscallConn()
	if err == nil {
		err = mem.register(efd)
	}
	if err != nil {
		_ = r.wake.Close()
		mem.close()
		return nil, err
	}
	go r.reap(conn)
	return r, nil
}

// close ends the engine. No transfer is under way; a driver may still be on its way out.
func (r *ring) close() {
	r.mu.Lock()
	for r.driven {
		r.idle.Wait()
	}
	r.mu.Unlock()
	_ = r.wake.Close() // ends the reaper
	<-r.reaped
	r.mem.close()
}

func (r *ring) start(batch []*blk.IO) {
	r.mu.Lock()
	r.queue.push(batch)
	if r.driven {
		r.mu.Unlock()
		return
	}
	r.driven = true
	r.mu.Unlock()
	r.drive(ringRounds)
}

// reap drives the ring whenever a completion signals the eventfd. The poller reports each signal once (EPOLLET), also
// when nobody reads the eventfd, so nobody does.
func (r *ring) reap(conn syscall.RawConn) {
	defer close(r.reaped)
	_ = conn.Read(func(uintptr) bool { // returns when the eventfd is closed
		r.mu.Lock()
		if r.driven {
			r.mu.Unlock()
			return false
		}
		r.driven = true
		r.mu.Unlock()
		r.drive(-1)
		return false
	})
}

// drive does what there is to do, for at most so many rounds if rounds is not negative.
func (r *ring) drive(rounds int) {
	r.mem.cqFlags.Store(cqEventfdDisabled)
	for ; rounds != 0; rounds-- {
		n := r.fill()
		if n > 0 {
			r.submit(n)
		} else if !r.completed() && r.leave() {
			return
		}
		r.complete()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mem.cqFlags.Store(0)
	r.driven = false
	r.idle.Broadcast()
	_, _ = unix.Write(r.efd, []byte{0: 1, 7: 1}) // eight bytes above zero in any byte order: the reaper goes on
}

// leave ends the driver's work if there is none left. The signal is on again before the last look at the completions,
// so that one that comes too late for the look gives a signal: sync/atomic is a full barrier here, and the kernel has
// one between storing the tail and reading the flags (io_cqring_wake in io_uring/io_uring.h).
func (r *ring) leave() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.queue.n > 0 && len(r.free) > 0 {
		return false
	}
	r.mem.cqFlags.Store(0)
	if r.completed() {
		r.mem.cqFlags.Store(cqEventfdDisabled)
		return false
	}
	r.driven = false
	r.idle.Broadcast()
	return true
}

// fill moves transfers from the queue to the ring while it has room, and returns how many.
func (r *ring) fill() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for ; len(r.free) > 0; n++ {
		io := r.queue.pop()
		if io == nil {
			break
		}
		last := len(r.free) - 1
		if !fits(io) {
			r.file.pool.push(io)
			n--
			continue
		}
		number := r.free[last]
		r.free = r.free[:last]
		r.flying[number] = io
		op := uint8(opReadv)
		if io.Op == blk.OpWrite {
			op = opWritev
		}
		tail := r.mem.sqTail.Load()
		r.mem.sqes[tail&uint32(len(r.mem.sqes)-1)].put(op, r.file.fd, io.Vec, io.Off, uint64(number))
		r.mem.sqTail.Store(tail + 1)
	}
	return n
}

// fits reports whether the ring can take io; the kernel takes a negative offset for something else.
func fits(io *blk.IO) bool { return io.Off >= 0 && len(io.Vec) <= iov.MaxElems }

// submit gives the n entries that fill made to the kernel. Those that it does not take, because it lacks memory, go to
// the pool.
func (r *ring) submit(n int) {
	for n > 0 {
		k, errno := r.mem.enter(n)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || k <= 0 {
			break
		}
		n -= k
	}
	head, tail := r.mem.sqHead.Load(), r.mem.sqTail.Load()
	for i := head; i != tail; i++ {
		r.file.pool.push(r.land(r.mem.sqes[i&uint32(len(r.mem.sqes)-1)].userData))
	}
	r.mem.sqTail.Store(head) // the kernel looks at entries during enter only
}

// completed reports whether there are completions to take.
func (r *ring) completed() bool { return r.mem.cqHead.Load() != r.mem.cqTail.Load() }

// complete takes completions that are there, up to chunk.
func (r *ring) complete() {
	head, tail := r.mem.cqHead.Load(), r.mem.cqTail.Load()
	if tail-head > r.chunk {
		tail = head + r.chunk
		r.chunk = min(2*r.chunk, ringChunk)
	} else {
		r.chunk = 1
	}
	for ; head != tail; head++ {
		e := r.mem.cqes[head&uint32(len(r.mem.cqes)-1)]
		r.mem.cqHead.Store(head + 1)
		io := r.land(e.userData)
		if e.res < 0 {
			r.file.fail(io, unix.Errno(-e.res))
		} else {
			r.file.finish(io, int(e.res), io.Vec.Size())
		}
	}
}

// land returns the transfer that flew by this number, and the number.
func (r *ring) land(number uint64) *blk.IO {
	io := r.flying[number]
	r.flying[number] = nil
	r.free = append(r.free, uint32(number))
	return io
}
