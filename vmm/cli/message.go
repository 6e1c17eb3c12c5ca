package cli

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// escaped returns s with Go's escapes in place of what a terminal would obey, or can't show: file names may hold
// anything. Characters in keep stay as they are.
func escaped(s, keep string) string {
	var b strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		if c := s[:n]; strconv.IsPrint(r) && (r != utf8.RuneError || n > 1) || strings.Contains(keep, c) {
			b.WriteString(c)
		} else {
			q := strconv.Quote(c)
			b.WriteString(q[1 : len(q)-1])
		}
		s = s[n:]
	}
	return b.String()
}

// quoted is a name as a terminal can show it: in quotes, with escapes, if it holds what is not printable, or could be taken
// for such a name.
func quoted(s string) string {
	if q := strconv.Quote(s); q[1:len(q)-1] != s || s == "" {
		return q
	}
	return s
}

// message is the text of err as a terminal can show it, in one line unless lines are to be kept. Errors that were joined
// stand behind each other then, instead of below.
func message(err error, keepLines bool) string {
	if keepLines {
		return escaped(err.Error(), "\n\t")
	}
	var parts []error
	switch e := any(err).(type) { // not errors.As: this goes down step by step
	case interface{ Unwrap() error }:
		parts = []error{e.Unwrap()}
	case interface{ Unwrap() []error }:
		parts = e.Unwrap()
	}
	var b strings.Builder
	rest := err.Error()
	for _, part := range parts {
		if part == nil {
			continue
		}
		before, after, found := strings.Cut(rest, part.Error())
		if !found { // it is said in other words
			continue
		}
		if before == "\n" { // as errors.Join puts it
			before = "; "
		}
		b.WriteString(escaped(before, ""))
		b.WriteString(message(part, false))
		rest = after
	}
	return b.String() + escaped(rest, "")
}
