package guesttest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/guest/lab"
	"github.com/kvmlet/kvmlet/guest/lab/labtest"
	"github.com/kvmlet/kvmlet/guest/tail"
)

// failing is a test that has failed; what it logs is kept.
type failing struct {
	testing.TB
	logged strings.Builder
}

func (*failing) Failed() bool                   { return true }
func (f *failing) Log(args ...any)              { fmt.Fprintln(&f.logged, args...) }
func (f *failing) Logf(format string, a ...any) { fmt.Fprintf(&f.logged, format+"\n", a...) }

// TestHungGuestIsLookedAt has a kernel that says a word and hangs with interrupts off, until its test's time is over.
func TestHungGuestIsLookedAt(t *testing.T) {
	// mov dx, 0x3f8; mov al, '!'; out dx, al; cli; jmp to itself
	hang := []byte{0x66, 0xBA, 0xF8, 0x03, 0xB0, '!', 0xEE, 0xFA, 0xEB, 0xFE}
	kernel := filepath.Join(t.TempDir(), "hang")
	if err := os.WriteFile(kernel, elf(hang), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithCancelCause(t.Context())
	defer end(nil)
	tb := &failing{TB: t}
	g := &Guest{tb: tb, ctx: ctx, console: tail.New(consoleSize)}
	booted := make(chan error, 1)
	go func() { booted <- g.boot(&Config{Kernel: kernel, Bare: true}) }()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); g.console.String() == ""; <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("the kernel says nothing")
		}
	}
	end(errTime)
	if err := <-booted; !errors.Is(err, errTime) {
		t.Errorf("boot: %v", err)
	}
	g.close()
	log := tb.logged.String()
	const where = "vCPU 0 runs at RIP 0x200008, RFLAGS 0x2, CPL 0"
	if !strings.Contains(log, where) || !strings.Contains(log, "hangs") || strings.Contains(log, labtest.Hung) != lab.Inside() ||
		!strings.Contains(log, "\n"+labtest.NoTime+"\n") {
		t.Errorf("%q", log)
	}
}

// elf wraps code in a kernel: one segment that is loaded at 2 MiB and entered at its start.
func elf(code []byte) []byte {
	const base, header, programHeader = 2 << 20, 64, 56
	var b bytes.Buffer
	for _, part := range []any{
		[]byte{0x7F, 'E', 'L', 'F', 2, 1, 1, 0}, [8]byte{},
		uint16(2), uint16(62), uint32(1), // ET_EXEC, EM_X86_64
		uint64(base), uint64(header), uint64(0), uint32(0),
		uint16(header), uint16(programHeader), uint16(1), [3]uint16{},
		uint32(1), uint32(5), uint64(header + programHeader), [2]uint64{base, base}, // PT_LOAD, read and execute
		[2]uint64{uint64(len(code)), 4096}, uint64(4096),
		code,
	} {
		_ = binary.Write(&b, binary.LittleEndian, part) // a buffer takes all
	}
	return b.Bytes()
}
