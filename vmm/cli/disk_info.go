package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/blk/qcow2"
)

func printJSON(s streams, v any) error {
	enc := json.NewEncoder(s.answer)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func newDiskInfo(s streams) *cobra.Command {
	var d diskFlags
	var asJSON, chain bool
	cmd := &cobra.Command{
		Use:   "info [flags] DISK",
		Short: "Describe a disk",
		Long: `info prints size, format and settings of a disk; --json prints what qemu-img info --output=json
would. With --backing-chain it goes on with the backing file and those below, which --backing must
allow.`,
		Example: `  kvmlet disk info test.img
  kvmlet disk info --format qcow2 --backing-chain --backing on overlay.qcow2
  kvmlet disk info --format qcow2 --json test.qcow2 | jq '."virtual-size"'`,
		Args: operands("DISK"),
		RunE: func(cmd *cobra.Command, args []string) error {
			spec := d.spec
			spec.Path, spec.ReadOnly = args[0], true
			layers := []disk.Info{{}}
			var err error
			if chain {
				layers, err = disk.InspectChain(cmd.Context(), spec)
			} else {
				layers[0], err = disk.Inspect(cmd.Context(), spec)
			}
			if err != nil {
				return shareHint(err)
			}
			switch {
			case asJSON && chain:
				return printJSON(s, layers)
			case asJSON:
				return printJSON(s, layers[0])
			}
			for i := range layers {
				if i > 0 {
					fprintf(s.answer, "\n")
				}
				if err := printInfo(s, &layers[i]); err != nil {
					return err
				}
			}
			hintFormat(cmd, s, "format", spec.Path)
			return nil
		},
	}
	addFormat(cmd, &d.spec.Format, "format", "f", "the disk")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&chain, "backing-chain", false, "describe the backing files too")
	d.addBacking(cmd)
	d.addShare(cmd)
	return cmd
}

