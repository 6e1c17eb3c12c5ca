package cli

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/fault"
	"github.com/kvmlet/kvmlet/blk/mem"
)

// TestDiskBadInput gives the disk commands what cannot work. Each is answered by one line.
func TestDiskBadInput(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	raw, image, backed, spoiling := f.data("raw", 1<<20), f.path("image"), f.path("backed"), f.path("spoiling")
	ok(t, "disk", "create", "-f", "qcow2", image, "1M")
	ok(t, "disk", "create", "-f", "qcow2", "-b", "raw", "-F", "raw", backed)
	ok(t, "disk", "create", "-f", "qcow2", "-b", "image", "-F", "raw", spoiling)
	locked := f.data("locked", 1<<20)
	lockElsewhere(t, locked)
	none, fifo, socket, mid := f.path("none"), f.path("fifo"), f.path("socket"), f.path("mid")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	ln, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ok(t, "disk", "create", "-f", "qcow2", "-b", "raw", "-F", "raw", mid)
	for name, c := range map[string]struct {
		args   []string
		status int // 0: statusError
		want   string
	}{
		"command":                     {[]string{"fly"}, 0, `unknown command "fly"`},
		"snapshot command":            {[]string{"snapshot", "fly"}, 0, `unknown command "fly"`},
		"command, nearly":             {[]string{"creat"}, 0, `unknown command "creat" for disk (did you mean create? see kvmlet disk --help)`},
		"command, in part":            {[]string{"co"}, 0, "did you mean commit or compare or convert? see"},
		"snapshot command, nearly":    {[]string{"snapshot", "craete"}, 0, "for disk snapshot (did you mean create? see kvmlet disk snapshot --help)"},
		"flag, nearly":                {[]string{"info", "--formt", "raw"}, 0, "unknown flag: --formt (did you mean --format? see kvmlet disk info --help)"},
		"flag, hidden":                {[]string{"check", "--progres"}, 0, "unknown flag: --progres (see"},
		"flag, a letter":              {[]string{"info", "-y"}, 0, "(see kvmlet disk info --help)"},
		"flag's value":                {[]string{"info", "--format"}, 0, "needs an argument: --format (see"},
		"flag":                        {[]string{"info", "--warp"}, 0, "kvmlet disk info --help"},
		"create without a path":       {[]string{"create"}, 0, "PATH is missing"},
		"create, empty path":          {[]string{"create", "", "1M"}, 0, "PATH is empty"},
		"create without a size":       {[]string{"create", none}, 0, "SIZE is missing"},
		"create, too much":            {[]string{"create", none, "1M", "2M"}, 0, `unexpected argument "2M"`},
		"create, size":                {[]string{"create", none, "much"}, 0, `"much" is not a size`},
		"create, size in part":        {[]string{"create", none, "1.0001K"}, 0, "not a whole number"},
		"create, size 0":              {[]string{"create", none, "0"}, 0, "0 bytes"},
		"create, beyond":              {[]string{"create", none, "9999999T"}, 0, "8 EiB"},
		"create, backed of size 0":    {[]string{"create", "-f", "qcow2", "-b", raw, "-F", "raw", none, "0"}, 0, "leave it out"},
		"create, format":              {[]string{"create", "-f", "vmdk", none, "1M"}, 0, "want raw or qcow2"},
		"create, option":              {[]string{"create", "-f", "qcow2", "-o", "warp=9", none, "1M"}, 0, "unknown option (have backing_file,"},
		"create, option twice":        {[]string{"create", "-f", "qcow2", "-o", "compat=1.1,compat=1.1", none, "1M"}, 0, "twice"},
		"create, option's value":      {[]string{"create", "-f", "qcow2", "-o", "cluster_size=x", none, "1M"}, 0, "is not a size"},
		"create, lazy":                {[]string{"create", "-f", "qcow2", "-o", "lazy_refcounts=maybe", none, "1M"}, 0, "want on or off"},
		"create, compression":         {[]string{"create", "-f", "qcow2", "--compression", "gzip", none, "1M"}, 0, "want zlib or zstd"},
		"create, clusters":            {[]string{"create", "-f", "qcow2", "--cluster-size", "3K", none, "1M"}, 0, "power of two"},
		"create, clusters of 0":       {[]string{"create", "-f", "qcow2", "--cluster-size", "0", none, "1M"}, 0, "--cluster-size 0: want 512 to 2M"},
		"create, option of 0":         {[]string{"create", "-f", "qcow2", "-o", "cluster_size=0", none, "1M"}, 0, "--cluster-size 0: want 512 to 2M"},
		"create, refcounts of 0":      {[]string{"create", "-f", "qcow2", "--refcount-bits", "0", none, "1M"}, 0, "--refcount-bits 0: want 1 to 64"},
		"create, clusters of a raw":   {[]string{"create", "--cluster-size", "4K", none, "1M"}, 0, "qcow2"},
		"create, there":               {[]string{"create", raw, "1M"}, 0, "--force"},
		"create, in use":              {[]string{"create", "--force", locked, "1M"}, 0, "in use"},
		"create, no folder":           {[]string{"create", none + "/disk", "1M"}, 0, "no such file"},
		"create, on a pipe":           {[]string{"create", fifo, "1M"}, 0, "it is a pipe (a disk is a regular file"},
		"create, on pipe, forced":     {[]string{"create", "-f", "qcow2", "--force", fifo, "1M"}, 0, "it is a pipe"},
		"create, on a folder":         {[]string{"create", f.dir, "1M"}, 0, "it is a directory"},
		"create, image on folder":     {[]string{"create", "-f", "qcow2", "--force", f.dir, "1M"}, 0, "it is a directory"},
		"create, on a socket":         {[]string{"create", "-f", "qcow2", socket, "1M"}, 0, "it is a socket"},
		"create, on a terminal":       {[]string{"create", "--force", "/dev/tty", "1M"}, 0, "it is a character device"},
		"create, on /dev/null":        {[]string{"create", "-f", "qcow2", "/dev/null", "1M"}, 0, "it is a character device"},
		"create, backing format":      {[]string{"create", "-f", "qcow2", "-b", raw, none}, 0, "never guessed"},
		"info, missing":               {[]string{"info", none}, 0, "no such file"},
		"info, not an image":          {[]string{"info", "-f", "qcow2", raw}, 0, "not a qcow2 image"},
		"info, in use":                {[]string{"info", locked}, 0, "--force-share"},
		"info, two":                   {[]string{"info", raw, image}, 0, "unexpected argument"},
		"info, policy":                {[]string{"info", "--backing=", raw}, 0, "want off, on, or"},
		"info, chain":                 {[]string{"info", "-f", "qcow2", "--backing-chain", backed}, 0, "backing option"},
		"info, chain, off":            {[]string{"info", "-f", "qcow2", "--backing-chain", "--backing", "off", backed}, 0, "backing option"},
		"check, raw":                  {[]string{"check", "-f", "raw", raw}, checkUnsupported, "--format qcow2"},
		"check, not said":             {[]string{"check", raw}, checkFailed, "not a qcow2 image"},
		"check, what":                 {[]string{"check", "--repair", image}, 0, "want leaks or all"},
		"commit, into an image":       {[]string{"commit", "--backing", "on", spoiling}, 0, "say --backing-format raw if it is none"},
		"convert, into an image":      {[]string{"convert", "-n", raw, image}, 0, "say --target-format qcow2, or --target-format raw"},
		"serve, an image":             {[]string{"serve", "-k", none, image}, 0, "say --format qcow2, or --format raw"},
		"commit, a raw":               {[]string{"commit", "-f", "raw", raw}, 0, "want qcow2"},
		"snapshot, a raw":             {[]string{"snapshot", "apply", "-f", "raw", raw, "a"}, 0, "want qcow2"},
		"check, missing":              {[]string{"check", "-f", "qcow2", none}, checkFailed, "no such file"},
		"check, not an image":         {[]string{"check", "-f", "qcow2", raw}, checkFailed, "not a qcow2 image"},
		"check, in use":               {[]string{"check", "-f", "qcow2", locked}, checkFailed, "--force-share"},
		"check, repair what":          {[]string{"check", "-f", "qcow2", "-r", "some", image}, 0, "want leaks or all"},
		"check, repair nothing":       {[]string{"check", "-f", "qcow2", "--repair=", image}, 0, "want leaks or all"},
		"check, repair what is used":  {[]string{"check", "-f", "qcow2", "-U", "--repair=all", image}, 0, "can't be repaired"},
		"convert, one":                {[]string{"convert", raw}, 0, "TARGET is missing"},
		"convert, missing":            {[]string{"convert", none, f.path("t1")}, 0, "no such file"},
		"convert, in use":             {[]string{"convert", locked, f.path("t2")}, 0, "--force-share"},
		"convert, there":              {[]string{"convert", raw, image}, 0, "--force"},
		"convert, itself":             {[]string{"convert", "--force", raw, raw}, 0, "would be overwritten"},
		"convert, unlocked itself":    {[]string{"convert", "--force", "-U", raw, raw}, 0, "would be overwritten"},
		"convert, its backing file":   {[]string{"convert", "--force", "-U", "-f", "qcow2", "--backing", "on", backed, raw}, 0, "would be overwritten"},
		"convert, backing":            {[]string{"convert", "-f", "qcow2", backed, f.path("t3")}, 0, "backing option"},
		"convert, backing elsewhere":  {[]string{"convert", "-f", "qcow2", "--backing", "/usr", backed, f.path("t4")}, 0, "lies elsewhere"},
		"convert, compress a raw":     {[]string{"convert", "-c", raw, f.path("t5")}, 0, "--target-format qcow2"},
		"convert, requests":           {[]string{"convert", "-m", "0", raw, f.path("t6")}, 0, "want 1 to 1024"},
		"convert, sparse":             {[]string{"convert", "-S", "100", raw, f.path("t7")}, 0, "multiple of 512"},
		"convert, zero":               {[]string{"convert", "--target-is-zero", raw, f.path("t8")}, 0, "--no-create"},
		"convert, settings":           {[]string{"convert", "-n", "-O", "qcow2", "-o", "compat=1.1", raw, image}, 0, "can't be chosen"},
		"convert, into what is not":   {[]string{"convert", "-n", raw, none}, 0, "no such file"},
		"convert, into less":          {[]string{"convert", "-n", raw, f.data("less", 512)}, 0, "kvmlet disk resize"},
		"convert, no server":          {[]string{"convert", raw, "nbd+unix:///?socket=" + none}, 0, "no such file"},
		"convert, a backing file":     {[]string{"convert", "-B", "raw", "-F", "raw", raw, f.path("t9")}, 0, "qcow2"},
		"convert, to a pipe":          {[]string{"convert", raw, fifo}, 0, "it is a pipe"},
		"convert, below the backing":  {[]string{"convert", "-O", "qcow2", "-B", "mid", "-F", "qcow2", raw, f.path("t10")}, 0, `backing file "raw" of ` + mid + ": it lies elsewhere"},
		"convert, backing refused":    {[]string{"convert", "-O", "qcow2", "-B", "mid", "-F", "qcow2", "--backing", "/usr", raw, f.path("t11")}, 0, `backing file "mid": it lies elsewhere`},
		"compare, one":                {[]string{"compare", raw}, 0, "DISK2 is missing"},
		"compare, missing":            {[]string{"compare", raw, none}, compareFailed, "no such file"},
		"compare, in use":             {[]string{"compare", raw, locked}, compareFailed, "--force-share"},
		"compare, requests":           {[]string{"compare", "-m", "9999", raw, raw}, 0, "want 1 to 1024"},
		"map, backing":                {[]string{"map", "-f", "qcow2", backed}, 0, "backing option"},
		"map, in use":                 {[]string{"map", locked}, 0, "--force-share"},
		"resize, size":                {[]string{"resize", raw, "+much"}, 0, "is not a size"},
		"resize, + only":              {[]string{"resize", raw, "+"}, 0, "SIZE is +, and no number"},
		"resize, - only":              {[]string{"resize", raw, "-"}, 0, "SIZE is -, and no number"},
		"resize, two signs":           {[]string{"resize", raw, "++1M"}, 0, `"+1M" is not a size`},
		"resize, -size":               {[]string{"resize", "--shrink", raw, "-512K"}, 0, "put -- before the operands"},
		"resize, smaller":             {[]string{"resize", raw, "512K"}, 0, "--shrink"},
		"resize, to nothing":          {[]string{"resize", "--shrink", raw, "0"}, 0, "no disk is as large"},
		"resize, below nothing":       {[]string{"resize", "--shrink", "--", raw, "-2M"}, 0, "no disk is as large"},
		"resize, beyond":              {[]string{"resize", raw, "+8388608T"}, 0, "8 EiB"},
		"resize, perhaps an image":    {[]string{"resize", image, "+1M"}, 0, "--format raw if it is none"},
		"bench, perhaps an image":     {[]string{"bench", "-w", image}, 0, "--format raw if it is none"},
		"resize, far":                 {[]string{"resize", raw, "8388607T"}, 0, "too large"},
		"resize, in use":              {[]string{"resize", locked, "+1M"}, 0, "in use"},
		"resize, backing":             {[]string{"resize", "-f", "qcow2", backed, "+1M"}, 0, "backing option"},
		"commit without backing":      {[]string{"commit", "--backing", "on", image}, 0, "no backing file"},
		"commit, not an image":        {[]string{"commit", raw}, 0, "not a qcow2 image"},
		"commit, requests":            {[]string{"commit", "-m", "0", image}, 0, "want 1 to 1024"},
		"snapshot of a raw":           {[]string{"snapshot", "create", raw, "a"}, 0, "not a qcow2 image"},
		"snapshot without a name":     {[]string{"snapshot", "create", image}, 0, "NAME is missing"},
		"snapshot that is not":        {[]string{"snapshot", "apply", image, "a"}, 0, `apply snapshot "a": no such snapshot`},
		"snapshot to delete":          {[]string{"snapshot", "delete", image, "a"}, 0, "no such snapshot"},
		"serve where":                 {[]string{"serve", raw}, 0, "say where"},
		"serve twice":                 {[]string{"serve", "--socket", "s", "--listen", ":1", raw}, 0, "one of them"},
		"serve, TLS on a socket":      {[]string{"serve", "--socket", "s", "--tls", f.dir, raw}, 0, "--listen"},
		"serve, no certificates":      {[]string{"serve", "--listen", "127.0.0.1:0", "--tls", f.dir, raw}, 0, "server-cert.pem"},
		"serve, missing":              {[]string{"serve", "--socket", f.path("s1"), none}, 0, "no such file"},
		"serve, in use":               {[]string{"serve", "--socket", f.path("s2"), locked}, 0, "in use"},
		"serve, on a file":            {[]string{"serve", "--socket", image, raw}, 0, "not a socket"},
		"serve, socket's name":        {[]string{"serve", "--socket", f.path(strings.Repeat("s", 120)), raw}, 0, "the kernel takes 107"},
		"serve, long name":            {[]string{"serve", "--socket", f.path("s5"), "-x", strings.Repeat("x", 4097), raw}, 0, "a name of 4097 bytes, and NBD has 4096 at most"},
		"serve, long text":            {[]string{"serve", "--socket", f.path("s6"), "-D", strings.Repeat("x", 4097), raw}, 0, "--description: a text of 4097 bytes"},
		"serve, no address":           {[]string{"serve", "--listen", "nowhere", raw}, 0, "--listen"},
		"serve, limits":               {[]string{"serve", "--socket", f.path("s3"), "--throttle", "bps-total=fast", raw}, 0, "not a number"},
		"serve, copies of nothing":    {[]string{"serve", "--socket", f.path("s4"), "-r", "--copy-on-read", raw}, 0, "copy-on-read"},
		"bench, depth":                {[]string{"bench", "-d", "0", raw}, 0, "want 1 to 1024"},
		"bench, count":                {[]string{"bench", "-c", "0", raw}, 0, "want 1 at least"},
		"bench, size":                 {[]string{"bench", "-s", "65M", raw}, 0, "1 byte to 64M"},
		"bench, larger than the disk": {[]string{"bench", "-s", "2M", raw}, 0, "no room"},
		"bench, offset":               {[]string{"bench", "--offset", "1M", raw}, 0, "no room"},
		"bench, pattern":              {[]string{"bench", "--pattern", "zigzag", raw}, 0, "sequential or random"},
		"bench, flushes of reads":     {[]string{"bench", "--flush-interval", "5", raw}, 0, "--write"},
		"bench, in use":               {[]string{"bench", locked}, 0, "in use"},
		"bench, cache":                {[]string{"bench", "--cache", "warm", raw}, 0, "want writeback,"},
		"bench, engine":               {[]string{"bench", "--aio", "native", raw}, 0, "want auto, io_uring or threads"},
	} {
		t.Run(name, func(t *testing.T) { // one after the other: some lock what others read
			r := runCommand(t, append([]string{"disk"}, c.args...)...)
			if c.status != 0 {
				if r.status != c.status {
					t.Errorf("status %d, want %d", r.status, c.status)
				}
				r.status = statusError
			}
			expectOneLine(t, r, c.want)
		})
	}
	t.Cleanup(func() {
		left, err := filepath.Glob(f.path("t*"))
		if err != nil || len(left) > 0 {
			t.Errorf("targets that were not made are there: %q", left)
		}
	})
}

