package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/blk/raw"
)

const diskLong = `disk makes, inspects, copies and exports disks. A DISK is a file, a block device, or an NBD server's
export: nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, or the same with nbds for TLS.

Its format is raw unless --format says otherwise (qcow2 for check, commit and snapshot, which are
about images). It is never guessed from what the disk holds, because a guest could write a raw disk
so that it looks like an image which names any of the host's files as its backing file. For the same
reason the backing file that an image names is opened only if --backing allows it.

A disk in use is locked: any number of kvmlets can read it at a time, or one alone write it. QEMU
keeps away from a disk that kvmlet uses, and kvmlet from one that QEMU uses.

Exit status, unless a command says otherwise: 0, or 123 if a signal stopped it, or 125 if it failed.`

func newDisk(s streams) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "disk",
		Short: "Make, inspect, copy and export disks",
		Long:  diskLong,
		Example: `  kvmlet disk create --format qcow2 test.qcow2 10G
  kvmlet disk convert --format qcow2 test.qcow2 test.img
  kvmlet disk serve --format qcow2 --socket test.sock test.qcow2`,
		Args: noCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newDiskCreate(s), newDiskInfo(s), newDiskCheck(s), newDiskConvert(s), newDiskCompare(s), newDiskMap(s),
		newDiskCommit(s), newDiskResize(s), newDiskSnapshot(s), newDiskServe(s), newDiskBench(s))
	return cmd
}

// choice is a flag with a value that has a name.
type choice[T fmt.Stringer] struct {
	value *T
	parse func(string) (T, error)
	kind  string
}

func (c choice[T]) Type() string { return c.kind }

func (c choice[T]) String() string {
	if c.value == nil { // a zero choice, which pflag makes to compare with
		return ""
	}
	return (*c.value).String()
}

func (c choice[T]) Set(s string) error {
	v, err := c.parse(s)
	if err == nil {
		*c.value = v
	}
	return err
}

// diskFlags are the flags with which commands open disks.
type diskFlags struct {
	spec disk.Spec
}

// named adds a flag whose values have names, which are completed.
func named[T fmt.Stringer](cmd *cobra.Command, value *T, parse func(string) (T, error), names []string, flag, short, usage string) {
	cmd.Flags().VarP(choice[T]{value, parse, "name"}, flag, short, usage)
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(names, cobra.ShellCompDirectiveNoFileComp))
}

func addFormat(cmd *cobra.Command, f *disk.Format, flag, short, whose string) {
	*f = disk.Raw
	named(cmd, f, disk.ParseFormat, disk.Formats(), flag, short, "`FORMAT` of "+whose+": raw or qcow2")
}

// addImageFormat adds a format for commands that only images have a use for. It need not be said.
func addImageFormat(cmd *cobra.Command, f *disk.Format, parse func(string) (disk.Format, error), names []string) {
	*f = disk.QCOW2
	named(cmd, f, parse, names, "format", "f", "`FORMAT` of the image: "+strings.Join(names, " or "))
}

// onlyQCOW2 is disk.ParseFormat where other formats can't do what is asked.
func onlyQCOW2(name string) (disk.Format, error) {
	if name != string(disk.QCOW2) {
		return "", fmt.Errorf("format=%s: want qcow2, which alone can do this", name)
	}
	return disk.QCOW2, nil
}

// addBacking adds what is said about backing files.
func (d *diskFlags) addBacking(cmd *cobra.Command) {
	cmd.Flags().Var(choice[disk.Backing]{&d.spec.Backing, disk.ParseBacking, "policy"}, "backing",
		"which backing `FILES` may be opened: off (none), on (all that the images name), or a folder or file in which they lie")
	named(cmd, &d.spec.BackingFormat, disk.ParseFormat, disk.Formats(), "backing-format", "",
		"`FORMAT` of backing files whose images do not say")
}

// addIO adds how a disk is read and written.
func (d *diskFlags) addIO(cmd *cobra.Command) {
	named(cmd, &d.spec.Cache, disk.ParseCache, disk.Caches(), "cache", "",
		"`MODE` of caching: writeback, none (O_DIRECT), writethrough, directsync or unsafe")
	named(cmd, &d.spec.AIO, raw.ParseAIO, disk.AIOs(), "aio", "", "`ENGINE` for requests: auto, io_uring or threads")
}

func (d *diskFlags) addThrottle(cmd *cobra.Command) {
	cmd.Flags().Var(choice[blk.Throttle]{&d.spec.Throttle, disk.ParseThrottle, "limits"}, "throttle",
		"`LIMITS` such as bps-total=10M,iops-read=500 (bps or iops, -total, -read or -write, then nothing, -max or -max-length)")
}

func (d *diskFlags) addShare(cmd *cobra.Command) {
	cmd.Flags().BoolVarP(&d.spec.ForceShare, "force-share", "U", false,
		"look at a disk that is in use; what is read may be of different times")
}

