package image

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"syscall"
)

// Key names what an entry of a Store was made from. Equal inputs give equal keys.
type Key [sha256.Size]byte

// KeyOf returns the key of parts. Their number and their borders count: KeyOf("ab", "c") is not KeyOf("a", "bc").
func KeyOf(parts ...string) Key {
	h := sha256.New()
	var n [8]byte
	for _, p := range parts {
		binary.LittleEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
	return Key(h.Sum(nil))
}

// StatKey returns a key for the content of the file at path without reading it: device, inode, size, and the times of
// the last change to its content and to its inode. It follows symbolic links.
func StatKey(path string) (Key, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return Key{}, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return Key{}, fmt.Errorf("stat %s: no inode number", path)
	}
	return KeyOf("stat", fmt.Sprint(st.Dev, st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec)), nil
}

// String returns the key in hexadecimal.
func (k Key) String() string { return hex.EncodeToString(k[:]) }

// parseKey is the inverse of String.
func parseKey(s string) (k Key, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(k) {
		return k, fmt.Errorf("%q is no key", s)
	}
	return Key(b), nil
}
