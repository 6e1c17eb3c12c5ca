package raw

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
)

// AIO says how transfers that are started, not waited for, are carried out. The names are those of QEMU's aio option.
type AIO uint8

// The engines. ReadVecAt and WriteVecAt use none of them: they make their system calls on the caller's goroutine.
const (
	// AIOAuto is AIOIOUring where the kernel offers that and AIOThreads elsewhere.
	AIOAuto AIO = iota

	// AIOIOUring hands transfers to an io_uring, many with one system call. Of a disk with CacheWriteback it gets the
	// reads that the page cache can't answer; writes, which are copies there, go to workers: the kernel would have
	// threads of its own do them, one at a time for each file.
	AIOIOUring

	// AIOThreads has up to 64 workers make blocking system calls. Each takes a thread while it blocks; see runtime's
	// GOMAXPROCS, which on machines with few CPUs limits how fast threads can follow each other.
	AIOThreads
)

var aioNames = [...]string{AIOAuto: "auto", AIOIOUring: "io_uring", AIOThreads: "threads"}

// String returns the name that ParseAIO takes.
func (a AIO) String() string { return nameOf(aioNames[:], int(a)) }

// ParseAIO returns the engine of that name: auto, io_uring or threads.
func ParseAIO(name string) (AIO, error) {
	i, err := parseName("aio", aioNames[:], name)
	return AIO(i), err
}

// AIO returns the engine in use, AIOIOUring or AIOThreads.
func (f *File) AIO() AIO {
	if f.ring != nil {
		return AIOIOUring
	}
	return AIOThreads
}

// Threadless implements blk.Threadless: past the page cache the ring needs no thread.
func (f *File) Threadless() bool { return f.ring != nil && f.direct }

const (
	// inlineMax is the longest read, in bytes, that Start copies out of the page cache itself.
	inlineMax = 64 << 10

	// inlineLanes is how many goroutines, or calls of Start from Done on one goroutine, do so at a time.
	inlineLanes = 4

	// inlineRounds is how many transfers a caller of Start carries out so before another goroutine takes over.
	inlineRounds = 1024

	// inlineWait is how many transfers a read that the page cache can't answer waits for before it is passed on, so that
	// several go to the kernel at once. Where every Done starts another transfer, the queue is never empty.
	inlineWait = 32
)

// inline is the part of an engine that tries reads of the page cache on the goroutine that starts them, which takes less
// time than passing them on.
type inline struct {
	work func()      // File.goOnInline, a method value made once
	off  atomic.Bool // the file can't do it

	mu    sync.Mutex
	queue fifo
	lanes int // how many goroutines take from queue
}

// setUpEngine makes the engine that o asks for.
func (f *File) setUpEngine(o Options) error {
	f.pool = newPool(f)
	f.inline.work = f.goOnInline
	f.inline.off.Store(f.direct) // nothing to copy
	if o.AIO == AIOThreads {
		return nil
	}
	ring, err := f.sys.newRing(f)
	switch {
	case err == nil:
		f.ring = ring
	case o.AIO == AIOIOUring:
		return fmt.Errorf("open disk %s: aio=io_uring: %w (use aio=threads, or let the kernel offer io_uring: "+
			"Linux 5.8 or later, sysctl kernel.io_uring_disabled=0, a seccomp filter that permits it)", f.path, err)
	}
	return nil
}

// closeEngine ends what setUpEngine began. No transfer is under way.
func (f *File) closeEngine() {
	if f.ring != nil {
		f.ring.close()
	}
	if f.pool != nil {
		f.pool.close()
	}
}

// Start implements blk.Starter. It may take the time of copying bytes out of the page cache, its own and those of
// transfers that others start meanwhile; it never waits for the medium.
func (f *File) Start(batch []*blk.IO) {
	for _, io := range batch {
		io.Driver = 0
	}
	if f.inline.off.Load() {
		f.startAll(batch)
		return
	}
	l := &f.inline
	l.mu.Lock()
	l.queue.push(batch)
	if l.lanes >= inlineLanes { // so Done may call Start, and start does not go ever deeper
		l.mu.Unlock()
		return
	}
	l.lanes++
	l.mu.Unlock()
	f.runInline()
}

