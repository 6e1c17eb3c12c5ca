package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/spf13/cobra"

	"github.com/kvmlet/kvmlet/guest/lab"
	"github.com/kvmlet/kvmlet/vmm"
)

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"", "run", "lab", "probe"} {
		args := append(strings.Fields(command), "--help")
		r := runCommand(t, args...)
		if r.status != statusOK || r.err != "" || !strings.Contains(r.out, "Examples:\n  kvmlet ") {
			t.Errorf("%v: status %d, errors %q, no examples in:\n%s", args, r.status, r.err, r.out)
		}
		for line := range strings.Lines(r.out) {
			if n := len(strings.TrimRight(line, "\n")); n > helpWidth {
				t.Errorf("%v: a line of %d columns: %s", args, n, line)
			}
		}
	}
	if r := runCommand(t); r.status != statusOK || !strings.Contains(r.out, "Usage:") {
		t.Errorf("no arguments: %+v", r)
	}
	if r := runCommand(t, "--version"); r.status != statusOK || !strings.HasPrefix(r.out, "kvmlet ") {
		t.Errorf("--version: %+v", r)
	}
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if r := runCommand(t, "completion", shell); r.status != statusOK || !strings.Contains(r.out, "kvmlet") || r.err != "" {
			t.Errorf("completion %s: status %d, errors %q", shell, r.status, r.err)
		}
	}
	for args, want := range map[string][]string{
		"":             {"run", "probe", "lab", "completion"},
		"run --accel ": {"auto", "kvm", "lab"},
		"run --cpu ":   {"host", "baseline"},
		"run --dis":    {"--disk"},
	} {
		words := append([]string{"__complete"}, strings.Split(args, " ")...)
		r := runCommand(t, words...)
		for _, w := range want {
			if !slices.ContainsFunc(strings.Split(r.out, "\n"), func(line string) bool {
				offer, _, _ := strings.Cut(line, "\t")
				return offer == w
			}) {
				t.Errorf("%q is not completed to %s, but: %s", args, w, r.out)
			}
		}
	}
}

// TestProbe runs everywhere, so it only looks for what fits together.
func TestProbe(t *testing.T) {
	t.Parallel()
	r := runCommand(t, "probe", "--json")
	var p vmm.Probe
	if err := json.Unmarshal([]byte(r.out), &p); err != nil || r.status != statusOK || r.err != "" {
		t.Fatalf("status %d, errors %q, %v in: %s", r.status, r.err, err, r.out)
	}
	if p.CPUs < 1 || p.Memory == 0 || p.Kernel == "" {
		t.Errorf("a host with %d CPUs, %d bytes of memory, kernel %q", p.CPUs, p.Memory, p.Kernel)
	}
	features := make(map[string]vmm.Feature)
	for _, f := range p.Features {
		features[f.Name] = f
		if f.Detail == "" || !f.OK && f.Remedy == "" {
			t.Errorf("%+v says too little", f)
		}
	}
	for _, name := range []string{"kvm", "tap", "io_uring"} {
		if _, ok := features[name]; !ok {
			t.Errorf("nothing about %s", name)
		}
	}
	if features["kvm"].OK != (p.KVM == vmm.HardwareKVM) || p.KVM != vmm.NoKVM && (p.APIVersion == 0 || p.GuestSpeed <= 0) {
		t.Errorf("KVM %q contradicts %+v", p.KVM, p)
	}

	text := runCommand(t, "probe")
	verdict := map[bool]string{true: "VMs run on this host's KVM", false: "VMs run in the lab"}[p.KVM == vmm.HardwareKVM]
	if text.status != statusOK || !strings.Contains(text.out, verdict) || !strings.Contains(text.out, "\nkvm ") {
		t.Errorf("probe says:\n%s", text.out)
	}
}

// TestLabCommand reads the command that a VM in the lab is made with as the lab would, and wants the same VM.
func TestLabCommand(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	disk, comma, kernel, initrd := file("disk.img"), file("with,comma=x"), file("vmlinux"), file("initrd")
	log := filepath.Join(dir, "log")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(kernel, link); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args   []string
		shares []string
	}{
		"plain":   {nil, nil},
		"command": {[]string{"--", "sh", "-c", "echo --accel lab; exit 3", "--", ""}, nil},
		"sizes":   {[]string{"--cpus", "3", "--memory", "1026M", "--cpu", "baseline", "--name", "web-1"}, nil},
		"append":  {[]string{"--append", "-x a=\"b c\" --", "--timeout", "5s"}, nil},
		"disks": {[]string{
			"--disk", "path=" + disk + ",id=root", "--disk", "path=" + strings.ReplaceAll(comma, ",", ",,") + ",readonly",
		}, []string{disk}},
		"cards": {[]string{
			"--net", "tap=t0,hostip=10.1.2.3/24,mac=52:54:00:00:00:01", "--net", "tap=t1,existing,id=lan", "--tty", "--", "ip", "a",
		}, nil},
		"files":   {[]string{"--kernel", link, "--initrd", initrd, "--console", log}, []string{log}},
		"console": {[]string{"--console", "-"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			here := parsePlan(t, c.args)
			args, shares, err := here.labCommand("/bin/kvmlet")
			if err != nil {
				t.Fatal(err)
			}
			if args[0] != "/bin/kvmlet" || args[1] != "run" || !slices.Equal(shares, c.shares) {
				t.Errorf("command %q, shares %q, want %q", args, shares, c.shares)
			}
			there := parsePlan(t, args[2:])
			if !reflect.DeepEqual(here.cfg, there.cfg) || here.agent != there.agent {
				t.Errorf("%q is another VM: %+v, want %+v", args, there.cfg, here.cfg)
			}
			want, got := *here.o, *there.o
			want.accel, want.timeout = accelKVM, 0 // the timeout is kept here
			want.disks, got.disks = nil, nil       // compared above
			if want.kernel != "" {
				want.kernel = kernel
			}
			if !reflect.DeepEqual(want, got) {
				t.Errorf("%q means %+v, want %+v", args, got, want)
			}
		})
	}
}

