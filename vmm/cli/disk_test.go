package cli

import (
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/guest/hosttest"
)

var diskCommands = []string{
	"", "create", "info", "check", "convert", "compare", "map", "resize", "snapshot", "snapshot list", "snapshot create",
	"snapshot apply", "snapshot delete", "commit", "serve", "bench",
}

func TestDiskHelp(t *testing.T) {
	t.Parallel()
	for _, command := range diskCommands {
		args := append([]string{"disk"}, append(strings.Fields(command), "--help")...)
		r := runCommand(t, args...)
		if r.status != statusOK || r.err != "" || !strings.Contains(r.out, "Examples:\n  kvmlet disk "+command) {
			t.Errorf("%v: status %d, errors %q, no examples in:\n%s", args, r.status, r.err, r.out)
		}
		for line := range strings.Lines(r.out) {
			if n := len(strings.TrimRight(line, "\n")); n > helpWidth {
				t.Errorf("%v: a line of %d columns: %s", args, n, line)
			}
		}
	}
	for _, args := range [][]string{{"disk"}, {"disk", "snapshot"}} {
		if r := runCommand(t, args...); r.status != statusOK || !strings.Contains(r.out, "Usage:") {
			t.Errorf("%v: %+v", args, r)
		}
	}
}

func TestDiskCompletion(t *testing.T) {
	t.Parallel()
	for args, want := range map[string][]string{
		"disk ":                         {"create", "info", "check", "convert", "compare", "map", "resize", "commit", "snapshot", "serve", "bench"},
		"disk snapshot ":                {"list", "create", "apply", "delete"},
		"disk create --format ":         disk.Formats(),
		"disk create --preallocation ":  disk.Preallocations(),
		"disk create --compat ":         {"0.10", "1.1"},
		"disk convert --target-format ": disk.Formats(),
		"disk convert --compression ":   {"zlib", "zstd"},
		"disk convert --cache ":         disk.Caches(),
		"disk check --repair ":          {"leaks", "all"},
		"disk serve --aio ":             disk.AIOs(),
		"disk serve --detect-zeroes ":   disk.DetectNames(),
		"disk bench --pattern ":         {"sequential", "random"},
		"disk compare --sec":            {"--second-format"},
		"disk map --b":                  {"--backing", "--backing-format"},
	} {
		r := runCommand(t, append([]string{"__complete"}, strings.Split(args, " ")...)...)
		for _, w := range want {
			if !slices.ContainsFunc(strings.Split(r.out, "\n"), func(line string) bool {
				offer, _, _ := strings.Cut(line, "\t")
				return offer == w
			}) {
				t.Errorf("%q is not completed to %s, but: %s", args, w, r.out)
			}
		}
	}
}

