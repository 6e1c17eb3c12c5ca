package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/blk/qcow2"
)

// imageFlags are the settings of a new disk.
type imageFlags struct {
	options     []string
	cluster     size
	lazy        bool
	compat      string
	compression string
	refcount    int
	prealloc    disk.Preallocation
	backing     string
	backFormat  disk.Format
	force       bool
	flags       map[string]string // that -o means, by QEMU's names
}

// imageOptions are the settings that -o takes, by QEMU's names, and the flags that mean the same; beside them there are
// backing_file and backing_fmt.
var imageOptions = []struct{ name, flag string }{
	{"cluster_size", "cluster-size"}, {"lazy_refcounts", "lazy-refcounts"}, {"compat", "compat"},
	{"compression_type", "compression"}, {"refcount_bits", "refcount-bits"}, {"preallocation", "preallocation"},
}

// add adds the flags. Those of the backing file have the names backing and format, because other commands call it otherwise.
func (i *imageFlags) add(cmd *cobra.Command, backing, backingShort, format, formatShort string) {
	f := cmd.Flags()
	f.StringArrayVarP(&i.options, "option", "o", nil, "set `NAME=VALUE,...` by QEMU's names, such as cluster_size=2M")
	f.Var(&i.cluster, "cluster-size", "qcow2: `SIZE` of clusters, 512 to 2M, a power of two (default 64K)")
	f.BoolVar(&i.lazy, "lazy-refcounts", false, "qcow2: write faster, and repair after a crash")
	f.StringVar(&i.compat, "compat", "", "qcow2: `VERSION` of the format, 0.10 or 1.1 (default 1.1)")
	f.StringVar(&i.compression, "compression", "", "qcow2: `TYPE` of compressed clusters, zlib or zstd (default zlib)")
	f.IntVar(&i.refcount, "refcount-bits", 0, "qcow2: `WIDTH` of reference counts, 1 to 64, a power of two (default 16)")
	named(cmd, &i.prealloc, disk.ParsePreallocation, disk.Preallocations(), "preallocation", "",
		"`WHAT` has its place from the start: off, metadata (qcow2), falloc or full")
	f.StringVarP(&i.backing, backing, backingShort, "",
		"qcow2: show what is in `FILE` where nothing was written; a relative name is relative to the image")
	named(cmd, &i.backFormat, disk.ParseFormat, disk.Formats(), format, formatShort, "`FORMAT` of that file")
	f.BoolVar(&i.force, "force", false, "overwrite what is there")
	for flag, values := range map[string][]string{"compat": {"0.10", "1.1"}, "compression": {"zlib", "zstd"}} {
		_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	i.flags = map[string]string{"backing_file": backing, "backing_fmt": format}
	for _, o := range imageOptions {
		i.flags[o.name] = o.flag
	}
}

// spec returns what the flags say about a disk at path.
func (i *imageFlags) spec(cmd *cobra.Command, path string, format disk.Format, bytes int64) (disk.CreateSpec, error) {
	c := disk.CreateSpec{Path: path, Format: format, Size: bytes, Overwrite: i.force}
	if err := i.setOptions(cmd); err != nil {
		return c, err
	}
	switch i.compression {
	case "", "zlib":
	case "zstd":
		c.Compression = qcow2.Zstd
	default:
		return c, fmt.Errorf("--compression %s: want zlib or zstd", i.compression)
	}
	switch f := cmd.Flags(); {
	case i.cluster > math.MaxInt64 || i.cluster == 0 && f.Changed("cluster-size"):
		return c, fmt.Errorf("--cluster-size %v: want 512 to 2M, a power of two", &i.cluster)
	case i.refcount == 0 && f.Changed("refcount-bits"):
		return c, errors.New("--refcount-bits 0: want 1 to 64, a power of two")
	}
	c.ClusterSize, c.RefcountBits, c.Compat, c.LazyRefcounts = int64(i.cluster), i.refcount, qcow2.Compat(i.compat), i.lazy
	c.BackingFile, c.BackingFormat, c.Preallocation = i.backing, i.backFormat, i.prealloc
	return c, nil
}

// setOptions sets the flags that -o means.
func (i *imageFlags) setOptions(cmd *cobra.Command) error {
	for _, list := range i.options {
		options, err := properties(list)
		if err != nil {
			return fmt.Errorf("-o: %w", err)
		}
		for _, o := range options {
			flag, ok := i.flags[o.name]
			if !ok {
				have := strings.Join(slices.Sorted(maps.Keys(i.flags)), ", ")
				return fmt.Errorf("-o %s: unknown option (have %s)", o.name, have)
			}
			if flag == "lazy-refcounts" {
				if i.lazy, err = parseSwitch(o); err != nil {
					return fmt.Errorf("-o: %w", err)
				}
				continue
			}
			if err := cmd.Flags().Set(flag, o.value); err != nil {
				return fmt.Errorf("-o %s: %w", o.name, err)
			}
		}
	}
	return nil
}

func newDiskCreate(s streams) *cobra.Command {
	var i imageFlags
	var format disk.Format
	var quiet bool
	cmd := &cobra.Command{
		Use:   "create [flags] PATH [SIZE]",
		Short: "Make a disk",
		Long: `create makes a disk of SIZE bytes (K, M, G or T may stand behind the number, as in 1.5G), rounded up
to 512. With a backing file SIZE may be left out: the disk is then as large as that. A file that
exists is kept unless --force is given, and never touched while somebody uses it.`,
		Example: `  kvmlet disk create test.img 64M
  kvmlet disk create --format qcow2 test.qcow2 10G
  kvmlet disk create --format qcow2 --backing base.img --backing-format raw overlay.qcow2
  kvmlet disk create --format qcow2 -o cluster_size=2M,lazy_refcounts=on test.qcow2 10G`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 && args[0] != "" {
				return nil // said better where it is known whether there is a backing file
			}
			return operands("PATH", "SIZE")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			bytes := size(0)
			if len(args) > 1 {
				if err := bytes.Set(args[1]); err != nil {
					return err
				}
			}
			if bytes > math.MaxInt64 {
				return fmt.Errorf("%s: a disk has less than 8 EiB", args[1])
			}
			c, err := i.spec(cmd, args[0], format, int64(bytes))
			if err != nil {
				return err
			}
			switch {
			case len(args) < 2 && c.BackingFile == "":
				return errors.New("SIZE is missing (see kvmlet disk create --help)")
			case len(args) > 1 && bytes == 0 && c.BackingFile != "":
				return errors.New("SIZE is 0 (leave it out for the size of the backing file)")
			}
			var done func()
			c.Progress, done = workProgress(s, quiet, "Creating "+c.Path)
			defer done()
			return interruptible(cmd.Context(), c.Path+" was not made", func(ctx context.Context) error {
				return forceHint(disk.Create(ctx, c), c.Path)
			})
		},
	}
	addFormat(cmd, &format, "format", "f", "the disk")
	i.add(cmd, "backing", "b", "backing-format", "F")
	addQuiet(cmd, &quiet)
	return cmd
}

