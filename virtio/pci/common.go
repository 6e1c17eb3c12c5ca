package pci

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/virtio"
	"github.com/kvmlet/kvmlet/virtio/queue"
)

// commonSize is the size of struct virtio_pci_common_cfg without the fields that VIRTIO_F_NOTIF_CONFIG_DATA and
// VIRTIO_F_RING_RESET bring (virtio 1.2, 4.1.4.3).
const commonSize = 0x38

// driverRegs are the registers that the driver writes, beside those of its queues.
type driverRegs struct {
	deviceFeatureSelect uint32
	featureSelect       uint32
	features            virtio.Features
	queueSelect         uint16
}

// queueRegs are the registers of one queue.
type queueRegs struct {
	max    uint16
	size   uint16
	enable bool
	desc   uint64
	driver uint64
	device uint64
	vector atomic.Uint32 // of its interrupts, or noVector; written under Function.mu

	kick     *queue.Event
	doorbell uint64 // address at which the host signals kick; 0: none
}

// commonField is a field of the common configuration; value is little-endian and zero-extended.
type commonField struct {
	off, size int
	get       func(f *Function) uint64
	set       func(f *Function, value uint64) // nil: read-only
}

// commonFields is struct virtio_pci_common_cfg (virtio 1.2, 4.1.4.3). Fields of a queue that does not exist read as
// zero, its vector as none, and ignore what is written.
var commonFields = [...]commonField{
	{0x00, 4, // device_feature_select
		func(f *Function) uint64 { return uint64(f.driver.deviceFeatureSelect) },
		func(f *Function, v uint64) { f.driver.deviceFeatureSelect = uint32(v) }},
	{0x04, 4, // device_feature
		func(f *Function) uint64 { return featureWord(f.offered, f.driver.deviceFeatureSelect) }, nil},
	{0x08, 4, // driver_feature_select
		func(f *Function) uint64 { return uint64(f.driver.featureSelect) },
		func(f *Function, v uint64) { f.driver.featureSelect = uint32(v) }},
	{0x0C, 4, // driver_feature
		func(f *Function) uint64 { return featureWord(f.driver.features, f.driver.featureSelect) },
		(*Function).setFeatureWord},
	{0x10, 2, // config_msix_vector
		func(f *Function) uint64 { return uint64(f.configVector.Load()) },
		func(f *Function, v uint64) { f.mapVector(&f.configVector, uint16(v)) }},
	{0x12, 2, // num_queues
		func(f *Function) uint64 { return uint64(len(f.queues)) }, nil},
	{0x14, 1, // device_status
		func(f *Function) uint64 { return uint64(f.readStatus()) },
		func(f *Function, v uint64) { f.writeStatus(virtio.Status(v)) }},
	{0x15, 1, // config_generation
		func(f *Function) uint64 { return uint64(f.generation()) }, nil},
	{0x16, 2, // queue_select
		func(f *Function) uint64 { return uint64(f.driver.queueSelect) },
		func(f *Function, v uint64) { f.driver.queueSelect = uint16(v) }},
	{0x18, 2, // queue_size
		queueGet(func(q *queueRegs) uint64 { return uint64(q.size) }),
		queueSet(func(q *queueRegs, v uint64) { q.size = uint16(v) })},
	{0x1A, 2, // queue_msix_vector
		func(f *Function) uint64 {
			if q := f.selected(); q != nil {
				return uint64(q.vector.Load())
			}
			return noVector
		},
		func(f *Function, v uint64) {
			if q := f.selected(); q != nil {
				f.mapVector(&q.vector, uint16(v))
			}
		}},
	{0x1C, 2, // queue_enable; a driver never writes zero (virtio 1.2, 4.1.4.3.2)
		queueGet(func(q *queueRegs) uint64 {
			if q.enable {
				return 1
			}
			return 0
		}),
		queueSet(func(q *queueRegs, v uint64) { q.enable = v == 1 })},
	{0x1E, 2, // queue_notify_off
		func(f *Function) uint64 {
			if f.selected() != nil {
				return uint64(f.driver.queueSelect)
			}
			return 0
		}, nil},
	{0x20, 8, // queue_desc
		queueGet(func(q *queueRegs) uint64 { return q.desc }),
		queueSet(func(q *queueRegs, v uint64) { q.desc = v })},
	{0x28, 8, // queue_driver
		queueGet(func(q *queueRegs) uint64 { return q.driver }),
		queueSet(func(q *queueRegs, v uint64) { q.driver = v })},
	{0x30, 8, // queue_device
		queueGet(func(q *queueRegs) uint64 { return q.device }),
		queueSet(func(q *queueRegs, v uint64) { q.device = v })},
}

