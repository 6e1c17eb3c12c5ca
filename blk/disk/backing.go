package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"unicode"

	"github.com/kvmlet/kvmlet/blk/qcow2"
	"github.com/kvmlet/kvmlet/blk/raw"
)

// identity tells files apart, whatever their names.
type identity struct {
	dev, ino uint64 // of a file
	device   uint64 // of a block device, wherever its nodes lie
	uri      string // of an NBD export
}

// identify returns the identity of what path names. ok is false where there is none: opening it will say why.
func identify(path string) (id identity, ok bool) {
	if IsURI(path) {
		return identity{uri: path}, true
	}
	info, err := os.Stat(path)
	if err != nil {
		return identity{}, false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return identity{}, false
	}
	if info.Mode().Type() == fs.ModeDevice {
		return identity{device: st.Rdev}, true
	}
	return identity{dev: st.Dev, ino: st.Ino}, true
}

// notSeen remembers path, and refuses one that the chain has already. It would be locked, or opened without an end.
func (o *opener) notSeen(path string) error {
	id, ok := identify(path)
	if ok && slices.Contains(o.seen, id) {
		return fmt.Errorf("%w: it comes back to %s", qcow2.ErrBackingLoop, path)
	}
	o.seen = append(o.seen, id)
	return nil
}

// refusedError is why a backing file is not opened. Its text stands behind the file's name, so qcow2.ErrBacking, which it is,
// is not said again.
type refusedError struct{ why string }

func (r *refusedError) Error() string        { return r.why }
func (r *refusedError) Is(target error) bool { return target == qcow2.ErrBacking }

func refuse(format string, args ...any) error { return &refusedError{fmt.Sprintf(format, args...)} }

// allowed says where the backing file is that the image at p names, if it may be opened.
func (o *opener) allowed(p place, name, format string) (place, error) {
	if p.depth >= maxDepth {
		return place{}, ErrDepth
	}
	below := place{depth: p.depth + 1, format: Format(format)}
	if format == "" {
		below.format = o.s.BackingFormat
	}
	switch {
	case o.s.Backing == Backing{}:
		return place{}, refuse("not allowed by the backing option (which may be on if you trust who made the image, " +
			"or the folder in which it lies)")
	case below.format == "":
		return place{}, refuse("the image does not say what format it has, and it is never guessed (give the " +
			"backing format: raw or qcow2)")
	case below.format != Raw && below.format != QCOW2:
		return place{}, refuse("it has the format %q (raw and qcow2 are known)", string(below.format))
	}
	var err error
	if below.name, err = resolve(p.name, name); err != nil {
		return place{}, err
	}
	below.path, err = o.s.Backing.permit(below.name)
	return below, err
}

// resolve returns the place that an image at parent means by name.
func resolve(parent, name string) (string, error) {
	if strings.ContainsFunc(name, unicode.IsControl) { // which a terminal would obey
		return "", refuse("control characters in the name %q", name)
	}
	if IsURI(name) {
		return name, nil
	}
	name = strings.TrimPrefix(name, "file:")
	if i := strings.IndexAny(name, ":/"); i >= 0 && name[i] == ':' {
		return "", refuse("its name begins with the protocol %q (files and NBD servers are known; "+
			"for a file of such a name, write ./ before it)", name[:i])
	}
	switch {
	case name == "":
		return "", refuse("its name is empty")
	case filepath.IsAbs(name):
		return name, nil
	case IsURI(parent):
		return "", refuse("its name is relative to that of an NBD export")
	}
	if !strings.Contains(parent, "/") {
		return name, nil
	}
	// Not filepath.Join: a .. behind a symbolic link leads elsewhere than it thinks.
	return filepath.Dir(parent) + "/" + name, nil
}

// confirm refuses a file that was opened by a path which permit returned, and lies elsewhere: a folder on the way may have
// been exchanged for a link meanwhile.
func (b Backing) confirm(f *raw.File) error {
	if b.on {
		return nil
	}
	root, err := canonical(b.below)
	if err != nil {
		return fmt.Errorf("what the backing option allows, %s: %w", b.below, err)
	}
	path, err := f.Opened()
	if err != nil {
		return fmt.Errorf("where a backing file lies: %w", err)
	}
	if rel, err := filepath.Rel(root, path); err != nil || !filepath.IsLocal(rel) {
		return refuse("it lies elsewhere, at %s (the backing option allows what lies in %s)", path, b.below)
	}
	return nil
}

// permit returns the path by which name is opened, if the policy allows it.
func (b Backing) permit(name string) (string, error) {
	if b.on {
		return name, nil
	}
	refused := func(why string) error {
		return refuse("%s (the backing option allows what lies in %s)", why, b.below)
	}
	if IsURI(name) {
		return "", refused("it is on an NBD server")
	}
	root, err := canonical(b.below)
	if err != nil {
		return "", fmt.Errorf("what the backing option allows, %s: %w", b.below, err)
	}
	path, err := canonical(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", refused("there is no " + name)
	}
	if err != nil {
		return "", err
	}
	if rel, err := filepath.Rel(root, path); err != nil || !filepath.IsLocal(rel) {
		return "", refused("it lies elsewhere, at " + path)
	}
	return path, nil
}

// canonical returns the path of a file without any symbolic link in it.
func canonical(path string) (string, error) {
	p, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	return filepath.Abs(p)
}
