package disk

import (
	"context"
	"errors"
	"fmt"

	"github.com/kvmlet/kvmlet/blk/qcow2"
)

// CommitOptions says how Commit works.
type CommitOptions struct {
	Workers  int                     // 0 means 8
	Progress func(done, total int64) // as for Copy
}

// Commit writes what the image s has of its own into its backing file, which becomes as large as the image at least. The
// policy s.Backing must allow that file: it is written. Nobody else may use either; the image itself is not changed, and
// reads as before. It returns the path of the backing file, if it is known by then. A Commit that fails, or whose ctx
// ends, is in part done, which the image hides; it can be done again.
func Commit(ctx context.Context, s Spec, o CommitOptions) (base string, err error) {
	s.ReadOnly, s.Alone = true, true
	if err := s.check(); err != nil {
		return "", err
	}
	src, err := Open(ctx, s)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	image, ok := src.Backend().(*qcow2.Image)
	if !ok || image.Info().BackingFile == "" {
		return "", fmt.Errorf("commit disk %s: it has no backing file", s.Path)
	}
	info := image.Info()
	chain := &opener{ctx: ctx, s: s}
	below, err := chain.allowed(place{name: s.Path}, info.BackingFile, info.BackingFormat)
	if err == nil {
		err = errors.Join(chain.notSeen(s.Path), chain.notSeen(below.path))
	}
	if err != nil {
		return "", fmt.Errorf("commit disk %s: backing file %q: %w", s.Path, info.BackingFile, err)
	}
	t := Spec{
		Path: below.path, Format: below.format, Cache: s.Cache, AIO: s.AIO, Backing: s.Backing, BackingFormat: s.BackingFormat,
	}
	dst, err := Open(ctx, t)
	if err != nil {
		return below.path, err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	if dst.Size() < src.Size() {
		if err := dst.Truncate(ctx, src.Size()); err != nil {
			return below.path, fmt.Errorf("disk %s: %w", below.path, err)
		}
	}
	return below.path, Copy(ctx, dst, src, CopyOptions{Own: true, Workers: o.Workers, Progress: o.Progress})
}
