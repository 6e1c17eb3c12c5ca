package cli

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestEscape(t *testing.T) {
	t.Parallel()
	cases := []struct {
		in, want string
		left     bool
	}{
		{"ls\r", "ls\r", false},
		{"a\x01xb", "a", true},
		{"a\x01Xb", "a", true},
		{"\x01\x01x", "\x01x", false},
		{"\x01ax", "\x01x", false},
		{"\x01b", "\x01b", false},
		{"\x01", "", false}, // half an escape at the end of input
		{"", "", false},
	}
	for _, c := range cases {
		for name, r := range map[string]io.Reader{
			"at once": strings.NewReader(c.in), "by bytes": iotest.OneByteReader(strings.NewReader(c.in)),
		} {
			left := 0
			e := &escapeReader{r: r, leave: func() { left++ }}
			got, err := io.ReadAll(iotest.OneByteReader(e))
			if err != nil || string(got) != c.want || left != map[bool]int{true: 1}[c.left] {
				t.Errorf("%q %s: passed %q, left %d times, %v", c.in, name, got, left, err)
			}
		}
	}
	long := bytes.Repeat([]byte("x\x01b"), 10_000)
	got, err := io.ReadAll(&escapeReader{r: bytes.NewReader(long), leave: func() { t.Error("left") }})
	if err != nil || !bytes.Equal(got, long) {
		t.Errorf("long input came out as %d bytes of %d, %v", len(got), len(long), err)
	}
}

func TestMargin(t *testing.T) {
	t.Parallel()
	if got, want := margin([]string{"two", "", "the end"}), "  | two\n  | the end\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := margin([]string{"a\tb\x1b]0;x\a\x1b[2J", "\x9b1m\u202eok"}), "  | a\tb?]0;x??[2J\n  | \ufffd1m?ok\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := margin(nil); got != "" {
		t.Errorf("an empty console ended with %q", got)
	}
}
