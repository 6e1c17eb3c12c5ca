package disk

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"slices"
	"strings"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/raw"
)

// Format is how the bytes of a disk lie in its file.
type Format string

// The formats.
const (
	Raw   Format = "raw" // one to one
	QCOW2 Format = "qcow2"
)

var formats = []string{string(Raw), string(QCOW2)}

// Formats returns the names that ParseFormat takes.
func Formats() []string { return slices.Clone(formats) }

func (f Format) String() string { return string(f) }

// ParseFormat returns the format of that name: raw or qcow2.
func ParseFormat(name string) (Format, error) {
	_, err := index("format", formats, name)
	return Format(name), err
}

// Cache says what stands between a disk and its medium, by QEMU's names.
type Cache uint8

// The cache modes. What was written is on stable storage after a flush; with CacheWritethrough and CacheDirectSync every
// write ends with one.
const (
	CacheWriteback    Cache = iota // through the host's page cache
	CacheNone                      // past it (O_DIRECT)
	CacheWritethrough              // through it, every write stable when it is done
	CacheDirectSync                // past it, likewise
	CacheUnsafe                    // through it, and flushes are left out: lost if the host goes down
)

var caches = []string{
	CacheWriteback: "writeback", CacheNone: "none", CacheWritethrough: "writethrough", CacheDirectSync: "directsync",
	CacheUnsafe: "unsafe",
}

// Caches returns the names that ParseCache takes.
func Caches() []string { return slices.Clone(caches) }

func (c Cache) String() string { return name(caches, int(c)) }

// ParseCache returns the mode of that name: writeback, none, writethrough, directsync or unsafe.
func ParseCache(name string) (Cache, error) {
	i, err := index("cache", caches, name)
	return Cache(i), err
}

// raw returns the driver's part of the mode.
func (c Cache) raw() raw.Cache {
	if c == CacheNone || c == CacheDirectSync {
		return raw.CacheNone
	}
	return raw.CacheWriteback
}

func (c Cache) through() bool { return c == CacheWritethrough || c == CacheDirectSync }

// AIOs returns the names that raw.ParseAIO takes.
func AIOs() []string {
	return []string{raw.AIOAuto.String(), raw.AIOIOUring.String(), raw.AIOThreads.String()}
}

var detects = []string{blk.DetectOff: "off", blk.DetectOn: "on", blk.DetectUnmap: "unmap"}

// DetectNames returns the names that ParseDetectZeroes takes.
func DetectNames() []string { return slices.Clone(detects) }

// ParseDetectZeroes returns the setting of that name: off, on or unmap.
func ParseDetectZeroes(name string) (blk.DetectZeroes, error) {
	i, err := index("detect-zeroes", detects, name)
	return blk.DetectZeroes(i), err
}

// Preallocation says how much of a new disk has its place from the start, by QEMU's names.
type Preallocation uint8

// The kinds of preallocation.
const (
	PreallocateOff      Preallocation = iota
	PreallocateMetadata               // qcow2 only: every cluster has its place in the image, but takes no space yet
	PreallocateFalloc                 // space is reserved
	PreallocateFull                   // zeroes are written
)

var preallocations = []string{
	PreallocateOff: "off", PreallocateMetadata: "metadata", PreallocateFalloc: "falloc", PreallocateFull: "full",
}

// Preallocations returns the names that ParsePreallocation takes.
func Preallocations() []string { return slices.Clone(preallocations) }

func (p Preallocation) String() string { return name(preallocations, int(p)) }

// ParsePreallocation returns the kind of that name: off, metadata, falloc or full.
func ParsePreallocation(name string) (Preallocation, error) {
	i, err := index("preallocation", preallocations, name)
	return Preallocation(i), err
}

// Backing says which backing files may be opened. The zero value allows none: the name of a backing file is part of the
// image, and who made the image chose it.
type Backing struct {
	on    bool
	below string
}

