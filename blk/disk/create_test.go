package disk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/blk/qcow2"
	"github.com/kvmlet/kvmlet/blk/raw"
)

// TestCreate makes disks that QEMU finds nothing wrong with.
func TestCreate(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "base.raw"), pattern(3<<20, 1), 0o644))
	for name, c := range map[string]CreateSpec{
		"raw":          {Size: 1 << 20},
		"raw odd":      {Size: 1000},
		"raw falloc":   {Size: 1 << 20, Preallocation: PreallocateFalloc},
		"raw full":     {Size: 1 << 20, Preallocation: PreallocateFull},
		"plain":        {Format: QCOW2, Size: 1 << 30},
		"odd":          {Format: QCOW2, Size: 1000},
		"empty":        {Format: QCOW2},
		"settings":     {Format: QCOW2, Size: 64 << 20, ClusterSize: 2 << 20, RefcountBits: 64, LazyRefcounts: true, Compression: qcow2.Zstd},
		"old":          {Format: QCOW2, Size: 64 << 20, Compat: qcow2.Compat010},
		"backed":       {Format: QCOW2, BackingFile: "base.raw", BackingFormat: Raw},
		"backed, size": {Format: QCOW2, Size: 8 << 20, BackingFile: filepath.Join(dir, "base.raw"), BackingFormat: Raw},
		"metadata":     {Format: QCOW2, Size: 16 << 20, Preallocation: PreallocateMetadata},
		"falloc":       {Format: QCOW2, Size: 16 << 20, Preallocation: PreallocateFalloc},
		"full":         {Format: QCOW2, Size: 16 << 20, Preallocation: PreallocateFull},
		"full, tiny":   {Format: QCOW2, Size: 1 << 20, ClusterSize: 512, RefcountBits: 64, Preallocation: PreallocateFull},
	} {
		c.Path = filepath.Join(dir, name)
		var last, total int64
		c.Progress = func(done, all int64) { last, total = done, all }
		create(t, c)
		if full := c.Preallocation == PreallocateFull; full != (total > 0) || last != total {
			t.Errorf("%s: the last progress is %d of %d", name, last, total)
		}
		if c.Format != QCOW2 {
			continue
		}
		qemuOK(t, "qemu-img", "check", "-f", "qcow2", c.Path)
		d := open(t, Spec{Path: c.Path, Format: QCOW2, Backing: BackingOn, ReadOnly: true})
		want := make([]byte, (c.Size+511)&^511)
		if c.BackingFile != "" {
			want = append(pattern(3<<20, 1), want...)[:max(3<<20, len(want))]
			copy(want[3<<20:], make([]byte, len(want)))
		}
		if len(want) < 1<<29 && !bytes.Equal(contents(t, d), want) || d.Size() != int64(len(want)) {
			t.Errorf("%s: a disk of %d bytes, want %d, or other bytes", name, d.Size(), len(want))
		}
		must(t, d.Close())
		info, err := os.Stat(c.Path)
		must(t, err)
		if taken := info.Sys().(*syscall.Stat_t).Blocks * 512; c.Preallocation >= PreallocateFalloc && taken < c.Size {
			t.Errorf("%s takes %d bytes", name, taken)
		}
		// What was preallocated does not grow when it is written.
		if c.Preallocation == PreallocateOff {
			continue
		}
		d = open(t, Spec{Path: c.Path, Format: QCOW2})
		write(t, d, 0, pattern(int(c.Size), 2))
		must(t, d.Close())
		after, err := os.Stat(c.Path)
		must(t, err)
		if after.Size() > info.Size() {
			t.Errorf("%s grows from %d to %d bytes", name, info.Size(), after.Size())
		}
		qemuOK(t, "qemu-img", "check", "-f", "qcow2", c.Path)
	}
}

