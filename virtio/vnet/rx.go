package vnet

import (
	"encoding/binary"
	"errors"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

const (
	// maxSegments bounds the list of buffers that the backend is given at once, and the elements of one chain. It stays
	// below IOV_MAX (1024), and no driver comes near it.
	maxSegments = 768

	// gsoTypeOffset is where gso_type is in the header (virtio 1.2, 5.1.6).
	gsoTypeOffset = 1

	// numBuffersOffset is where num_buffers is in the header (virtio 1.2, 5.1.6).
	numBuffersOffset = 10

	// spillSize is the length of the longest frame with its header.
	spillSize = net.HeaderLen + net.MaxFrame
)

var errRxChain = errors.New("vnet: receive buffer without room for a header, or in too many parts")

// receiver is the worker of the receive queue.
//
// It keeps a window of buffers: chains that it has popped and that no frame has filled yet. A frame is received straight
// into them. Behind them stands the spill, so that no frame is lost because the driver was late with buffers: what ended
// up there is copied into the next buffers as the driver supplies them. While there is no buffer at all nothing is
// received, and frames wait in the backend.
type receiver struct {
	*activation
	dev   *Device
	queue *queue.Queue
	merge bool // a frame may use several buffers
	want  int  // bytes that the window should hold
	limit int  // bytes of the longest frame, with its header, that the MTU allows

	buffers []buffer // circular
	first   int      // index of the window's first buffer
	window  int      // buffers in the window
	bytes   int      // that they hold

	frame   iov.Vec // where the next frame goes: the first buffers of the window, then the spill
	direct  int     // buffers in frame
	spillAt int     // bytes in front of the spill
	spill   []byte
	used    []queue.Used // scratch of push
}

// buffer is a chain that the driver supplied to receive into.
type buffer struct {
	queue.Chain
	size int // of Writable
}

func newReceiver(d *Device, a *activation, q *queue.Queue) *receiver {
	r := &receiver{activation: a, dev: d, queue: q, merge: a.features.Has(FeatureMrgRxBuf)}
	n := 1
	if r.merge {
		n = int(q.Size())
	}
	const around = net.HeaderLen + net.MaxFrame - net.MaxPacket // a packet
	r.limit = spillSize
	if a.features.Has(FeatureMTU) {
		r.limit = around + int(d.mtu)
	}
	r.want = around + max(int(d.mtu), DefaultMTU)
	if a.offloads&(net.GuestTSO4|net.GuestTSO6) != 0 {
		r.want = spillSize
	}
	r.buffers, r.used = make([]buffer, n), make([]queue.Used, 0, n)
	r.spill = make([]byte, spillSize)
	return r
}

// run brings frames to the guest until the device is reset, the backend fails or a chain turns out malformed.
func (r *receiver) run() {
	err := r.frames()
	switch {
	case r.stopping.Load():
	case errors.Is(err, errRxChain), errors.Is(err, queue.ErrBadChain):
		r.transport.NeedsReset()
	default:
		r.dev.fail(r.activation, err)
	}
}

// frames receives frame after frame. It returns why it cannot go on.
func (r *receiver) frames() error {
	for {
		if err := r.prepare(); err != nil {
			return err
		}
		n, err := r.dev.backend.Recv(r.frame)
		switch {
		case r.stopping.Load():
			return queue.ErrStopped
		case errors.Is(err, net.ErrFrameTooLong):
			r.drop(&r.dev.stats.rxTooLong)
			continue
		case err != nil:
			return err
		case n < net.HeaderLen:
			r.drop(&r.dev.stats.rxInvalid)
			continue
		case n > r.limit && !r.unsegmented():
			r.drop(&r.dev.stats.rxTooLong)
			continue
		}
		ok, err := r.place(n)
		if err != nil {
			return err
		}
		if !ok {
			r.drop(&r.dev.stats.rxTooLong)
			continue
		}
		r.dev.stats.rxFrames.Add(1) // before the driver sees the frame
		r.dev.stats.rxBytes.Add(uint64(n - net.HeaderLen))
		r.push(n)
	}
}

// drop counts a frame that the driver does not get to see. Its buffers may hold some of it and wait for the next one.
func (r *receiver) drop(reason *atomic.Uint64) {
	reason.Add(1)
	for i := range r.window {
		r.at(i).Touched()
	}
}

// unsegmented reports whether the received frame is one that shall still be cut to the MTU: only such a one may be longer
// once the driver was told the MTU (virtio 1.2, 5.1.4.1).
func (r *receiver) unsegmented() bool {
	var h [net.HeaderLen]byte
	_, _ = r.frame.CopyTo(h[:], 0) // the spill alone is longer
	return h[gsoTypeOffset]&^net.GSOECN != net.GSONone
}

// prepare fills the window from the queue, waits if that leaves it empty, and sets frame.
func (r *receiver) prepare() error {
	for r.bytes < r.want && r.window < len(r.buffers) {
		ok, err := r.pop()
		if err != nil {
			return err
		}
		if ok {
			continue
		}
		if r.window > 0 {
			break
		}
		// Wait looks at the queue again after it has asked for a kick, so that none is missed.
		if err := r.queue.Wait(); err != nil {
			return err
		}
	}
	r.frame, r.direct, r.spillAt = r.frame[:0], 0, 0
	for ; r.direct < r.window; r.direct++ {
		b := r.at(r.direct)
		if len(r.frame)+len(b.Writable) > maxSegments {
			break
		}
		r.frame = append(r.frame, b.Writable...)
		r.spillAt += b.size
	}
	r.frame = r.frame.Append(r.spill)
	return nil
}

// at returns buffer i of the window.
func (r *receiver) at(i int) *buffer { return &r.buffers[(r.first+i)%len(r.buffers)] }

// pop moves the next chain of the queue to the end of the window, which has room for it. It returns false when the
// queue has none.
func (r *receiver) pop() (bool, error) {
	b := r.at(r.window)
	ok, err := r.queue.Pop(&b.Chain)
	if err != nil || !ok {
		return false, err
	}
	// Each buffer must hold at least a header (virtio 1.2, 5.1.6.3.1).
	if b.size = b.Writable.Size(); b.size < net.HeaderLen || len(b.Writable) > maxSegments {
		return false, errRxChain
	}
	r.window++
	r.bytes += b.size
	return true, nil
}

// place moves what the received frame of n bytes has in the spill into buffers, and waits for the driver to supply
// those. It returns false when the driver's buffers cannot hold the frame at all.
func (r *receiver) place(n int) (bool, error) {
	for i, off := r.direct, r.spillAt; off < n; i++ {
		for i == r.window {
			if r.window == len(r.buffers) {
				return false, nil
			}
			ok, err := r.pop()
			if err == nil && !ok {
				err = r.queue.Wait()
			}
			if err != nil {
				return false, err
			}
		}
		b := r.at(i)
		m := min(b.size, n-off)
		if _, err := b.Writable.CopyFrom(0, r.spill[off-r.spillAt:][:m]); err != nil {
			return false, err
		}
		off += m
	}
	return true, nil
}

// push hands the frame of n bytes at the start of the window to the driver.
func (r *receiver) push(n int) {
	first := r.at(0)
	r.used = r.used[:0]
	for off := 0; off < n; r.window-- {
		b := r.at(0)
		m := min(b.size, n-off)
		r.used = append(r.used, queue.Used{Chain: &b.Chain, Written: uint32(m)})
		off += m
		r.bytes -= b.size
		r.first = (r.first + 1) % len(r.buffers)
	}
	if r.window == 0 {
		r.first = 0 // the same few slots again, whose lists have grown and are in the cache
	}
	var num [2]byte
	binary.LittleEndian.PutUint16(num[:], uint16(len(r.used)))
	// A buffer holds at least a header, so this cannot fail.
	_, _ = first.Writable.CopyFrom(numBuffersOffset, num[:])
	// All at once: a driver that finds only some of a frame's buffers drops it.
	r.queue.PushAll(r.used)
	if r.queue.ShouldNotify() {
		_ = r.transport.NotifyQueue(rxQueue) // the next frame notifies again
	}
}
