// Package blk is the block layer: everything between a disk device that a guest sees and the driver that holds the
// bytes.
//
// Programs that want a disk open one with blk/disk.Open, which puts driver, format and Device together, and read and
// write it with Device's methods. Buffers are iov.Vecs: iov.Of(p) is one of a slice p.
//
// A driver implements Backend, and says what else it can do by implementing more of the interfaces in driver.go. Device
// stands in front of it and gives every user the same contract, whatever the driver: any offset and length, vectors of
// any shape, requests in any number.
//
//	guest -> vblk -> Device -> Backend (raw, nbd, mem)
//	guest -> vblk -> Device -> Backend (qcow2) -> Device -> Backend (raw)
//	                                          \-> Device (backing file) -> ...
//
// A format such as qcow2 is a Backend over further Devices, so that its own metadata is padded, throttled and counted
// by the same code.
//
// A request passes these stages, in this order, and each has a file of its own:
//
//	gate.go      wait while the disk is drained; count what is under way
//	request.go   check mode, medium and range
//	throttle.go  wait for the rate limit
//	track.go     wait for earlier requests that overlap, where one of both needs the range for itself
//	notify.go    tell those who want to see the old bytes first
//	zero.go      find zeroes in what is written
//	pad.go       widen to the backend's alignment; bounce memory that it can't use; collapse what is too long; call it
//	bitmap.go    mark what was written
//	stats.go     count and time it
//
// Readers who know QEMU's block/io.c find its functions here under other names. bdrv_preadv, bdrv_pwritev and their
// kin are Do with a Request or the methods that wrap it; the aio variants are Submit, with Done for the callback, and the
// end of a context for bdrv_aio_cancel. There are no variants by sectors, and none that emulate one driver interface by
// another: a goroutine may block. bdrv_aio_multiwrite and bdrv_io_plug are Submit and Plug; bdrv_drain, bdrv_drain_all
// and the sections are Drain, DrainAll and Undrain, and bdrv_requests_pending has no other user than these.
// bdrv_round_to_clusters is part of copying on read (cor.go). Memory comes from a pool inside (qemu_blockalign), since no
// caller needs aligned memory of its own. bdrv_ioctl has no counterpart: SCSI commands are not passed through.
//
// Buffers are iov.Vecs over the guest's own pages all the way down; a request that the backend can serve as it stands is
// neither copied nor does it allocate.
package blk

import (
	"errors"
	"fmt"
	"os"
)

// SectorSize is the unit in which disks are sized and, on virtio, addressed, in bytes (virtio 1.2, 5.2.4). It does not
// depend on the block size of the medium.
const SectorSize = 512

var (
	// ErrReadOnly refuses a write to a disk that was opened for reading only.
	ErrReadOnly = errors.New("blk: disk is read-only")

	// ErrRange refuses a request that begins before or ends beyond the disk.
	ErrRange = errors.New("blk: request outside the disk")

	// ErrClosed refuses a request to a Device after Close; it also matches os.ErrClosed.
	ErrClosed = fmt.Errorf("blk: disk is closed: %w", os.ErrClosed)

	// ErrLimits refuses a Backend whose Limits are malformed.
	ErrLimits = errors.New("blk: limits not supported")

	// ErrNoMedium refuses a request to a drive without a medium.
	ErrNoMedium = errors.New("blk: no medium")

	// ErrUnsupported is what a Backend answers to an operation that it can't do, or not on this range. Device then does
	// it another way where there is one. It matches errors.ErrUnsupported.
	ErrUnsupported = fmt.Errorf("blk: operation not supported: %w", errors.ErrUnsupported)
)
