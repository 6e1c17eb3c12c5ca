package net

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
)

// ErrMAC reports an address that a network card cannot have.
var ErrMAC = errors.New("net: bad MAC address")

// MAC is an Ethernet address.
type MAC [6]byte

// RandomMAC returns a random unicast address from the locally administered range (IEEE 802, 8.4).
func RandomMAC() MAC {
	var m MAC
	rand.Read(m[:]) // never fails
	m[0] = m[0]&^1 | 2
	return m
}

// ParseMAC reads an address of the form 52:54:00:12:34:56. Errors wrap ErrMAC.
func ParseMAC(s string) (MAC, error) {
	var m MAC
	if len(s) != 3*len(m)-1 {
		return MAC{}, fmt.Errorf("%w %q: want six pairs of hexadecimal digits, as in 52:54:00:12:34:56", ErrMAC, s)
	}
	for i := range m {
		_, err := hex.Decode(m[i:i+1], []byte(s[3*i:3*i+2]))
		if err != nil || (i > 0 && s[3*i-1] != ':') {
			return MAC{}, fmt.Errorf("%w %q: want six pairs of hexadecimal digits, as in 52:54:00:12:34:56", ErrMAC, s)
		}
	}
	return m, m.Check()
}

// Check reports an address that is zero, multicast or broadcast by an error that wraps ErrMAC.
func (m MAC) Check() error {
	switch {
	case m == MAC{}:
		return fmt.Errorf("%w %v: it is zero", ErrMAC, m)
	case m[0]&1 != 0:
		return fmt.Errorf("%w %v: it is a multicast address, and a card needs one of its own: make the first byte even", ErrMAC, m)
	}
	return nil
}

// String formats m as 52:54:00:12:34:56.
func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}
