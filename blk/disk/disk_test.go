package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/blk/qcow2"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/iov"
)

func TestNames(t *testing.T) {
	t.Parallel()
	roundTrip := func(names []string, parse func(string) (fmt.Stringer, error)) {
		t.Helper()
		for _, n := range names {
			if v, err := parse(n); err != nil || v.String() != n {
				t.Errorf("%s is %v, %v", n, v, err)
			}
		}
		_, err := parse("else")
		if err == nil || !strings.Contains(err.Error(), names[0]) || !strings.Contains(err.Error(), names[len(names)-1]) {
			t.Errorf("a wrong name of %v: %v", names, err)
		}
	}
	roundTrip(Formats(), func(s string) (fmt.Stringer, error) { return ParseFormat(s) })
	roundTrip(Caches(), func(s string) (fmt.Stringer, error) { return ParseCache(s) })
	roundTrip(AIOs(), func(s string) (fmt.Stringer, error) { return raw.ParseAIO(s) })
	roundTrip(Preallocations(), func(s string) (fmt.Stringer, error) { return ParsePreallocation(s) })
	for i, n := range DetectNames() {
		if z, err := ParseDetectZeroes(n); err != nil || z != blk.DetectZeroes(i) {
			t.Errorf("%s is %v, %v", n, z, err)
		}
	}
	for _, s := range []string{"off", "on", "./on", "/var/lib/images", "base.img"} {
		if b, err := ParseBacking(s); err != nil || b.String() != s {
			t.Errorf("backing=%s is %v, %v", s, b, err)
		}
	}
	if _, err := ParseBacking(""); err == nil {
		t.Error("an empty policy is taken")
	}
	if s := Cache(9).String(); s != "unknown (9)" {
		t.Error(s)
	}
}

