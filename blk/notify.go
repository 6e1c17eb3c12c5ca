package blk

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/kvmlet/kvmlet/iov"
)

// BeforeWrite is called before bytes of a disk change: with the range that a write, a write of zeroes, a discard or a cut
// at the end is about to touch. old reads the disk as it still is. The write waits until BeforeWrite returns, and fails
// with its error.
type BeforeWrite func(ctx context.Context, old iov.ReaderAt, off, n int64) error

// sharedList is a list that is read without a lock. Its readers see it as it was before or after a change.
type sharedList[E any] struct {
	list atomic.Pointer[[]*E]
	mu   sync.Mutex // held by those who change list
}

func (l *sharedList[E]) all() []*E {
	if list := l.list.Load(); list != nil {
		return *list
	}
	return nil
}

// add and remove change the list. mu is held.
func (l *sharedList[E]) add(e *E) {
	list := append(slices.Clone(l.all()), e)
	l.list.Store(&list)
}

func (l *sharedList[E]) remove(e *E) {
	list := slices.DeleteFunc(slices.Clone(l.all()), func(o *E) bool { return o == e })
	l.list.Store(&list)
}

// listeners are functions to be called.
type listeners[F any] struct{ sharedList[F] }

// listen returns a function that removes f again.
func (l *listeners[F]) listen(f F) (remove func()) {
	entry := &f
	l.mu.Lock()
	defer l.mu.Unlock()
	l.add(entry)
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.remove(entry)
	}
}

// NotifyBeforeWrite has f called before every change of the disk's bytes until remove is called: how a backup keeps the
// old ones. It waits for the requests under way, so that f sees all later ones. f may be called from several goroutines
// at once, and calls may still be under way when remove returns; it must not send requests to this Device other than
// through old. Errors: ErrClosed, those of ctx.
func (d *Device) NotifyBeforeWrite(ctx context.Context, f BeforeWrite) (remove func(), err error) {
	if err := d.Drain(ctx); err != nil {
		return nil, err
	}
	defer d.Undrain()
	return d.beforeWrite.listen(f), nil
}

// OnResize has f called after the size of the disk changed, with the new size, until remove is called. Where it changes
// twice in a row the calls may come in either order; Size is right. A call may still be under way when remove returns. f
// must not resize the disk.
func (d *Device) OnResize(f func(size int64)) (remove func()) { return d.onResize.listen(f) }

// oldBytes reads a Device from within one of its requests: the gate may be shut behind that one.
type oldBytes struct{ d *Device }

func (o oldBytes) ReadVecAt(dst iov.Vec, off int64) (int, error) {
	size := dst.Size()
	if err := o.d.checkRange(off, int64(size)); err != nil || size == 0 {
		return 0, err
	}
	if err := o.d.readBytes(context.Background(), dst, off, size); err != nil {
		return 0, err
	}
	return size, nil
}

func (d *Device) notifyBeforeWrite(ctx context.Context, off, n int64) error {
	for _, f := range d.beforeWrite.all() {
		if err := (*f)(ctx, oldBytes{d}, off, n); err != nil {
			return err
		}
	}
	return nil
}
