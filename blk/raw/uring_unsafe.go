package raw

import (
	"fmt"
	"os"
	"structs"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/iov"
)

// The parts of linux/io_uring.h that the ring uses.
const (
	opReadv  = 1 // IORING_OP_READV
	opWritev = 2 // IORING_OP_WRITEV

	offSQRing = 0          // IORING_OFF_SQ_RING: with FEAT_SINGLE_MMAP the completions lie there too
	offSQEs   = 0x10000000 // IORING_OFF_SQES

	featSingleMmap   = 1 << 0 // IORING_FEAT_SINGLE_MMAP, Linux 5.4
	featNoDrop       = 1 << 1 // IORING_FEAT_NODROP, Linux 5.5
	featSubmitStable = 1 << 2 // IORING_FEAT_SUBMIT_STABLE, Linux 5.5: the kernel has copied a vector when a submission returns

	registerEventfd = 4 // IORING_REGISTER_EVENTFD

	cqEventfdDisabled = 1 << 0 // IORING_CQ_EVENTFD_DISABLED, Linux 5.8
)

// sqOffsets is struct io_sqring_offsets.
type sqOffsets struct {
	_           structs.HostLayout
	head        uint32 // 0
	tail        uint32 // 4
	ringMask    uint32 // 8
	ringEntries uint32 // 12
	flags       uint32 // 16
	dropped     uint32 // 20
	array       uint32 // 24
	_           uint32 // 28
	_           uint64 // 32: user_addr
}

// cqOffsets is struct io_cqring_offsets.
type cqOffsets struct {
	_           structs.HostLayout
	head        uint32 // 0
	tail        uint32 // 4
	ringMask    uint32 // 8
	ringEntries uint32 // 12
	overflow    uint32 // 16
	cqes        uint32 // 20
	flags       uint32 // 24
	_           uint32 // 28
	_           uint64 // 32: user_addr
}

// ringParams is struct io_uring_params.
type ringParams struct {
	_         structs.HostLayout
	sqEntries uint32    // 0
	cqEntries uint32    // 4
	flags     uint32    // 8
	_         [2]uint32 // 12: sq_thread_cpu, sq_thread_idle
	features  uint32    // 20
	_         [4]uint32 // 24: wq_fd, resv
	sq        sqOffsets // 40
	cq        cqOffsets // 80
}

// sqe is struct io_uring_sqe of a transfer.
type sqe struct {
	_        structs.HostLayout
	opcode   uint8    // 0
	_        uint8    // 1: flags
	_        uint16   // 2: ioprio
	fd       int32    // 4
	off      uint64   // 8
	addr     uint64   // 16
	len      uint32   // 24
	_        uint32   // 28: rw_flags
	userData uint64   // 32
	_        [24]byte // 40: buf_index, personality, splice_fd_in, addr3, padding
}

// cqe is struct io_uring_cqe.
type cqe struct {
	_        structs.HostLayout
	userData uint64 // 0
	res      int32  // 8
	_        uint32 // 12: flags
}

// ringMemory is what a ring shares with the kernel.
type ringMemory struct {
	fd      int
	rings   []byte // mapping of the head, tail and index words and the completions
	submits []byte // mapping of the submissions
	sqHead  *atomic.Uint32
	sqTail  *atomic.Uint32
	cqHead  *atomic.Uint32
	cqTail  *atomic.Uint32
	cqFlags *atomic.Uint32
	sqes    []sqe // a power of two of them
	cqes    []cqe // likewise
}

// newRingMemory sets up a ring of at least entries submissions.
func newRingMemory(entries uint32) (*ringMemory, error) {
	var p ringParams
	ptr := unsafe.Pointer(&p) // read and written during the call only
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(ptr), 0)
	if errno != 0 {
		return nil, os.NewSyscallError("io_uring_setup", errno)
	}
	m := &ringMemory{fd: int(fd)}
	const need = featSingleMmap | featNoDrop | featSubmitStable
	if p.features&need != need || p.cq.flags == 0 {
		m.close()
		return nil, fmt.Errorf("io_uring lacks features (%#x of %#x): %w", p.features&need, need, unix.EOPNOTSUPP)
	}
	size := max(p.sq.array+p.sqEntries*4, p.cq.cqes+p.cqEntries*uint32(unsafe.Sizeof(cqe{})))
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	var err error
	if m.rings, err = unix.Mmap(m.fd, offSQRing, int(size), prot, flags); err == nil {
		m.submits, err = unix.Mmap(m.fd, offSQEs, int(p.sqEntries)*int(unsafe.Sizeof(sqe{})), prot, flags)
	}
	if err != nil {
		m.close()
		return nil, os.NewSyscallError("mmap of io_uring", err)
	}
	word := func(off uint32) *atomic.Uint32 {
		return (*atomic.Uint32)(unsafe.Pointer(&m.rings[off])) // an aligned 32-bit word that the kernel shares
	}
	m.sqHead, m.sqTail = word(p.sq.head), word(p.sq.tail)
	m.cqHead, m.cqTail, m.cqFlags = word(p.cq.head), word(p.cq.tail), word(p.cq.flags)
	m.sqes = unsafe.Slice((*sqe)(unsafe.Pointer(&m.submits[0])), p.sqEntries)       // the mapping is an array of them
	m.cqes = unsafe.Slice((*cqe)(unsafe.Pointer(&m.rings[p.cq.cqes])), p.cqEntries) // an array inside the mapping
	for i := range p.sqEntries {
		word(p.sq.array + 4*i).Store(i) // entry i always stands for submission i
	}
	return m, nil
}

// close gives everything back.
func (m *ringMemory) close() {
	if m.submits != nil {
		_ = unix.Munmap(m.submits)
	}
	if m.rings != nil {
		_ = unix.Munmap(m.rings)
	}
	_ = unix.Close(m.fd)
}

// register has the ring signal the eventfd efd when completions come.
func (m *ringMemory) register(efd int) error {
	number := int32(efd)
	p := unsafe.Pointer(&number) // read during the call only
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(m.fd), registerEventfd, uintptr(p), 1, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("io_uring_register", errno)
	}
	return nil
}

// enter submits n entries and returns how many of them the kernel took.
func (m *ringMemory) enter(n int) (int, unix.Errno) {
	r, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(m.fd), uintptr(n), 0, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}

// put fills in entry e. The caller keeps v alive until the transfer completes: the kernel's copy of the address is
// hidden from the garbage collector. The array behind v is never on a stack, which could move: v comes from a *blk.IO
// that was passed through an interface, and the compiler lets whatever such a pointer reaches escape to the heap.
func (e *sqe) put(op uint8, fd int, v iov.Vec, off int64, userData uint64) {
	*e = sqe{opcode: op, fd: int32(fd), off: uint64(off), len: uint32(len(v)), userData: userData}
	e.addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(v)))) // struct iovec; kept alive by the caller
}
