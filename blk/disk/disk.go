// Package disk puts disks together from what a user says about them: a driver for the place where the bytes lie, a
// format over it, the backing files of an image, and a blk.Device in front. The drivers know nothing of each other; what
// names files, formats and policies is here, and so is work that concerns whole disks: making, checking, copying,
// comparing and mapping them.
//
// A format is never guessed from what a file holds: what a guest wrote to a raw disk could look like an image that names
// any file of the host as its backing file. For the same reason backing files are opened only where the caller allows
// them (Backing), and always read-only.
package disk

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/blk/qcow2"
	"github.com/kvmlet/kvmlet/blk/raw"
)

// Spec describes a disk to open. Only Path must be set.
type Spec struct {
	Path   string // a file, a block device, or an NBD URI (nbd://, nbds://, nbd+unix://, nbds+unix://)
	Format Format // "" means Raw

	ReadOnly   bool // the disk can't be written, and others may read it too
	ForceShare bool // with ReadOnly: take no lock, and look at a disk that somebody may be writing

	Cache Cache   // of the whole chain; for an NBD server only what concerns flushes
	AIO   raw.AIO // of the whole chain

	Backing       Backing // which backing files may be opened; others are refused with qcow2.ErrBacking
	BackingFormat Format  // of a backing file whose image does not say; "" refuses it
	Alone         bool    // open an image without its backing file; what lies there can't be read

	DetectZeroes blk.DetectZeroes
	CopyOnRead   bool // store in the image what is read from its backing file

	Throttle blk.Throttle       // limits of this disk alone; or
	Group    *blk.ThrottleGroup // the group that it belongs to

	RequestAlign int // a coarser alignment than the medium's, to see what it costs; 0 means the medium's

	// ReconnectDelay is how long requests wait for a lost connection to an NBD server to come back; 0 means that they
	// fail at once.
	ReconnectDelay time.Duration
}

// maxDepth bounds the number of backing files below an image, each of which takes a file descriptor and some memory.
const maxDepth = 200

// ErrDepth refuses a chain of more backing files than anybody needs.
var ErrDepth = fmt.Errorf("more than %d backing files", maxDepth)

// IsURI reports whether path is that of an NBD export, and not of a file.
func IsURI(path string) bool {
	scheme, _, ok := strings.Cut(path, "://")
	switch scheme {
	case "nbd", "nbds":
		return ok
	case "nbd+unix", "nbds+unix":
		return ok
	}
	return false
}

// Open opens a disk and, where it is an image with a backing file, the chain below it. The Device owns all of it. ctx
// counts until Open returns.
//
// Errors: those of raw.Open, nbd.Dial and qcow2.Open, which includes qcow2.ErrBacking for a backing file that is not
// allowed; qcow2.ErrBackingLoop, ErrDepth, and blk.ErrThrottle. Nothing is left open then.
func Open(ctx context.Context, s Spec) (*blk.Device, error) {
	d, _, err := OpenChain(ctx, s)
	return d, err
}

// Layer is one disk of a chain: an image, or the raw disk at the end.
type Layer struct {
	Path   string // as the Spec, or the image above it, names it
	Format Format
	Device *blk.Device
}

// OpenChain is Open that tells of all layers, from the top. They are for looking at; the Device returned owns them.
func OpenChain(ctx context.Context, s Spec) (*blk.Device, []Layer, error) {
	if err := s.check(); err != nil {
		return nil, nil, err
	}
	group := s.Group
	if s.Throttle != (blk.Throttle{}) {
		var err error
		if group, err = blk.NewThrottleGroup(s.Throttle); err != nil {
			return nil, nil, fmt.Errorf("open disk %s: %w", s.Path, err)
		}
	}
	o := &opener{ctx: ctx, s: s}
	d, err := o.open(place{name: s.Path, path: s.Path, format: s.Format}, blk.Options{
		ReadOnly: s.ReadOnly, Writethrough: s.Cache.through(), NoFlush: s.Cache == CacheUnsafe,
		DetectZeroes: s.DetectZeroes, CopyOnRead: s.CopyOnRead, Throttle: group, RequestAlign: s.RequestAlign,
	})
	switch {
	case err == nil:
		return d, o.layers, nil
	case o.below != nil: // shorter than what each image of a long chain adds
		return nil, nil, fmt.Errorf("disk %s: %w", s.Path, o.below)
	}
	return nil, nil, err
}

