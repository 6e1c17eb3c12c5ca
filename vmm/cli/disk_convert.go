package cli

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/disk"
)

// maxRequests bounds the requests that a command keeps under way, each with a buffer of its own.
const maxRequests = 1024

// convertOptions are the flags of `disk convert`.
type convertOptions struct {
	source       diskFlags
	target       diskFlags // cache and engine
	image        imageFlags
	targetFormat disk.Format
	compress     bool
	noCreate     bool
	targetZero   bool
	requests     int
	sparse       size
	quiet        bool
}

func newDiskConvert(s streams) *cobra.Command {
	o := convertOptions{sparse: 4096}
	cmd := &cobra.Command{
		Use:   "convert [flags] SOURCE TARGET",
		Short: "Copy a disk into another format or place",
		Long: `convert makes TARGET a disk with the contents of SOURCE. What SOURCE knows to be zero is not read,
and zeroes among its data are not stored: a raw file gets holes, an image no clusters. TARGET is
made, unless it is a block device or an NBD export, or --no-create is given; a file that exists is
kept unless --force is given.

With --target-backing TARGET gets a backing file; if that is one of SOURCE's own, what lies in it is
not copied. When convert fails or is stopped, TARGET is left incomplete.`,
		Example: `  kvmlet disk convert --target-format qcow2 test.img test.qcow2
  kvmlet disk convert --format qcow2 --backing on overlay.qcow2 flat.img
  kvmlet disk convert --target-format qcow2 --compress --compression zstd test.img small.qcow2
  kvmlet disk convert --no-create test.img nbd://192.0.2.1/disk`,
		Args: operands("SOURCE", "TARGET"),
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, s, args[0], args[1]) },
	}
	f := cmd.Flags()
	addFormat(cmd, &o.source.spec.Format, "format", "f", "SOURCE")
	o.source.addBacking(cmd)
	o.source.addShare(cmd)
	addFormat(cmd, &o.targetFormat, "target-format", "O", "TARGET")
	o.image.add(cmd, "target-backing", "B", "target-backing-format", "F")
	o.target.addIO(cmd)
	f.BoolVarP(&o.compress, "compress", "c", false, "compress the data (TARGET in format qcow2)")
	f.BoolVarP(&o.noCreate, "no-create", "n", false, "write into a TARGET that is there and as large as SOURCE at least")
	f.BoolVar(&o.targetZero, "target-is-zero", false, "with --no-create: TARGET reads as zeroes, so write none")
	f.IntVarP(&o.requests, "coroutines", "m", 8, fmt.Sprintf("`NUMBER` of requests at a time, 1 to %d", maxRequests))
	f.VarP(&o.sparse, "sparse", "S", "look for zeroes by this `SIZE`, a multiple of 512; 0 stores every byte")
	addQuiet(cmd, &o.quiet)
	return cmd
}

// check refuses what contradicts itself, before anything is opened.
func (o *convertOptions) check(cmd *cobra.Command, target string) error {
	if disk.IsURI(target) {
		o.noCreate = true
	}
	switch {
	case o.requests < 1 || o.requests > maxRequests:
		return fmt.Errorf("--coroutines %d: want 1 to %d", o.requests, maxRequests)
	case o.sparse%blk.SectorSize != 0 || o.sparse > math.MaxInt32:
		return fmt.Errorf("--sparse %v: want 0 or a multiple of 512 below 2G", &o.sparse)
	case o.targetZero && !o.noCreate:
		return errors.New("--target-is-zero says something about a TARGET that is there: it needs --no-create")
	case o.compress && o.targetFormat != disk.QCOW2:
		return errors.New("--compress: only qcow2 has compressed clusters (add --target-format qcow2)")
	case o.noCreate && changed(cmd.Flags(), "option", "cluster-size", "lazy-refcounts", "compat", "compression", "refcount-bits",
		"preallocation", "target-backing", "target-backing-format", "force"):
		return errors.New("with --no-create, or an NBD export, TARGET stays what it is: its settings can't be chosen")
	}
	return nil
}

func (o *convertOptions) run(cmd *cobra.Command, s streams, source, target string) error {
	if err := o.check(cmd, target); err != nil {
		return err
	}
	create, err := o.image.spec(cmd, target, o.targetFormat, 0)
	if err != nil {
		return err
	}
	hintFormat(cmd, s, "format", source)
	if o.noCreate {
		if err := sureOfFormat(cmd, "target-format", target); err != nil {
			return err
		}
	}
	touched := false
	err = interruptible(cmd.Context(), "", func(ctx context.Context) error {
		return o.convert(ctx, s, source, create, &touched)
	})
	if err != nil && touched {
		status := statusError
		var ee *exitError
		if errors.As(err, &ee) {
			status = ee.status
		}
		err = &exitError{status, fmt.Errorf("%w (%s is incomplete)", err, target)}
	}
	return err
}

