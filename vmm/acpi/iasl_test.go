package acpi

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/guest/hosttest"
)

// TestIASL lets ACPI's reference compiler take the tables apart and put them together again: without errors or warnings,
// and to the same bytes.
func TestIASL(t *testing.T) {
	t.Parallel()
	iasl := hosttest.Tool(t, "iasl")
	large := testConfig(300)
	large.PCI.High = Window{1 << 38, 1 << 37}
	large.PCI.LastBus = 15
	small := testConfig(1)
	small.Serial, small.RTC, small.Pvpanic, small.ResetPort = nil, Legacy{}, 0, 0
	for name, c := range map[string]Config{"usual": testConfig(2), "large": large, "small": small} {
		for sig, table := range build(t, c) {
			if sig == "RSDP" {
				continue // iasl does not take an RSDP by itself
			}
			t.Run(name+" "+sig, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				run := func(args ...string) string {
					cmd := exec.CommandContext(t.Context(), iasl, args...)
					cmd.Dir = dir
					out, err := cmd.CombinedOutput()
					if err != nil {
						t.Fatalf("iasl %s: %v\n%s", strings.Join(args, " "), err, out)
					}
					return string(out)
				}
				if err := os.WriteFile(filepath.Join(dir, "in.aml"), table, 0o600); err != nil {
					t.Fatal(err)
				}
				if out := run("-d", "in.aml"); regexp.MustCompile(`(?i)\b(error|warning|invalid|incorrect)`).MatchString(out) {
					t.Errorf("taken apart:\n%s", out)
				}
				source, err := os.ReadFile(filepath.Join(dir, "in.dsl"))
				if err != nil {
					t.Fatal(err)
				}
				if bytes.Contains(source, []byte("Incorrect checksum")) || bytes.Contains(source, []byte("Invalid")) {
					t.Errorf("taken apart:\n%s", source)
				}
				// -oa: no optimization, which would choose other encodings of names.
				out := run("-oa", "-p", "out", "in.dsl")
				if !strings.Contains(out, "0 Errors, 0 Warnings") {
					t.Errorf("put together:\n%s\n%s", out, source)
				}
				again, err := os.ReadFile(filepath.Join(dir, "out.aml"))
				if err != nil {
					t.Fatal(err)
				}
				if sig == "FACS" {
					if !bytes.Equal(again, table) {
						t.Errorf("not the same bytes: %x, %x", again, table)
					}
					return
				}
				// iasl signs its own work: creator, its revision and so the checksum.
				for _, b := range [][]byte{again, table} {
					b[9] = 0
					clear(b[28:36])
				}
				if !bytes.Equal(again, table) {
					t.Errorf("not the same bytes:\n%x\n%x", again, table)
				}
			})
		}
	}
}
