package tail_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kvmlet/kvmlet/guest/tail"
)

func TestKeepsTheEnd(t *testing.T) {
	t.Parallel()
	const size = 100
	for _, step := range []int{1, 3, 99, 100, 101, 199, 200, 201, 1000} {
		b := tail.New(size)
		var all []byte
		for len(all) < 1200 {
			p := bytes.Repeat([]byte(fmt.Sprint(len(all)%7)), step)
			all = append(all, p...)
			if n, err := b.Write(p); n != step || err != nil {
				t.Fatalf("write of %d: %d, %v", step, n, err)
			}
			if got, want := b.String(), string(all[max(0, len(all)-size):]); got != want {
				t.Fatalf("after writes of %d, %q is kept, want %q", step, got, want)
			}
		}
	}
}

func TestLines(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		text string
		n    int
		want []string
	}{
		{"", 3, nil},
		{"\r\n\n ", 3, nil},
		{"one", 3, []string{"one"}},
		{"one\r\ntwo\r\n\r\n", 3, []string{"one", "two"}},
		{"one\n\ntwo\nthree\nfour", 3, []string{"two", "three", "four"}},
		{"one\n\ntwo\nthree", 3, []string{"", "two", "three"}},
	} {
		b := tail.New(1000)
		fmt.Fprint(b, c.text)
		if got := b.Lines(c.n); !slices.Equal(got, c.want) {
			t.Errorf("%q ends with %q, want %q", c.text, got, c.want)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	b := tail.New(64)
	var writers sync.WaitGroup
	for range 4 {
		writers.Go(func() {
			for range 1000 {
				fmt.Fprint(b, "word ")
			}
		})
	}
	for range 1000 {
		if s := b.String(); len(s) > 64 || strings.Trim(s, "word ") != "" {
			t.Errorf("%q is kept", s)
		}
	}
	writers.Wait()
	if got := b.Lines(1); len(got) != 1 || !strings.HasSuffix(got[0], "word word") {
		t.Errorf("it ends with %q", got)
	}
}
