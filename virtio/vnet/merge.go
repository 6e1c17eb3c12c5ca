package vnet

import "github.com/kvmlet/kvmlet/virtio/queue"

// mergeable says whether FeatureMrgRxBuf is offered. It needs a queue that can return several chains at once.
const mergeable = false

type used struct {
	Head    uint16
	Written uint32
}

func pushAll(q *queue.Queue, all []used) {
	for _, u := range all {
		q.Push(u.Head, u.Written)
	}
}
