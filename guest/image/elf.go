package image

import (
	"bufio"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// libDir is where libraries go in a guest. The loader of a Debian system searches it without a configuration file.
const libDir = "usr/lib/x86_64-linux-gnu"

// builtinDirs are the folders that Debian's loader searches last (ld.so(8)).
var builtinDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib", "/usr/lib"}

// program is an executable of the host with the shared libraries that it needs.
type program struct {
	path  string // after following links
	image []byte // the executable's bytes if they are not the file's own
	libs  []library
}

// library is a shared library, or the loader, of the host.
type library struct {
	name string // as DT_NEEDED calls it; the loader by its path
	path string // after following links
	dest string // in the guest
}

// linker finds shared libraries as the host's loader does: in the folders that the program names (DT_RUNPATH, DT_RPATH),
// that /etc/ld.so.conf names, and in the built-in ones.
type linker struct {
	dirs []string
	read map[string]*object
}

func newLinker() *linker {
	dirs := confDirs("/etc/ld.so.conf", 0)
	return &linker{dirs: append(dirs, builtinDirs...), read: map[string]*object{}}
}

// confDirs reads the folders that a configuration file of ldconfig(8) names.
func confDirs(file string, depth int) []string {
	f, err := os.Open(file)
	if err != nil || depth > 4 {
		return nil
	}
	defer f.Close()
	var dirs []string
	for sc := bufio.NewScanner(f); sc.Scan(); {
		line, _, _ := strings.Cut(sc.Text(), "#")
		fields := strings.Fields(line)
		switch {
		case len(fields) == 2 && fields[0] == "include":
			if !filepath.IsAbs(fields[1]) {
				fields[1] = filepath.Join(filepath.Dir(file), fields[1])
			}
			names, _ := filepath.Glob(fields[1]) // a malformed pattern names no file
			for _, name := range names {
				dirs = append(dirs, confDirs(name, depth+1)...)
			}
		case len(fields) == 1 && filepath.IsAbs(fields[0]):
			dirs = append(dirs, filepath.Clean(fields[0]))
		}
	}
	return dirs
}

// object is what an ELF file says to the loader.
type object struct {
	interp string
	needed []string
	dirs   []string        // DT_RUNPATH or DT_RPATH, with $ORIGIN replaced
	exe    bool            // may be run
	dynsym map[string]bool // exported names, read on demand
}

// errELF says that a file is no ELF file that this machine's loader takes.
var errELF = errors.New("not an x86-64 ELF file")

func (l *linker) object(path string) (*object, error) {
	if o, ok := l.read[path]; ok {
		return o, nil
	}
	f, err := elf.Open(path)
	if err != nil {
		if _, statErr := os.Stat(path); statErr != nil {
			return nil, statErr
		}
		return nil, fmt.Errorf("%s: %w: %w", path, errELF, err)
	}
	defer f.Close()
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return nil, fmt.Errorf("%s: %w: it is for %v", path, errELF, f.Machine)
	}
	o := &object{exe: f.Type == elf.ET_EXEC || f.Type == elf.ET_DYN}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		b := make([]byte, min(p.Filesz, 4096))
		if _, err := p.ReadAt(b, 0); err != nil {
			return nil, fmt.Errorf("%s: read the loader's name: %w", path, err)
		}
		o.interp = strings.TrimRight(string(b), "\x00")
	}
	if f.SectionByType(elf.SHT_DYNAMIC) != nil {
		if o.needed, err = f.ImportedLibraries(); err != nil {
			return nil, fmt.Errorf("%s: read the names of its libraries: %w", path, err)
		}
	}
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		list, err := f.DynString(tag)
		if err != nil {
			continue // no dynamic section
		}
		for _, s := range list {
			for _, d := range filepath.SplitList(s) {
				d = strings.NewReplacer("${ORIGIN}", filepath.Dir(path), "$ORIGIN", filepath.Dir(path)).Replace(d)
				if filepath.IsAbs(d) {
					o.dirs = append(o.dirs, filepath.Clean(d))
				}
			}
		}
	}
	l.read[path] = o
	return o, nil
}

// exports returns the names that the library at path defines.
func (l *linker) exports(path string) (map[string]bool, error) {
	o, err := l.object(path)
	if err != nil || o.dynsym != nil {
		return o.dynsym, err
	}
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	syms, err := f.DynamicSymbols()
	if err != nil && !errors.Is(err, elf.ErrNoSymbols) {
		return nil, fmt.Errorf("%s: read its symbols: %w", path, err)
	}
	o.dynsym = map[string]bool{}
	for _, s := range syms {
		if s.Section != elf.SHN_UNDEF {
			o.dynsym[s.Name] = true
		}
	}
	return o.dynsym, nil
}

// load returns the program at path with its libraries, theirs, and so on. The libraries named in without are left out,
// and the program is changed to run without them (see thin).
func (l *linker) load(path string, without []string) (*program, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	p := &program{path: path}
	root, err := l.object(path)
	if err != nil {
		return nil, err
	}
	if root.interp != "" {
		file, err := filepath.EvalSymlinks(root.interp)
		if err != nil {
			return nil, fmt.Errorf("%s: find its loader: %w", path, err)
		}
		p.libs = append(p.libs, library{name: root.interp, path: file, dest: root.interp})
	}
	type want struct{ name, by string }
	var queue []want
	seen := map[string]bool{filepath.Base(root.interp): true}
	push := func(by string, names []string) {
		for _, n := range names {
			if !seen[n] && (by != path || !slices.Contains(without, n)) {
				seen[n] = true
				queue = append(queue, want{n, by})
			}
		}
	}
	push(path, root.needed)
	for len(queue) > 0 {
		w := queue[0]
		queue = queue[1:]
		lib, err := l.find(w.name, w.by)
		if err != nil {
			return nil, err
		}
		p.libs = append(p.libs, lib)
		o, err := l.object(lib.path)
		if err != nil {
			return nil, err
		}
		push(lib.path, o.needed)
	}
	if slices.ContainsFunc(root.needed, func(n string) bool { return slices.Contains(without, n) }) {
		if p.image, err = l.thin(p, without); err != nil {
			return nil, fmt.Errorf("%s: leave libraries out: %w", path, err)
		}
	}
	return p, nil
}

// find looks for the library called name that the object at by needs.
func (l *linker) find(name, by string) (library, error) {
	o, err := l.object(by)
	if err != nil {
		return library{}, err
	}
	if strings.Contains(name, "/") {
		file, err := filepath.EvalSymlinks(name)
		return library{name: name, path: file, dest: name}, err
	}
	for i, dir := range slices.Concat(o.dirs, l.dirs) {
		file, err := filepath.EvalSymlinks(filepath.Join(dir, name))
		if err != nil {
			continue
		}
		if _, err := l.object(file); errors.Is(err, errELF) {
			continue // a library for another machine, or a linker script
		} else if err != nil {
			return library{}, err
		}
		dest := filepath.Join(libDir, name)
		if i < len(o.dirs) { // the guest's loader looks where the program tells it
			dest = filepath.Join(dir, name)
		}
		return library{name: name, path: file, dest: dest}, nil
	}
	return library{}, fmt.Errorf("%s needs %s, which is not on this machine (reinstall the Debian package of the program)",
		by, name)
}
