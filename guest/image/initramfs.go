package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// Options say how Initramfs makes an image. The zero value is the default image in the default store.
type Options struct {
	Store    *Store
	Programs []Program // of the host, beside u-root's commands; nil means DefaultPrograms
}

// Progress tells what a build is doing. Building a new image takes most of a minute; looking an image up tells nothing.
type Progress struct {
	Step, Steps int    // Step of Steps is being done, from 1 on
	Text        string // a few words for people
	Done, Total int    // within the step; Total is 0 where that is not known
}

const (
	stepPrograms = 1 + iota
	stepBusybox
	stepArchive
	steps = iota
)

// formatVersion changes when the same inputs give another image.
const formatVersion = "initramfs/1"

// inputsSuffix ends the name of the file that tells which image is current.
const inputsSuffix = ".inputs"

// Initramfs returns the path of a cpio archive with the guest's programs: u-root's commands in one busybox, and
// programs of the host with their libraries. It holds no /init (see AgentSegment). The archive is made when it is
// missing, or when one of its inputs has changed; without changes the call takes a millisecond and needs neither Go nor
// the inputs. progress may be nil; it is called from one goroutine at a time.
func Initramfs(ctx context.Context, o Options, progress func(Progress)) (string, error) {
	if progress == nil {
		progress = func(Progress) {}
	}
	s := o.Store
	if s == nil {
		var err error
		if s, err = OpenStore(""); err != nil {
			return "", err
		}
	}
	programs := o.Programs
	if programs == nil {
		programs = DefaultPrograms()
	}
	recipe, err := recipeKey(programs)
	if err != nil {
		return "", err
	}
	note := filepath.Join(s.dir, kindInitramfs, recipe.String()[:40]+inputsSuffix)
	if path, ok := s.current(note); ok {
		return path, nil
	}

	progress(Progress{Step: stepPrograms, Steps: steps, Text: "Looking for programs and libraries"})
	t := newTree()
	if err := errors.Join(addConfig(t), addPrograms(t, programs), addCommands(t)); err != nil {
		return "", err
	}
	golang, err := findGo(ctx)
	if err != nil {
		return "", err
	}
	bbKey, err := busyboxKey(golang)
	if err != nil {
		return "", err
	}
	ins, digest, err := inputs(t)
	if err != nil {
		return "", err
	}
	key := KeyOf(formatVersion, bbKey.String(), digest.String())
	archive, err := s.Build(ctx, kindInitramfs, key, func(w io.Writer) error {
		bb, err := s.busybox(ctx, golang, bbKey, func(text string, done, total int) {
			progress(Progress{Step: stepBusybox, Steps: steps, Text: text, Done: done, Total: total})
		})
		if err != nil {
			return err
		}
		if err := t.addFile(busyboxFile, bb, 0o755); err != nil {
			return err
		}
		progress(Progress{Step: stepArchive, Steps: steps, Text: "Writing the guest image"})
		return t.writeArchive(w)
	})
	if err != nil {
		return "", err
	}
	if in, err := newInput(golang.path); err == nil {
		ins = append(ins, in)
	}
	// Only saves the next call from looking at what the image is made of, so a failure does not matter.
	_ = writeInputs(note, inputsNote{Image: key.String(), Inputs: ins})
	return archive, nil
}

const (
	kindInitramfs = "initramfs"
	kindBusybox   = "busybox"
	busyboxFile   = "usr/bin/bb"
)

// recipeKey names what is wanted, whatever the inputs hold.
func recipeKey(programs []Program) (Key, error) {
	files, err := urootModule()
	if err != nil {
		return Key{}, err
	}
	parts := []string{formatVersion}
	for _, name := range []string{"go.mod", "go.sum", "commands.go"} {
		parts = append(parts, string(files[name]))
	}
	b, err := json.Marshal(programs)
	return KeyOf(append(parts, string(b))...), err
}

// addCommands puts the names of u-root's commands into t, but for those that t has already. The busybox looks at the
// name that it was called by.
func addCommands(t tree) error {
	cmds, err := urootCommands()
	if err != nil {
		return err
	}
	for _, c := range cmds {
		name := path.Join("usr/bin", path.Base(c))
		if _, ok := t[name]; ok {
			continue
		}
		if err := t.addLink(name, path.Base(busyboxFile)); err != nil {
			return err
		}
	}
	return nil
}

// inputsNote is kept in a file for each recipe: the image that is current, and what to look at to see that it still is.
type inputsNote struct {
	Image  string
	Inputs []input
}

// input is a file of the host at the time when an image was made from it.
type input struct {
	Path  string
	Size  int64
	Mtime int64 // nanoseconds since 1970
}

func newInput(path string) (input, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return input{}, err
	}
	return input{Path: path, Size: fi.Size(), Mtime: fi.ModTime().UnixNano()}, nil
}

// inputs lists the host's files in t and computes a digest of all that t holds.
func inputs(t tree) (list []input, digest Key, err error) {
	var parts []string
	for _, name := range t.names() {
		n := t[name]
		content := string(n.data)
		for _, file := range []string{n.source, n.origin} {
			if file == "" {
				continue
			}
			in, err := newInput(file)
			if err != nil {
				return nil, Key{}, err
			}
			list = append(list, in)
		}
		if n.source != "" {
			if content, err = hashFile(n.source); err != nil {
				return nil, Key{}, err
			}
		}
		parts = append(parts, name, fmt.Sprintf("%o %d:%d", n.mode, n.major, n.minor), content)
	}
	return list, KeyOf(parts...), nil
}

// current returns the image that the note tells of, unless one of its inputs has changed since. Inputs that are gone do
// not count: without them no other image could be made.
func (s *Store) current(note string) (string, bool) {
	b, err := os.ReadFile(note)
	if err != nil {
		return "", false
	}
	var n inputsNote
	if err := json.Unmarshal(b, &n); err != nil {
		return "", false
	}
	key, err := parseKey(n.Image)
	if err != nil {
		return "", false
	}
	for _, in := range n.Inputs {
		now, err := newInput(in.Path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil || now != in {
			return "", false
		}
	}
	touch(note)
	return s.Lookup(kindInitramfs, key)
}

func writeInputs(note string, n inputsNote) error {
	slices.SortFunc(n.Inputs, func(a, b input) int { return strings.Compare(a.Path, b.Path) })
	n.Inputs = slices.Compact(n.Inputs)
	b, err := json.MarshalIndent(n, "", "\t")
	if err != nil {
		return err
	}
	return writeFile(note, b)
}
