package vnet

import (
	"errors"
	"os"

	"github.com/kvmlet/kvmlet/iov"
	"github.com/kvmlet/kvmlet/net"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// etherHeaderLen is the length of an Ethernet header without a VLAN tag: the shortest frame.
const etherHeaderLen = 14

// transmitter is the worker of the transmit queue.
type transmitter struct {
	*activation
	dev    *Device
	queue  *queue.Queue
	chain  queue.Chain
	header [net.HeaderLen]byte // of the frame being sent
	frame  iov.Vec             // header, then the guest's bytes
}

// run sends frames until the device is reset or a chain turns out malformed. The driver is notified once for all that
// was there, and at least once around the queue, however fast it adds more.
func (t *transmitter) run() {
	for t.queue.Wait() == nil {
		for left := t.queue.Size(); left > 0 && !t.stopping.Load(); left-- {
			ok, err := t.queue.Pop(&t.chain)
			if err == nil && ok {
				err = t.send()
			}
			if err != nil {
				t.transport.NeedsReset()
				return
			}
			if !ok {
				break
			}
			t.queue.Push(&t.chain, 0)
		}
		if t.queue.ShouldNotify() {
			_ = t.transport.NotifyQueue(txQueue) // the next frame notifies again
		}
	}
}

var errTxChain = errors.New("vnet: transmit buffer without a whole header")

// send passes the popped chain's frame to the backend, or drops and counts it. The backend gets the header that was
// checked, not the guest's memory, which may change at any moment. An error means that the driver broke the rules of
// the queue.
func (t *transmitter) send() error {
	n, err := t.chain.Readable.CopyTo(t.header[:], 0)
	if err != nil || n < net.HeaderLen {
		return errTxChain
	}
	stats := &t.dev.stats
	length := t.chain.Readable.Size() - net.HeaderLen
	if length < etherHeaderLen || length > net.MaxFrame {
		stats.txBadLength.Add(1)
		return nil
	}
	h, err := net.ParseHeader(t.header[:])
	if err == nil {
		err = h.CheckFromGuest(t.offloads, length)
	}
	if err != nil {
		stats.txBadHeader.Add(1)
		return nil
	}
	h.Flags &= net.FlagNeedsCSum // the only one that a driver may set
	h.NumBuffers = 0
	h.Put(t.header[:])

	t.frame = t.frame[:0].Append(t.header[:])
	if t.frame, err = t.chain.Readable.AppendSlice(t.frame, net.HeaderLen, length); err != nil {
		return err
	}
	_, err = t.dev.backend.Send(t.frame)
	switch {
	case err == nil:
		stats.txFrames.Add(1)
		stats.txBytes.Add(uint64(length))
	case errors.Is(err, os.ErrDeadlineExceeded): // only a reset sets a deadline
	default:
		stats.txRefused.Add(1)
	}
	return nil
}