func addQuiet(cmd *cobra.Command, quiet *bool) {
	cmd.Flags().BoolVarP(quiet, "quiet", "q", false, "show no progress bar on a terminal")
	// Habit of who comes from qemu-img, where a bar must be asked for.
	cmd.Flags().BoolP("progress", "p", false, "show a progress bar (it is shown anyway)")
	_ = cmd.Flags().MarkHidden("progress")
}

// changed reports whether one of the flags was given.
func changed(f *pflag.FlagSet, names ...string) bool {
	for _, name := range names {
		if f.Changed(name) {
			return true
		}
	}
	return false
}

// operands wants arguments for each of names, none of them empty.
func operands(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		usage := fmt.Sprintf("(see %s --help)", cmd.CommandPath())
		switch {
		case len(args) < len(names):
			return fmt.Errorf("%s is missing %s", names[len(args)], usage)
		case len(args) > len(names):
			return fmt.Errorf("unexpected argument %q %s", args[len(names)], usage)
		}
		for i, a := range args {
			if a == "" {
				return fmt.Errorf("%s is empty", names[i])
			}
		}
		return nil
	}
}

// errInterrupted is the cause of the end of work that a signal stopped.
var errInterrupted = errors.New("stopped by a signal")

// interruptible does work until it ends or a signal stops it, which comes out as status 123. incomplete, unless it is
// empty, names what such work leaves behind. Requests that were begun end first; who does not want to wait for them, as
// for a server that does not answer, sends more signals, of which the third has its default action.
func interruptible(ctx context.Context, incomplete string, work func(ctx context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	signals := takeSignals()
	defer signals.release()
	defer signals.during(func(sig os.Signal) {
		if !wantsEnd(sig) {
			return
		}
		cancel(errInterrupted)
		if signals.interrupts++; signals.interrupts == patience-1 {
			signals.release()
		}
	})()
	err := work(ctx)
	if !errors.Is(context.Cause(ctx), errInterrupted) || !errors.Is(err, context.Canceled) && !errors.Is(err, errInterrupted) {
		return err // it ended before, or failed for another reason
	}
	if incomplete != "" {
		return &exitError{statusStopped, fmt.Errorf("%w: %s", errInterrupted, incomplete)}
	}
	return &exitError{statusStopped, errInterrupted}
}

// workProgress shows a bar for work that is to be done in bytes, on a terminal only. close takes it off.
func workProgress(s streams, quiet bool, text string) (report func(done, total int64), closeBar func()) {
	p := newProgress(s.err)
	if quiet || !p.terminal {
		return nil, func() {}
	}
	return func(done, total int64) { p.step(text, int(done), int(total)) }, p.close
}

// beginsAsImage reports whether a file has the first bytes of a qcow2 image.
func beginsAsImage(path string) bool {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() && info.Mode().Type() != os.ModeDevice {
		return false // an NBD export, or what can't be a disk
	}
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	b := make([]byte, 4)
	_, err = f.ReadAt(b, 0)
	return err == nil && string(b) == "QFI\xfb"
}

// hintFormat tells of what looks like a mistake: an image that is taken for a raw disk because nothing was said.
func hintFormat(cmd *cobra.Command, s streams, flag, path string) {
	if !cmd.Flags().Changed(flag) && beginsAsImage(path) {
		const hint = "kvmlet: %s is taken for a raw disk, but begins as a qcow2 image does; if it is one, say --%s qcow2\n"
		fprintf(s.err, hint, quoted(path), flag)
	}
}

// sureOfFormat refuses to change what looks like such a mistake.
func sureOfFormat(cmd *cobra.Command, flag, path string) error {
	if cmd.Flags().Changed(flag) || !beginsAsImage(path) {
		return nil
	}
	return fmt.Errorf("%s begins as a qcow2 image does: say --%s qcow2, or --%[2]s raw if it is none", path, flag)
}

// shareHint says how a disk in use can be looked at nevertheless.
func shareHint(err error) error {
	if errors.Is(err, raw.ErrLocked) {
		return fmt.Errorf("%w; look at it as it is with --force-share", err)
	}
	return err
}

// forceHint says how what is there can be overwritten.
func forceHint(err error, path string) error {
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already (choose another name, or overwrite it with --force)", path)
	}
	return err
}

// sizeText writes a number of bytes as people like it, and exactly.
func sizeText(n int64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	v, u := float64(n), 0
	for v >= 1024 && u < len(units)-1 {
		v, u = v/1024, u+1
	}
	if u == 0 {
		return fmt.Sprintf("%d bytes", n)
	}
	s := strings.TrimSuffix(fmt.Sprintf("%.2f", v), ".00")
	return fmt.Sprintf("%s %s (%d bytes)", s, units[u], n)
}

// detectZeroes is a name that disk.ParseDetectZeroes takes.
type detectZeroes string

func (z detectZeroes) String() string {
	if z == "" {
		return "off"
	}
	return string(z)
}

func parseDetectZeroes(s string) (detectZeroes, error) {
	_, err := disk.ParseDetectZeroes(s)
	return detectZeroes(s), err
}

func (z detectZeroes) setting() (blk.DetectZeroes, error) { return disk.ParseDetectZeroes(z.String()) }
