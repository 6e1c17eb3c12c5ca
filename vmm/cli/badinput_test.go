package cli

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// testKernel is an ELF file with one segment of a page, at 16 MiB, where it is entered.
func testKernel(t *testing.T, machine elf.Machine) []byte {
	t.Helper()
	const at, page, headers = 16 << 20, 4096, 64 + 56
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: 1, Entry: at,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
	}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB)
	h.Ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)
	ph := elf.Prog64{
		Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Off: page, Vaddr: at, Paddr: at,
		Filesz: page, Memsz: page,
	}
	var b bytes.Buffer
	for _, v := range []any{&h, &ph, make([]byte, 2*page-headers)} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// badInput holds files to be wrong about.
type badInput struct {
	t   *testing.T
	dir string
}

func (f badInput) path(name string) string { return filepath.Join(f.dir, name) }

func (f badInput) write(name string, content []byte) string {
	f.t.Helper()
	if err := os.WriteFile(f.path(name), content, 0o644); err != nil {
		f.t.Fatal(err)
	}
	return f.path(name)
}

// sparse makes a file of size bytes that takes no space.
func (f badInput) sparse(name string, size int64) string {
	f.t.Helper()
	path := f.write(name, nil)
	if err := os.Truncate(path, size); err != nil {
		f.t.Fatal(err)
	}
	return path
}

// beyondHost is more memory than this host has, or than any VM may have.
func beyondHost(t *testing.T) string {
	t.Helper()
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%dG", min(si.Totalram*uint64(si.Unit)>>30+1, 65))
}

