package image

import (
	"bufio"
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// urootFiles is a small module that requires u-root, its busybox builder and the commands' dependencies. Its files have
// other names here, so that it is no module within this one.
//
//go:embed uroot/*.txt
var urootFiles embed.FS

// urootModule returns the files of the embedded module by their real names.
func urootModule() (map[string][]byte, error) {
	list, err := urootFiles.ReadDir("uroot")
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for _, d := range list {
		b, err := urootFiles.ReadFile(path.Join("uroot", d.Name()))
		if err != nil {
			return nil, err
		}
		files[strings.TrimSuffix(d.Name(), ".txt")] = b
	}
	return files, nil
}

// urootCommands returns the import paths of the commands in the busybox, in the order of the embedded list.
func urootCommands() ([]string, error) {
	files, err := urootModule()
	if err != nil {
		return nil, err
	}
	f, err := parser.ParseFile(token.NewFileSet(), "commands.go", files["commands.go"], parser.ImportsOnly)
	if err != nil {
		return nil, err
	}
	var cmds []string
	for _, i := range f.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			return nil, err
		}
		cmds = append(cmds, p)
	}
	return cmds, nil
}

// toolchain is the go command and what it says about itself.
type toolchain struct {
	path string // of the command, after following links
	root string // GOROOT
	ver  string // GOVERSION
}

// findGo asks the go command that is in PATH, or in Go's usual place.
func findGo(ctx context.Context) (*toolchain, error) {
	file, err := exec.LookPath("go")
	if err != nil {
		if file, err = exec.LookPath("/usr/local/go/bin/go"); err != nil {
			return nil, fmt.Errorf("build the guest image: no go command in PATH: install Go 1.26 or later and %w", ErrSetup)
		}
	}
	t := &toolchain{path: file}
	if target, err := filepath.EvalSymlinks(file); err == nil {
		t.path = target
	}
	out, err := t.run(ctx, "", nil, nil, "env", "-json", "GOROOT", "GOVERSION")
	if err != nil {
		return nil, err
	}
	var env struct{ GOROOT, GOVERSION string }
	if err := json.Unmarshal(out, &env); err != nil {
		return nil, fmt.Errorf("go env: %w", err)
	}
	t.root, t.ver = env.GOROOT, env.GOVERSION
	return t, nil
}

// run executes the go command in dir with extra variables and returns its standard output. What it says on standard
// error goes line by line to line, if that is given, and into the error if it fails. The network is out of reach for it.
func (t *toolchain) run(ctx context.Context, dir string, env []string, line func(string), args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, t.path, args...)
	cmd.Dir = dir
	// With the flags of kvmlet's own build, the standard library is compiled only once for all.
	cmd.Env = append(os.Environ(), "GOPROXY=off", "GOFLAGS=-trimpath", "GOWORK=off", "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	cmd.Env = append(cmd.Env, env...)
	group, end, err := processGroup()
	if err != nil {
		return nil, err
	}
	defer end()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: group}
	cmd.Cancel = func() error { return syscall.Kill(-group, syscall.SIGKILL) }
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	pr, pw := io.Pipe()
	cmd.Stderr = pw
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", t.path, err)
	}
	said := make(chan []string)
	go func() {
		var last []string
		sc := bufio.NewScanner(pr)
		for sc.Scan() {
			if line != nil {
				line(sc.Text())
			}
			last = append(last, sc.Text())
			if len(last) > 20 {
				last = last[1:]
			}
		}
		// Whatever follows an overlong line is not wanted, but go must not block on it.
		_, _ = io.Copy(io.Discard, pr)
		said <- last
	}()
	err = cmd.Wait()
	pw.Close()
	last := <-said
	if cause := context.Cause(ctx); cause != nil {
		return nil, fmt.Errorf("go %s: %w", args[0], cause)
	}
	if err != nil {
		// makebb speaks on standard output.
		text := strings.TrimSpace(strings.Join(append(last, tail(stdout.String(), 20)...), "\n"))
		err = fmt.Errorf("go %s: %w\n%s", args[0], err, text)
		if notDownloaded(text) {
			err = fmt.Errorf("%w\nGo modules of the guest image are not on this machine: %w", err, ErrSetup)
		}
		return nil, err
	}
	return stdout.Bytes(), nil
}

