package image

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Unix mode bits of a cpio header; they are those of stat(2).
const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
	modeChar = 0o020000
	modeType = 0o170000
)

// node is one file of a guest's root: what it is, and where its content comes from.
type node struct {
	mode         uint32 // type and permissions
	source       string // a regular file: the host's file that holds the content, or empty
	data         []byte // the content, if source is empty; a symbolic link's target
	origin       string // the host's file that data was made from, or empty
	major, minor uint32 // a device's number
}

// tree is the file system of an archive, by path without a leading slash. Files belong to root.
type tree map[string]node

// aliases are the folders that a merged /usr replaces by links, longest first.
var aliases = []struct{ from, to string }{
	{"usr/sbin", "usr/bin"},
	{"bin", "usr/bin"},
	{"sbin", "usr/bin"},
	{"lib", "usr/lib"},
	{"lib64", "usr/lib64"},
}

// newTree returns what every guest needs before its init runs: the folders to mount on, the layout's links, and the
// devices that the kernel opens for init (Documentation/filesystems/ramfs-rootfs-initramfs.rst).
func newTree() tree {
	t := tree{}
	for _, d := range []string{"dev", "etc", "mnt", "proc", "root", "run", "sys", "usr/bin", "usr/lib", "usr/lib64", "var/tmp"} {
		t.mustAdd(d, node{mode: modeDir | 0o755})
	}
	t.mustAdd("tmp", node{mode: modeDir | fsSticky | 0o777})
	for name, target := range map[string]string{
		"bin": "usr/bin", "sbin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "usr/sbin": "bin", "var/run": "../run",
	} {
		t[name] = node{mode: modeLink | 0o777, data: []byte(target)}
	}
	t.mustAdd("dev/console", node{mode: modeChar | 0o600, major: 5, minor: 1})
	t.mustAdd("dev/null", node{mode: modeChar | 0o666, major: 1, minor: 3})
	return t
}

const fsSticky = 0o1000

// canonical returns where name really lies: no leading slash, and no folder in it that is a link.
func canonical(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for _, a := range aliases {
		if rest, ok := strings.CutPrefix(name, a.from+"/"); ok {
			return canonical(a.to + "/" + rest)
		}
	}
	return name
}

// add puts n at name and makes the folders above it. What is there already must be the same.
func (t tree) add(name string, n node) error {
	name = canonical(name)
	if !fs.ValidPath(name) || name == "." {
		return fmt.Errorf("%q is no file name for a guest", name)
	}
	if old, ok := t[name]; ok {
		if old.mode == n.mode && old.source == n.source && string(old.data) == string(n.data) {
			return nil
		}
		return fmt.Errorf("/%s would be in the guest twice (%s)", name, strings.Trim(old.source+", "+n.source, ", "))
	}
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if old, ok := t[dir]; !ok {
			t[dir] = node{mode: modeDir | 0o755}
		} else if old.mode&modeType != modeDir {
			return fmt.Errorf("/%s cannot be in the guest: /%s is no folder", name, dir)
		}
	}
	t[name] = n
	return nil
}

func (t tree) mustAdd(name string, n node) {
	if err := t.add(name, n); err != nil {
		panic(err) // names in this package's own source
	}
}

// addFile adds the host's regular file source.
func (t tree) addFile(name, source string, perm uint32) error {
	return t.add(name, node{mode: modeFile | perm, source: source})
}

// addData adds a regular file that holds data.
func (t tree) addData(name string, data []byte, perm uint32) error {
	return t.add(name, node{mode: modeFile | perm, data: data})
}

// addLink adds a symbolic link to target.
func (t tree) addLink(name, target string) error {
	return t.add(name, node{mode: modeLink | 0o777, data: []byte(target)})
}

// addProgram adds a dynamically or statically linked program and, once, the libraries that it needs.
func (t tree) addProgram(name string, p *program) error {
	n := node{mode: modeFile | 0o755, source: p.path}
	if p.image != nil {
		n = node{mode: n.mode, data: p.image, origin: p.path}
	}
	err := t.add(name, n)
	for _, l := range p.libs {
		err = errors.Join(err, t.addFile(l.dest, l.path, 0o755))
	}
	return err
}

// names returns the paths in the order in which they stand in an archive: folders before what is in them.
func (t tree) names() []string {
	names := make([]string, 0, len(t))
	for name := range t {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