// TestBadInput gives `kvmlet run` what cannot work. Each is answered by one line and status 125, before there is a VM or
// a lab to run it in: neither KVM nor QEMU is needed for that.
func TestBadInput(t *testing.T) {
	t.Parallel()
	f := badInput{t, t.TempDir()}
	kernel := f.write("vmlinux", testKernel(t, elf.EM_X86_64))
	disk := f.sparse("disk.img", 1<<20)
	locked := f.sparse("locked.img", 1<<20)
	lockElsewhere(t, locked)
	link := f.path("link.img")
	if err := os.Symlink(disk, link); err != nil {
		t.Fatal(err)
	}
	qcow2 := f.path("qcow2")
	if err := os.WriteFile(qcow2, append([]byte("QFI\xfb"), make([]byte, 508)...), 0o600); err != nil {
		t.Fatal(err)
	}
	pipe := f.path("pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	arm := make([]byte, 4096)
	copy(arm[56:], "ARM\x64")
	many := strings.Split(strings.Repeat("--net tap=x ", 30), " ")[:60]
	for i := range 30 {
		many[2*i+1] = fmt.Sprintf("tap=x%d", i)
	}
	// A guest with its own init needs no image of ours.
	initrd := []string{"--initrd", f.sparse("initrd", 4096)}

	cases := map[string]struct {
		args []string
		want string
	}{
		"kernel without a name":           {[]string{"--kernel", ""}, "--kernel: it is empty"},
		"initrd empty":                    {[]string{"--initrd="}, "--initrd: it is empty"},
		"console empty":                   {[]string{"--console", ""}, "--console: it is empty"},
		"kernel missing":                  {[]string{"--kernel", f.path("none")}, "no such file"},
		"kernel is a directory":           {[]string{"--kernel", f.dir}, "not a regular file"},
		"kernel is a pipe":                {[]string{"--kernel", pipe}, "not a regular file"},
		"kernel empty":                    {[]string{"--kernel", f.write("empty", nil)}, "truncated"},
		"kernel truncated":                {[]string{"--kernel", f.write("short", testKernel(t, elf.EM_X86_64)[:5000])}, "truncated"},
		"kernel header truncated":         {[]string{"--kernel", f.write("head", testKernel(t, elf.EM_X86_64)[:40])}, "truncated"},
		"kernel is junk":                  {[]string{"--kernel", f.write("junk", bytes.Repeat([]byte("junk"), 1024))}, "not a Linux kernel"},
		"kernel for aarch64, ELF":         {[]string{"--kernel", f.write("arm.elf", testKernel(t, elf.EM_AARCH64))}, "another architecture"},
		"kernel for aarch64, Image":       {[]string{"--kernel", f.write("arm", arm)}, "another architecture"},
		"initrd missing":                  {[]string{"--kernel", kernel, "--initrd", f.path("none")}, "no such file"},
		"initrd is a directory":           {[]string{"--kernel", kernel, "--initrd", f.dir}, "not a regular file"},
		"initrd does not fit":             {[]string{"--kernel", kernel, "--memory", "64M", "--initrd", f.sparse("large", 60<<20)}, "does not fit"},
		"initrd larger than any memory":   {[]string{"--kernel", kernel, "--initrd", f.sparse("vast", 1<<40)}, "does not fit"},
		"command line too long":           {append(initrd, "--kernel", kernel, "--append", strings.Repeat("x", 2048)), "too long"},
		"memory too small":                {[]string{"--memory", "62M"}, "want 64 MiB"},
		"memory too large":                {[]string{"--memory", "1T"}, "64 GiB"},
		"memory beyond the host's":        {[]string{"--memory", beyondHost(t)}, "MiB"},
		"memory in odd bytes":             {[]string{"--memory", "67108865"}, "multiple of 2 MiB"},
		"memory unreadable":               {[]string{"--memory", "lots"}, `"lots" is not a size`},
		"memory negative":                 {[]string{"--memory=-64M"}, "is not a size"},
		"no CPU":                          {[]string{"--cpus", "0"}, "want 1 to 64"},
		"too many CPUs":                   {[]string{"--cpus", "65"}, "want 1 to 64"},
		"CPUs unreadable":                 {[]string{"--cpus", "two"}, `"two"`},
		"CPU template unknown":            {[]string{"--cpu", "z80"}, "z80"},
		"disk missing":                    {[]string{"--disk", "path=" + f.path("none")}, "disk create"},
		"disk missing, read-only":         {[]string{"--disk", "path=" + f.path("none") + ",readonly"}, "no such file"},
		"disk is a directory":             {[]string{"--disk", "path=" + f.dir}, "directory"},
		"disk is a pipe":                  {[]string{"--disk", "path=" + pipe}, "pipe"},
		"disk empty":                      {[]string{"--disk", "path=" + f.path("empty")}, "empty"},
		"disk in use":                     {[]string{"--disk", "path=" + locked}, "in use"},
		"disk in use, read-only":          {[]string{"--disk", "path=" + locked + ",readonly"}, "in use"},
		"disk without a path":             {[]string{"--disk", "readonly"}, "path=FILE"},
		"disk option unknown":             {[]string{"--disk", "path=" + disk + ",cash=none"}, `unknown property "cash"`},
		"disk is an image":                {[]string{"--disk", "path=" + qcow2}, "say format=qcow2"},
		"disk format unknown":             {[]string{"--disk", "path=" + disk + ",format=vmdk"}, "format=vmdk"},
		"disk twice":                      {[]string{"--disk", "path=" + disk, "--disk", "path=" + disk}, "used twice"},
		"disk twice, by a link":           {[]string{"--disk", "path=" + disk, "--disk", "path=" + link + ",id=b"}, "used twice"},
		"disk id too long":                {[]string{"--disk", "path=" + disk + ",id=" + strings.Repeat("x", 21)}, "20 at most"},
		"disk id unprintable":             {[]string{"--disk", "path=" + disk + ",id=\x1b[31m"}, "printable"},
		"disk id twice":                   {[]string{"--disk", "path=" + disk + ",id=a", "--disk", "path=" + kernel + ",id=a"}, "id a: used twice"},
		"id of a disk and a card":         {[]string{"--disk", "path=" + disk + ",id=a", "--net", "tap=t0,id=a"}, "id a: used twice"},
		"id as another disk's default":    {[]string{"--disk", "path=" + disk + ",id=disk1", "--disk", "path=" + kernel}, "id disk1: used twice"},
		"tap twice":                       {[]string{"--net", "tap=t0", "--net", "tap=t0"}, "used twice"},
		"MAC address twice":               {[]string{"--net", "tap=t0,mac=52:54:00:00:00:01", "--net", "tap=t1,mac=52:54:00:00:00:01"}, "used twice"},
		"tap without a name":              {[]string{"--net", "tap"}, "want tap=NAME"},
		"tap name too long":               {[]string{"--net", "tap=" + strings.Repeat("t", 16)}, "15 characters"},
		"network unknown":                 {[]string{"--net", "wifi=home"}, `unknown kind "wifi"`},
		"network option unknown":          {[]string{"--net", "tap=t0,speed=9"}, "speed"},
		"too many devices":                {many, "room for"},
		"name too long":                   {[]string{"--name", strings.Repeat("n", 64)}, "1 to 63"},
		"name empty":                      {[]string{"--name", ""}, "1 to 63"},
		"name with a space":               {[]string{"--name", "a b"}, "letters, digits and hyphens"},
		"timeout unreadable":              {[]string{"--timeout", "soon"}, `"soon"`},
		"timeout negative":                {[]string{"--timeout", "-1s"}, "positive"},
		"accel unknown":                   {[]string{"--accel", "warp"}, "want auto, kvm or lab"},
		"option unknown":                  {[]string{"--warp"}, "unknown flag: --warp (see kvmlet run --help)"},
		"option unknown, short":           {[]string{"-W"}, "unknown shorthand flag"},
		"option without its value":        {[]string{"--disk"}, "needs an argument"},
		"command without --":              {[]string{"uname"}, "behind --"},
		"words on both sides of --":       {[]string{"uname", "--", "-a"}, `unexpected argument "uname"`},
		"console in a folder that is not": {append(initrd, "--kernel", kernel, "--console", f.path("none/log")), "console"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// The later of two --accel counts.
			args := append([]string{"run", "--accel", "lab"}, c.args...)
			expectOneLine(t, runCommand(t, args...), c.want)
		})
	}
}