func printInfo(s streams, i *disk.Info) error {
	w := tabwriter.NewWriter(s.answer, 0, 0, 2, ' ', 0)
	line := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	line("disk", "%s", quoted(i.Filename))
	line("format", "%s", i.Format)
	line("size", "%s", sizeText(i.VirtualSize))
	if i.ActualSize != nil {
		line("space taken", "%s", sizeText(*i.ActualSize))
	}
	if i.ClusterSize != 0 {
		line("cluster size", "%s", sizeText(i.ClusterSize))
	}
	if i.Dirty {
		line("dirty", "yes: it was not closed, and is repaired when it is opened for writing")
	}
	if i.Backing != "" {
		format := i.BackingFormat
		if format == "" {
			format = "not said"
		}
		line("backing file", "%s (format %s)", quoted(i.Backing), quoted(format))
		if i.FullBacking != i.Backing {
			line("", "which is %s", quoted(i.FullBacking))
		}
	}
	if f := i.Specific; f != nil {
		line("compat", "%s", f.Data.Compat)
		line("compression", "%s", f.Data.Compression)
		line("refcount bits", "%d", f.Data.RefcountBits)
		for _, is := range []struct {
			name string
			yes  *bool
		}{{"lazy refcounts", f.Data.LazyRefcounts}, {"corrupt", f.Data.Corrupt}} {
			if is.yes != nil {
				line(is.name, "%s", yesNo(*is.yes))
			}
		}
	}
	if err := w.Flush(); err != nil || len(i.Snapshots) == 0 {
		return err
	}
	fprintf(s.answer, "snapshots:\n")
	return printSnapshots(s, i.Snapshots)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// Exit statuses of `disk check`, those of qemu-img check.
const (
	checkFailed      = 1
	checkCorrupt     = 2
	checkLeaks       = 3
	checkUnsupported = 63
)

// checkReport is the result of a check in the shape of `qemu-img check --output=json`.
type checkReport struct {
	Filename         string      `json:"filename"`
	Format           disk.Format `json:"format"`
	CheckErrors      int64       `json:"check-errors"`
	EndOffset        int64       `json:"image-end-offset,omitempty"`
	Corruptions      int64       `json:"corruptions,omitempty"`
	Leaks            int64       `json:"leaks,omitempty"`
	CorruptionsFixed int64       `json:"corruptions-fixed,omitempty"`
	LeaksFixed       int64       `json:"leaks-fixed,omitempty"`
	Total            int64       `json:"total-clusters,omitempty"`
	Allocated        int64       `json:"allocated-clusters,omitempty"`
	Fragmented       int64       `json:"fragmented-clusters,omitempty"`
	Compressed       int64       `json:"compressed-clusters,omitempty"`
}

// repairs are the values of --repair.
var repairs = map[string]qcow2.Repair{"": qcow2.RepairNone, "leaks": qcow2.RepairLeaks, "all": qcow2.RepairAll}

func newDiskCheck(s streams) *cobra.Command {
	var d diskFlags
	var asJSON, quiet bool
	var repair string
	cmd := &cobra.Command{
		Use:   "check [flags] IMAGE",
		Short: "Check a qcow2 image, and repair it",
		Long: `check compares what a qcow2 image refers to with its reference counts. Nothing is changed unless
--repair says so: leaks gives lost clusters back, all corrects whatever can be. A check reads all of
the image's tables, and none of its data.

Exit status, as qemu-img check's: 0 if nothing is wrong, or nothing any more; 1 if the check could
not be made; 2 if the image is corrupt; 3 if it has lost clusters, which cost nothing but space;
63 if the format has nothing to check; 123 if a signal stopped it; 125 for a wrong command line, or
a report that could not be written.`,
		Example: `  kvmlet disk check test.qcow2
  kvmlet disk check --repair=all test.qcow2`,
		Args: func(cmd *cobra.Command, args []string) error {
			// First: a mode that was left out takes the image's place, and it is the mode that is missing then.
			if _, ok := repairs[repair]; !ok || repair == "" && cmd.Flags().Changed("repair") {
				return fmt.Errorf("--repair %s: want leaks or all", repair)
			}
			return operands("IMAGE")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			mode := repairs[repair]
			if d.spec.ForceShare && mode != qcow2.RepairNone {
				return errors.New("--force-share with --repair: an image that somebody uses can't be repaired")
			}
			d.spec.Path = args[0]
			return checkDisk(cmd.Context(), s, d.spec, mode, asJSON, quiet)
		},
	}
	addImageFormat(cmd, &d.spec.Format, disk.ParseFormat, disk.Formats())
	f := cmd.Flags()
	f.StringVarP(&repair, "repair", "r", "", "repair `WHAT` is wrong: leaks or all")
	_ = cmd.RegisterFlagCompletionFunc("repair",
		cobra.FixedCompletions([]string{"leaks", "all"}, cobra.ShellCompDirectiveNoFileComp))
	f.BoolVar(&asJSON, "json", false, "print JSON")
	d.addShare(cmd)
	addQuiet(cmd, &quiet)
	return cmd
}

func checkDisk(ctx context.Context, s streams, spec disk.Spec, mode qcow2.Repair, asJSON, quiet bool) error {
	var r qcow2.Report
	bar := newProgress(s.err)
	if !quiet {
		bar.busy("Checking " + spec.Path)
	}
	err := interruptible(ctx, "", func(ctx context.Context) (err error) {
		r, err = disk.Check(ctx, spec, mode)
		return err
	})
	bar.close()
	var stopped *exitError
	switch {
	case errors.As(err, &stopped):
		return err
	case errors.Is(err, blk.ErrUnsupported):
		return &exitError{checkUnsupported,
			fmt.Errorf("check %s: a raw disk has nothing to check (if it is a qcow2 image, say --format qcow2)", spec.Path)}
	case err != nil && mode == qcow2.RepairNone:
		return &exitError{checkFailed, shareHint(err)}
	case err != nil:
		return &exitError{checkFailed, err}
	}
	if asJSON {
		_ = printJSON(s, checkReport{ // as printReport does, it leaves what fails to s.answer
			Filename: spec.Path, Format: spec.Format, CheckErrors: r.Errors, EndOffset: r.End,
			Corruptions: r.Corruptions - r.FixedCorruptions, Leaks: r.Leaks - r.FixedLeaks,
			CorruptionsFixed: r.FixedCorruptions, LeaksFixed: r.FixedLeaks,
			Total: r.Total, Allocated: r.Allocated, Fragmented: r.Fragmented, Compressed: r.Compressed,
		})
	} else {
		printReport(s, &r)
	}
	switch {
	case r.Errors > 0:
		return &exitError{status: checkFailed}
	case r.Corruptions > r.FixedCorruptions:
		return &exitError{status: checkCorrupt}
	case r.Leaks > r.FixedLeaks:
		return &exitError{status: checkLeaks}
	}
	return nil
}

func printReport(s streams, r *qcow2.Report) {
	for _, p := range r.Problems {
		fprintf(s.answer, "%s\n", escaped(p, ""))
	}
	if n := r.Corruptions + r.Leaks - int64(len(r.Problems)); n > 0 && len(r.Problems) > 0 {
		fprintf(s.answer, "and %d more\n", n)
	}
	if r.FixedCorruptions+r.FixedLeaks > 0 {
		fprintf(s.answer, "repaired: %d corruptions, %d lost clusters\n", r.FixedCorruptions, r.FixedLeaks)
	}
	if r.Clean() {
		fprintf(s.answer, "no errors\n")
	} else {
		fprintf(s.answer, "left: %d corruptions, %d lost clusters, %d errors of the check\n",
			r.Corruptions-r.FixedCorruptions, r.Leaks-r.FixedLeaks, r.Errors)
	}
	fprintf(s.answer, "%d of %d clusters in use, %d of them compressed, %d fragmented; the image ends at byte %d\n",
		r.Allocated, r.Total, r.Compressed, r.Fragmented, r.End)
}

func newDiskMap(s streams) *cobra.Command {
	var d diskFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "map [flags] DISK",
		Short: "Tell where in which file the bytes of a disk are",
		Long: `map lists the parts of a disk that are stored, and where: in the disk's own file, or in that of a
backing file if --backing allows it. --json lists all parts, as qemu-img map --output=json does:
depth is the number of the layer, present whether it has the bytes at all, zero whether they are
known to read as zeroes, data whether they are stored, offset where that is.`,
		Example: `  kvmlet disk map test.img
  kvmlet disk map --format qcow2 --backing on --json overlay.qcow2`,
		Args: operands("DISK"),
		RunE: func(cmd *cobra.Command, args []string) error {
			d.spec.Path, d.spec.ReadOnly = args[0], true
			hintFormat(cmd, s, "format", args[0])
			return interruptible(cmd.Context(), "", func(ctx context.Context) error {
				return shareHint(mapDisk(ctx, s, d.spec, asJSON))
			})
		},
	}
	addFormat(cmd, &d.spec.Format, "format", "f", "the disk")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	d.addBacking(cmd)
	d.addShare(cmd)
	return cmd
}

