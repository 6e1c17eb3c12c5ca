package cli

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/guest/image"
	"github.com/kvmlet/kvmlet/guest/lab"
	"github.com/kvmlet/kvmlet/vmm/cli/ptytest"
)

// TestLateTerminal follows a terminal to raw mode and back.
func TestLateTerminal(t *testing.T) {
	t.Parallel()
	_, tty := ptytest.Open(t)
	before := ptytest.Attributes(t, tty)
	l := &lateTerminal{f: tty}
	l.set()
	if a := ptytest.Attributes(t, tty); a.Lflag&(unix.ICANON|unix.ECHO|unix.ISIG) != 0 {
		t.Error("the terminal is not raw")
	}
	l.set() // must not take raw for what was before
	l.restore()
	if ptytest.Attributes(t, tty) != before {
		t.Error("the terminal is not as before")
	}
	l.set()
	if ptytest.Attributes(t, tty) != before {
		t.Error("the terminal was changed after its command's end")
	}
}

func TestTerminalSize(t *testing.T) {
	t.Parallel()
	master, tty := ptytest.Open(t)
	if got := terminalSize(tty); got != (lab.Size{Rows: 24, Columns: 80}) {
		t.Errorf("a terminal without a size has %+v", got)
	}
	if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: 132}); err != nil {
		t.Fatal(err)
	}
	if got := terminalSize(tty); got != (lab.Size{Rows: 50, Columns: 132}) {
		t.Errorf("a terminal of 50 rows and 132 columns has %+v", got)
	}
}

func TestFirstRead(t *testing.T) {
	t.Parallel()
	calls := 0
	r := &firstRead{r: strings.NewReader("input"), before: func() { calls++ }}
	if calls != 0 {
		t.Error("called without a read")
	}
	b, err := io.ReadAll(r)
	if string(b) != "input" || err != nil || calls != 1 {
		t.Errorf("read %q, %v, with %d calls", b, err, calls)
	}
}

// TestProgressLines is progress where nobody watches: a line for each step.
func TestProgressLines(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	p := &progress{w: &out}
	p.busy("only for those who wait")
	p.text("Booting")
	p.text("Booting")
	for i := range 3 {
		p.image(image.Progress{Step: 2, Steps: 3, Text: "Building", Done: i, Total: 3})
	}
	if _, err := io.WriteString(p.before(&out), "output\n"); err != nil {
		t.Fatal(err)
	}
	p.text("too late")
	p.close()
	if got, want := out.String(), "kvmlet: Booting\nkvmlet: [2/3] Building\noutput\n"; got != want {
		t.Errorf("progress is %q, want %q", got, want)
	}
}

// TestProgressBar is progress on a terminal. What it leaves there is a clean line, whatever it showed.
func TestProgressBar(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	p := &progress{w: &out, terminal: true}
	for i := range 4 {
		p.image(image.Progress{Step: 1, Steps: 2, Text: "Building", Done: i, Total: 3})
	}
	p.busy("Booting")
	p.close()
	shown := out.Len()
	p.text("too late")
	p.close()
	if out.Len() != shown {
		t.Errorf("after its end it says %q", out.String()[shown:])
	}
	if got := out.String(); !strings.Contains(got, "[1/2] Building") || !strings.Contains(got, "Booting") {
		t.Errorf("it shows %q", got)
	}
	if line := lastLine(out.String()); strings.TrimSpace(line) != "" {
		t.Errorf("it leaves %q behind", line)
	}
}

// lastLine is what a terminal shows in the line that the cursor is in, for text with carriage returns.
func lastLine(s string) string {
	s = s[strings.LastIndexByte(s, '\n')+1:]
	var line []rune
	at := 0
	for _, r := range s {
		if r == '\r' {
			at = 0
			continue
		}
		if at == len(line) {
			line = append(line, r)
		} else {
			line[at] = r
		}
		at++
	}
	return string(line)
}