// startAll gives batch to the ring or to the workers.
func (f *File) startAll(batch []*blk.IO) {
	switch {
	case f.ring == nil:
		f.pool.start(batch)
	case f.direct:
		f.ring.start(batch)
	default: // runs of reads to the ring, runs of writes to the workers
		for len(batch) > 0 {
			n := 1
			for n < len(batch) && batch[n].Op == batch[0].Op {
				n++
			}
			if batch[0].Op == blk.OpRead {
				f.ring.start(batch[:n])
			} else {
				f.pool.start(batch[:n])
			}
			batch = batch[n:]
		}
	}
}

// runInline takes transfers from the inline queue until it is empty. Reads that the page cache can't answer, and
// writes, are passed on, some at a time.
func (f *File) runInline() {
	l := &f.inline
	var rest [inlineWait]*blk.IO
	n, waited := 0, 0 // how many are in rest, and for how many transfers the first of them
	for round := 0; ; round++ {
		l.mu.Lock()
		if round >= inlineRounds && n == 0 && l.queue.n > 0 {
			f.pool.ended.Add(1) // in time: what is queued is under way, so nobody closes the disk
			l.mu.Unlock()
			go l.work() // and keeps the lane
			return
		}
		io := l.queue.pop()
		if io == nil && n == 0 {
			l.lanes--
			l.mu.Unlock()
			return
		}
		l.mu.Unlock()
		if n > 0 {
			waited++
		}
		if io != nil && !f.tryInline(io) {
			rest[n] = io
			n++
		}
		if io == nil || waited == inlineWait-1 { // then rest has room for no more
			f.startAll(rest[:n])
			n, waited = 0, 0
		}
	}
}

// goOnInline is runInline on a goroutine of its own.
func (f *File) goOnInline() {
	defer f.pool.ended.Done()
	f.runInline()
}

// tryInline carries out a read if the page cache holds all its bytes, or the first of them.
func (f *File) tryInline(io *blk.IO) bool {
	if io.Op != blk.OpRead || len(io.Vec) == 0 || len(io.Vec) > iov.MaxElems || io.Off < 0 || f.inline.off.Load() {
		return false
	}
	size := io.Vec.Size()
	if size > inlineMax {
		return false
	}
	n, errno := f.sys.transfer(f.fd, blk.OpRead, io.Vec, io.Off, unix.RWF_NOWAIT)
	switch errno {
	case 0:
		f.finish(io, n, size)
		return true
	case unix.EOPNOTSUPP, unix.ENOSYS:
		f.inline.off.Store(true)
	}
	return false // EAGAIN, or something that the engine will meet again and report
}

// finish ends io, on which the kernel has transferred n bytes of size, or has the workers do the rest of it.
func (f *File) finish(io *blk.IO, n, size int) {
	if n < size && !(io.Op == blk.OpRead && f.atEnd(io.Off+int64(n))) {
		io.Driver = uint64(n)
		f.pool.push(io)
		return
	}
	io.N, io.Err = n, nil
	io.Done(io)
}

// fail ends io with errno, or has the workers try again what need not fail: a signal came, memory was short, or the
// thread that drove the ring has ended, with which the kernel answers ECANCELED or EFAULT (io_req_task_submit in
// io_uring/io_uring.c). Go ends a thread when a goroutine that is locked to it ends, whatever ran on it before.
func (f *File) fail(io *blk.IO, errno unix.Errno) {
	switch errno {
	case unix.EINTR, unix.EAGAIN, unix.ECANCELED, unix.EFAULT:
		f.pool.push(io)
		return
	}
	io.N, io.Err = 0, f.transferError(io.Op, io.Off, errno)
	io.Done(io)
}

// carryOut does what is left of io, whose first io.Driver bytes are done, on this goroutine.
func (f *File) carryOut(io *blk.IO) {
	v, done := io.Vec, int(io.Driver)
	if done > 0 {
		v, _ = v.Slice(done, v.Size()-done) // done is less than the size
	}
	var n int
	if io.Op == blk.OpWrite {
		n, io.Err = f.WriteVecAt(v, io.Off+int64(done))
	} else {
		n, io.Err = f.ReadVecAt(v, io.Off+int64(done))
	}
	io.N = done + n
	io.Done(io)
}
