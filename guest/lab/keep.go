package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/image"
)

const (
	keptLabs   = 3 // how many saved labs stay in the cache
	tempPrefix = ".tmp-"

	// A saved lab is a directory with these two: RAM, which every later lab maps privately, and the rest of the machine.
	ramFile, stateFile = "ram", "state"
)

// start gives a machine whose agent is connected: from a saved lab, which is made first if there is none.
func start(ctx context.Context, cfg *Config) (*machine, error) {
	k, err := newKeep(ctx, cfg)
	if err != nil {
		return nil, err
	}
	for attempt := 1; ; attempt++ {
		saved, err := k.find(ctx)
		if err != nil {
			return nil, err
		}
		m, err := k.restore(ctx, saved)
		if err == nil {
			return m, nil
		}
		if ctx.Err() != nil || attempt == 2 {
			return nil, err
		}
		k.cfg.Progress("the saved lab is of no use; booting a new one")
		os.RemoveAll(saved)
	}
}

// keep is the cache of saved labs, looked at for one kind of lab.
type keep struct {
	cfg    *Config
	hw     hardware
	dir    string // of all saved labs
	kernel string
	key    image.Key
}

func newKeep(ctx context.Context, cfg *Config) (*keep, error) {
	qemu, err := exec.LookPath(qemuProgram)
	if err != nil {
		return nil, ErrNoQEMU
	}
	store, err := image.OpenStore("")
	if err != nil {
		return nil, err
	}
	k := &keep{
		cfg: cfg, kernel: cfg.Kernel, dir: filepath.Join(store.Dir(), "lab"),
		hw: hardware{qemu: qemu, memory: cfg.Memory, cpus: cfg.CPUs, icount: cfg.Icount},
	}
	if k.kernel == "" {
		if k.kernel, err = store.Kernel(ctx); err != nil {
			return nil, err
		}
	}
	parts := []string{"lab/1", agent.Fingerprint(), k.hw.commandLine()}
	for _, file := range []string{qemu, k.kernel} {
		key, err := image.StatKey(file)
		if err != nil {
			return nil, err
		}
		parts = append(parts, file, key.String())
	}
	k.key = image.KeyOf(append(parts, k.hw.arguments("ram", 0, 0, 0)...)...)
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the cache folder: %w (set XDG_CACHE_HOME to a folder that can be written)", err)
	}
	return k, nil
}

// find returns the saved lab's directory. Of several processes that find none, one makes it.
func (k *keep) find(ctx context.Context) (string, error) {
	path := filepath.Join(k.dir, k.key.String()[:32])
	if k.use(path) {
		return path, nil
	}
	unlock, err := lockAny(ctx, []string{filepath.Join(k.dir, ".lock")}, func() {
		k.cfg.Progress("waiting for another process that boots a lab")
	})
	if err != nil {
		return "", err
	}
	defer unlock()
	if k.use(path) {
		return path, nil
	}
	k.cfg.Progress("booting a lab, which later ones start from")
	k.prune()
	temp, err := os.MkdirTemp(k.dir, tempPrefix)
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temp)
	if err := k.build(ctx, temp); err != nil {
		return "", err
	}
	if err := os.Rename(temp, path); err != nil {
		return "", err
	}
	return path, nil
}

// use reports whether a saved lab is there, and notes that it was used.
func (k *keep) use(path string) bool {
	now := time.Now()
	return os.Chtimes(path, now, now) == nil
}

// prune removes what interrupted builds left, and saved labs but the newest, to make room for one more. The caller
// holds the lock. Labs that run from a removed state keep their files open.
func (k *keep) prune() {
	entries, err := os.ReadDir(k.dir)
	if err != nil {
		return
	}
	type saved struct {
		path string
		used time.Time
	}
	var all []saved
	for _, e := range entries {
		path := filepath.Join(k.dir, e.Name())
		info, err := e.Info()
		switch {
		case err != nil || !e.IsDir():
		case strings.HasPrefix(e.Name(), tempPrefix):
			os.RemoveAll(path)
		default:
			all = append(all, saved{path, info.ModTime()})
		}
	}
	slices.SortFunc(all, func(a, b saved) int { return cmp.Compare(b.used.UnixNano(), a.used.UnixNano()) })
	for _, s := range all[min(len(all), keptLabs-1):] {
		os.RemoveAll(s.path)
	}
}

// limit bounds a start of QEMU, which kills it when it takes too long.
func limit(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("the machine is not up after %s", startTimeout))
}

// build boots a lab and saves it in dir.
func (k *keep) build(ctx context.Context, dir string) (err error) {
	initramfs, err := k.writeInitramfs(ctx, dir)
	if err != nil {
		return err
	}
	state, err := os.Create(filepath.Join(dir, stateFile))
	if err != nil {
		return err
	}
	defer state.Close()
	ctx, cancel := limit(ctx)
	defer cancel()
	ram := "memory-backend-file,share=on,mem-path=" + escape(filepath.Join(dir, ramFile))
	m, err := launch(ctx, &k.hw, ram, "-kernel", k.kernel, "-initrd", initramfs, "-append", k.hw.commandLine())
	if err != nil {
		return err
	}
	defer m.close()
	defer context.AfterFunc(ctx, m.kill)()
	if err := m.connect(ctx); err != nil {
		return err
	}
	m.agent.Close() // the agent then waits for the next host
	if err := m.monitor.migrate("migrate", state); err != nil {
		return m.explain(cmp.Or(context.Cause(ctx), err))
	}
	m.close()
	os.Remove(initramfs)
	return flush(dir, ramFile, stateFile)
}

// restore starts a machine from a saved lab and connects to its agent.
func (k *keep) restore(ctx context.Context, saved string) (*machine, error) {
	state, err := os.Open(filepath.Join(saved, stateFile))
	if err != nil {
		return nil, err
	}
	defer state.Close()
	ctx, cancel := limit(ctx)
	defer cancel()
	ram := "memory-backend-file,share=off,reserve=off,mem-path=" + escape(filepath.Join(saved, ramFile))
	m, err := launch(ctx, &k.hw, ram, "-incoming", "defer")
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, m.kill)()
	if err := m.monitor.migrate("migrate-incoming", state); err != nil {
		return nil, m.explain(cmp.Or(context.Cause(ctx), err))
	}
	if err := m.connect(ctx); err != nil {
		return nil, err
	}
	return m, nil
}

// writeInitramfs writes the archive that holds the lab's PID 1.
func (k *keep) writeInitramfs(ctx context.Context, dir string) (path string, err error) {
	find := k.cfg.Init
	if find == nil {
		find = func(context.Context) (string, error) { return os.Executable() }
	}
	exe, err := find(ctx)
	if err != nil {
		return "", fmt.Errorf("find the program to be its PID 1: %w", err)
	}
	archive, err := image.AgentSegment(exe)
	if err != nil {
		return "", err
	}
	defer archive.Close()
	path = filepath.Join(dir, "initramfs")
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	_, err = archive.WriteTo(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return "", fmt.Errorf("write its initramfs: %w", err)
	}
	return path, nil
}

// flush makes files durable, so that a crash of the host leaves no saved lab with holes.
func flush(dir string, names ...string) error {
	for _, name := range names {
		f, err := os.Open(filepath.Join(dir, name))
		if err == nil {
			err = errors.Join(f.Sync(), f.Close())
		}
		if err != nil {
			return fmt.Errorf("save it: %w", err)
		}
	}
	return nil
}

// escape quotes a value of a QEMU option list, where a comma ends it.
func escape(value string) string { return strings.ReplaceAll(value, ",", ",,") }
