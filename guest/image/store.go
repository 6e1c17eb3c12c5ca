package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lockName   = ".lock"
	tempPrefix = ".tmp-"
	sumSuffix  = ".sum"

	// What prune leaves: an entry used within graceTime always, of the others the keepNewest last used ones, and of
	// those none that was not used for maxAge.
	graceTime  = time.Hour
	keepNewest = 4
	maxAge     = 30 * 24 * time.Hour

	// cacheRemedy ends the errors about a cache that cannot be written.
	cacheRemedy = "set XDG_CACHE_HOME to a folder that can be written"
)

// Store keeps files that are expensive to make, each under a kind and the Key of what it was made from.
//
// Entries are written whole or not at all. Processes that want the same entry at once make it once: the others wait. An
// entry whose file was damaged or cut short is not handed out but made again. A path that a Store returned stays valid
// for an hour at least, and an open file for as long as it is open. A Store may be used by many goroutines.
type Store struct {
	dir string
}

// OpenStore returns the store in the folder dir, which is made when it is missing. An empty dir means the folder kvmlet
// in the user's cache, which is under $XDG_CACHE_HOME or $HOME/.cache.
func OpenStore(dir string) (*Store, error) {
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("find a folder for cached images: %w (set HOME or XDG_CACHE_HOME)", err)
		}
		dir = filepath.Join(cache, "kvmlet")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the cache folder: %w (%s)", err, cacheRemedy)
	}
	return &Store{dir: dir}, nil
}

// Dir returns the folder that holds the store.
func (s *Store) Dir() string { return s.dir }

// Lookup returns the path of an entry if it is there and sound.
func (s *Store) Lookup(kind string, key Key) (string, bool) {
	path := s.path(kind, key)
	if err := checkEntry(path); err != nil {
		return "", false
	}
	touch(path + sumSuffix)
	return path, true
}

// Build returns the path of an entry; when it is missing, build writes its content first. ctx bounds the time spent
// waiting for another process that is building entries of this kind, and is for build to watch as well. kind is a short
// lower-case word.
func (s *Store) Build(ctx context.Context, kind string, key Key, build func(w io.Writer) error) (string, error) {
	if path, ok := s.Lookup(kind, key); ok {
		return path, nil
	}
	dir := filepath.Join(s.dir, kind)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make the cache folder: %w (%s)", err, cacheRemedy)
	}
	unlock, err := lock(ctx, filepath.Join(dir, lockName))
	if err != nil {
		return "", err
	}
	defer unlock()
	if path, ok := s.Lookup(kind, key); ok { // another process made it meanwhile
		return path, nil
	}
	path := s.path(kind, key)
	prune(dir, path, time.Now())
	if err := writeEntry(path, build); err != nil {
		return "", err
	}
	return path, nil
}

// scratch makes a folder for a build of this kind, which the caller removes in the end. If it dies before, the kind's next
// build does. The caller holds the kind's lock.
func (s *Store) scratch(kind string) (string, error) {
	parent, err := filepath.Abs(filepath.Join(s.dir, kind))
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(parent, tempPrefix)
	if err != nil {
		return "", fmt.Errorf("write to the cache: %w", err)
	}
	return dir, nil
}

// Derived returns the path of a file that build makes from inputs named by key, such as an unpacked kernel. It is Build
// with a kind of its own: name the purpose and its version in the key.
func (s *Store) Derived(ctx context.Context, key Key, build func(w io.Writer) error) (string, error) {
	return s.Build(ctx, "derived", key, build)
}

func (s *Store) path(kind string, key Key) string {
	return filepath.Join(s.dir, kind, key.String()[:40])
}

// entrySum is what the file beside an entry says about it. The time stands for the content as long as it agrees, so that
// a lookup need not read tens of megabytes.
type entrySum struct {
	sha256 string
	size   int64
	mtime  int64 // nanoseconds since 1970
}

func (e entrySum) String() string {
	return fmt.Sprintf("sha256 %s\nsize %d\nmtime %d\n", e.sha256, e.size, e.mtime)
}

func readSum(path string) (e entrySum, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return e, err
	}
	if _, err := fmt.Sscanf(string(b), "sha256 %64s\nsize %d\nmtime %d\n", &e.sha256, &e.size, &e.mtime); err != nil {
		return e, fmt.Errorf("%s: %w", path, err)
	}
	return e, nil
}

var errDamaged = errors.New("cached file is damaged")

