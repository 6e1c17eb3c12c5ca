package net

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// ErrSpec reports a description of a network card that cannot be understood.
var ErrSpec = errors.New("net: bad network description")

// Spec describes a network card: KIND[=NAME][,OPTION[=VALUE]]..., for example tap=vm0,hostip=192.168.77.1/24. Whoever
// understands an option takes it; what is left when the backend opens is a mistake.
type Spec struct {
	Kind    string // the backend's prefix
	Name    string // what it connects to; may be empty
	options map[string]string
}

// ParseSpec reads a description. Errors wrap ErrSpec.
func ParseSpec(s string) (*Spec, error) {
	head, rest, more := strings.Cut(s, ",")
	spec := &Spec{options: map[string]string{}}
	spec.Kind, spec.Name, _ = strings.Cut(head, "=")
	if spec.Kind == "" {
		return nil, fmt.Errorf("%w %q: it starts with the kind of network, as in tap=NAME", ErrSpec, s)
	}
	for more {
		var option string
		option, rest, more = strings.Cut(rest, ",")
		key, value, _ := strings.Cut(option, "=")
		if key == "" {
			return nil, fmt.Errorf("%w %q: empty option", ErrSpec, s)
		}
		if _, twice := spec.options[key]; twice {
			return nil, fmt.Errorf("%w %q: option %s appears twice", ErrSpec, s, key)
		}
		spec.options[key] = value
	}
	return spec, nil
}

// Take removes an option and returns its value.
func (s *Spec) Take(option string) (value string, ok bool) {
	value, ok = s.options[option]
	delete(s.options, option)
	return value, ok
}

// Unknown reports options that nobody took, by an error that wraps ErrSpec.
func (s *Spec) Unknown() error {
	if len(s.options) == 0 {
		return nil
	}
	left := slices.Sorted(maps.Keys(s.options))
	return fmt.Errorf("%w: %s does not know the option %s", ErrSpec, s.Kind, strings.Join(left, ", "))
}

// OpenFunc opens a backend. It takes the options that it knows from s and checks s.Unknown before it changes anything.
type OpenFunc func(s *Spec) (Backend, error)

// Registry maps prefixes to backends. The program that puts a VM together fills it; there is no global one.
type Registry map[string]OpenFunc

// Open opens the backend that s.Kind names.
func (r Registry) Open(s *Spec) (Backend, error) {
	open, ok := r[s.Kind]
	if !ok {
		return nil, fmt.Errorf("%w: unknown kind %q, want one of: %s",
			ErrSpec, s.Kind, strings.Join(slices.Sorted(maps.Keys(r)), ", "))
	}
	return open(s)
}

// Peek returns an option's value and leaves it in place for whoever takes it.
func (s *Spec) Peek(option string) (value string, ok bool) {
	value, ok = s.options[option]
	return value, ok
}
