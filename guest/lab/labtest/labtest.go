// Package labtest lets tests that need KVM run by plain "go test" on every host: where KVM is not hardware, the test
// binary runs itself again in a lab.
package labtest

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/agent"
	"github.com/kvmlet/kvmlet/guest/image"
	"github.com/kvmlet/kvmlet/guest/lab"
	"github.com/kvmlet/kvmlet/vmm/kvm"
)

// Main is for a package's TestMain, which it ends: func TestMain(m *testing.M) { labtest.Main(m) }. It runs the tests
// in this process where KVM is hardware, and in a lab with the same arguments, environment and working directory
// elsewhere. There the host's files can be read at their places; what tests write is lost, but for the profiles and the
// like that "go test" asks for.
func Main(m *testing.M) { MainWhere(m, kvm.CheckHardware) }

// MainWhere is Main for tests that need something else of their host than KVM, such as rights: possible tries it and says
// what is missing. With a nil error the tests run in this process, and otherwise in a lab, which has everything.
func MainWhere(m *testing.M, possible func() error) {
	if !flag.Parsed() {
		flag.Parse()
	}
	if value("test.list") != "" || lab.Inside() { // there the tests themselves say what is wrong
		os.Exit(m.Run())
	}
	missing := possible()
	if missing == nil {
		os.Exit(m.Run())
	}
	fmt.Fprintf(os.Stderr, "lab: the tests run in a lab, as this host lacks what they need: %v\n", missing)
	code, err := runInLab()
	if err != nil {
		fmt.Fprintf(os.Stderr, "run the tests in a lab: %v\n", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func runInLab() (code int, err error) {
	exe, err := os.Executable()
	if err != nil {
		return 1, err
	}
	shares, err := outputs()
	if err != nil {
		return 1, err
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	defer signal.Stop(signals)
	for attempt := 1; ; attempt++ {
		var out, words bytes.Buffer // "go test" must see the results of one attempt only
		cfg := lab.Config{
			Args: append([]string{exe}, arguments()...), Shares: shares,
			Stdout: &out, Stderr: io.MultiWriter(os.Stderr, &words), Signals: signals,
			Init:     Init,
			Progress: func(line string) { fmt.Fprintln(os.Stderr, "lab:", line) },
		}
		status, err := runOnce(cfg)
		if attempt == attempts || !again(status, err, out.String(), words.String()) {
			_, failed := out.WriteTo(os.Stdout)
			return status.Code, errors.Join(err, failed)
		}
		// The margin keeps "go test" from taking this for the results.
		shown := strings.ReplaceAll(strings.ReplaceAll(out.String(), "\x16", ""), "\n", "\n  | ")
		fmt.Fprintf(os.Stderr, "lab: the tests failed and are run once more, since a guest hung as QEMU's emulation of SVM makes "+
			"it hang now and then. Their output:\n  | %s\n", shown)
	}
}

// runOnce runs a lab for as long as an attempt may take. The tests in there end before, unless all of it hangs.
func runOnce(cfg lab.Config) (agent.ExitStatus, error) {
	ctx := context.Background()
	if limit := timeLimit(); limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit/attempts, errHung)
		defer cancel()
	}
	return lab.Run(ctx, cfg)
}

// errHung says that a lab was stopped because nothing in it did so.
var errHung = errors.New("the lab does not end, though the time of its tests is over")

// timeLimit is what "go test" was told, or 0 if there is none.
func timeLimit() time.Duration {
	limit, err := time.ParseDuration(value("test.timeout"))
	if err != nil {
		return 0
	}
	return max(limit, 0)
}

// arguments are this process's, with the time limit of all attempts shared out among them.
func arguments() []string {
	args := os.Args[1:]
	if limit := timeLimit(); limit > 0 {
		args = append(slices.Clone(args), "-test.timeout="+share(limit).String())
	}
	return args
}

// share is what each attempt gets of a time limit for all of them and their labs' starts.
func share(limit time.Duration) time.Duration { return limit/attempts - min(limit/20, time.Minute) }

// Init is a lab.Config's Init for programs that are not kvmlet: it gives the executable that $KVMLET_BIN names, or a
// small one that "go build" makes, which is kept in the user's cache.
func Init(ctx context.Context) (string, error) {
	if exe := os.Getenv("KVMLET_BIN"); exe != "" {
		return exe, nil
	}
	store, err := image.OpenStore("")
	if err != nil {
		return "", err
	}
	return store.Build(ctx, "pid1", image.KeyOf(agent.Fingerprint()), func(w io.Writer) error {
		dir, err := os.MkdirTemp("", "labtest-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		// The test's own executable would do, but it may be instrumented, and a saved lab serves others too.
		exe := filepath.Join(dir, "pid1")
		build := exec.CommandContext(ctx, "go", "build", "-o", exe, "github.com/kvmlet/kvmlet/guest/lab/labtest/pid1")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s(or set KVMLET_BIN to a kvmlet executable)", strings.Join(build.Args, " "), err, out)
		}
		f, err := os.Open(exe)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	})
}

// outputs returns what the testing package's flags say that it shall write. Files are made if they are missing, so that
// each can be shared alone: its directory may hold the test binary, which is faster to read when it is not shared.
func outputs() (shares []string, err error) {
	for _, name := range []string{"test.outputdir", "test.gocoverdir", "test.fuzzcachedir"} {
		if dir := value(name); dir != "" {
			shares = append(shares, dir)
		}
	}
	if dir := os.Getenv("GOCOVERDIR"); dir != "" {
		shares = append(shares, dir)
	}
	for _, name := range []string{
		"test.testlogfile", "test.coverprofile", "test.cpuprofile", "test.memprofile", "test.blockprofile",
		"test.mutexprofile", "test.trace",
	} {
		file := value(name)
		if file == "" {
			continue
		}
		if dir := value("test.outputdir"); dir != "" && !filepath.IsAbs(file) {
			continue // in the directory that is shared
		}
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE, 0o666)
		if err != nil {
			return nil, fmt.Errorf("make the file of -%s: %w", name, err)
		}
		f.Close()
		shares = append(shares, file)
	}
	return shares, nil
}

// value returns a flag's value, or "" if the testing package does not have it.
func value(name string) string {
	if f := flag.Lookup(name); f != nil {
		return f.Value.String()
	}
	return ""
}