// TestDiskNoSpaceForAnswer gives commands a standard output that takes nothing: an answer that nobody got is an error. What
// is said beside it, on standard error, may be lost.
func TestDiskNoSpaceForAnswer(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	raw, other, image, plain := f.data("raw", 1<<20), f.data("other", 1<<19), f.path("image"), f.path("plain")
	ok(t, "disk", "create", "-f", "qcow2", image, "1M")
	ok(t, "disk", "create", "-f", "qcow2", plain, "1M")
	ok(t, "disk", "snapshot", "create", image, "before")
	long := f.data("long", 1<<20)
	if err := os.Truncate(long, 2<<20); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"info":              {"disk", "info", raw},
		"info, snapshots":   {"disk", "info", "-f", "qcow2", image},
		"info, chain":       {"disk", "info", "-f", "qcow2", "--backing-chain", plain},
		"info, JSON":        {"disk", "info", "--json", raw},
		"check":             {"disk", "check", image},
		"serve":             {"disk", "serve", "--listen", "127.0.0.1:0", raw},
		"check, JSON":       {"disk", "check", "--json", image},
		"compare":           {"disk", "compare", raw, raw},
		"compare, differ":   {"disk", "compare", "-F", "qcow2", raw, image},
		"compare, sizes":    {"disk", "compare", "-s", raw, other},
		"map":               {"disk", "map", raw},
		"map, JSON":         {"disk", "map", "--json", raw},
		"bench":             {"disk", "bench", "-c", "1", raw},
		"bench, JSON":       {"disk", "bench", "-c", "1", "--json", raw},
		"snapshots":         {"disk", "snapshot", "list", image},
		"snapshots, JSON":   {"disk", "snapshot", "list", "--json", image},
		"help":              {"disk", "map", "--help"},
		"help of all":       {"disk"},
		"version":           {"--version"},
		"probe":             {"probe"},
		"probe, JSON":       {"probe", "--json"},
		"completion script": {"completion", "bash"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			expectOneLine(t, runFull(t, "err", args...), "no space left on device")
		})
	}
	for name, args := range map[string][]string{
		"hint": {"disk", "info", image}, "sizes": {"disk", "compare", raw, long},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if r := runFull(t, "out", args...); r.status != statusOK || r.out == "" {
				t.Errorf("status %d, output %q", r.status, r.out)
			}
		})
	}
}

