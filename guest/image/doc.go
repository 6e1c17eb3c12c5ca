// Package image finds and makes what a guest boots from: the pinned kernel, the initramfs with its programs, and the
// small archive that carries the agent.
//
// Nothing is downloaded here. The kernel and u-root's sources come from Go's module cache, the other programs from the
// machine's Debian packages; "make setup" puts all of them there. What is made is kept in a Store, a folder in the
// user's cache, so that the static kvmlet binary works later from any directory, without Go and without its sources.
//
// The initramfs has the merged layout of a Debian system: bin, sbin, lib and lib64 are links into usr. It holds no
// /init. A guest gets one from a second archive, which AgentSegment makes of a running executable and which is placed
// right behind the first one in guest memory; the kernel unpacks one after the other.
package image

import (
	_ "github.com/gokrazy/kernel.amd64" // keeps the kernel's version and checksum in go.mod and go.sum
)