// parsePlan is the plan of `kvmlet run` with args.
func parsePlan(t *testing.T, args []string) *plan {
	t.Helper()
	o := &runOptions{memory: defaultMemory}
	cmd := &cobra.Command{}
	o.addFlags(cmd)
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	o.command = append([]string{}, cmd.Flags().Args()...)
	p, err := newPlan(o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestLabMemory(t *testing.T) {
	t.Parallel()
	for vm, want := range map[uint64]int64{64 << 20: lab.DefaultMemory, 5 << 30: lab.DefaultMemory, 8 << 30: 9 << 30} {
		if got := labMemory(vm); got != want {
			t.Errorf("a VM of %d bytes gets a lab of %d, want %d", vm, got, want)
		}
	}
}

func TestStatuses(t *testing.T) {
	t.Parallel()
	failure := errors.New("it broke")
	for _, c := range []struct {
		err  error
		want int
		text string
	}{
		{endError(vmm.End{Outcome: vmm.PowerOff}), 0, ""},
		{endError(vmm.End{Outcome: vmm.Reboot}), 120, "rebooted"},
		{endError(vmm.End{Outcome: vmm.TripleFault}), 121, "triple fault"},
		{endError(vmm.End{Outcome: vmm.Panic}), 122, "panicked"},
		{endError(vmm.End{Outcome: vmm.Stopped}), 123, "stopped"},
		{endError(vmm.End{Outcome: vmm.Failed, Err: failure}), 125, "it broke"},
		{leaveError(nil), 0, ""},
		{leaveError(failure), 0, ""},
		{leaveError(fmt.Errorf("connect: %w", errTimeout)), 124, "timeout"},
		{leaveError(fmt.Errorf("connect: %w", errLeft)), 123, "stopped"},
		{leaveError(fmt.Errorf("lab: %w", lab.ErrInterrupted)), 123, "stopped"},
		{errSilent, 125, "before its agent answered"},
		{&exitError{status: 7}, 7, "exit status 7"},
		{&exitError{127, failure}, 127, "it broke"},
	} {
		status, text := statusOK, ""
		var ee *exitError
		if errors.As(c.err, &ee) {
			status, text = ee.status, ee.Error()
		} else if c.err != nil {
			t.Errorf("%v has no status", c.err)
		}
		if status != c.want || !strings.Contains(text, c.text) {
			t.Errorf("%v: status %d, %q; want %d with %q", c.err, status, text, c.want, c.text)
		}
	}
	if (&exitError{statusPanic, failure}).failed() != true || (&exitError{statusStopped, errLeft}).failed() ||
		(&exitError{status: 1}).failed() {
		t.Error("a wrong idea of what has failed")
	}
}

// recorder is a command in the guest that takes signals and sizes.
type recorder struct {
	mu  sync.Mutex
	got []string
}

func (r *recorder) add(s string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, s)
	return nil
}

func (r *recorder) Signal(sig syscall.Signal) error { return r.add(sig.String()) }

func (r *recorder) Resize(rows, columns uint16) error {
	return r.add(fmt.Sprintf("%dx%d", rows, columns))
}

// TestRelay sends signals to a session: the command's are passed on, and too many or too grave ones end it.
func TestRelay(t *testing.T) {
	t.Parallel()
	null, err := os.Open(os.DevNull) // a terminal whose size is unknown
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	const (
		intr, term, hup, usr1, winch = syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGWINCH
	)
	for name, c := range map[string]struct {
		tty  bool
		send []os.Signal
		want []string
		left bool
	}{
		"passed on":             {false, []os.Signal{usr1, intr, hup}, []string{"user defined signal 1", "interrupt", "hangup"}, false},
		"the third interrupt":   {false, []os.Signal{intr, usr1, term, intr}, []string{"interrupt", "user defined signal 1", "terminated"}, true},
		"hangups do not count":  {false, []os.Signal{hup, hup, hup, hup}, []string{"hangup", "hangup", "hangup", "hangup"}, false},
		"size without terminal": {false, []os.Signal{winch, usr1}, []string{"user defined signal 1"}, false},
		"size of a terminal":    {true, []os.Signal{winch, usr1}, []string{"24x80", "user defined signal 1"}, false},
		"end of a terminal":     {true, []os.Signal{hup}, nil, true},
		"terminated terminal":   {true, []os.Signal{term}, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, leave := context.WithCancelCause(t.Context())
			defer leave(nil)
			s := &session{streams: streams{in: null, out: null, err: null}, signals: &signals{ch: make(chan os.Signal)}, tty: c.tty}
			r := &recorder{}
			stop := s.signals.during(func(sig os.Signal) { s.relay(r, sig, leave) })
			for _, sig := range c.send {
				s.signals.ch <- sig
			}
			stop()
			if !slices.Equal(r.got, c.want) || errors.Is(context.Cause(ctx), errLeft) != c.left {
				t.Errorf("the command got %q, want %q; left: %v", r.got, c.want, context.Cause(ctx))
			}
		})
	}
}