// TestDiskCreate makes disks with every flag and option, and asks QEMU what they are.
func TestDiskCreate(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	f.data("base", 1<<20)
	for name, c := range map[string]struct {
		args []string
		want map[string]any // of qemu-img info
	}{
		"raw":     {[]string{"SELF", "1M"}, map[string]any{"format": "raw", "virtual-size": 1048576.0}},
		"full":    {[]string{"--preallocation", "full", "SELF", "1M"}, map[string]any{"actual-size": 1048576.0}},
		"plain":   {[]string{"-f", "qcow2", "SELF", "3G"}, map[string]any{"format": "qcow2", "virtual-size": 3221225472.0, "compat": "1.1"}},
		"old":     {[]string{"-f", "qcow2", "--compat", "0.10", "SELF", "3G"}, map[string]any{"compat": "0.10"}},
		"options": {[]string{"-f", "qcow2", "-o", "cluster_size=4K,lazy_refcounts=on", "-o", "refcount_bits=64,compression_type=zstd", "SELF", "1M"}, map[string]any{"cluster-size": 4096.0, "lazy-refcounts": true, "refcount-bits": 64.0, "compression-type": "zstd"}},
		"flags":   {[]string{"-f", "qcow2", "--cluster-size=2M", "--lazy-refcounts", "--refcount-bits=1", "--compression=zstd", "SELF", "1M"}, map[string]any{"cluster-size": 2097152.0, "lazy-refcounts": true, "refcount-bits": 1.0, "compression-type": "zstd"}},
		"backed":  {[]string{"-f", "qcow2", "-b", "base", "-F", "raw", "SELF"}, map[string]any{"virtual-size": 1048576.0, "backing-filename": "base", "backing-filename-format": "raw"}},
		"larger":  {[]string{"-f", "qcow2", "-o", "backing_file=base,backing_fmt=raw", "SELF", "2M"}, map[string]any{"virtual-size": 2097152.0, "backing-filename": "base"}},
		"forced":  {[]string{"-f", "qcow2", "--force", "SELF", "2M"}, map[string]any{"virtual-size": 2097152.0}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := f.path(name)
			if name == "forced" {
				f.data(name, 5<<20)
			}
			args := []string{"disk", "create"}
			for _, a := range c.args {
				args = append(args, strings.ReplaceAll(a, "SELF", path))
			}
			if out := ok(t, args...); out != "" {
				t.Errorf("it says %q", out)
			}
			format := "raw"
			if slices.Contains(c.args, "qcow2") {
				format = "qcow2"
				qemuOK(t, qemuImg, "check", path)
			}
			var info map[string]any
			if err := json.Unmarshal([]byte(qemuOK(t, qemuImg, "info", "--output=json", "-f", format, path)), &info); err != nil {
				t.Fatal(err)
			}
			if s, ok := info["format-specific"].(map[string]any); ok {
				for k, v := range s["data"].(map[string]any) {
					info[k] = v
				}
			}
			for k, v := range c.want {
				if !reflect.DeepEqual(info[k], v) {
					t.Errorf("%s is %v, want %v", k, info[k], v)
				}
			}
		})
	}
}

// TestDiskInfo looks at what is printed for people.
func TestDiskInfo(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	raw, image := f.data("raw", 3<<19), f.path("image\x1b[31m")
	ok(t, "disk", "create", "-f", "qcow2", "-b", "raw", "-F", "raw", image)
	ok(t, "disk", "snapshot", "create", image, "one\ntwo")
	if out := ok(t, "disk", "info", raw); !strings.Contains(out, "1.50 MiB (1572864 bytes)") || !strings.Contains(out, "raw\n") {
		t.Error(out)
	}
	out := ok(t, "disk", "info", "-f", "qcow2", image)
	for _, want := range []string{`image\x1b[31m"`, "64 KiB (65536 bytes)", "raw (format raw)\n", "which is " + raw, "compat", `"one\ntwo"`} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %q", want, out)
		}
	}
	chain := ok(t, "disk", "info", "-f", "qcow2", "--backing-chain", "--backing", "on", image)
	if !strings.HasPrefix(chain, out+"\n") || strings.Count(chain, "\n\n") != 1 {
		t.Errorf("the chain is %q", chain)
	}
	var list []disk.Info
	if err := json.Unmarshal([]byte(ok(t, "disk", "info", "-f", "qcow2", "--backing-chain", "--backing", "on", "--json", image)), &list); err != nil ||
		len(list) != 2 || list[1].Filename != raw {
		t.Errorf("%+v, %v", list, err)
	}
	// Taken for a raw disk, which it is if it is not said to be an image.
	if r := runCommand(t, "disk", "info", image); r.status != 0 || !strings.Contains(r.out, "raw\n") || !strings.Contains(r.err, "--format qcow2") {
		t.Errorf("%+v", r)
	}
	if r := runCommand(t, "disk", "convert", image, f.path("taken for raw")); r.status != 0 || !strings.Contains(r.err, "--format qcow2") {
		t.Errorf("%+v", r)
	}
	if r := runCommand(t, "disk", "compare", image, f.path("taken for raw")); r.status != 0 || !strings.Contains(r.err, "--second-format qcow2") {
		t.Errorf("%+v", r)
	}
	ok(t, "disk", "compare", "-f", "raw", "-F", "raw", image, f.path("taken for raw")) // who says it is meant
	// Somebody else's locks.
	lockElsewhere(t, raw)
	if out := ok(t, "disk", "info", "-U", raw); !strings.Contains(out, "1572864") {
		t.Error(out)
	}
}

