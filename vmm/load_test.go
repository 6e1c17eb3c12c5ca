package vmm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/guest/linux"
)

// archiveFile writes a cpio archive with one file of zeros and returns it with its length.
func archiveFile(t *testing.T, size int64) (*os.File, int64) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "initrd"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	header := func(mode, size int64, name string) string {
		return fmt.Sprintf("070701%08x%08x%032x%08x%032x%08x%08x%s\x00", 0, mode, 0, size, 0, len(name)+1, 0, name)
	}
	file, end := header(0o100755, size, "data."), header(0, 0, "TRAILER!!!") // that name's data begins at a multiple of 4
	at := int64(len(file)) + size
	_, err = f.WriteString(file)
	if err == nil {
		_, err = f.WriteAt([]byte(end), at)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f, at + int64(len(end))
}

// TestCheckRoom gives a guest an initrd that it can hold, but not unpack.
func TestCheckRoom(t *testing.T) {
	const size = 30 << 20 // with the archive 90 MiB; early, and 1/64 of the memory come on top
	f, n := archiveFile(t, size)
	stable, other := linux.NewStableFile(f, n), io.NewSectionReader(f, 0, n)
	k := payload(t, code{}.spin())
	for name, c := range map[string]struct {
		memory  uint64 // MiB
		initrd  []linux.Blob
		cmdline string
		refused bool
	}{
		"too little":      {92, []linux.Blob{stable}, BaseCmdline, true},
		"enough":          {94, []linux.Blob{stable}, BaseCmdline, false},
		"twice the same":  {122, []linux.Blob{stable, stable}, BaseCmdline, true},
		"enough for both": {124, []linux.Blob{stable, stable}, BaseCmdline, false},
		"a user's":        {90, []linux.Blob{other}, BaseCmdline, false},
		"partly a user's": {90, []linux.Blob{other, stable}, BaseCmdline, false},
		"not tmpfs":       {90, []linux.Blob{stable}, "rootfstype=ramfs", false},
		"of another size": {90, []linux.Blob{stable}, "quiet initramfs_options=size=90%", false},
		"no initrd":       {64, nil, BaseCmdline, false},
	} {
		cfg := Config{CPUs: 1, Memory: c.memory << 20, Kernel: k, Initrd: c.initrd, Cmdline: c.cmdline}
		err := cfg.CheckBoot()
		if (err != nil) != c.refused || c.refused && !errors.Is(err, ErrMemory) {
			t.Errorf("%s: CheckBoot: %v", name, err)
		}
		if c.refused {
			if vm, err := New(&cfg); vm != nil || !errors.Is(err, ErrMemory) {
				t.Errorf("%s: New: %v", name, err)
			}
		}
	}
	cfg := Config{Memory: MinMemory, Kernel: k, Initrd: []linux.Blob{stable}}
	if err := cfg.CheckBoot(); err == nil || !strings.Contains(err.Error(), "at least 94 MiB") {
		t.Errorf("CheckBoot: %v; want the least memory named", err)
	}
}
