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

func TestTail(t *testing.T) {
	t.Parallel()
	var through bytes.Buffer
	tl := &tail{w: &through}
	for i := range 5000 {
		if _, err := tl.Write([]byte("line " + strings.Repeat("x", i%50) + "\r\n")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tl.Write([]byte("\n\nthe end")); err != nil {
		t.Fatal(err)
	}
	if len(tl.buf) > tailSize {
		t.Errorf("%d bytes are kept", len(tl.buf))
	}
	if !bytes.HasSuffix(through.Bytes(), []byte("the end")) {
		t.Error("output was not passed on")
	}
	last := string(tl.last(3))
	if !strings.HasSuffix(last, "  | the end\n") || strings.Contains(last, "\r") || strings.Count(last, "\n") > 3 {
		t.Errorf("the last lines are %q", last)
	}
	if got := (&tail{}).last(3); len(got) != 0 {
		t.Errorf("an empty console ended with %q", got)
	}
}