// TestDiskCheck wants qemu-img check's exit statuses and numbers.
func TestDiskCheck(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	const refcounts = 2 << 16 // behind the header and the refcount table
	damage := map[string]func(b []byte){
		"clean":   func([]byte) {},
		"leaks":   func(b []byte) { b[refcounts+2*40+1] = 1 },
		"corrupt": func(b []byte) { b[refcounts+2*6+1] = 0 },
		"both":    func(b []byte) { b[refcounts+2*6+1], b[refcounts+2*40+1] = 0, 1 },
	}
	for name, c := range map[string]struct {
		damage, repair string
		status, after  int
	}{
		"clean":                  {"clean", "", 0, 0},
		"clean, repaired":        {"clean", "all", 0, 0},
		"leaks":                  {"leaks", "", checkLeaks, checkLeaks},
		"leaks, repaired":        {"leaks", "leaks", 0, 0},
		"corrupt":                {"corrupt", "", checkCorrupt, checkCorrupt},
		"corrupt, leaks only":    {"corrupt", "leaks", checkCorrupt, checkCorrupt},
		"corrupt, repaired":      {"corrupt", "all", 0, 0},
		"both":                   {"both", "", checkCorrupt, checkCorrupt},
		"both, leaks repaired":   {"both", "leaks", checkCorrupt, checkCorrupt},
		"both, all of repaired":  {"both", "all", 0, 0},
		"compressed and skipped": {"clean", "", 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			image := f.path(name)
			ok(t, "disk", "convert", "-O", "qcow2", "--compress="+map[bool]string{true: "true", false: "false"}[strings.HasPrefix(name, "comp")],
				f.data(name+".raw", 1<<20), image)
			b, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}
			b = append(b, make([]byte, 4<<20)...) // where clusters can be lost
			damage[c.damage](b)
			theirs := f.path(name + ".theirs")
			for _, path := range []string{image, theirs} {
				if err := os.WriteFile(path, b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			args := []string{"check", "-f", "qcow2"}
			if c.repair != "" {
				args = append(args, "-r", c.repair)
			}
			theirOut, theirStatus := qemu(t, qemuImg, append(args, "--output=json", theirs)...)
			r := runCommand(t, append([]string{"disk"}, append(args, "--json", image)...)...)
			// qemu-img says 1 where it repaired the leaks of a corrupt image.
			if r.status != c.status || r.status != theirStatus && c.repair != "leaks" || r.err != "" {
				t.Errorf("status %d, errors %q; want %d; qemu-img has %d", r.status, r.err, c.status, theirStatus)
			}
			if c.repair == "" && c.status != checkCorrupt { // it counts some corruptions twice
				var a, b map[string]any
				if err := errors.Join(json.Unmarshal([]byte(r.out), &a), json.Unmarshal([]byte(theirOut[strings.Index(theirOut, "{"):]), &b)); err != nil {
					t.Fatalf("%v in %s and %s", err, r.out, theirOut)
				}
				delete(a, "filename")
				delete(b, "filename")
				if !reflect.DeepEqual(a, b) {
					t.Errorf("%v\nqemu-img: %v", a, b)
				}
			}
			again := runCommand(t, "disk", "check", "-f", "qcow2", image)
			if again.status != c.after || strings.Contains(again.out, "no errors") != (c.after == 0) {
				t.Errorf("afterwards: %+v", again)
			}
			if out, status := qemu(t, qemuImg, "check", image); status != c.after {
				t.Errorf("afterwards qemu-img says %d: %s", status, out)
			}
		})
	}
}

