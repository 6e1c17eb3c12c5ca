package cli

import (
	"fmt"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"

	"github.com/kvmlet/kvmlet/guest/image"
)

// progress shows long work on standard error: a bar on a terminal, a line for each step elsewhere. It is silent until
// there is something to tell.
type progress struct {
	w        *os.File
	terminal bool
	bar      *progressbar.ProgressBar
	last     string
}

func newProgress(w *os.File) *progress { return &progress{w: w, terminal: isTerminal(w)} }

// text announces a step.
func (p *progress) text(s string) { p.step(s, 0, 0) }

// image shows the progress of an image build.
func (p *progress) image(i image.Progress) {
	p.step(fmt.Sprintf("[%d/%d] %s", i.Step, i.Steps, i.Text), i.Done, i.Total)
}

func (p *progress) step(s string, done, total int) {
	if !p.terminal {
		if s != p.last {
			fprintf(p.w, "kvmlet: %s\n", s)
			p.last = s
		}
		return
	}
	if total == 0 {
		total = -1 // a spinner
	}
	if p.bar == nil {
		p.bar = progressbar.NewOptions(total, progressbar.OptionSetWriter(p.w), progressbar.OptionClearOnFinish(),
			progressbar.OptionThrottle(50*time.Millisecond), progressbar.OptionSetWidth(30), progressbar.OptionSpinnerType(14))
	}
	if s != p.last {
		p.bar.Describe(s)
		p.last = s
	}
	if p.bar.GetMax() != total {
		p.bar.ChangeMax(total)
	}
	_ = p.bar.Set(done) // only the terminal can fail
}

// close takes the bar off the terminal.
func (p *progress) close() {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
}