// TestBadCommand is about what goes wrong before any command of ours is chosen, or in others than run.
func TestBadCommand(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"command unknown":       {[]string{"fly"}, `unknown command "fly"`},
		"command nearly right":  {[]string{"rum"}, `unknown command "rum"`},
		"option of the program": {[]string{"--warp"}, "unknown flag"},
		"probe with an operand": {[]string{"probe", "more"}, "more"},
		"lab without a command": {[]string{"lab"}, "behind --"},
		"lab option unknown":    {[]string{"lab", "--warp", "--", "ls"}, "kvmlet lab --help"},
		"lab without a CPU":     {[]string{"lab", "--cpus", "0", "--", "ls"}, "--cpus 0: want 1 to 64"},
		"lab of less than none": {[]string{"lab", "--cpus=-1", "--", "ls"}, "--cpus -1: want 1 to 64"},
		"lab of too many CPUs":  {[]string{"lab", "--cpus", "65", "--", "ls"}, "--cpus 65: want 1 to 64"},
		"lab memory unreadable": {[]string{"lab", "--memory", "much", "--", "ls"}, "is not a size"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			expectOneLine(t, runCommand(t, c.args...), c.want)
		})
	}
}

// TestTapNeedsRights asks for a tap as a user who may not make one. The file system is not the subject, so there is none.
func TestTapNeedsRights(t *testing.T) {
	t.Parallel()
	r := runUnprivileged(t, "run", "--accel", "kvm", "--net", "tap=kvmlettest0")
	if os.Geteuid() != 0 && r.status == statusOK {
		t.Fatal("this user may make taps; run the test as root or without CAP_NET_ADMIN")
	}
	if strings.Contains(r.err, "no such file") || strings.Contains(r.err, "no such device") {
		expectOneLine(t, r, "modprobe tun") // a host without taps
		return
	}
	expectOneLine(t, r, "CAP_NET_ADMIN")
}

// expectOneLine wants a failure that says what in one line.
func expectOneLine(t *testing.T, r result, want string) {
	t.Helper()
	line, rest, ended := strings.Cut(r.err, "\n")
	if r.status != statusError || r.out != "" || !ended || rest != "" ||
		!strings.HasPrefix(line, "kvmlet: ") || !strings.Contains(line, want) {
		t.Errorf("status %d, output %q, errors %q; want status %d and one line with %q", r.status, r.out, r.err, statusError, want)
	}
}