// TestDiskConvert goes from format to format, and lets qemu-img compare.
func TestDiskConvert(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	base := f.data("base", 2<<20)
	top := f.path("top")
	ok(t, "disk", "create", "-f", "qcow2", "-b", "base", "-F", "raw", top, "5M")
	qemuOK(t, qemuIO, "-f", "qcow2", "-c", "write -P 1 100k 300k", "-c", "write -z 1M 128k", "-c", "write -P 2 4321k 5000", top)
	whole := []string{"-f", "qcow2", "--backing", "on", top}
	for name, c := range map[string]struct {
		args   []string
		format string
		most   int64 // bytes of space that the target takes; 0: any number
	}{
		"raw":           {whole, "raw", 3 << 20},
		"stored":        {append([]string{"-S", "0"}, whole...), "raw", 0},
		"qcow2":         {append([]string{"-O", "qcow2"}, whole...), "qcow2", 4 << 20},
		"compressed":    {append([]string{"-O", "qcow2", "-c", "-m", "3"}, whole...), "qcow2", 1 << 20},
		"zstd":          {append([]string{"-O", "qcow2", "-c", "-o", "compression_type=zstd,cluster_size=128K"}, whole...), "qcow2", 1 << 20},
		"same backing":  {append([]string{"-O", "qcow2", "-B", "base", "-F", "raw"}, whole...), "qcow2", 1 << 20},
		"other backing": {append([]string{"-O", "qcow2", "-B", "other", "-F", "raw"}, whole...), "qcow2", 0},
		"from raw":      {[]string{"-O", "qcow2", base}, "qcow2", 0},
		"none":          {append([]string{"--cache", "none", "--aio", "threads"}, whole...), "raw", 0},
	} {
		t.Run(name, func(t *testing.T) { // not in parallel: kvmlet's locks keep qemu-img away
			if name == "other backing" {
				f.data("other", 5<<20)
			}
			target := f.path(name)
			if out := ok(t, append(append([]string{"disk", "convert"}, c.args...), target)...); out != "" {
				t.Errorf("it says %q", out)
			}
			source, format := top, "qcow2"
			if name == "from raw" {
				source, format = base, "raw"
			}
			qemuOK(t, qemuImg, "compare", "-f", format, "-F", c.format, source, target)
			if c.format == "qcow2" {
				qemuOK(t, qemuImg, "check", target)
			}
			info, err := os.Stat(target)
			if err != nil {
				t.Fatal(err)
			}
			if taken := info.Sys().(*syscall.Stat_t).Blocks * 512; c.most > 0 && taken > c.most {
				t.Errorf("it takes %d bytes, at most %d are needed", taken, c.most)
			}
		})
	}
	t.Run("into what is there", func(t *testing.T) {
		target := f.data("there", 6<<20)
		ok(t, append(append([]string{"disk", "convert", "-n"}, whole...), target)...)
		if r := runCommand(t, "disk", "compare", "-f", "qcow2", "--backing", "on", top, target); r.status != compareDiffer ||
			r.out != "the disks differ at byte 5242880\n" { // where the source ends
			t.Errorf("%+v", r)
		}
	})
}