// check refuses what contradicts itself.
func (s *Spec) check() error {
	if s.Format == "" {
		s.Format = Raw
	}
	var err error
	switch {
	case s.Path == "":
		return errors.New("open disk: its path is empty")
	case s.Format != Raw && s.Format != QCOW2:
		_, err = ParseFormat(string(s.Format))
	case s.BackingFormat != "" && s.BackingFormat != Raw && s.BackingFormat != QCOW2:
		_, err = ParseFormat(string(s.BackingFormat))
	case s.Cache > CacheUnsafe:
		err = fmt.Errorf("cache mode %v", s.Cache)
	case s.ForceShare && !s.ReadOnly:
		err = errors.New("a disk without a lock can't be written (use it read-only)")
	case s.CopyOnRead && s.ReadOnly:
		err = errors.New("copy-on-read stores what is read, so the disk can't be read-only")
	case s.Group != nil && s.Throttle != (blk.Throttle{}):
		err = errors.New("limits of its own, and a throttle group: a disk has one or the other")
	}
	if err != nil {
		return fmt.Errorf("open disk %s: %w", s.Path, err)
	}
	return nil
}

// place is where one layer of a chain lies.
type place struct {
	name   string // as said, what relative names of backing files refer to
	path   string // what is opened
	format Format
	depth  int
}

// opener opens the layers of one chain.
type opener struct {
	ctx    context.Context
	s      Spec
	seen   []identity // of the layers so far, from the top
	layers []Layer
	below  error // why a backing file was not opened
}

// open opens the layer at p and those below it, with a Device that has the options o.
func (o *opener) open(p place, options blk.Options) (_ *blk.Device, err error) {
	if err := o.ctx.Err(); err != nil {
		return nil, fmt.Errorf("open disk %s: %w", p.path, err)
	}
	if err := o.notSeen(p.path); err != nil {
		return nil, err
	}
	layer := len(o.layers)
	o.layers = append(o.layers, Layer{Path: p.name, Format: p.format})
	b, err := o.s.openFile(o.ctx, p.path, options.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = b.Close() // nothing was written
		}
	}()
	if f, ok := b.(*raw.File); ok && p.depth > 0 {
		if err := o.s.Backing.confirm(f); err != nil {
			return nil, err
		}
	}
	if p.format == Raw {
		d, err := blk.New(b, options)
		if err != nil {
			return nil, fmt.Errorf("open disk %s: %w", p.path, err)
		}
		o.layers[layer].Device = d
		return d, nil
	}
	file, err := blk.New(b, blk.Options{ReadOnly: options.ReadOnly, NoFlush: options.NoFlush})
	if err != nil {
		return nil, fmt.Errorf("open disk %s: %w", p.path, err)
	}
	b = file // which closes what it was made of
	image, err := qcow2.Open(file, o.imageOptions(p, options.ReadOnly))
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", p.path, err)
	}
	b = image
	d, err := blk.New(image, options)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", p.path, err)
	}
	o.layers[layer].Device = d
	return d, nil
}

func (o *opener) imageOptions(p place, readOnly bool) qcow2.Options {
	q := qcow2.Options{ReadOnly: readOnly, NoBacking: o.s.Alone}
	q.Backing = func(name, format string) (*blk.Device, error) {
		d, err := o.openBelow(p, name, format)
		if err != nil && o.below == nil {
			of := ""
			if p.depth > 0 {
				of = " of " + p.name
			}
			o.below = fmt.Errorf("backing file %q%s: %w", name, of, err)
		}
		return d, err
	}
	return q
}

// openBelow opens the backing file that the image at p names.
func (o *opener) openBelow(p place, name, format string) (*blk.Device, error) {
	below, err := o.allowed(p, name, format)
	if err != nil {
		return nil, err
	}
	return o.open(below, blk.Options{ReadOnly: true, NoFlush: o.s.Cache == CacheUnsafe})
}

// openFile opens what a file, a device or a server holds, byte for byte.
func (s *Spec) openFile(ctx context.Context, path string, readOnly bool) (blk.Backend, error) {
	if !IsURI(path) {
		return raw.Open(path, raw.Options{ReadOnly: readOnly, Cache: s.Cache.raw(), AIO: s.AIO, ForceShare: s.ForceShare})
	}
	o, err := nbd.ParseURI(path)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	o.ReconnectDelay = s.ReconnectDelay
	c, err := nbd.Dial(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("open disk %s: %w", path, err)
	}
	if c.ReadOnly() && !readOnly {
		_ = c.Close()
		return nil, fmt.Errorf("open disk %s: its server exports it read-only (use it read-only)", path)
	}
	return c, nil
}