// groupLeader kills its process group, itself included, when its standard input ends.
const groupLeader = "read line; kill -KILL 0"

// processGroup starts a process group for commands that start others, as go starts compilers. All that is in it is killed
// by end, or when this process dies in whichever way: a death signal would reach the first command only. Commands are to
// be waited for before end is called, which waits for the group's leader.
func processGroup() (id int, end func(), err error) {
	leader := exec.Command("/bin/sh", "-c", groupLeader)
	leader.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// This process alone holds the pipe's other end: commands do not inherit it.
	hold, err := leader.StdinPipe()
	if err != nil {
		return 0, nil, err
	}
	if err := leader.Start(); err != nil {
		return 0, nil, fmt.Errorf("start a process group: %w", err)
	}
	return leader.Process.Pid, func() {
		hold.Close()
		_ = leader.Wait() // it was killed
	}, nil
}

// notDownloaded recognises what the go command says about a module that would have to be downloaded.
func notDownloaded(text string) bool {
	for _, s := range []string{"GOPROXY=off", "missing go.sum entry", "no required module provides", "cannot find module"} {
		if strings.Contains(text, s) {
			return true
		}
	}
	return false
}

func tail(text string, n int) []string {
	lines := strings.Split(text, "\n")
	return lines[max(0, len(lines)-n):]
}

// busybox returns the path of u-root's commands in one static executable. The sources are written by u-root's own
// builder, gobusybox, and compiled here, because that way Go's build cache is used.
func (s *Store) busybox(ctx context.Context, t *toolchain, key Key, report func(text string, done, total int)) (string, error) {
	return s.Build(ctx, kindBusybox, key, func(w io.Writer) error {
		dir, err := s.scratch(kindBusybox)
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		report("Preparing u-root's commands", 0, 0)
		src, err := writeBusybox(ctx, t, dir)
		if err != nil {
			return fmt.Errorf("prepare u-root's commands: %w", err)
		}
		env := []string{"GO111MODULE=off", "GOPATH=" + filepath.Join(dir, "gen"), "GOTMPDIR=" + dir}
		deps, err := t.run(ctx, src, env, nil, "list", "-deps", ".")
		if err != nil {
			return fmt.Errorf("list what u-root's commands need: %w", err)
		}
		done, total := 0, bytes.Count(deps, []byte("\n"))
		const text = "Compiling u-root's commands"
		report(text, done, total)
		bin := filepath.Join(dir, "bb")
		_, err = t.run(ctx, src, env, func(string) { done++; report(text, min(done, total), total) },
			"build", "-v", "-ldflags=-s -w -buildid=", "-o", bin, ".")
		if err != nil {
			return fmt.Errorf("compile u-root's commands: %w", err)
		}
		f, err := os.Open(bin)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	})
}

// busyboxKey names what a busybox is made of: the module's files, which pin all sources, and the compiler.
func busyboxKey(t *toolchain) (Key, error) {
	files, err := urootModule()
	if err != nil {
		return Key{}, err
	}
	return KeyOf("busybox/1", t.ver, string(files["go.mod"]), string(files["go.sum"]), string(files["commands.go"])), nil
}

// writeBusybox writes the module into dir, lets gobusybox make the busybox's sources from it, and returns the folder
// with its main package. GOPATH for it is dir/gen.
func writeBusybox(ctx context.Context, t *toolchain, dir string) (string, error) {
	files, err := urootModule()
	if err != nil {
		return "", err
	}
	mod := filepath.Join(dir, "mod")
	if err := os.Mkdir(mod, 0o755); err != nil {
		return "", err
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(mod, name), b, 0o644); err != nil {
			return "", err
		}
	}
	cmds, err := urootCommands()
	if err != nil {
		return "", err
	}
	if len(cmds) == 0 {
		return "", errors.New("the list of commands is empty")
	}
	env := []string{"GO111MODULE=on", "GOROOT=" + t.root, "GOTMPDIR=" + dir}
	args := append([]string{"tool", "makebb", "-g", "-gen-dir", filepath.Join(dir, "gen")}, cmds...)
	if _, err := t.run(ctx, mod, env, nil, args...); err != nil {
		return "", err
	}
	return filepath.Join(dir, "gen", "src", "bb.u-root.com", "bb"), nil
}
