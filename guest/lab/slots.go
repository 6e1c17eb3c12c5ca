package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/image"
)

const (
	lockPoll      = 100 * time.Millisecond // flock(2) cannot wait for one of several files, nor be called off
	slotImpatient = 3 * time.Second        // until waiting is worth a word
)

// acquireSlot waits until fewer labs run on the host than it has CPUs, or than two: one that sits at a prompt must not
// keep tests from running.
func acquireSlot(ctx context.Context, progress func(string)) (release func(), err error) {
	store, err := image.OpenStore("")
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(store.Dir(), "lab")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the cache folder: %w", err)
	}
	paths := make([]string, max(2, runtime.NumCPU()))
	for i := range paths {
		paths[i] = filepath.Join(dir, fmt.Sprintf(".slot-%d", i))
	}
	return lockAny(ctx, paths, func() {
		progress(fmt.Sprintf("waiting for one of the %d labs that may run at a time on this host", len(paths)))
	})
}

// lockAny locks one of the files, made if missing. It calls waiting once if that takes a while. The lock ends with the
// process at the latest.
func lockAny(ctx context.Context, paths []string, waiting func()) (unlock func(), err error) {
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	impatient := time.NewTimer(slotImpatient)
	defer impatient.Stop()
	for {
		for _, path := range paths {
			f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
			if err != nil {
				return nil, err
			}
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
			if err == nil {
				return func() { f.Close() }, nil
			}
			f.Close()
			if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
				return nil, fmt.Errorf("lock %s: %w", path, err)
			}
		}
		select {
		case <-tick.C:
		case <-impatient.C:
			waiting()
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for other labs: %w", context.Cause(ctx))
		}
	}
}
