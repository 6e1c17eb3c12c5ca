package blk

import (
	"errors"
	"fmt"
	"slices"
)

// bitmapList is the bitmaps of a Device.
type bitmapList struct{ sharedList[Bitmap] }

// AddBitmap adds an enabled bitmap, which shows what changes from now on, in granules of granularity bytes: a power of
// two from 512 to 2^31. Errors: ErrBitmap.
func (d *Device) AddBitmap(name string, granularity int64) (*Bitmap, error) {
	l := &d.bitmaps
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.find(name) != nil {
		return nil, fmt.Errorf("%w %q is there already", ErrBitmap, name)
	}
	b, err := newBitmap(name, d.Size(), granularity)
	if err != nil {
		return nil, err
	}
	l.add(b)
	return b, nil
}

// Bitmap returns the bitmap with a name, or nil.
func (d *Device) Bitmap(name string) *Bitmap { return d.bitmaps.find(name) }

// Bitmaps returns all bitmaps, in the order in which they were added.
func (d *Device) Bitmaps() []*Bitmap { return slices.Clone(d.bitmaps.all()) }

// RemoveBitmap takes a bitmap away from the disk: it stays as it is. It returns false if there is none with that name.
func (d *Device) RemoveBitmap(name string) bool {
	l := &d.bitmaps
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.find(name)
	if b == nil {
		return false
	}
	l.remove(b)
	return true
}

func (l *bitmapList) find(name string) *Bitmap {
	for _, b := range l.all() {
		if b.Name() == name {
			return b
		}
	}
	return nil
}

// mark notes that n bytes at off changed. A bitmap that is added at the same time may miss it: that write was over before
// AddBitmap returned.
func (l *bitmapList) mark(off, n int64) {
	for _, b := range l.all() {
		b.mark(off, n)
	}
}

// fits reports whether all bitmaps can follow the disk to a new size.
func (l *bitmapList) fits(size int64) error {
	for _, b := range l.all() {
		if err := b.fits(size); err != nil {
			return err
		}
	}
	return nil
}

// resize follows the disk to a new size. New bytes are marked: some of them may have been there before, with other
// contents. A bitmap that can't follow is taken away rather than left to miss writes.
func (l *bitmapList) resize(old, size int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all error
	for _, b := range l.all() {
		if err := b.resize(size); err != nil {
			l.remove(b)
			all = errors.Join(all, err)
		} else if size > old {
			b.mark(old, size-old)
		}
	}
	return all
}
