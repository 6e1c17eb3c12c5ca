package image

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// Program is an executable of the host that the guest gets, with the shared libraries that it needs.
type Program struct {
	Name    string   // its file name in /usr/bin or /usr/sbin
	Package string   // the Debian package that it comes from
	Links   []string // further names in the guest
	Without []string // libraries to leave out, by the names in DT_NEEDED; calls into them crash
}

// fioWithout are libraries that serve I/O engines for storage clusters, RDMA and persistent memory. With what they need
// themselves they are 75 MB, against 2 MB for fio, and 20 of the 22 ms that fio takes to start.
var fioWithout = []string{
	"libgfapi.so.0", "libnbd.so.0", "libibverbs.so.1", "librdmacm.so.1", "librados.so.2", "librbd.so.1",
	"libpmemblk.so.1", "libpmem.so.1",
}

// DefaultPrograms returns what the guest image takes from Debian: the programs for tests of disks and networks, and
// those that u-root lacks or has in a version without usual options. fio's engines gfapi, nbd, rdma, rados, rbd,
// pmemblk, dev-dax and libpmem do not work in the guest.
func DefaultPrograms() []Program {
	list := []Program{
		{Name: "bash", Package: "bash", Links: []string{"sh"}},
		{Name: "fio", Package: "fio", Without: fioWithout},
		{Name: "iperf3", Package: "iperf3"},
		{Name: "mke2fs", Package: "e2fsprogs", Links: []string{"mkfs.ext2", "mkfs.ext3", "mkfs.ext4"}},
		{Name: "e2fsck", Package: "e2fsprogs", Links: []string{"fsck.ext4"}},
		{Name: "mawk", Package: "mawk", Links: []string{"awk"}},
	}
	for _, p := range []struct{ pkg, names string }{
		{"coreutils", "[ base64 cat chmod chown cp cut date dd df du env expr head id install ln ls md5sum mktemp mv nproc od"},
		{"coreutils", "printf readlink realpath rm seq sha1sum sha256sum shuf sleep sort split stat stty sync tail tee test"},
		{"coreutils", "timeout touch tr truncate uname uniq wc whoami"},
		{"findutils", "find xargs"},
		{"grep", "grep"},
		{"less", "less"},
		{"mount", "mount umount"},
		{"ncurses-bin", "clear"},
		{"sed", "sed"},
		{"tar", "tar"},
		{"util-linux", "blockdev lsblk taskset"},
	} {
		for _, name := range strings.Fields(p.names) {
			list = append(list, Program{Name: name, Package: p.pkg})
		}
	}
	return list
}

// programDirs are where Debian's packages put programs. Others in PATH are left alone: the image shall be the same on
// every machine with the same packages.
var programDirs = []string{"/usr/bin", "/usr/sbin", "/bin", "/sbin"}

func (p *Program) find() (string, error) {
	for _, dir := range programDirs {
		file := filepath.Join(dir, p.Name)
		if fi, err := os.Stat(file); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s is not installed (apt-get install %s)", p.Name, p.Package)
}

// addPrograms puts programs into t. The error names all that are missing.
func addPrograms(t tree, programs []Program) error {
	var missing []string
	l := newLinker()
	for i := range programs {
		p := &programs[i]
		file, err := p.find()
		if err != nil {
			missing = append(missing, err.Error())
			continue
		}
		prog, err := l.load(file, p.Without)
		if err != nil {
			return err
		}
		if err := t.addProgram(path.Join("usr/bin", p.Name), prog); err != nil {
			return err
		}
		for _, link := range p.Links {
			if err := t.addLink(path.Join("usr/bin", link), p.Name); err != nil {
				return err
			}
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("the guest image needs programs of this machine: %s: %w", strings.Join(missing, ", "), ErrSetup)
	}
	return nil
}

// shutdownScript asks PID 1 to end all processes, unmount and stop the machine, by the signals that busybox's init takes
// for it. It stops the machine itself if nothing has come of that in ten seconds.
const shutdownScript = "#!/bin/sh\nkill -%s 1 && sleep 10\nsync\nexec bb %s\n"

// configFiles are small files that the programs read.
var configFiles = map[string]string{
	"etc/passwd":   "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
	"etc/group":    "root:x:0:\ntty:x:5:\ndisk:x:6:\nnogroup:x:65534:\n",
	"etc/hosts":    "127.0.0.1 localhost\n::1 localhost\n",
	"etc/hostname": "kvmlet\n",
	"root/.bashrc": `PS1='guest:\w\$ '` + "\n",
}

// hostFiles are configuration files that come from the host if they are there: the defaults of mke2fs, and what terminals
// can do, for the shell's line editing.
var hostFiles = []string{
	"/etc/mke2fs.conf",
	"/lib/terminfo/a/ansi", "/lib/terminfo/d/dumb", "/lib/terminfo/l/linux", "/lib/terminfo/s/screen",
	"/lib/terminfo/s/screen-256color", "/lib/terminfo/t/tmux", "/lib/terminfo/t/tmux-256color", "/lib/terminfo/v/vt100",
	"/lib/terminfo/v/vt220", "/lib/terminfo/x/xterm", "/lib/terminfo/x/xterm-256color",
}

// addConfig puts the small files into t.
func addConfig(t tree) error {
	for name, text := range configFiles {
		if err := t.addData(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	for name, args := range map[string][2]string{
		"poweroff": {"USR2", "poweroff"}, "halt": {"USR2", "poweroff"}, "reboot": {"TERM", "shutdown -r now"},
	} {
		script := fmt.Sprintf(shutdownScript, args[0], args[1])
		if err := t.addData(path.Join("usr/bin", name), []byte(script), 0o755); err != nil {
			return err
		}
	}
	for _, file := range hostFiles {
		target, err := filepath.EvalSymlinks(file)
		if err != nil {
			continue // not on this machine; the programs have defaults
		}
		if err := t.addFile(file, target, 0o644); err != nil {
			return err
		}
	}
	return nil
}
