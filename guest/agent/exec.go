package agent

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// defaultPath is where programs are looked up that bring no PATH. u-root images keep theirs in /bbin.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/bbin"

// lookPath finds the program of a command as execvp does, inside the command's root. The error wraps ENOENT if there is
// none and EACCES if there is one that may not be executed.
func lookPath(sp *spec) (string, error) {
	root, err := unix.Open("/"+sp.root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("root %s: %v", sp.root, err) //nolint:errorlint // not %w: the command itself is not missing
	}
	defer unix.Close(root)
	dir := "/" + sp.dir
	if err := probe(root, dir, unix.S_IFDIR); err != nil {
		return "", fmt.Errorf("working directory %s: %v", dir[1:], err) //nolint:errorlint // as above
	}
	name := sp.args[0]
	if name == "" {
		return "", fmt.Errorf("a command without a name: %w", syscall.ENOENT)
	}
	if strings.Contains(name, "/") {
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		if err := probe(root, path, unix.S_IFREG); err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		return path, nil
	}
	found := error(syscall.ENOENT)
	for _, d := range filepath.SplitList(searchPath(sp)) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		path := filepath.Join(d, name)
		err := probe(root, path, unix.S_IFREG)
		if err == nil {
			return path, nil
		}
		if err == syscall.EACCES {
			found = err
		}
	}
	return "", fmt.Errorf("%s: %w in PATH", name, found)
}

func searchPath(sp *spec) string {
	if sp.defaultEnv {
		return os.Getenv("PATH")
	}
	path := defaultPath
	for _, e := range sp.env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	return path
}

// probe looks whether path, resolved inside root, is of the given kind and may be executed or entered.
func probe(root int, path string, kind uint32) error {
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	fd, err := unix.Openat2(root, path, how)
	for err == unix.EINTR || err == unix.EAGAIN {
		fd, err = unix.Openat2(root, path, how)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	switch err := unix.Fstat(fd, &st); {
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT != kind && kind == unix.S_IFDIR:
		return syscall.ENOTDIR
	case st.Mode&unix.S_IFMT != kind || st.Mode&0o111 == 0:
		return syscall.EACCES
	}
	return nil
}

// killSession kills every process of the session that pid leads.
func killSession(pid int) {
	_ = syscall.Kill(-pid, syscall.SIGKILL)
	for _, p := range processes() {
		if p.session == pid {
			_ = syscall.Kill(p.pid, syscall.SIGKILL)
		}
	}
}

type processID struct{ pid, session int }

// processes lists what /proc shows, kernel threads excepted.
func processes() []processID {
	names, _ := filepath.Glob("/proc/[0-9]*/stat")
	list := make([]processID, 0, len(names))
	for _, name := range names {
		stat, err := os.ReadFile(name)
		if err != nil {
			continue // ended meanwhile
		}
		// pid (name, which may hold anything) state ppid pgrp session ...
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		if len(fields) < 7 {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		session, _ := strconv.Atoi(string(fields[3]))
		const kernelThread = 0x00200000 // PF_KTHREAD of the flags field
		if flags, _ := strconv.Atoi(string(fields[6])); flags&kernelThread == 0 {
			list = append(list, processID{pid, session})
		}
	}
	return list
}

// bootClock is the time since the kernel started.
func bootClock() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// readInfo asks the kernel; the times of PID 1 are left zero.
func readInfo() (Info, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Info{}, os.NewSyscallError("uname", err)
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return Info{}, os.NewSyscallError("sysinfo", err)
	}
	text := unix.ByteSliceToString
	return Info{
		Kernel:   strings.Join([]string{text(u.Sysname[:]), text(u.Release[:]), text(u.Version[:]), text(u.Machine[:])}, " "),
		Hostname: text(u.Nodename[:]),
		CPUs:     runtime.NumCPU(),
		Memory:   si.Totalram * uint64(si.Unit),
		Uptime:   bootClock(),
	}, nil
}