func TestThrottleText(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]blk.Throttle{
		"bps-total=10M":                             {BPSTotal: blk.Rate{Avg: 10 << 20}},
		"iops-read=500,iops-read-max=1K":            {IOPSRead: blk.Rate{Avg: 500, Max: 1024}},
		"bps-total=1.5m":                            {BPSTotal: blk.Rate{Avg: 3 << 19}},
		"iops-read=500:iops-read-max=1K":            {IOPSRead: blk.Rate{Avg: 500, Max: 1024}},
		"bps-write=1G,bps-write-max=2G,iops-size=0": {BPSWrite: blk.Rate{Avg: 1 << 30, Max: 2 << 30}},
	} {
		if got, err := ParseThrottle(text); err != nil || got != want {
			t.Errorf("%s is %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"": "not a number", "bps-total": "not a number", "bps-total=": "not a number", "bps-total=-1": "not a number",
		"bps-total=1KK": "not a number", "bps-total=8388608T": "too large", "bps-total=0.3": "not a whole number", "warp=9": "no limit is called",
		"bps-total=1,bps-read=1": "together with", "bps-total-max=5": "without bps-total",
	} {
		if _, err := ParseThrottle(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func TestParseNumber(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]uint64{
		"0": 0, "512": 512, "512B": 512, "64K": 64 << 10, "64k": 64 << 10, "2GiB": 2 << 30, "2gb": 2 << 30, "3Ti": 3 << 40,
		"1.5G": 1610612736, "0.5K": 512, "1.0": 1, "1.25M": 1310720, "2.000T": 2 << 40, "0.0009765625K": 1,
		"0.0000000000009094947017729282379150390625T": 1, // 2 to the power of -40
		"18446744073709551615":                        math.MaxUint64,
		"18014398509481983.9990234375K":               math.MaxUint64,
	} {
		if n, err := ParseNumber(text); err != nil || n != want {
			t.Errorf("%q is %d, %v, want %d", text, n, err, want)
		}
	}
	for text, want := range map[string]error{
		"": errNumber, "K": errNumber, "B": errNumber, "much": errNumber, "-1": errNumber, "+1": errNumber, " 1": errNumber,
		"1I": errNumber, "1KK": errNumber, "1KMi": errNumber, "1BB": errNumber, "1P": errNumber, "0x10": errNumber,
		"1e3": errNumber, "1_000": errNumber, "1/2": errNumber, ".5G": errNumber, "1.G": errNumber, "1.5.5G": errNumber,
		"1,5G": errNumber, "1\u212a": errNumber, "\u0661": errNumber, "Inf": errNumber,
		"1.5": errWhole, "1.5B": errWhole, "1.0001K": errWhole, "0.1G": errWhole,
		"18446744073709551616": errLarge, "16777216T": errLarge, "16777215.9999999999999999T": errWhole,
	} {
		if n, err := ParseNumber(text); !errors.Is(err, want) {
			t.Errorf("%q is %d, %v, want %v", text, n, err, want)
		}
	}
}

// TestOpenModes reads and writes a disk in every format, cache mode and engine.
func TestOpenModes(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	for _, format := range []Format{Raw, QCOW2} {
		for _, cacheName := range Caches() {
			for _, aioName := range AIOs() {
				cache, err := ParseCache(cacheName)
				must(t, err)
				aio, err := raw.ParseAIO(aioName)
				must(t, err)
				path := filepath.Join(dir, fmt.Sprintf("%s-%s-%s", format, cacheName, aioName))
				create(t, CreateSpec{Path: path, Format: format, Size: 1 << 20})
				s := Spec{Path: path, Format: format, Cache: cache, AIO: aio, DetectZeroes: blk.DetectUnmap}
				d, err := Open(t.Context(), s)
				if err != nil && cache.raw() == raw.CacheNone && strings.Contains(err.Error(), "O_DIRECT") {
					t.Logf("%s: %v", path, err)
					continue
				}
				must(t, err)
				want := pattern(70000, 1)
				write(t, d, 12345, want)
				must(t, d.Flush())
				must(t, d.Close())
				s.ReadOnly = true
				d, err = Open(t.Context(), s)
				must(t, err)
				got := make([]byte, len(want))
				_, err = d.ReadVecAt(iov.Of(got), 12345)
				must(t, err)
				if !bytes.Equal(got, want) {
					t.Errorf("%s: other bytes come back", path)
				}
				if _, err := d.WriteVecAt(iov.Of(want), 0); !errors.Is(err, blk.ErrReadOnly) {
					t.Errorf("%s: a write to a read-only disk: %v", path, err)
				}
				must(t, d.Close())
			}
		}
	}
}

// TestBacking opens chains under every policy.
func TestBacking(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"images", "images/deep", "elsewhere"} {
		must(t, os.Mkdir(at(d), 0o755))
	}
	base := pattern(64<<10, 3)
	for _, path := range []string{"images/base.raw", "elsewhere/base.raw", "images/deep/base.raw", "images/on"} {
		must(t, os.WriteFile(at(path), base, 0o644))
	}
	must(t, os.Symlink(at("elsewhere/base.raw"), at("images/escape.raw")))
	must(t, os.Symlink(at("images/base.raw"), at("elsewhere/inward.raw")))
	must(t, os.Symlink(at("images"), at("alias")))
	// Images are made by the driver, which does not look at backing files.
	image := func(name, backing, format string) string {
		t.Helper()
		must(t, raw.Create(t.Context(), at(name), 512, raw.CreateOptions{}))
		d := open(t, Spec{Path: at(name)})
		must(t, qcow2.Create(t.Context(), d, qcow2.CreateOptions{Size: 64 << 10, BackingFile: backing, BackingFormat: format}))
		must(t, d.Close())
		return at(name)
	}
	relative := image("images/relative.qcow2", "base.raw", "raw")
	prefixed := image("images/prefixed.qcow2", "file:base.raw", "raw")
	absolute := image("images/absolute.qcow2", at("images/base.raw"), "raw")
	upward := image("images/upward.qcow2", "../elsewhere/base.raw", "raw")
	round := image("images/round.qcow2", "../images/deep/../base.raw", "raw")
	escape := image("images/escape.qcow2", "escape.raw", "raw")
	inward := image("images/inward.qcow2", "../elsewhere/inward.raw", "raw")
	two := image("images/two.qcow2", "upward.qcow2", "qcow2")
	missing := image("images/missing.qcow2", "none.raw", "raw")
	unsaid := image("images/unsaid.qcow2", "base.raw", "")
	vmdk := image("images/vmdk.qcow2", "base.raw", "vmdk")
	protocol := image("images/protocol.qcow2", "ssh://host/base.raw", "raw")
	json := image("images/json.qcow2", `json:{"driver":"raw"}`, "raw")
	onNBD := image("images/nbd.qcow2", "nbd+unix:///?socket=/nowhere/socket", "raw")
	control := image("images/control.qcow2", "base\x1b[31m.raw", "raw")
	self := image("images/self.qcow2", "self.qcow2", "qcow2")
	image("images/loop.qcow2", "loop2.qcow2", "qcow2")
	image("images/loop2.qcow2", "deep/../../alias/loop.qcow2", "qcow2")

	below := BackingBelow
	for name, c := range map[string]struct {
		path    string
		backing Backing
		format  Format
		want    error // nil: it opens
		text    string
	}{
		"off":                        {relative, Backing{}, "", qcow2.ErrBacking, "backing option"},
		"on":                         {relative, BackingOn, "", nil, ""},
		"on, prefixed":               {prefixed, BackingOn, "", nil, ""},
		"on, absolute":               {absolute, BackingOn, "", nil, ""},
		"on, symbolic link":          {escape, BackingOn, "", nil, ""},
		"on, missing":                {missing, BackingOn, "", fs.ErrNotExist, "none.raw"},
		"on, format not said":        {unsaid, BackingOn, "", qcow2.ErrBacking, "backing format: raw"},
		"on, format given":           {unsaid, BackingOn, Raw, nil, ""},
		"on, format given wrong":     {unsaid, BackingOn, QCOW2, qcow2.ErrFormat, "base.raw"},
		"on, given for another":      {relative, BackingOn, QCOW2, nil, ""}, // the image says raw
		"on, unknown format":         {vmdk, BackingOn, "", qcow2.ErrBacking, `"vmdk"`},
		"on, unknown format, given":  {vmdk, BackingOn, Raw, qcow2.ErrBacking, `"vmdk"`},
		"on, protocol":               {protocol, BackingOn, "", qcow2.ErrBacking, `protocol "ssh"`},
		"on, control characters":     {control, BackingOn, "", qcow2.ErrBacking, `base\x1b[31m.raw`},
		"on, json":                   {json, BackingOn, "", qcow2.ErrBacking, `protocol "json"`},
		"on, NBD":                    {onNBD, BackingOn, "", fs.ErrNotExist, "/nowhere/socket"},
		"on, two":                    {two, BackingOn, "", nil, ""},
		"on, itself":                 {self, BackingOn, "", qcow2.ErrBackingLoop, "self.qcow2"},
		"on, loop":                   {at("images/loop.qcow2"), BackingOn, "", qcow2.ErrBackingLoop, "loop.qcow2"},
		"folder":                     {relative, below(at("images")), "", nil, ""},
		"folder by a link":           {relative, below(at("alias")), "", nil, ""},
		"folder, by a link":          {at("alias/relative.qcow2"), below(at("images")), "", nil, ""},
		"folder, absolute":           {absolute, below(at("images")), "", nil, ""},
		"folder above":               {upward, below(dir), "", nil, ""},
		"folder, other":              {relative, below(at("elsewhere")), "", qcow2.ErrBacking, "lies elsewhere"},
		"folder, upward":             {upward, below(at("images")), "", qcow2.ErrBacking, "lies elsewhere"},
		"folder, round about":        {round, below(at("images")), "", nil, ""},
		"folder, link out":           {escape, below(at("images")), "", qcow2.ErrBacking, "lies elsewhere"},
		"folder, link in":            {inward, below(at("images")), "", nil, ""},
		"folder, second layer":       {two, below(at("images")), "", qcow2.ErrBacking, "lies elsewhere"},
		"folder, missing":            {missing, below(at("images")), "", qcow2.ErrBacking, "there is no"},
		"folder, NBD":                {onNBD, below("/"), "", qcow2.ErrBacking, "NBD server"},
		"folder, missing itself":     {relative, below(at("none")), "", fs.ErrNotExist, "backing option"},
		"folder, of a like name":     {relative, below(at("image")), "", fs.ErrNotExist, "backing option"},
		"file":                       {relative, below(at("images/base.raw")), "", nil, ""},
		"file, other":                {relative, below(at("elsewhere/base.raw")), "", qcow2.ErrBacking, "lies elsewhere"},
		"file, of the same contents": {escape, below(at("images/base.raw")), "", qcow2.ErrBacking, "lies elsewhere"},
	} {
		d, err := Open(t.Context(), Spec{
			Path: c.path, Format: QCOW2, Backing: c.backing, BackingFormat: c.format, ReadOnly: true,
		})
		switch {
		case err != nil:
			if c.want == nil || !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%s: %v, want %v with %q", name, err, c.want, c.text)
			}
			continue
		case c.want != nil:
			t.Errorf("%s: it opens", name)
		case !bytes.Equal(contents(t, d), base):
			t.Errorf("%s: other bytes than the backing file's", name)
		}
		must(t, d.Close())
	}

	// Alone, anything goes but reading.
	d := open(t, Spec{Path: self, Format: QCOW2, Alone: true})
	if _, err := d.ReadVecAt(iov.Of(make([]byte, 512)), 0); !errors.Is(err, qcow2.ErrBacking) {
		t.Errorf("a read of what is in the backing file: %v", err)
	}
	must(t, d.Close())
}

// TestDepth opens chains as long as may be, and longer.
func TestDepth(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	at := func(i int) string { return filepath.Join(dir, fmt.Sprint(i)) }
	create(t, CreateSpec{Path: at(0), Size: 4096})
	for i := 1; i <= maxDepth+1; i++ {
		format := QCOW2
		if i == 1 {
			format = Raw
		}
		create(t, CreateSpec{
			Path: at(i), Format: QCOW2, ClusterSize: 512, BackingFile: fmt.Sprint(i - 1), BackingFormat: format,
		})
	}
	s := Spec{Path: at(maxDepth), Format: QCOW2, Backing: BackingOn, ReadOnly: true}
	d, layers, err := OpenChain(t.Context(), s)
	must(t, err)
	if len(layers) != maxDepth+1 || layers[0].Device != d || layers[maxDepth].Format != Raw || layers[maxDepth].Path != at(0) {
		t.Errorf("%d layers, the last %+v", len(layers), layers[len(layers)-1])
	}
	for i, l := d, 0; i != nil; i, l = i.Backing(), l+1 {
		if layers[l].Device != i {
			t.Fatalf("layer %d is another", l)
		}
	}
	must(t, d.Close())
	s.Path = at(maxDepth + 1)
	if _, err := Open(t.Context(), s); !errors.Is(err, ErrDepth) || len(err.Error()) > 300 {
		t.Errorf("too long a chain: %v", err)
	}
}

// TestSharing has two images with one backing file, which nobody can write meanwhile.
func TestSharing(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	base := create(t, CreateSpec{Path: filepath.Join(dir, "base"), Size: 1 << 20})
	var images []*blk.Device
	for i := range 3 {
		path := create(t, CreateSpec{Path: filepath.Join(dir, fmt.Sprint(i)), Format: QCOW2, BackingFile: "base", BackingFormat: Raw})
		images = append(images, open(t, Spec{Path: path, Format: QCOW2, Backing: BackingOn}))
		write(t, images[i], 0, pattern(1000, byte(i)))
	}
	if _, err := Open(t.Context(), Spec{Path: base}); !errors.Is(err, raw.ErrLocked) {
		t.Errorf("the backing file is opened for writing: %v", err)
	}
	if _, err := Open(t.Context(), Spec{Path: filepath.Join(dir, "1"), Format: QCOW2, ReadOnly: true, Backing: BackingOn}); !errors.Is(err, raw.ErrLocked) {
		t.Errorf("an image that is written is opened: %v", err)
	}
	d, err := Open(t.Context(), Spec{Path: filepath.Join(dir, "1"), Format: QCOW2, ReadOnly: true, ForceShare: true, Backing: BackingOn})
	must(t, err)
	must(t, d.Close())
	for _, d := range images {
		must(t, d.Close())
	}
	d, err = Open(t.Context(), Spec{Path: base})
	must(t, err)
	must(t, d.Close())
}

// TestCopyOnRead wants what was read to be in the image.
func TestCopyOnRead(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "base"), pattern(256<<10, 1), 0o644))
	path := create(t, CreateSpec{Path: filepath.Join(dir, "top"), Format: QCOW2, BackingFile: "base", BackingFormat: Raw})
	d := open(t, Spec{Path: path, Format: QCOW2, Backing: BackingOn, CopyOnRead: true})
	_, err := d.ReadVecAt(iov.Of(make([]byte, 10)), 70000)
	must(t, err)
	s, n, err := d.BlockStatus(t.Context(), 64<<10, 128<<10)
	must(t, err)
	if s.Flags&blk.StatusAllocated == 0 || n != 64<<10 {
		t.Errorf("after reading: status %+v of %d bytes", s, n)
	}
	must(t, d.Close())
}

