package guesttest

import (
	"bufio"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

// holdings counts what this process holds of the kinds that a VM needs: goroutines by what they run, descriptors and
// mappings by what they are of. What a test itself opens, such as files and sockets, is not in it.
type holdings map[string]int

// live counts the guests of this process, since those that run beside another are not its leftovers.
var live struct {
	sync.Mutex
	guests int
	before holdings // when there was none
}

// watch is called before a guest is made. It returns what the process held when there was none.
func watch() holdings {
	live.Lock()
	defer live.Unlock()
	if live.guests == 0 {
		live.before = count()
	}
	live.guests++
	return live.before
}

// leaveTime bounds the wait for goroutines that have done their work but not returned yet.
const leaveTime = 5 * time.Second

// checkLeftovers is called when a guest is closed. The last of several answers for all.
func (g *Guest) checkLeftovers(before holdings) {
	g.tb.Helper()
	live.Lock()
	defer live.Unlock()
	live.guests--
	if live.guests > 0 {
		return
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(leaveTime); ; <-tick.C {
		left := count().beyond(before)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			g.tb.Errorf("closed guests left behind:\n\t%s", strings.Join(left, "\n\t"))
			return
		}
	}
}

// beyond lists what h has more of than before.
func (h holdings) beyond(before holdings) (list []string) {
	for _, what := range slices.Sorted(maps.Keys(h)) {
		if n := h[what] - before[what]; n > 0 {
			list = append(list, fmt.Sprintf("%d %s", n, what))
		}
	}
	return list
}

func count() holdings {
	h := make(holdings)
	h.countGoroutines()
	h.countFiles()
	h.countMappings()
	return h
}

const module = "github.com/kvmlet/kvmlet/"

// countGoroutines counts those that run kvmlet's code, by the outermost function of that, apart from tests themselves.
func (h holdings) countGoroutines() {
	buf := make([]byte, 64<<10)
	n := runtime.Stack(buf, true)
	for n == len(buf) {
		buf = make([]byte, 2*len(buf))
		n = runtime.Stack(buf, true)
	}
	for stack := range strings.SplitSeq(string(buf[:n]), "\n\n") {
		if strings.Contains(stack, "\ntesting.tRunner(") || strings.Contains(stack, "\ntesting.(*M).Run(") {
			continue
		}
		outermost := ""
		for line := range strings.Lines(stack) {
			if name, ok := strings.CutPrefix(line, module); ok {
				outermost = name[:strings.LastIndex(name, "(")] // without arguments
			}
		}
		if outermost != "" {
			h["goroutines of "+outermost]++
		}
	}
}

// countFiles counts KVM's objects, eventfds and taps.
func (h holdings) countFiles() {
	list, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range list {
		to, _ := os.Readlink(fd) // one that is closed by now is not counted
		for _, kind := range []string{"/dev/kvm", "anon_inode:kvm", "anon_inode:[eventfd]", "/dev/net/tun"} {
			if strings.HasPrefix(to, kind) {
				h["descriptors of "+to]++
			}
		}
	}
}

// countMappings counts those of KVM's objects.
func (h holdings) countMappings() {
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if _, of, ok := strings.Cut(s.Text(), "anon_inode:kvm"); ok {
			h["mappings of anon_inode:kvm"+of]++
		}
	}
}
