package blk

import (
	"fmt"
	"io"
	"sync"

	"github.com/kvmlet/kvmlet/iov"
)

// Options says how a Device uses its Backend. The zero value is a writable disk.
type Options struct {
	ReadOnly bool // refuse writes with ErrReadOnly; Flush has nothing to do
}

// Device is one disk as its users see it. All methods may be called from any goroutine at any time.
type Device struct {
	backend  Backend
	limits   Limits
	readOnly bool

	mu     sync.RWMutex // held for reading by every request, for writing by Close
	closed bool

	stats stats
}

// New returns a Device over b and takes ownership of it: Close closes b. On an error b stays the caller's. ErrLimits
// reports a Backend whose Limits a Device does not serve.
func New(b Backend, o Options) (*Device, error) {
	limits := b.Limits()
	if err := limits.check(); err != nil {
		return nil, err
	}
	if size := b.Size(); size < 0 || size%SectorSize != 0 {
		return nil, fmt.Errorf("blk: disk of %d bytes: its size must be a multiple of %d", size, SectorSize)
	}
	return &Device{backend: b, limits: limits, readOnly: o.ReadOnly}, nil
}

// Size returns the size of the disk in bytes, a multiple of SectorSize.
func (d *Device) Size() int64 { return d.backend.Size() }

// ReadOnly reports whether writes are refused.
func (d *Device) ReadOnly() bool { return d.readOnly }

// Limits returns what the disk asks of requests and knows about its medium.
func (d *Device) Limits() Limits { return d.limits }

// ReadVecAt fills dst with the bytes of the disk from offset off on and returns dst.Size(). A part of the disk that its
// storage lacks, because a file turned out shorter, reads as zeroes. After an error the contents of dst are undefined.
// Errors: ErrRange, ErrClosed, and what the Backend reports.
func (d *Device) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	n, err := d.read(dst, off)
	d.stats.read.add(n, err)
	return n, err
}

// WriteVecAt writes src at offset off and returns src.Size(). The bytes are stable after the next Flush. After an error
// any part of the range may hold old or new bytes. Errors: ErrReadOnly, ErrRange, ErrClosed, and what the Backend
// reports.
func (d *Device) WriteVecAt(src iov.Vec, off int64) (int, error) {
	n, err := d.write(src, off)
	d.stats.write.add(n, err)
	return n, err
}

// Flush returns when every write that completed before the call is on stable storage. Errors: ErrClosed, and what the
// Backend reports.
func (d *Device) Flush() error {
	err := d.flush()
	d.stats.flush.add(0, err)
	return err
}

// Close waits for the requests under way and closes the Backend. Requests that come later, and a second Close, get
// ErrClosed.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return ErrClosed
	}
	d.closed = true
	return d.backend.Close()
}

func (d *Device) read(dst iov.Vec, off int64) (int, error) {
	if err := d.begin(); err != nil {
		return 0, err
	}
	defer d.mu.RUnlock()
	size := dst.Size()
	if err := d.checkRange(off, size); err != nil || size == 0 {
		return 0, err
	}
	n, err := d.backend.ReadVecAt(dst, off)
	if err == nil && n < size {
		err = dst.Fill(n, size-n, 0)
	}
	if err != nil {
		return n, d.stats.failed(err)
	}
	return size, nil
}

func (d *Device) write(src iov.Vec, off int64) (int, error) {
	if err := d.begin(); err != nil {
		return 0, err
	}
	defer d.mu.RUnlock()
	if d.readOnly {
		return 0, ErrReadOnly
	}
	size := src.Size()
	if err := d.checkRange(off, size); err != nil || size == 0 {
		return 0, err
	}
	n, err := d.backend.WriteVecAt(src, off)
	if err == nil && n < size {
		err = io.ErrShortWrite
	}
	if err != nil {
		return n, d.stats.failed(err)
	}
	return size, nil
}

func (d *Device) flush() error {
	if err := d.begin(); err != nil {
		return err
	}
	defer d.mu.RUnlock()
	if d.readOnly {
		return nil
	}
	if err := d.backend.Flush(); err != nil {
		return d.stats.failed(err)
	}
	return nil
}

// begin admits a request. It returns with mu held for reading, unless it returns an error.
func (d *Device) begin() error {
	d.mu.RLock()
	if d.closed {
		d.mu.RUnlock()
		return ErrClosed
	}
	return nil
}

// checkRange compares without adding: off and n come from the guest, and their sum may not fit.
func (d *Device) checkRange(off int64, n int) error {
	size := d.backend.Size()
	if off < 0 || off > size || int64(n) > size-off {
		return ErrRange
	}
	return nil
}