func mapDisk(ctx context.Context, s streams, spec disk.Spec, asJSON bool) (err error) {
	d, layers, err := disk.OpenChain(ctx, spec)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if asJSON {
		return mapJSON(ctx, s, d)
	}
	w := tabwriter.NewWriter(s.answer, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "START\tLENGTH\tOFFSET\tFILE")
	err = disk.Extents(ctx, d, func(e disk.Extent) error {
		if !e.Data {
			return nil
		}
		at := "-"
		switch {
		case e.Compressed:
			at = "compressed"
		case e.Offset != nil:
			at = fmt.Sprintf("%#x", *e.Offset)
		}
		_, err := fmt.Fprintf(w, "%#x\t%#x\t%s\t%s\n", e.Start, e.Length, at, quoted(layers[e.Depth].Path))
		return err
	})
	return errors.Join(err, w.Flush())
}

// mapJSON prints one extent to a line, as it is found: a large disk has many.
func mapJSON(ctx context.Context, s streams, d *blk.Device) error {
	var b strings.Builder
	separator := "["
	err := disk.Extents(ctx, d, func(e disk.Extent) error {
		line, err := json.Marshal(e)
		if err != nil {
			return err
		}
		b.WriteString(separator)
		b.Write(line)
		separator = ",\n"
		if b.Len() < 32<<10 {
			return nil
		}
		_, err = io.WriteString(s.answer, b.String())
		b.Reset()
		return err
	})
	if err != nil {
		return err
	}
	if separator == "[" {
		b.WriteString(separator)
	}
	b.WriteString("]\n")
	_, err = io.WriteString(s.answer, b.String())
	return err
}
