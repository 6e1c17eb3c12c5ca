package cli

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/cheggaaa/pb/v3"

	"github.com/kvmlet/kvmlet/guest/image"
)

// progress shows long work on standard error: a bar on a terminal, a line for each step elsewhere. It is silent until
// there is something to tell. Its methods may be called from any goroutine.
type progress struct {
	w        io.Writer
	terminal bool

	mu     sync.Mutex // guards what follows
	bar    *pb.ProgressBar
	last   string
	total  int
	closed bool
}

func newProgress(w *os.File) *progress { return &progress{w: w, terminal: isTerminal(w)} }

// text announces a step.
func (p *progress) text(s string) { p.step(s, 0, 0) }

// busy says on a terminal why nothing happens there. Elsewhere nobody waits.
func (p *progress) busy(s string) {
	if p.terminal {
		p.step(s, 0, 0)
	}
}

// image shows the progress of an image build.
func (p *progress) image(i image.Progress) {
	p.step(fmt.Sprintf("[%d/%d] %s", i.Step, i.Steps, i.Text), i.Done, i.Total)
}

// step shows s, with a bar if total is known. It does nothing after close.
func (p *progress) step(s string, done, total int) {
	s = escaped(s, "") // there may be a file's name in it
	p.mu.Lock()
	defer p.mu.Unlock()
	news := s != p.last
	p.last = s
	switch {
	case p.closed:
		return
	case !p.terminal:
		if news {
			fprintf(p.w, "kvmlet: %s\n", s)
		}
		return
	}
	if p.bar == nil || news || (total > 0) != (p.total > 0) {
		p.clear()
		p.bar = newBar(p.w, s, total > 0)
		p.bar.SetTotal(int64(total)).SetCurrent(int64(done)).Write().Start() // from the first tick on its goroutine draws it
	}
	p.total = total
	p.bar.SetTotal(int64(total)).SetCurrent(int64(done))
}

// How long work looks: a bar where its end is known, and something that turns elsewhere.
const (
	barLook     = `{{string . "text"}} {{percent . "%3.0f%%"}} {{bar . "|" "█" "█" " " "|"}}  [{{etime .}}:{{rtime .}}]`
	spinnerLook = `{{cycle . "⠋" "⠙" "⠹" "⠸" "⠼" "⠴" "⠦" "⠧" "⠇" "⠏"}} {{string . "text"}}  [{{etime .}}]`
	barWidth    = 80 // columns, with the text
	barRefresh  = 100 * time.Millisecond
)

func newBar(w io.Writer, text string, known bool) *pb.ProgressBar {
	b := pb.New(0).Set("text", text).SetMaxWidth(barWidth).SetRefreshRate(barRefresh).SetTemplateString(spinnerLook)
	if known {
		b.SetTemplateString(barLook)
	}
	// SetWriter looks at what is set by then.
	b.Set(pb.Terminal, true).Set(pb.Color, false).Set(pb.CleanOnFinish, true).Set(pb.TimeRound, time.Second).SetWriter(w)
	if b.Width() <= 0 { // a terminal that does not know its size
		b.SetWidth(barWidth)
	}
	return b
}

// clear takes the bar off the terminal and ends its goroutine.
func (p *progress) clear() {
	if p.bar != nil {
		p.bar.Finish()
		p.bar = nil
	}
}

// close takes the bar off the terminal for good.
func (p *progress) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	p.closed = true
}

// before returns a writer that closes p ahead of the first byte.
func (p *progress) before(w io.Writer) io.Writer { return &afterProgress{w: w, p: p} }

type afterProgress struct {
	w    io.Writer
	p    *progress
	once sync.Once
}

func (a *afterProgress) Write(b []byte) (int, error) {
	a.once.Do(a.p.close)
	return a.w.Write(b)
}