// convert sets touched before the first change to the target.
func (o *convertOptions) convert(ctx context.Context, s streams, source string, create disk.CreateSpec, touched *bool) (err error) {
	o.source.spec.Path, o.source.spec.ReadOnly = source, true
	src, layers, err := disk.OpenChain(ctx, o.source.spec)
	if err != nil {
		return shareHint(err)
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	for _, l := range layers {
		if sameFile(l.Path, create.Path) {
			return fmt.Errorf("%s is SOURCE, or a backing file of it, and would be overwritten", create.Path)
		}
	}
	target := o.targetSpec(create)
	report, done := workProgress(s, o.quiet, "Converting "+filepath.Base(source))
	defer done()
	c := disk.CopyOptions{
		Compress: o.compress, Workers: o.requests, Sparse: int(o.sparse), Progress: report, TargetZero: o.targetZero,
	}
	if o.sparse == 0 {
		c.Sparse = -1
	}
	if !o.noCreate && (create.Format != disk.Raw || !isDevice(create.Path)) {
		create.Size, create.Progress, create.Use = src.Size(), report, &target
		if err := disk.Create(ctx, create); err != nil {
			return forceHint(err, create.Path)
		}
		*touched = true
		c.TargetZero = create.BackingFile == ""
	}
	dst, err := disk.Open(ctx, target)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	if dst.Size() < src.Size() {
		return fmt.Errorf("%s has %d bytes and SOURCE %d (enlarge it with: kvmlet disk resize)",
			create.Path, dst.Size(), src.Size())
	}
	for _, l := range layers[1:] {
		if create.BackingFile != "" && sameFile(l.Path, besides(create.Path, create.BackingFile)) {
			c.Base = l.Device
		}
	}
	*touched = true
	return disk.Copy(ctx, dst, src, c)
}

// targetSpec is how the target is opened when it is there. A backing file that the command line names may be opened.
func (o *convertOptions) targetSpec(c disk.CreateSpec) disk.Spec {
	t := o.target.spec
	t.Path, t.Format = c.Path, c.Format
	t.Backing, t.BackingFormat = o.source.spec.Backing, o.source.spec.BackingFormat
	if t.Backing == (disk.Backing{}) && c.BackingFile != "" {
		t.Backing = disk.BackingBelow(besides(c.Path, c.BackingFile))
	}
	return t
}

// besides is the path of a file that an image names.
func besides(image, name string) string {
	if filepath.IsAbs(name) || disk.IsURI(name) {
		return name
	}
	return filepath.Dir(image) + "/" + name
}

func sameFile(a, b string) bool {
	if disk.IsURI(a) || disk.IsURI(b) {
		return a == b
	}
	fa, err := os.Stat(a)
	if err != nil {
		return false
	}
	fb, err := os.Stat(b)
	return err == nil && os.SameFile(fa, fb)
}

// isDevice reports whether path is a block device, which is as it is.
func isDevice(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().Type() == os.ModeDevice
}

func newDiskCommit(s streams) *cobra.Command {
	var d diskFlags
	var quiet bool
	var requests int
	cmd := &cobra.Command{
		Use:   "commit [flags] IMAGE",
		Short: "Write what a qcow2 image holds into its backing file",
		Long: `commit makes the backing file of an image read as the image does. --backing must allow that file,
which the image names: it is written. The image stays as it is, and can be removed then. Other
images over the same backing file would change what they show; while one of them is in use, commit
refuses.

A commit that is stopped is in part done. The image reads as before all along, and commit can be
run again.`,
		Example: `  kvmlet disk commit --backing on overlay.qcow2
  kvmlet disk commit --backing /var/lib/images overlay.qcow2`,
		Args: operands("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if requests < 1 || requests > maxRequests {
				return fmt.Errorf("--coroutines %d: want 1 to %d", requests, maxRequests)
			}
			d.spec.Path = args[0]
			if !cmd.Flags().Changed("backing-format") {
				if err := sureOfBacking(cmd.Context(), d.spec); err != nil {
					return err
				}
			}
			report, done := workProgress(s, quiet, "Committing "+filepath.Base(args[0]))
			defer done()
			return interruptible(cmd.Context(), args[0]+" is committed in part; run it again", func(ctx context.Context) error {
				_, err := disk.Commit(ctx, d.spec, disk.CommitOptions{Workers: requests, Progress: report})
				return err
			})
		},
	}
	addImageFormat(cmd, &d.spec.Format, onlyQCOW2, []string{string(disk.QCOW2)})
	d.addBacking(cmd)
	d.addIO(cmd)
	cmd.Flags().IntVarP(&requests, "coroutines", "m", 8, fmt.Sprintf("`NUMBER` of requests at a time, 1 to %d", maxRequests))
	addQuiet(cmd, &quiet)
	return cmd
}

