// Package cli holds kvmlet's commands, one file each. main only calls Main.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Exit statuses of kvmlet itself. With a COMMAND its own status is passed on, so these follow what env(1), timeout(1)
// and docker run use, and stay clear of the small numbers that commands use.
const (
	statusOK          = 0
	statusReboot      = 120 // the guest rebooted
	statusTripleFault = 121 // the guest's CPU shut down
	statusPanic       = 122 // the guest's kernel panicked
	statusStopped     = 123 // the VM was stopped from outside: Ctrl-A x, or a signal
	statusTimeout     = 124 // --timeout ran out
	statusError       = 125 // kvmlet itself failed, or the command line was wrong
)

// exitError carries an exit status through cobra. A nil err means that all is said already.
type exitError struct {
	status int
	err    error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// failed reports whether something went wrong that the guest's console may explain.
func (e *exitError) failed() bool {
	return e.err != nil && e.status != statusTimeout && e.status != statusStopped && e.status != statusReboot
}

// streams are the standard streams of a command, replaced in tests.
type streams struct {
	in       *os.File
	out, err *os.File
	answer   *answer // to out: what a command was asked to tell
}

// answer writes what a command was asked to tell, which must not be lost unnoticed: for the first error of a write, if it
// is nothing worse, the command fails when it has ended.
type answer struct {
	w   io.Writer
	err error
}

func (a *answer) Write(p []byte) (int, error) {
	n, err := a.w.Write(p)
	if err != nil && a.err == nil {
		a.err = err
	}
	return n, err
}

// interactive reports whether somebody sits at a terminal and types.
func (s *streams) interactive() bool { return isTerminal(s.in) && isTerminal(s.out) }

// Main runs the command line and returns the exit status.
func Main(ctx context.Context, args []string) int {
	return run(ctx, args, streams{in: os.Stdin, out: os.Stdout, err: os.Stderr})
}

func run(ctx context.Context, args []string, s streams) int {
	s.answer = &answer{w: s.out}
	cmd := newRoot(s)
	cmd.SetArgs(args)
	done, err := cmd.ExecuteContextC(ctx)
	var ee *exitError
	if err != nil && !errors.As(err, &ee) {
		ee = &exitError{status: statusError, err: err}
	}
	if s.answer.err != nil && (ee == nil || ee.err == nil) {
		ee = &exitError{status: statusError, err: s.answer.err}
	}
	if ee == nil {
		return statusOK
	}
	if ee.err != nil {
		// The disk commands have one line; elsewhere there may be the output of another program.
		fmt.Fprintf(s.err, "kvmlet: %s\n", message(ee.err, !strings.HasPrefix(done.CommandPath()+" ", "kvmlet disk ")))
	}
	return ee.status
}

func newRoot(s streams) *cobra.Command {
	root := &cobra.Command{
		Use:   "kvmlet",
		Short: "Run a Linux machine of its own for a test, a benchmark or a CI job",
		Long: `kvmlet is a virtual machine monitor on KVM. It boots a Linux guest in which a command runs as if it
were local: its output comes out here, and its exit status is kvmlet's. Where KVM is missing, or
emulated in software, the same commands run in the lab, a QEMU machine that has KVM as on hardware;
only slower.`,
		Example: `  kvmlet run                              # an interactive shell in a new VM
  kvmlet run -- uname -a                  # one command, and its exit status
  kvmlet run --disk path=test.img -- lsblk
  kvmlet probe                            # what this host can do`,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetIn(s.in)
	root.SetOut(s.answer)
	root.SetErr(s.err)
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	// What is wrong is said in one line, which cobra's suggestions are not: didYouMean makes one of them.
	root.DisableSuggestions = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var unknown *pflag.NotExistError
		if errors.As(err, &unknown) {
			if short := unknown.GetSpecifiedShortnames(); short != "" && short[0] >= '0' && short[0] <= '9' { // a size
				return fmt.Errorf("-%s is taken for a flag (put -- before the operands: see %s --help)", short, cmd.CommandPath())
			}
		}
		return fmt.Errorf("%w (%ssee %s --help)", err, flagsLike(cmd, unknown), cmd.CommandPath())
	})
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), ".FlagUsages", fmt.Sprintf(".FlagUsagesWrapped %d", helpWidth)))
	root.AddCommand(newRun(s), newDisk(s), newProbe(s), newLab(s))
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "help": // an unknown topic is an error
			c.Args = func(_ *cobra.Command, args []string) error {
				if found, _, err := root.Find(args); err != nil || found == root && len(args) > 0 {
					return fmt.Errorf("no help about %q (see kvmlet --help)", strings.Join(args, " "))
				}
				return nil
			}
		case "completion": // what it prints goes into a file
			c.RunE = func(_ *cobra.Command, args []string) error {
				return errors.New("completion: want a shell: bash, zsh, fish or powershell")
			}
		}
	}
	return root
}

// noCommand takes no arguments, for a command that has only commands of its own: what is there is none of them.
func noCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	path := cmd.CommandPath()
	return fmt.Errorf("unknown command %q for %s (%ssee %s --help)", args[0], strings.TrimPrefix(path, "kvmlet "),
		didYouMean(cmd, "", args[0]), path)
}

// flagsLike asks whether one of the flags of cmd was meant. unknown is nil if something else was wrong with a flag.
func flagsLike(cmd *cobra.Command, unknown *pflag.NotExistError) string {
	if unknown == nil || unknown.GetSpecifiedShortnames() != "" {
		return ""
	}
	names := &cobra.Command{} // cobra suggests only commands
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		names.AddCommand(&cobra.Command{Use: f.Name, Hidden: f.Hidden, Run: func(*cobra.Command, []string) {}})
	})
	return didYouMean(names, "--", unknown.GetSpecifiedName())
}

// didYouMean asks whether one of the commands of cmd was meant by a name that none of them has. It is empty if none is like it.
func didYouMean(cmd *cobra.Command, prefix, name string) string {
	cmd.SuggestionsMinimumDistance = 2 // cobra's own default, which it sets elsewhere
	like := cmd.SuggestionsFor(name)
	if len(like) == 0 {
		return ""
	}
	slices.Sort(like)
	return "did you mean " + prefix + strings.Join(like, " or "+prefix) + "? "
}

// helpWidth is how wide help texts are, in columns.
const helpWidth = 100

// version is the module's version as the Go toolchain recorded it.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// fprintf writes to a stream that cannot be helped if it fails, or that remembers it, as an answer does.
func fprintf(w io.Writer, format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }
