// Package virtio holds what every virtio device and every transport agree on: device types, feature bits, the bits of
// the device status and the two interfaces between them. The spec is virtio 1.2 (OASIS, 2022).
package virtio

import "github.com/kvmlet/kvmlet/virtio/queue"

// ID is a device type (virtio 1.2, 5).
type ID uint16

// Device types (virtio 1.2, 5).
const (
	Net     ID = 1
	Block   ID = 2
	Console ID = 3
	RNG     ID = 4
	Balloon ID = 5
	VSock   ID = 19
)

// Features is a set of feature bits: 0 to 23 and 50 up belong to the device type, those between to the queues and the
// transport (virtio 1.2, 2.2 and 6).
type Features uint64

// Feature bits that do not depend on the device type (virtio 1.2, 6).
const (
	RingIndirectDesc Features = 1 << 28
	RingEventIdx     Features = 1 << 29
	VersionOne       Features = 1 << 32
	AccessPlatform   Features = 1 << 33
	RingPacked       Features = 1 << 34
	InOrder          Features = 1 << 35
	OrderPlatform    Features = 1 << 36
	SRIOV            Features = 1 << 37
	NotificationData Features = 1 << 38
	NotifConfigData  Features = 1 << 39
	RingReset        Features = 1 << 40
)

// Has reports whether f contains every bit of x.
func (f Features) Has(x Features) bool { return f&x == x }

// Status is the device status field (virtio 1.2, 2.1).
type Status uint8

// Bits of the device status (virtio 1.2, 2.1).
const (
	StatusAcknowledge Status = 1
	StatusDriver      Status = 2
	StatusDriverOK    Status = 4
	StatusFeaturesOK  Status = 8
	StatusNeedsReset  Status = 64
	StatusFailed      Status = 128
)

// Device is a virtio device without its transport. The transport calls every method, one at a time except where a method
// says otherwise; what the guest wrote reaches the device unchecked.
type Device interface {
	// ID returns the device type.
	ID() ID

	// Features returns the device-specific and queue features to offer; the transport adds VersionOne and removes
	// what it cannot carry. The answer must not change while a transport holds the device.
	Features() Features

	// QueueSizes returns the maximum size of each queue, a power of two up to 32768. Its length is the number of
	// queues. The answer must not change.
	QueueSizes() []uint16

	// ReadConfig fills p from the device-specific configuration at byte offset off >= 0; what lies beyond its end
	// reads as zero. It may be called in any state, while workers run and during Reset, and must not wait for either.
	ReadConfig(p []byte, off int)

	// WriteConfig stores p at byte offset off >= 0 of the device-specific configuration and ignores what is read-only
	// or lies beyond the end. It may be called when ReadConfig may.
	WriteConfig(p []byte, off int)

	// Activate starts the device's workers: the driver has set DRIVER_OK. f is a subset of the features offered, with
	// VersionOne. queues has an entry for each of QueueSizes, nil for a queue that the driver left disabled. On an
	// error no worker may be left running, and the transport asks the driver for a reset. t is valid until Reset.
	Activate(f Features, queues []*queue.Queue, t Transport) error

	// Reset stops the workers and waits for them: once it returns, the device neither touches guest memory nor calls
	// its Transport. It may be called when the device is not active, and waits as long as it takes. After an error the
	// device may still do both; the transport does not activate it before a later Reset has succeeded.
	Reset() error
}

// ConfigGenerator is a Device whose device-specific configuration changes otherwise than by WriteConfig.
type ConfigGenerator interface {
	Device

	// ConfigGeneration returns a number that steps at each such change, in whatever state the device is, under the lock
	// under which ReadConfig reads. A driver that finds the same number before and after it read several fields knows
	// that they belong together (virtio 1.2, 2.5). It may be called when ReadConfig may.
	ConfigGeneration() uint8
}

// Negotiator is a Device whose device-specific configuration depends on the features that the driver accepted, which it
// may read before DRIVER_OK.
type Negotiator interface {
	Device

	// Negotiated is called when the driver has set FEATURES_OK, with what Activate will be called with. Reset undoes it.
	// It does not block.
	Negotiated(f Features)
}

// Transport is a device's way to its driver. All methods may be called from any goroutine between the start of
// Activate and the return of Reset. They do not block on anything that waits for the device.
type Transport interface {
	// NotifyQueue sends the used-buffer notification of queue i (virtio 1.2, 2.3). A device calls it when the
	// queue's ShouldNotify said yes.
	NotifyQueue(i int) error

	// NotifyConfig tells the driver that the device-specific configuration has changed, after the change
	// (virtio 1.2, 2.5). The device is a ConfigGenerator.
	NotifyConfig() error

	// NeedsReset sets DEVICE_NEEDS_RESET: the device met an error that only a reset by the driver can end
	// (virtio 1.2, 2.1.2).
	NeedsReset()
}