// TestCreateErrors wants what can't be made to leave nothing behind, and what is there as it was.
func TestCreateErrors(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	there := filepath.Join(dir, "there")
	must(t, os.WriteFile(there, pattern(8192, 1), 0o644))
	locked := create(t, CreateSpec{Path: filepath.Join(dir, "locked"), Size: 4096})
	user := open(t, Spec{Path: locked, ReadOnly: true})
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	server := export(t, nbd.Export{Disk: user})
	for name, c := range map[string]struct {
		ctx  context.Context
		c    CreateSpec
		want error
		text string
	}{
		"no path":                 {c: CreateSpec{Size: 512}, text: "path is empty"},
		"no size":                 {c: CreateSpec{}, text: "0 bytes"},
		"negative":                {c: CreateSpec{Size: -512}, text: "-512 bytes"},
		"too large":               {c: CreateSpec{Size: 1<<63 - 1}, text: "bytes"},
		"format":                  {c: CreateSpec{Size: 512, Format: "vmdk"}, text: "raw or qcow2"},
		"raw with clusters":       {c: CreateSpec{Size: 512, ClusterSize: 4096}, text: "qcow2"},
		"raw with metadata":       {c: CreateSpec{Size: 512, Preallocation: PreallocateMetadata}, text: "metadata"},
		"raw, backed":             {c: CreateSpec{Size: 512, BackingFile: "there", BackingFormat: Raw}, text: "qcow2"},
		"format of backing file":  {c: CreateSpec{Format: QCOW2, BackingFile: "there"}, text: "never guessed"},
		"wrong format of it":      {c: CreateSpec{Format: QCOW2, BackingFile: "there", BackingFormat: QCOW2}, want: qcow2.ErrFormat},
		"no backing file":         {c: CreateSpec{Format: QCOW2, BackingFile: "none", BackingFormat: Raw}, want: fs.ErrNotExist},
		"a protocol":              {c: CreateSpec{Format: QCOW2, BackingFile: "ssh://there", BackingFormat: Raw}, text: "ssh"},
		"backed, preallocated":    {c: CreateSpec{Format: QCOW2, BackingFile: "there", BackingFormat: Raw, Preallocation: PreallocateFull}, text: "hide"},
		"clusters":                {c: CreateSpec{Format: QCOW2, Size: 512, ClusterSize: 1000}, text: "clusters of 1000"},
		"negative clusters":       {c: CreateSpec{Format: QCOW2, Size: 512, ClusterSize: -1, Preallocation: PreallocateFull}, text: "clusters of -1"},
		"refcounts":               {c: CreateSpec{Format: QCOW2, Size: 512, RefcountBits: 3}, text: "refcounts of 3"},
		"compat":                  {c: CreateSpec{Format: QCOW2, Size: 512, Compat: "2.0"}, text: "2.0"},
		"old and zstd":            {c: CreateSpec{Format: QCOW2, Size: 512, Compat: "0.10", Compression: qcow2.Zstd}, text: "0.10"},
		"large for its clusters":  {c: CreateSpec{Format: QCOW2, Size: 1 << 50, ClusterSize: 512}, text: "larger clusters"},
		"more than there is":      {c: CreateSpec{Size: 1 << 60, Preallocation: PreallocateFalloc}, text: "of 1152921504606846976 bytes"},
		"image beyond the host":   {c: CreateSpec{Format: QCOW2, Size: 1 << 52, ClusterSize: 2 << 20, Preallocation: PreallocateFull}, text: "fresh of 45"},
		"no folder":               {c: CreateSpec{Path: filepath.Join(dir, "none/disk"), Size: 512}, want: fs.ErrNotExist},
		"exists":                  {c: CreateSpec{Path: there, Size: 512}, want: fs.ErrExist},
		"exists, image":           {c: CreateSpec{Path: there, Format: QCOW2, Size: 512}, want: fs.ErrExist},
		"exists, wrong":           {c: CreateSpec{Path: there, Format: QCOW2, Size: 512, ClusterSize: 3, Overwrite: true}, text: "clusters"},
		"in use":                  {c: CreateSpec{Path: locked, Format: QCOW2, Size: 512, Overwrite: true}, want: raw.ErrLocked},
		"its own backing file":    {c: CreateSpec{Path: there, Format: QCOW2, BackingFile: "there", BackingFormat: Raw, Overwrite: true}, want: qcow2.ErrBackingLoop},
		"a folder":                {c: CreateSpec{Path: dir, Size: 512}, text: "it is a directory"},
		"raw on a server":         {c: CreateSpec{Path: server, Size: 512}, text: "needs no preparation"},
		"on a server, not forced": {c: CreateSpec{Path: server, Format: QCOW2, Size: 512}, want: fs.ErrExist},
		"on a read-only server":   {c: CreateSpec{Path: server, Format: QCOW2, Size: 512, Overwrite: true}, text: "read-only"},
		"cancelled":               {ended, CreateSpec{Size: 1 << 20, Preallocation: PreallocateFull}, context.Canceled, ""},
		"cancelled, image":        {ended, CreateSpec{Format: QCOW2, Size: 1 << 20, Preallocation: PreallocateFull}, context.Canceled, ""},
	} {
		fresh := filepath.Join(dir, "fresh")
		if c.c.Path == "" && name != "no path" {
			c.c.Path = fresh
		}
		if c.ctx == nil {
			c.ctx = t.Context()
		}
		err := Create(c.ctx, c.c)
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %v with %q", name, err, c.want, c.text)
		}
		if _, err := os.Lstat(fresh); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: there is a file now", name)
			_ = os.Remove(fresh)
		}
	}
	got, err := os.ReadFile(there)
	must(t, err)
	if !bytes.Equal(got, pattern(8192, 1)) {
		t.Error("a file that was there is not what it was")
	}
	must(t, Create(t.Context(), CreateSpec{Path: there, Format: QCOW2, Size: 1 << 20, Overwrite: true}))
	qemuOK(t, "qemu-img", "check", "-f", "qcow2", there)
}

