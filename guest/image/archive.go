package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"

	"golang.org/x/sys/unix"
)

const (
	cpioMagic   = "070701"     // newc, without checksums (Documentation/driver-api/early-userspace/buffer-format.rst)
	cpioTrailer = "TRAILER!!!" // the name of the last entry
	cpioMaxSize = 1<<32 - 1    // a file's size is eight hexadecimal digits

	// archiveAlign is the multiple to which archives are padded with zeros, which the kernel skips: two archives one
	// behind the other then both begin on a page.
	archiveAlign = 4096
)

// Archive is an uncompressed cpio archive that is put together while it is read: headers from memory, content from the
// files that it was made of, which it keeps open. It may be read from several goroutines.
type Archive struct {
	parts []part
	files []*os.File
	size  int64
}

// part is a run of an archive's bytes.
type part struct {
	off int64
	n   int64
	r   io.ReaderAt
}

// writeArchive writes t to w as an archive.
func (t tree) writeArchive(w io.Writer) error {
	a, err := newArchive(t)
	if err != nil {
		return err
	}
	defer a.Close()
	_, err = a.WriteTo(w)
	return err
}

// newArchive lays out t. The order of entries and every byte of the headers depend on t alone.
func newArchive(t tree) (a *Archive, err error) {
	a = &Archive{}
	defer func() {
		if err != nil {
			a.Close()
		}
	}()
	var head bytes.Buffer // what has not become a part yet
	pad := func(align int) {
		if rest := int(a.size+int64(head.Len())) % align; rest != 0 {
			head.Write(make([]byte, align-rest))
		}
	}
	flush := func() {
		if head.Len() > 0 {
			a.append(bytes.NewReader(bytes.Clone(head.Bytes())), int64(head.Len()))
			head.Reset()
		}
	}
	for i, name := range t.names() {
		n := t[name]
		var f *os.File
		size := int64(len(n.data))
		if n.source != "" {
			if f, size, err = OpenRegular(n.source); err != nil {
				return a, fmt.Errorf("put /%s into the guest: %w", name, err)
			}
			a.files = append(a.files, f)
		}
		if size > cpioMaxSize {
			return a, fmt.Errorf("put /%s into the guest: %d bytes are too many for a cpio archive", name, size)
		}
		writeHeader(&head, i+1, name, n, size)
		pad(4)
		if f != nil {
			flush()
			a.append(f, size)
		} else {
			head.Write(n.data)
		}
		pad(4)
	}
	writeHeader(&head, 0, cpioTrailer, node{}, 0)
	pad(archiveAlign)
	flush()
	return a, nil
}

// OpenRegular opens a regular file for reading and returns its size in bytes too. It refuses everything else, and never
// waits.
func OpenRegular(path string) (*os.File, int64, error) {
	// Without O_NONBLOCK the open of a pipe would wait for somebody to write to it.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s: not a regular file", path)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, fi.Size(), nil
}

// writeHeader writes an entry's header and name: the magic number and 13 fields of eight hexadecimal digits.
func writeHeader(w *bytes.Buffer, ino int, name string, n node, size int64) {
	nlink := 1
	if n.mode&modeType == modeDir {
		nlink = 2
	}
	w.WriteString(cpioMagic)
	for _, v := range [...]int64{
		int64(ino),
		int64(n.mode),
		0, 0, // uid, gid: root
		int64(nlink),
		0, // mtime
		size,
		0, 0, // major and minor number of the device that holds the file
		int64(n.major), int64(n.minor),
		int64(len(name)) + 1,
		0, // checksum, unused
	} {
		fmt.Fprintf(w, "%08x", v)
	}
	w.WriteString(name)
	w.WriteByte(0)
}

func (a *Archive) append(r io.ReaderAt, n int64) {
	a.parts = append(a.parts, part{off: a.size, n: n, r: r})
	a.size += n
}

// Size returns the archive's length in bytes, a multiple of 4096.
func (a *Archive) Size() int64 { return a.size }

// ReadAt reads as io.ReaderAt says. It fails if a file has become shorter than it was.
func (a *Archive) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read a guest archive: negative offset")
	}
	done := 0
	i := sort.Search(len(a.parts), func(i int) bool { return a.parts[i].off+a.parts[i].n > off })
	for ; i < len(a.parts) && done < len(p); i++ {
		from := off + int64(done) - a.parts[i].off
		want := p[done:]
		if left := a.parts[i].n - from; int64(len(want)) > left {
			want = want[:left]
		}
		n, err := a.parts[i].r.ReadAt(want, from)
		done += n
		if n == len(want) {
			continue
		}
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return done, fmt.Errorf("read a guest archive: a file in it changed: %w", err)
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

// WriteTo writes the whole archive to w.
func (a *Archive) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, io.NewSectionReader(a, 0, a.size))
}

// Close closes the files that the archive reads from.
func (a *Archive) Close() error {
	var errs []error
	for _, f := range a.files {
		errs = append(errs, f.Close())
	}
	a.files = nil
	return errors.Join(errs...)
}