func newDiskResize(_ streams) *cobra.Command {
	var d diskFlags
	var shrink bool
	cmd := &cobra.Command{
		Use:   "resize [flags] DISK [+|-]SIZE",
		Short: "Change the size of a disk",
		Long: `resize makes a disk SIZE bytes large, or larger by +SIZE, or smaller by -SIZE (behind --, so that it
is not taken for a flag). What is new reads as zeroes. What is cut off is lost, so making a disk
smaller takes --shrink. Partitions and file systems in it are left as they are.`,
		Example: `  kvmlet disk resize test.img +1G
  kvmlet disk resize --format qcow2 --shrink -- test.qcow2 -512M`,
		Args: operands("DISK", "SIZE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			d.spec.Path = args[0]
			if err := sureOfFormat(cmd, "format", args[0]); err != nil {
				return err
			}
			return interruptible(cmd.Context(), "", func(ctx context.Context) error {
				return resizeDisk(ctx, d.spec, args[1], shrink)
			})
		},
	}
	addFormat(cmd, &d.spec.Format, "format", "f", "the disk")
	d.addBacking(cmd)
	cmd.Flags().BoolVar(&shrink, "shrink", false, "let the disk become smaller")
	return cmd
}

func resizeDisk(ctx context.Context, spec disk.Spec, to string, shrink bool) (err error) {
	var n size
	number := to
	if to[0] == '+' || to[0] == '-' {
		number = to[1:]
	}
	if number == "" {
		return fmt.Errorf("SIZE is %s, and no number: want a size, or by how much it changes, as in +1G", to)
	}
	if err := n.Set(number); err != nil {
		return err
	}
	d, err := disk.Open(ctx, spec)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	now := d.Size()
	bytes := int64(min(n, math.MaxInt64))
	switch {
	case strings.HasPrefix(to, "+") && bytes > math.MaxInt64-now:
		return fmt.Errorf("resize %s: %s: a disk has less than 8 EiB", spec.Path, to)
	case strings.HasPrefix(to, "+"):
		bytes += now
	case strings.HasPrefix(to, "-"):
		bytes = now - bytes
	}
	if bytes > math.MaxInt64-blk.SectorSize || bytes <= 0 {
		return fmt.Errorf("resize %s to %d bytes: no disk is as large as that", spec.Path, bytes)
	}
	bytes = (bytes + blk.SectorSize - 1) &^ (blk.SectorSize - 1)
	if bytes < now && !shrink {
		return fmt.Errorf("resize %s: %d bytes are less than its %d, and what is cut off is lost (add --shrink if it may be)",
			spec.Path, bytes, now)
	}
	err = d.Truncate(ctx, bytes)
	switch fixed := errors.Is(err, blk.ErrUnsupported) && spec.Format == disk.Raw; {
	case fixed && disk.IsURI(spec.Path):
		return fmt.Errorf("resize %s: an NBD export can't be resized by its clients", spec.Path)
	case fixed && isDevice(spec.Path):
		return fmt.Errorf("resize %s: a block device can't be resized (but perhaps by what made it, as lvresize)", spec.Path)
	case err != nil:
		return fmt.Errorf("disk %s: %w", spec.Path, err)
	}
	return d.FlushContext(ctx)
}