// TestCreateOnServer writes an image onto an export.
func TestCreateOnServer(t *testing.T) {
	leaks(t)
	path := create(t, CreateSpec{Path: filepath.Join(t.TempDir(), "file"), Size: 4 << 20})
	d := open(t, Spec{Path: path})
	uri := export(t, nbd.Export{Disk: d})
	must(t, Create(t.Context(), CreateSpec{Path: uri, Format: QCOW2, Size: 1 << 20, Overwrite: true}))
	image := open(t, Spec{Path: uri, Format: QCOW2})
	write(t, image, 5000, pattern(100000, 1))
	must(t, image.Close())
	image = open(t, Spec{Path: uri, Format: QCOW2, ReadOnly: true})
	if got := contents(t, image)[5000:105000]; !bytes.Equal(got, pattern(100000, 1)) {
		t.Error("other bytes come back")
	}
	must(t, image.Close())
}

// TestInfo compares Inspect with qemu-img info.
func TestInfo(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	t.Chdir(dir)
	create(t, CreateSpec{Path: "base.raw", Size: 1 << 20})
	must(t, os.Mkdir("sub", 0o755))
	for name, c := range map[string]CreateSpec{
		"plain":  {Path: "plain", Format: QCOW2, Size: 1 << 30},
		"backed": {Path: "sub/backed", Format: QCOW2, BackingFile: "../base.raw", BackingFormat: Raw},
		"set":    {Path: "set", Format: QCOW2, Size: 1 << 20, ClusterSize: 4096, LazyRefcounts: true, Compression: qcow2.Zstd, RefcountBits: 1},
		"old":    {Path: filepath.Join(dir, "old"), Format: QCOW2, Size: 1 << 20, Compat: "0.10"},
		"raw":    {Path: "raw", Size: 1 << 20, Preallocation: PreallocateFull},
	} {
		create(t, c)
		if name == "plain" {
			qemuOK(t, "qemu-img", "snapshot", "-c", "before", c.Path)
		}
		if c.Format == "" {
			c.Format = Raw
		}
		info, err := Inspect(t.Context(), Spec{Path: c.Path, Format: c.Format})
		must(t, err)
		ours, err := json.Marshal(info)
		must(t, err)
		theirs := qemuOK(t, "qemu-img", "info", "--output=json", "-f", string(c.Format), c.Path)
		var a, b map[string]any
		must(t, json.Unmarshal(ours, &a))
		must(t, json.Unmarshal([]byte(theirs), &b))
		tidy(b)
		if p, ok := b["full-backing-filename"].(string); ok {
			b["full-backing-filename"] = filepath.Clean(p)
		}
		if !reflect.DeepEqual(a, b) {
			t.Errorf("%s: %s\nqemu-img: %s", name, ours, theirs)
		}
	}
}