// TestDiskOddNames gives the disk commands names that a terminal would obey. What they say of them is one line without.
func TestDiskOddNames(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	const odd, shown = "a\x1b[31m\nkvmlet: all is well\x7f\xff\u202e", `a\x1b[31m\nkvmlet: all is well\x7f\xff\u202e`
	folder, image := f.path("f"+odd), f.path("i"+odd)
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	data, none := f.data(odd, 1<<20), f.path("none"+odd)
	ok(t, "disk", "create", "-f", "qcow2", image, "1M")
	for name, c := range map[string]struct {
		args   []string
		status int // 0: statusError
		want   string
	}{
		"create, there":       {[]string{"create", data, "1M"}, 0, f.path(shown) + " is there already"},
		"create on a folder":  {[]string{"create", folder, "1M"}, 0, "f" + shown + ": it is a directory"},
		"create in no folder": {[]string{"create", none + "/x", "1M"}, 0, "none" + shown + "/x: no such file"},
		"create, backing":     {[]string{"create", "-f", "qcow2", "-b", odd, "-F", "qcow2", f.path("t")}, 0, `control characters in the name "` + shown},
		"info":                {[]string{"info", none}, 0, "none" + shown + ": no such file"},
		"check":               {[]string{"check", data}, checkFailed, "/" + shown + ": "},
		"convert":             {[]string{"convert", none, f.path("t")}, 0, "none" + shown + ": no such file"},
		"convert, itself":     {[]string{"convert", "--force", data, data}, 0, "/" + shown + " is SOURCE"},
		"compare":             {[]string{"compare", data, none}, compareFailed, "none" + shown + ": no such file"},
		"map":                 {[]string{"map", folder}, 0, "f" + shown + ": it is a directory"},
		"resize":              {[]string{"resize", image, "2M"}, 0, "i" + shown + " begins as a qcow2 image does"},
		"resize, size":        {[]string{"resize", data, "512"}, 0, "resize " + f.path(shown) + ": 512 bytes are less"},
		"commit":              {[]string{"commit", image}, 0, "i" + shown + ": it has no backing file"},
		"snapshot":            {[]string{"snapshot", "apply", image, odd}, 0, `snapshot "` + shown + `": no such snapshot`},
		"serve":               {[]string{"serve", "--socket", f.path("s"), none}, 0, "none" + shown + ": no such file"},
		"serve, socket":       {[]string{"serve", "--socket", data, data}, 0, "/" + shown + " is there, and not a socket"},
		"bench":               {[]string{"bench", none}, 0, "none" + shown + ": no such file"},
		"bench, cache":        {[]string{"bench", "--cache", odd, data}, 0, shown},
		"command":             {[]string{odd}, 0, shown},
		"flag":                {[]string{"info", "--" + odd}, 0, shown},
	} {
		t.Run(name, func(t *testing.T) {
			r := runCommand(t, append([]string{"disk"}, c.args...)...)
			if c.status != 0 && r.status == c.status {
				r.status = statusError
			}
			expectOneLine(t, r, c.want)
			if line := strings.TrimSuffix(r.err, "\n"); strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("%q", line)
			}
		})
	}
	quoted := `"` + f.path("i"+shown) + `"`
	if out := ok(t, "disk", "info", "-f", "qcow2", image); !strings.Contains(out, " "+quoted+"\n") {
		t.Errorf("info: %s", out)
	}
	if out := ok(t, "disk", "map", "-f", "raw", image); !strings.HasSuffix(out, quoted+"\n") {
		t.Errorf("map: %s", out)
	}
	if r := runCommand(t, "disk", "map", image); !strings.HasPrefix(r.err, "kvmlet: "+quoted+" is taken for a raw disk") {
		t.Errorf("hint: %s", r.err)
	}
	if r := runCommand(t, "run", "--disk", "path="+f.path("\x1b[31m")); !strings.Contains(r.err, `\x1b[31m`) {
		t.Errorf("run: %q", r.err)
	}
	plain := f.data("a plain 'näme'", 1<<20)
	if out := ok(t, "disk", "info", plain); !strings.Contains(out, " "+plain+"\n") {
		t.Errorf("info: %s", out)
	}
}