func newDiskSnapshot(s streams) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot",
		Short: "List, create, apply and delete the snapshots inside a qcow2 image",
		Long: `snapshot works on internal snapshots: earlier states of the disk that lie in the same qcow2 image. A
snapshot is named by its name, or else by its ID.`,
		Example: `  kvmlet disk snapshot create test.qcow2 before
  kvmlet disk snapshot list test.qcow2
  kvmlet disk snapshot apply test.qcow2 before`,
		Args: noCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	list := &cobra.Command{
		Use:     "list [flags] IMAGE",
		Short:   "List the snapshots, oldest first",
		Example: "  kvmlet disk snapshot list test.qcow2",
		Args:    operands("IMAGE"),
	}
	d := diskFlags{}
	addImageFormat(list, &d.spec.Format, onlyQCOW2, []string{string(disk.QCOW2)})
	d.addShare(list)
	asJSON := list.Flags().Bool("json", false, "print JSON")
	list.RunE = func(cmd *cobra.Command, args []string) error {
		spec := d.spec
		spec.Path = args[0]
		info, err := disk.Inspect(cmd.Context(), spec)
		if err != nil {
			return shareHint(err)
		}
		if *asJSON {
			return printJSON(s, append([]disk.Snapshot{}, info.Snapshots...))
		}
		return printSnapshots(s, info.Snapshots)
	}
	cmd.AddCommand(list)
	for _, c := range []struct {
		name, short string
		do          func(im *qcow2.Image, name string) error
	}{
		{"create", "Keep the disk as it is now under a name", func(im *qcow2.Image, name string) error {
			return im.CreateSnapshot(name, 0, 0)
		}},
		{"apply", "Make the disk what it was then; what it is now is lost", (*qcow2.Image).ApplySnapshot},
		{"delete", "Forget a snapshot", (*qcow2.Image).DeleteSnapshot},
	} {
		change := &cobra.Command{
			Use:     c.name + " [flags] IMAGE NAME",
			Short:   c.short,
			Example: fmt.Sprintf("  kvmlet disk snapshot %s test.qcow2 before", c.name),
			Args:    operands("IMAGE", "NAME"),
			RunE: func(cmd *cobra.Command, args []string) error {
				return interruptible(cmd.Context(), "", func(ctx context.Context) error {
					return withImage(ctx, args[0], func(im *qcow2.Image) error { return c.do(im, args[1]) })
				})
			},
		}
		addImageFormat(change, new(disk.Format), onlyQCOW2, []string{string(disk.QCOW2)})
		cmd.AddCommand(change)
	}
	return cmd
}

// withImage opens a qcow2 image for writing, without its backing file, and calls f.
func withImage(ctx context.Context, path string, f func(*qcow2.Image) error) (err error) {
	d, err := disk.Open(ctx, disk.Spec{Path: path, Format: disk.QCOW2, Alone: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := f(d.Backend().(*qcow2.Image)); err != nil {
		return fmt.Errorf("disk %s: %w", path, err)
	}
	return nil
}

func printSnapshots(s streams, list []disk.Snapshot) error {
	if len(list) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(s.answer, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tNAME\tDATE\tVM STATE\tVM CLOCK")
	for _, n := range list {
		clock := time.Duration(n.ClockSec)*time.Second + time.Duration(n.ClockNsec)
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%v\n", quoted(n.ID), quoted(n.Name),
			time.Unix(n.DateSec, 0).UTC().Format("2006-01-02 15:04:05"), sizeText(n.StateSize), clock)
	}
	return w.Flush()
}
