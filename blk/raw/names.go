package raw

import (
	"fmt"
	"slices"
	"strings"
)

// nameOf returns the name of option value i.
func nameOf(names []string, i int) string {
	if i < len(names) {
		return names[i]
	}
	return fmt.Sprintf("unknown (%d)", i)
}

// parseName returns the index of name. The error lists what may be said.
func parseName(option string, names []string, name string) (int, error) {
	if i := slices.Index(names, name); i >= 0 {
		return i, nil
	}
	last := len(names) - 1
	return 0, fmt.Errorf("%s=%s: want %s or %s", option, name, strings.Join(names[:last], ", "), names[last])
}
