package vblk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue/queuetest"
)

var errMedium = errors.New("medium error")

// memory is a disk in memory that can fail and can be held.
type memory struct {
	limits blk.Limits
	fail   atomic.Bool

	// hold, if set before the first request, is called within every read and write; it may block.
	hold func(off int64)

	mu      sync.Mutex
	data    []byte
	void    int64 // if set, the size of a disk of zeroes, which keeps nothing and has no data
	flushes int
	changes []string
	sizes   []int // of the reads and writes, in bytes

	reads    atomic.Int64
	underway atomic.Int64
}

func newMemory(sectors int) *memory { return &memory{data: make([]byte, sectors*512)} }

func (m *memory) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	m.underway.Add(1)
	defer m.underway.Add(-1)
	m.reads.Add(1)
	if m.hold != nil {
		m.hold(off)
	}
	if m.fail.Load() {
		return 0, errMedium
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sizes = append(m.sizes, dst.Size())
	if m.void > 0 {
		return dst.Size(), dst.Fill(0, dst.Size(), 0)
	}
	return dst.CopyFrom(0, m.data[off:off+int64(dst.Size())])
}

func (m *memory) WriteVecAt(src iov.Vec, off int64) (int, error) {
	m.underway.Add(1)
	defer m.underway.Add(-1)
	if m.hold != nil {
		m.hold(off)
	}
	if m.fail.Load() {
		return 0, errMedium
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sizes = append(m.sizes, src.Size())
	if m.void > 0 {
		return src.Size(), nil
	}
	return src.CopyTo(m.data[off:off+int64(src.Size())], 0)
}

// Discard and WriteZeroes remember what they are asked for. Discarded bytes are lost.
func (m *memory) Discard(off, n int64) error { return m.change("discard", off, n, 0xdd) }

func (m *memory) WriteZeroes(off, n int64, unmap bool) error {
	if unmap {
		return m.change("unmap", off, n, 0)
	}
	return m.change("zero", off, n, 0)
}

func (m *memory) change(what string, off, n int64, b byte) error {
	m.underway.Add(1)
	defer m.underway.Add(-1)
	if m.hold != nil {
		m.hold(off)
	}
	if m.fail.Load() {
		return errMedium
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.changes = append(m.changes, fmt.Sprintf("%s %d+%d", what, off/512, n/512))
	if m.void > 0 {
		return nil
	}
	for i := range m.data[off : off+n] {
		m.data[off+int64(i)] = b
	}
	return nil
}

// changed returns what was discarded and zeroed, in sectors.
func (m *memory) changed() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changes
}

func (m *memory) Truncate(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.data = append(m.data, make([]byte, max(0, size-int64(len(m.data))))...)[:size]
	return nil
}

func (m *memory) Flush() error {
	if m.fail.Load() {
		return errMedium
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes++
	return nil
}

func (m *memory) flushed() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.flushes
}

// taken returns the sizes of the reads and writes since it was last called.
func (m *memory) taken() []int {
	m.mu.Lock()
	defer m.mu.Unlock()
	sizes := m.sizes
	m.sizes = nil
	return sizes
}

func (m *memory) snapshot() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.data)
}

func (m *memory) Size() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return max(m.void, int64(len(m.data)))
}

func (m *memory) Limits() blk.Limits { return m.limits }
func (m *memory) Close() error       { return nil }

// serve carries out the request in r.chain and returns the length for the used ring.
func serve(d *Device, r *request) uint32 {
	for more := d.begin(r); more; {
		more = d.advance(r, d.disk.Do(context.Background(), &r.part))
	}
	if r.answer != nil {
		r.answer[0] = r.status
	}
	return r.written
}

// rig is a device with a driver on its first queue.
type rig struct {
	testing.TB
	*queuetest.Driver
	transport *queuetest.Transport
	dev       *Device
	disk      *blk.Device
	memory    *memory
}

type setup struct {
	Options
	readOnly bool
	without  virtio.Features // what the driver does not negotiate
	memory   *memory         // nil: 64 sectors
}

func newDevice(tb testing.TB, m *memory, readOnly bool, o Options) (*Device, *blk.Device) {
	tb.Helper()
	disk, err := blk.New(m, blk.Options{ReadOnly: readOnly})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := disk.Close(); err != nil {
			tb.Error(err)
		}
	})
	dev, err := New(disk, o)
	if err != nil {
		tb.Fatal(err)
	}
	return dev, disk
}

func start(tb testing.TB, s setup) *rig {
	tb.Helper()
	if s.memory == nil {
		s.memory = newMemory(64)
	}
	dev, disk := newDevice(tb, s.memory, s.readOnly, s.Options)
	tr := queuetest.Start(tb, dev, ^s.without, queuetest.Options{})
	return &rig{TB: tb, Driver: tr.Drivers[0], transport: tr, dev: dev, disk: disk, memory: s.memory}
}

// resetHeld resets a device whose disk holds requests until release is closed. It closes that once the reset has begun, and
// not before.
func (r *rig) resetHeld(release chan<- struct{}) {
	r.Helper()
	r.dev.mu.Lock()
	begun := r.dev.active.ctx.Done()
	r.dev.mu.Unlock()
	go func() {
		<-begun
		close(release)
	}()
	if err := r.dev.Reset(); err != nil {
		r.Fatal(err)
	}
}

// header builds the first 16 bytes of a request.
func header(typ uint32, sector uint64) []byte {
	h := make([]byte, 16)
	binary.LittleEndian.PutUint32(h, typ)
	binary.LittleEndian.PutUint32(h[4:], 0xdeadbeef) // reserved: the device must not look
	binary.LittleEndian.PutUint64(h[8:], sector)
	return h
}

// cut divides b into pieces of the given lengths, the rest in one.
func cut(b []byte, lengths ...int) (pieces [][]byte) {
	for _, n := range lengths {
		if n < len(b) {
			pieces, b = append(pieces, b[:n]), b[n:]
		}
	}
	return append(pieces, b)
}

// unset marks bytes that the device should not have touched.
const unset = 0xa5

func space(n int) []byte { return bytes.Repeat([]byte{unset}, n) }

func pattern(n, seed int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte((i+seed)%151) + 1 // never zero, never unset
	}
	return p
}

// request sends a plain request: data is read by the device, room is written. It returns the status and the length in
// the used ring.
func (r *rig) request(typ uint32, sector uint64, data, room []byte) (status byte, written uint32) {
	r.Helper()
	readable, s := [][]byte{header(typ, sector)}, space(1)
	writable := [][]byte{s}
	if len(data) > 0 {
		readable = append(readable, data)
	}
	if len(room) > 0 {
		writable = [][]byte{room, s}
	}
	written = r.Do(readable, writable)
	return s[0], written
}

// alive checks that the queue still works.
func (r *rig) alive() {
	r.Helper()
	room := space(512)
	status, written := r.request(0, 0, nil, room)
	if status != 0 || written != 513 || !bytes.Equal(room, r.memory.snapshot()[:512]) {
		r.Fatalf("the queue is out of order: status %d, %d bytes written", status, written)
	}
}

// awaitUsed waits until the used index is idx, for requests that the driver does not keep account of.
func (r *rig) awaitUsed(idx uint16) {
	r.Helper()
	deadline := time.Now().Add(queuetest.Timeout)
	for r.UsedIdx() != idx {
		if time.Now().After(deadline) {
			r.Fatalf("used index %d, want %d", r.UsedIdx(), idx)
		}
		runtime.Gosched()
	}
}
