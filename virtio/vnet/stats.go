package vnet

import "sync/atomic"

// Stats are a card's counters since New. Each frame that the card drops counts under exactly one reason.
type Stats struct {
	RxFrames  uint64 // frames that the guest received
	RxBytes   uint64 // their bytes, without virtio-net headers
	RxTooLong uint64 // dropped: longer than the guest's buffers, or the MTU it was told
	RxInvalid uint64 // dropped: the backend delivered no whole header

	TxFrames    uint64 // frames that the backend took
	TxBytes     uint64 // their bytes, without virtio-net headers
	TxBadLength uint64 // dropped: shorter than an Ethernet header or longer than net.MaxFrame
	TxBadHeader uint64 // dropped: the header asks for what was not negotiated
	TxRefused   uint64 // dropped: the backend returned an error
}

// counters are Stats while workers count.
type counters struct {
	rxFrames, rxBytes, rxTooLong, rxInvalid                atomic.Uint64
	txFrames, txBytes, txBadLength, txBadHeader, txRefused atomic.Uint64
}

// Stats returns the counters.
func (d *Device) Stats() Stats {
	c := &d.stats
	return Stats{
		RxFrames: c.rxFrames.Load(), RxBytes: c.rxBytes.Load(),
		RxTooLong: c.rxTooLong.Load(), RxInvalid: c.rxInvalid.Load(),
		TxFrames: c.txFrames.Load(), TxBytes: c.txBytes.Load(),
		TxBadLength: c.txBadLength.Load(), TxBadHeader: c.txBadHeader.Load(), TxRefused: c.txRefused.Load(),
	}
}