// checkEntry says whether the entry at path is whole. An entry with another time, as after a copy of the cache, is read
// and compared with its checksum.
func checkEntry(path string) error {
	sum, err := readSum(path + sumSuffix)
	if err != nil {
		return err
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() || fi.Size() != sum.size {
		return fmt.Errorf("%s: %w", path, errDamaged)
	}
	if fi.ModTime().UnixNano() == sum.mtime {
		return nil
	}
	got, err := hashFile(path)
	if err != nil {
		return err
	}
	if got != sum.sha256 {
		return fmt.Errorf("%s: %w", path, errDamaged)
	}
	sum.mtime = fi.ModTime().UnixNano()
	// Only saves the next lookup from reading the file again, so a failure does not matter.
	_ = writeFile(path+sumSuffix, []byte(sum.String()))
	return nil
}

// writeEntry makes the entry at path. The caller holds the kind's lock.
func writeEntry(path string, build func(w io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), tempPrefix)
	if err != nil {
		return fmt.Errorf("write to the cache: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	w := newSum(f)
	if err := build(w); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write to the cache: %w", err)
	}
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	// The checksum goes first: a crash in between leaves a checksum without its file, which is simply a miss.
	sum := entrySum{sha256: w.hex(), size: w.n, mtime: fi.ModTime().UnixNano()}
	if err := writeFile(path+sumSuffix, []byte(sum.String())); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// sumWriter passes on what it is given, counts it and computes its SHA-256.
type sumWriter struct {
	w io.Writer
	h hash.Hash
	n int64
}

func newSum(w io.Writer) *sumWriter { return &sumWriter{w: w, h: sha256.New()} }

func (s *sumWriter) hex() string { return hex.EncodeToString(s.h.Sum(nil)) }

func (s *sumWriter) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.h.Write(p[:n])
	s.n += int64(n)
	return n, err
}

// writeFile replaces the small file at path, atomically and durably.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), tempPrefix)
	if err != nil {
		return fmt.Errorf("write to the cache: %w", err)
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("write to the cache: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lock takes the exclusive lock on the file at path and returns what releases it. The kernel releases it as well when
// the process dies.
func lock(ctx context.Context, path string) (func(), error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock the cache: %w (%s)", err, cacheRemedy)
	}
	unlock := func() { f.Close() }
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return unlock, nil
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		unlock()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	locked := make(chan error)
	go func() {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		for errors.Is(err, unix.EINTR) {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		select {
		case locked <- err:
		case <-ctx.Done(): // flock(2) cannot be called off, so the lock goes back when it comes
			unlock()
		}
	}()
	select {
	case err = <-locked:
		if err != nil {
			unlock()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		return unlock, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another kvmlet that is filling the cache (%s): %w", path, context.Cause(ctx))
	}
}

// touch records that an entry was used, at most once a minute. A cache that cannot be written is not an error.
func touch(path string) {
	now := time.Now()
	if fi, err := os.Stat(path); err == nil && now.Sub(fi.ModTime()) > time.Minute {
		_ = os.Chtimes(path, now, now)
	}
}

// prune removes entries that were not used for long, but for keep, and leftovers of builds that died. The caller holds the
// kind's lock and builds nothing yet, so that every temporary file or folder is a leftover, but for small files of
// writeFile, which are left alone while young.
func prune(dir, keep string, now time.Time) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	type entry struct {
		path string
		used time.Time
	}
	var entries []entry
	for _, d := range list {
		path := filepath.Join(dir, d.Name())
		fi, err := d.Info()
		if err != nil {
			continue
		}
		switch {
		case strings.HasPrefix(d.Name(), tempPrefix) && d.IsDir():
			os.RemoveAll(path)
		case strings.HasPrefix(d.Name(), tempPrefix):
			if now.Sub(fi.ModTime()) > graceTime {
				os.Remove(path)
			}
		case strings.HasSuffix(d.Name(), inputsSuffix):
			if now.Sub(fi.ModTime()) > maxAge {
				os.Remove(path)
			}
		case strings.HasSuffix(d.Name(), sumSuffix):
			if path != keep+sumSuffix {
				entries = append(entries, entry{path, fi.ModTime()})
			}
		}
	}
	slices.SortFunc(entries, func(a, b entry) int { return b.used.Compare(a.used) })
	for i, e := range entries {
		age := now.Sub(e.used)
		if age > maxAge || (age > graceTime && i >= keepNewest-1) {
			os.Remove(e.path)
			os.Remove(strings.TrimSuffix(e.path, sumSuffix))
		}
	}
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := newSum(io.Discard)
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return h.hex(), nil
}