// selected returns the queue that queue_select names, nil if there is none.
func (f *Function) selected() *queueRegs {
	if i := int(f.driver.queueSelect); i < len(f.queues) {
		return &f.queues[i]
	}
	return nil
}

func queueGet(get func(q *queueRegs) uint64) func(*Function) uint64 {
	return func(f *Function) uint64 {
		if q := f.selected(); q != nil {
			return get(q)
		}
		return 0
	}
}

// queueSet makes a setter of a register that locks once the queue is enabled or the driver is done: what the device
// works with was checked when it was activated and must not change afterwards.
func queueSet(set func(q *queueRegs, value uint64)) func(*Function, uint64) {
	return func(f *Function, v uint64) {
		if q := f.selected(); q != nil && !q.enable && f.status&virtio.StatusDriverOK == 0 {
			set(q, v)
		}
	}
}

// featureWord returns word i of a feature set; there are two (virtio 1.2, 4.1.4.3).
func featureWord(s virtio.Features, i uint32) uint64 {
	if i > 1 {
		return 0
	}
	return uint64(uint32(s >> (32 * i)))
}

// setFeatureWord takes the features that the driver accepts, until it is done with them.
func (f *Function) setFeatureWord(v uint64) {
	if i := f.driver.featureSelect; i <= 1 && f.status&virtio.StatusFeaturesOK == 0 {
		f.driver.features = f.driver.features&^(0xFFFF_FFFF<<(32*i)) | virtio.Features(v)<<(32*i)
	}
}

// load reads the field as it is.
func (r *commonField) load(f *Function) (b [8]byte) {
	binary.LittleEndian.PutUint64(b[:], r.get(f))
	return b
}

// readCommon reads bytes of the common configuration. A driver uses each field's own width (virtio 1.2, 4.1.3.1); other
// accesses read the bytes of every field that they touch.
func (f *Function) readCommon(p []byte, off int) {
	for i := range commonFields {
		r := &commonFields[i]
		if !overlap(off, len(p), r.off, r.size) {
			continue
		}
		b := r.load(f)
		if d := r.off - off; d >= 0 {
			copy(p[d:], b[:r.size])
		} else {
			copy(p, b[-d:r.size])
		}
	}
}

// generation returns config_generation. A device whose configuration changes counts that itself, under the lock under
// which it answers ReadConfig: so the number changes together with the configuration, whoever reads at that moment, and
// also while the driver does not run the device.
func (f *Function) generation() uint8 {
	if d, ok := f.dev.(virtio.ConfigGenerator); ok {
		return d.ConfigGeneration()
	}
	return 0
}

// writeCommon writes bytes of the common configuration: the fields that they touch, in order, keep their other bytes.
// While a reset is under way, whose end the driver must wait for (virtio 1.2, 4.1.4.3.2), there is nothing to write to.
func (f *Function) writeCommon(p []byte, off int) {
	if f.halting != nil && f.halting.clear {
		return
	}
	for i := range commonFields {
		r := &commonFields[i]
		if r.set == nil || !overlap(off, len(p), r.off, r.size) {
			continue
		}
		b := r.load(f)
		if d := r.off - off; d >= 0 {
			copy(b[:r.size], p[d:])
		} else {
			copy(b[-d:r.size], p)
		}
		r.set(f, binary.LittleEndian.Uint64(b[:]))
	}
}