// TestDiskCompare wants qemu-img compare's verdicts.
func TestDiskCompare(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	a := f.data("a", 1<<20)
	change := func(name string, size int64, at int64) string {
		path := f.data(name, 1<<20)
		if at >= 0 {
			qemuOK(t, qemuIO, "-f", "raw", "-c", "write -P 255 "+sizeNumber(at)+" 512", path)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, c := range map[string]struct {
		b      string
		strict bool
		status int
		say    string
		warn   bool
	}{
		"same":           {change("same", 1<<20, -1), false, 0, "the disks are the same\n", false},
		"same, strict":   {change("same2", 1<<20, -1), true, 0, "the disks are the same\n", false},
		"longer":         {change("longer", 2<<20, -1), false, 0, "the disks are the same\n", true},
		"longer, strict": {change("longer2", 2<<20, -1), true, 1, "the disks have 1048576 and 2097152 bytes\n", false},
		"other":          {change("other", 1<<20, 512<<10), false, 1, "the disks differ at byte 524288\n", false},
		"shorter":        {change("shorter", 1<<19, -1), false, 1, "the disks differ at byte 524288\n", false},
	} {
		t.Run(name, func(t *testing.T) { // not in parallel: kvmlet's locks keep qemu-img away
			args := []string{"-f", "raw", "-F", "raw"}
			if c.strict {
				args = append(args, "-s")
			}
			args = append(args, a, c.b)
			r := runCommand(t, append([]string{"disk", "compare"}, args...)...)
			if r.status != c.status || r.out != c.say || (r.err != "") != c.warn {
				t.Errorf("%+v, want status %d and %q", r, c.status, c.say)
			}
			if out, status := qemu(t, qemuImg, append([]string{"compare"}, args...)...); status != c.status {
				t.Errorf("qemu-img says %d: %s", status, out)
			}
		})
	}
}

func sizeNumber(n int64) string { s := size(n); return s.String() }

// TestDiskMap compares with qemu-img map.
func TestDiskMap(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	f.data("base", 1<<20)
	top := f.path("top")
	ok(t, "disk", "create", "-f", "qcow2", "-b", "base", "-F", "raw", top, "3M")
	qemuOK(t, qemuIO, "-f", "qcow2", "-c", "write -P 1 64k 128k", "-c", "write -z 512k 64k", "-c", "write -P 2 2M 64k", top)
	var ours, theirs []map[string]any
	if err := errors.Join(json.Unmarshal([]byte(ok(t, "disk", "map", "-f", "qcow2", "--backing", f.dir, "--json", top)), &ours),
		json.Unmarshal([]byte(qemuOK(t, qemuImg, "map", "--output=json", top)), &theirs)); err != nil {
		t.Fatal(err)
	}
	for _, list := range [][]map[string]any{ours, theirs} {
		for _, e := range list {
			delete(e, "compressed") // not in all versions of qemu-img
		}
	}
	if !reflect.DeepEqual(ours, theirs) {
		t.Errorf("%v\nqemu-img: %v", ours, theirs)
	}
	// The table has the same lines as qemu-img's, under another head.
	lines := func(s string) (all [][]string) {
		for line := range strings.Lines(s) {
			all = append(all, strings.Fields(line))
		}
		return all[1:]
	}
	a, b := lines(ok(t, "disk", "map", "-f", "qcow2", "--backing", "on", top)), lines(qemuOK(t, qemuImg, "map", top))
	for _, l := range append(a, b...) {
		for i := range l[:3] {
			l[i] = strings.TrimPrefix(l[i], "0x") // qemu-img writes 0 without
		}
	}
	if !reflect.DeepEqual(a, b) {
		t.Errorf("%q\nqemu-img: %q", a, b)
	}
}

// TestDiskResize makes disks larger and smaller.
func TestDiskResize(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	raw, image := f.data("raw", 1<<20), f.path("image")
	ok(t, "disk", "create", "-f", "qcow2", image, "1M")
	for _, d := range [][]string{{"raw", raw}, {"qcow2", image}} {
		for _, step := range []struct {
			args []string
			want string
		}{{[]string{"--", d[1], "+1M"}, "(2097152 bytes)"}, {[]string{d[1], "5000"}, ""}, {[]string{"--shrink", d[1], "5000"}, "(5120 bytes)"}, {[]string{"--shrink", "--", d[1], "-512"}, "(4608 bytes)"}, {[]string{d[1], "1G"}, "(1073741824 bytes)"}} {
			r := runCommand(t, append([]string{"disk", "resize", "-f", d[0]}, step.args...)...)
			if step.want == "" {
				expectOneLine(t, r, "--shrink")
				continue
			}
			if out := ok(t, "disk", "info", "-f", d[0], d[1]); r.status != 0 || !strings.Contains(out, step.want) {
				t.Errorf("%q: %+v, then %s", step.args, r, out)
			}
		}
	}
	qemuOK(t, qemuImg, "check", image)
}

// TestDiskCommit brings an overlay and its backing file together.
func TestDiskCommit(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	base, top := f.data("base", 1<<20), f.path("top")
	ok(t, "disk", "create", "-f", "qcow2", "-b", "base", "-F", "raw", top, "2M")
	qemuOK(t, qemuIO, "-f", "qcow2", "-c", "write -P 1 100k 10k", "-c", "write -z 512k 64k", "-c", "write -P 2 1500k 1k", top)
	ok(t, "disk", "convert", "-p", "-f", "qcow2", "--backing", "on", top, f.path("want"))
	ok(t, "disk", "check", "-p", top)
	expectOneLine(t, runCommand(t, "disk", "commit", top), "backing option")
	if out := ok(t, "disk", "commit", "-p", "-f", "qcow2", "--backing", f.dir, top); out != "" {
		t.Error(out)
	}
	ok(t, "disk", "compare", base, f.path("want"))
	ok(t, "disk", "compare", "-f", "qcow2", "--backing", "on", top, base)
}

// TestDiskSnapshot goes back in time.
func TestDiskSnapshot(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	image := f.path("image")
	ok(t, "disk", "create", "-f", "qcow2", image, "1M")
	qemuOK(t, qemuIO, "-c", "write -P 1 0 64k", image)
	ok(t, "disk", "snapshot", "create", "-f", "qcow2", image, "one")
	qemuOK(t, qemuIO, "-c", "write -P 2 0 64k", image)
	ok(t, "disk", "snapshot", "create", image, "two")
	expectOneLine(t, runCommand(t, "disk", "snapshot", "create", image, "two"), "exists")
	if out := qemuOK(t, qemuImg, "snapshot", "-l", image); !strings.Contains(out, "one") || !strings.Contains(out, "two") {
		t.Error(out)
	}
	ok(t, "disk", "snapshot", "apply", image, "one")
	qemuOK(t, qemuIO, "-c", "read -P 1 0 64k", image)
	ok(t, "disk", "snapshot", "apply", image, "2") // by its ID
	qemuOK(t, qemuIO, "-c", "read -P 2 0 64k", image)
	ok(t, "disk", "snapshot", "delete", image, "one")
	var list []disk.Snapshot
	if err := json.Unmarshal([]byte(ok(t, "disk", "snapshot", "list", "--json", image)), &list); err != nil || len(list) != 1 || list[0].Name != "two" {
		t.Errorf("%+v, %v", list, err)
	}
	ok(t, "disk", "snapshot", "delete", image, "two")
	if out := ok(t, "disk", "snapshot", "list", image); out != "" {
		t.Error(out)
	}
	qemuOK(t, qemuImg, "check", image)
}

// TestDiskLeaks runs commands, also such as fail, and wants all files and goroutines to be gone.
func TestDiskLeaks(t *testing.T) {
	f := newDiskFiles(t)
	raw, image := f.data("raw", 1<<20), f.path("image")
	runs := func() {
		for _, args := range []string{
			"create --force -f qcow2 IMAGE 1M", "create -f qcow2 IMAGE 1M", "convert --force -O qcow2 RAW IMAGE", "convert RAW /none/x",
			"info RAW", "info -f qcow2 RAW", "check -f qcow2 IMAGE", "check -f qcow2 RAW", "map RAW", "compare -F qcow2 RAW IMAGE",
			"compare -F qcow2 RAW RAW", "resize RAW +1M", "resize -f qcow2 RAW +1M", "snapshot list IMAGE", "snapshot list RAW",
			"bench -c 100 RAW", "bench -c 100 -s 1G RAW", "serve --listen nowhere RAW", "serve --socket RAW RAW",
		} {
			args = strings.NewReplacer("RAW", raw, "IMAGE", image).Replace(args)
			runCommand(t, append([]string{"disk"}, strings.Fields(args)...)...)
		}
	}
	runs() // what stays for good is there now
	check := hosttest.Leaks(t, 10*time.Second)
	runs()
	check()
}