// sureOfBacking refuses to write to a backing file that is raw only as the image has it, and looks otherwise. What is wrong
// with the image itself is for commit to tell.
func sureOfBacking(ctx context.Context, spec disk.Spec) error {
	spec.ReadOnly, spec.ForceShare = true, true
	chain, _ := disk.InspectChain(ctx, spec)
	if len(chain) > 1 && chain[1].Format == disk.Raw && beginsAsImage(chain[1].Filename) {
		const text = "%s would be written, as a raw file, which %s calls it, and begins as a qcow2 image does: " +
			"say --backing-format raw if it is none"
		return fmt.Errorf(text, chain[1].Filename, spec.Path)
	}
	return nil
}

// Exit statuses of `disk compare`, those of qemu-img compare.
const (
	compareDiffer = 1
	compareFailed = 2
)

func newDiskCompare(s streams) *cobra.Command {
	var d diskFlags
	var second disk.Format
	var strict, quiet bool
	var requests int
	cmd := &cobra.Command{
		Use:   "compare [flags] DISK1 DISK2",
		Short: "Tell whether two disks have the same contents",
		Long: `compare reads two disks, which may have different formats, and tells the first byte at which they
differ. A shorter disk goes on with zeroes. With --strict sizes count too, and what is stored on one
and only known to be zero on the other is a difference.

Exit status: 0 if they are the same, 1 if they differ, 2 if that could not be found out, 123 if a
signal stopped it, 125 for a wrong command line, or an answer that could not be written.`,
		Example: `  kvmlet disk compare --format qcow2 test.qcow2 test.img
  kvmlet disk compare --format qcow2 --second-format qcow2 --backing on overlay.qcow2 flat.qcow2`,
		Args: operands("DISK1", "DISK2"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if requests < 1 || requests > maxRequests {
				return fmt.Errorf("--coroutines %d: want 1 to %d", requests, maxRequests)
			}
			hintFormat(cmd, s, "format", args[0])
			hintFormat(cmd, s, "second-format", args[1])
			a, b := d.spec, d.spec
			a.Path, a.ReadOnly = args[0], true
			b.Path, b.ReadOnly, b.Format = args[1], true, second
			report, done := workProgress(s, quiet, "Comparing "+filepath.Base(a.Path))
			o := disk.CompareOptions{Strict: strict, Workers: requests, Progress: report}
			var found comparison
			err := interruptible(cmd.Context(), "", func(ctx context.Context) error { return found.find(ctx, a, b, o) })
			done()
			var stopped *exitError
			switch {
			case errors.As(err, &stopped):
				return err
			case err != nil:
				return &exitError{compareFailed, shareHint(err)}
			}
			return found.tell(s)
		},
	}
	addFormat(cmd, &d.spec.Format, "format", "f", "DISK1")
	addFormat(cmd, &second, "second-format", "F", "DISK2")
	d.addBacking(cmd)
	d.addShare(cmd)
	f := cmd.Flags()
	f.BoolVarP(&strict, "strict", "s", false, "sizes and allocation count too")
	f.IntVarP(&requests, "coroutines", "m", 8, fmt.Sprintf("`NUMBER` of requests at a time, 1 to %d", maxRequests))
	addQuiet(cmd, &quiet)
	return cmd
}

// comparison is the result of `disk compare`.
type comparison struct {
	what  disk.Difference
	at    int64
	sizes [2]int64
}

func (c *comparison) find(ctx context.Context, a, b disk.Spec, o disk.CompareOptions) (err error) {
	da, err := disk.Open(ctx, a)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, da.Close()) }()
	db, err := disk.Open(ctx, b)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	c.sizes = [2]int64{da.Size(), db.Size()}
	c.what, c.at, err = disk.Compare(ctx, da, db, o)
	return err
}

func (c *comparison) tell(s streams) error {
	switch c.what {
	case disk.Contents:
		fprintf(s.answer, "the disks differ at byte %d\n", c.at)
	case disk.Sizes:
		fprintf(s.answer, "the disks have %d and %d bytes\n", c.sizes[0], c.sizes[1])
	case disk.Allocation:
		fprintf(s.answer, "the disks differ in what is stored at byte %d\n", c.at)
	case disk.Same:
		fprintf(s.answer, "the disks are the same\n")
		if c.sizes[0] != c.sizes[1] {
			fprintf(s.err, "kvmlet: they have %d and %d bytes; what is beyond is zero\n", c.sizes[0], c.sizes[1])
		}
		return nil
	}
	return &exitError{status: compareDiffer}
}