// tidy takes away what qemu-img tells beyond us, in those versions that do.
func tidy(b map[string]any) {
	delete(b, "children")
	list, _ := b["snapshots"].([]any)
	for _, s := range list {
		delete(s.(map[string]any), "icount")
	}
	if s, ok := b["format-specific"].(map[string]any); ok && s["type"] != "qcow2" {
		delete(b, "format-specific")
	}
}

func TestInspectChain(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	at := func(i int) string { return filepath.Join(dir, fmt.Sprint(i)) }
	create(t, CreateSpec{Path: at(0), Size: 4096})
	for i := 1; i <= 3; i++ {
		format := QCOW2
		if i == 1 {
			format = Raw
		}
		create(t, CreateSpec{Path: at(i), Format: QCOW2, BackingFile: fmt.Sprint(i - 1), BackingFormat: format})
	}
	s := Spec{Path: at(3), Format: QCOW2, Backing: BackingOn}
	chain, err := InspectChain(t.Context(), s)
	must(t, err)
	for i, info := range chain {
		if info.Filename != at(3-i) || i < 3 && (info.Format != QCOW2 || info.FullBacking != at(2-i)) {
			t.Errorf("layer %d is %+v", i, info)
		}
	}
	if len(chain) != 4 || chain[3].Format != Raw {
		t.Errorf("%d layers", len(chain))
	}
	s.Backing = Backing{}
	if chain, err := InspectChain(t.Context(), s); !errors.Is(err, qcow2.ErrBacking) || len(chain) != 1 {
		t.Errorf("without leave: %d layers, %v", len(chain), err)
	}
	s.Backing = BackingOn
	must(t, os.WriteFile(at(1), pattern(4096, 1), 0o644)) // which was an image
	chain, err = InspectChain(t.Context(), s)
	if last := (Info{Filename: at(1), Format: QCOW2}); !errors.Is(err, qcow2.ErrFormat) || len(chain) != 3 || !reflect.DeepEqual(chain[2], last) {
		t.Errorf("with junk in it: %+v, %v", chain, err)
	}
}

// TestCheck has clean and damaged images checked, and a raw disk.
func TestCheck(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	path := create(t, CreateSpec{Path: filepath.Join(dir, "image"), Format: QCOW2, Size: 1 << 20})
	d := open(t, Spec{Path: path, Format: QCOW2})
	write(t, d, 0, pattern(300000, 1))
	must(t, d.Close())
	s := Spec{Path: path, Format: QCOW2}
	r, err := Check(t.Context(), s, qcow2.RepairNone)
	if err != nil || !r.Clean() || r.Allocated != 5 {
		t.Errorf("a clean image: %+v, %v", r, err)
	}
	b, err := os.ReadFile(path)
	must(t, err)
	const refcounts = 2 << 16 // behind the header and the refcount table
	b[refcounts+2*6+1] = 0    // of a cluster in use
	b[refcounts+2*50+1] = 1   // of none
	must(t, os.WriteFile(path, b, 0o644))
	if r, err = Check(t.Context(), s, qcow2.RepairNone); err != nil || r.Corruptions == 0 || r.Leaks != 1 {
		t.Errorf("a damaged image: %+v, %v", r, err)
	}
	if _, status := qemu(t, "qemu-img", "check", path); status != 2 {
		t.Errorf("qemu-img says %d", status)
	}
	if r, err = Check(t.Context(), s, qcow2.RepairAll); err != nil || !r.Clean() || r.FixedLeaks != 1 {
		t.Errorf("repaired: %+v, %v", r, err)
	}
	qemuOK(t, "qemu-img", "check", path)
	for name, s := range map[string]Spec{"raw": {Path: path, Format: Raw}, "nothing said": {Path: path}} {
		if _, err := Check(t.Context(), s, qcow2.RepairNone); !errors.Is(err, blk.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Check(t.Context(), Spec{Path: filepath.Join(dir, "none"), Format: QCOW2}, qcow2.RepairNone); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "junk"), pattern(4096, 1), 0o644))
	if _, err := Check(t.Context(), Spec{Path: filepath.Join(dir, "junk"), Format: QCOW2}, qcow2.RepairNone); !errors.Is(err, qcow2.ErrFormat) {
		t.Error(err)
	}
}