// TestOpenErrors gives what can't be opened.
func TestOpenErrors(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	file := create(t, CreateSpec{Path: filepath.Join(dir, "file"), Size: 1 << 20})
	group, err := blk.NewThrottleGroup(blk.Throttle{})
	must(t, err)
	limits := blk.Throttle{BPSTotal: blk.Rate{Avg: 1 << 20}}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	disk := open(t, Spec{Path: file, ReadOnly: true})
	readOnly := export(t, nbd.Export{Disk: disk})
	for name, c := range map[string]struct {
		ctx  context.Context
		s    Spec
		text string
	}{
		"no path":              {nil, Spec{}, "path is empty"},
		"missing":              {nil, Spec{Path: filepath.Join(dir, "none")}, "no such file"},
		"unknown format":       {nil, Spec{Path: file, Format: "vmdk"}, "raw or qcow2"},
		"unknown format below": {nil, Spec{Path: file, BackingFormat: "vmdk"}, "raw or qcow2"},
		"unknown cache":        {nil, Spec{Path: file, Cache: 17}, "cache mode"},
		"not an image":         {nil, Spec{Path: file, Format: QCOW2, ReadOnly: true}, "not a qcow2 image"},
		"no lock, writable":    {nil, Spec{Path: file, ForceShare: true}, "without a lock"},
		"copy, read-only":      {nil, Spec{Path: file, ReadOnly: true, CopyOnRead: true}, "copy-on-read"},
		"two kinds of limits":  {nil, Spec{Path: file, Throttle: limits, Group: group}, "one or the other"},
		"limits without sense": {nil, Spec{Path: file, Throttle: blk.Throttle{BPSRead: blk.Rate{Avg: -1}}}, "bps-read"},
		"cancelled":            {ended, Spec{Path: file, ReadOnly: true}, "canceled"},
		"no server":            {nil, Spec{Path: "nbd+unix:///?socket=" + dir + "/none"}, "no such file"},
		"not a URI":            {nil, Spec{Path: "nbd://"}, "host"},
		"read-only server":     {nil, Spec{Path: readOnly}, "read-only"},
		"no image on a server": {nil, Spec{Path: readOnly, ReadOnly: true, Format: QCOW2}, "not a qcow2 image"},
	} {
		ctx := c.ctx
		if ctx == nil {
			ctx = t.Context()
		}
		if d, err := Open(ctx, c.s); err == nil {
			t.Errorf("%s: it opens", name)
			must(t, d.Close())
		} else if !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want %q", name, err, c.text)
		}
	}
	d, err := Open(t.Context(), Spec{Path: readOnly, ReadOnly: true})
	must(t, err)
	if d.Size() != 1<<20 {
		t.Errorf("an export of %d bytes", d.Size())
	}
	must(t, d.Close())
}

// TestThrottled shares one group, and has limits of its own.
func TestThrottled(t *testing.T) {
	leaks(t)
	path := create(t, CreateSpec{Path: filepath.Join(t.TempDir(), "file"), Size: 1 << 20})
	g, err := blk.NewThrottleGroup(blk.Throttle{IOPSTotal: blk.Rate{Avg: 1}})
	must(t, err)
	for name, s := range map[string]Spec{"own": {Throttle: blk.Throttle{IOPSTotal: blk.Rate{Avg: 1}}}, "group": {Group: g}} {
		s.Path = path
		d := open(t, s)
		ctx, cancel := context.WithCancel(t.Context())
		write(t, d, 0, make([]byte, 512))
		cancel()
		if err := d.Do(ctx, &blk.Request{Op: blk.OpRead, Vec: iov.Of(make([]byte, 512))}); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: the second request goes through: %v", name, err)
		}
		must(t, d.Close())
		must(t, g.Set(blk.Throttle{IOPSTotal: blk.Rate{Avg: 1}}))
	}
}