// BackingOn allows whatever the images of a chain name, as for images of one's own.
var BackingOn = Backing{on: true}

// BackingBelow allows files that lie in the folder dir, at any depth, or the one file of that name. Symbolic links count
// as what they lead to.
func BackingBelow(dir string) Backing { return Backing{below: dir} }

// ParseBacking reads off, on, or the path of a folder or file as for BackingBelow. One that is called on or off is
// written ./on or ./off.
func ParseBacking(s string) (Backing, error) {
	switch s {
	case "off":
		return Backing{}, nil
	case "on":
		return BackingOn, nil
	case "":
		return Backing{}, fmt.Errorf("backing=: want off, on, or a folder or file to which backing files are limited")
	}
	return BackingBelow(s), nil
}

func (b Backing) String() string {
	switch {
	case b.on:
		return "on"
	case b.below != "":
		return b.below
	}
	return "off"
}

// ParseThrottle reads limits as name=value joined by commas or colons, such as bps-total=10M,iops-read=500, with the names
// of blk.Throttle.SetParam and numbers as for ParseNumber. Errors match blk.ErrThrottle where a limit makes no sense.
func ParseThrottle(s string) (blk.Throttle, error) {
	var t blk.Throttle
	for part := range strings.SplitSeq(strings.ReplaceAll(s, ":", ","), ",") {
		name, value, _ := strings.Cut(part, "=")
		n, err := ParseNumber(value)
		if n > math.MaxInt64 {
			err = errLarge
		}
		if err != nil {
			return t, fmt.Errorf("throttle %s: %q is %w", part, value, err)
		}
		if err := t.SetParam(name, int64(n)); err != nil {
			return t, &limitError{err}
		}
	}
	if _, err := blk.NewThrottleGroup(t); err != nil {
		return t, &limitError{err}
	}
	return t, nil
}

// limitError is package blk's error about limits without the package's name, which means nothing to users.
type limitError struct{ err error }

func (e *limitError) Error() string { return strings.TrimPrefix(e.err.Error(), "blk: ") }
func (e *limitError) Unwrap() error { return e.err }

// Why ParseNumber refuses something.
var (
	errNumber = errors.New("not a number, or one with K, M, G or T behind it")
	errWhole  = errors.New("not a whole number")
	errLarge  = errors.New("too large a number")
)

// ParseNumber reads a number that may have a unit of 1024 behind it, K, M, G or T, as in 512, 64K or 2GiB. It may have a
// fraction if it comes to a whole number all the same: 1.5G is 1610612736. The text of an error begins with "not" or "too",
// to stand behind what is said of s.
func ParseNumber(s string) (uint64, error) {
	s = strings.TrimSuffix(strings.ToUpper(s), "B")
	digits, unit := s, int64(1)
	for i, name := range []string{"K", "M", "G", "T"} {
		if d, ok := strings.CutSuffix(strings.TrimSuffix(s, "I"), name); ok {
			digits, unit = d, 1<<(10*(i+1))
		}
	}
	whole, fraction, dot := strings.Cut(digits, ".")
	if !allDigits(whole) || dot && !allDigits(fraction) {
		return 0, errNumber
	}
	n, _ := new(big.Rat).SetString(digits)
	n.Mul(n, new(big.Rat).SetInt64(unit))
	switch {
	case !n.IsInt():
		return 0, errWhole
	case !n.Num().IsUint64():
		return 0, errLarge
	}
	return n.Num().Uint64(), nil
}

func allDigits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

func name(names []string, i int) string {
	if i < len(names) {
		return names[i]
	}
	return fmt.Sprintf("unknown (%d)", i)
}

// index returns where name stands. The error lists what may be said.
func index(option string, names []string, name string) (int, error) {
	if i := slices.Index(names, name); i >= 0 {
		return i, nil
	}
	last := len(names) - 1
	return 0, fmt.Errorf("%s=%s: want %s or %s", option, name, strings.Join(names[:last], ", "), names[last])
}
