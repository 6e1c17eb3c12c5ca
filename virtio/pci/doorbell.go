package pci

// notifyMultiplier is the distance in bytes of two queues' notification registers (virtio 1.2, 4.1.4.4).
const notifyMultiplier = 4

// kick is the driver's notification of queue i that came here instead of to the host's eventfd.
func (f *Function) kick(i int) {
	if i >= len(f.queues) || !f.active || !f.queues[i].enable {
		return
	}
	f.doorbells.Add(1)
	f.check(f.queues[i].kick.Signal())
}

// syncDoorbells makes the host signal the kick of every queue in use when its notification register is written where
// the BAR is now, and nowhere else. Where the host refuses, kick serves the queue.
func (f *Function) syncDoorbells() {
	for i := range f.queues {
		q := &f.queues[i]
		var want uint64
		if base := f.base.Load(); f.active && q.enable && base != 0 {
			want = base + notifyOffset + notifyMultiplier*uint64(i)
		}
		if want == q.doorbell {
			continue
		}
		if q.doorbell != 0 {
			f.check(f.host.RemoveIOEvent(q.doorbell, q.kick))
			q.doorbell = 0
		}
		if want != 0 && f.check(f.host.AddIOEvent(want, q.kick)) {
			q.doorbell = want
		}
	}
}