// A new image does not take the place of anything that its own chain needs.
func TestCreateOverItsChain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	base, mid, top := filepath.Join(dir, "base"), filepath.Join(dir, "mid"), filepath.Join(dir, "top")
	must(t, os.WriteFile(base, make([]byte, 1<<20), 0o600))
	must(t, Create(t.Context(), CreateSpec{Path: mid, Format: QCOW2, BackingFile: base, BackingFormat: Raw}))
	must(t, Create(t.Context(), CreateSpec{Path: top, Format: QCOW2, BackingFile: mid, BackingFormat: QCOW2}))
	for _, target := range []string{top, mid, base} {
		err := Create(t.Context(), CreateSpec{Path: target, Format: QCOW2, BackingFile: top, BackingFormat: QCOW2, Overwrite: true})
		if !errors.Is(err, qcow2.ErrBackingLoop) {
			t.Errorf("%s over %s: %v", target, top, err)
		}
	}
	if b, err := os.ReadFile(base); err != nil || !bytes.Equal(b, make([]byte, 1<<20)) {
		t.Errorf("the base was touched: %v", err)
	}
	must(t, os.WriteFile(mid, pattern(4096, 1), 0o600)) // no image any more, which somebody may still save
	err := Create(t.Context(), CreateSpec{Path: mid, Format: QCOW2, BackingFile: top, BackingFormat: QCOW2, Overwrite: true})
	if !errors.Is(err, qcow2.ErrBackingLoop) {
		t.Errorf("over what can't be read: %v", err)
	}
}

// An image that could not be opened as it will be is not made.
func TestCreateForUse(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	base, mid, target := filepath.Join(dir, "base"), filepath.Join(dir, "mid"), filepath.Join(dir, "target")
	must(t, os.WriteFile(base, make([]byte, 1<<20), 0o600))
	create(t, CreateSpec{Path: mid, Format: QCOW2, BackingFile: "base", BackingFormat: Raw})
	c := CreateSpec{Path: target, Format: QCOW2, BackingFile: "mid", BackingFormat: QCOW2}
	for name, refused := range map[string]struct {
		use  Spec
		want string
	}{
		"none":      {Spec{}, `backing file "mid": not allowed`},
		"one":       {Spec{Backing: BackingBelow(mid)}, `backing file "base" of ` + mid + ": it lies elsewhere"},
		"elsewhere": {Spec{Backing: BackingBelow("/usr")}, `backing file "mid": it lies elsewhere`},
	} {
		c.Use = &refused.use
		err := Create(t.Context(), c)
		if !errors.Is(err, qcow2.ErrBacking) || !strings.Contains(err.Error(), refused.want) {
			t.Errorf("%s: %v, want %q", name, err, refused.want)
		}
		if _, err := os.Stat(target); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s: the target is there: %v", name, err)
		}
	}
	c.Use = &Spec{Backing: BackingBelow(dir)}
	must(t, Create(t.Context(), c))
	d, err := Open(t.Context(), Spec{Path: target, Format: QCOW2, Backing: c.Use.Backing})
	must(t, err)
	must(t, d.Close())
}