// TestMessage makes lines of errors of several.
func TestMessage(t *testing.T) {
	t.Parallel()
	a, b := errors.New("a"), &os.PathError{Op: "open", Path: "x\ny", Err: unix.ENOENT}
	for want, err := range map[string]error{
		"a":                                    a,
		`open x\ny: no such file or directory`: b,
		`a; open x\ny: no such file or directory`:                     errors.Join(a, nil, b),
		`in z\n: open x\ny: no such file or directory; a (and so on)`: fmt.Errorf("in z\n: %w (and so on)", errors.Join(b, a)),
		"a and a, a; a": fmt.Errorf("%w and %w, %w", a, a, errors.Join(a, a)),
		"exit status 3": &exitError{status: 3},
	} {
		if got := message(err, false); got != want {
			t.Errorf("%q is %q, want %q", err, got, want)
		}
	}
	if got := message(errors.New("go:\n\tx\x1b"), true); got != "go:\n\tx\\x1b" {
		t.Errorf("lines that are kept: %q", got)
	}
}

// TestDiskNoSpace writes to a server that has no space left. What went wrong is one line, however much it is.
func TestDiskNoSpace(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	data := f.data("data", 1<<20)
	memory, err := mem.New(4<<20, mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	full := fault.New(memory, fault.Options{})
	uri := serveDisk(t, full, blk.Options{})
	ok(t, "disk", "create", "-f", "qcow2", "--force", uri, "1M")
	for _, op := range []fault.Op{fault.OpWrite, fault.OpZero, fault.OpFlush} {
		full.Add(fault.Rule{Op: op, Err: unix.ENOSPC})
	}
	for name, args := range map[string][]string{
		"create":           {"create", "-f", "qcow2", "--force", uri, "1M"},
		"create, reserved": {"create", "--preallocation", "falloc", f.path("t"), "4194304T"},
		"convert":          {"convert", data, uri},
		"convert to image": {"convert", "-n", "-O", "qcow2", data, uri},
		"compress":         {"convert", "-n", "-c", "-O", "qcow2", data, uri},
		"resize":           {"resize", "-f", "qcow2", uri, "1T"},
		"snapshot":         {"snapshot", "create", uri, "a"},
	} {
		t.Run(name, func(t *testing.T) {
			want := "no space left on device"
			if name == "create, reserved" {
				want = "create disk " + f.path("t")
			}
			expectOneLine(t, runCommand(t, append([]string{"disk"}, args...)...), want)
		})
	}
}
