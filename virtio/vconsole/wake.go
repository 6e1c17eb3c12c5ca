package vconsole

import "github.com/kvmlet/kvmlet/virtio/queue"

// wake makes q's worker look at its queue and at the state of the device again.
func wake(q *queue.Queue) {
	if w, ok := any(q).(interface{ Wake() }); ok {
		w.Wake()
	}
}
