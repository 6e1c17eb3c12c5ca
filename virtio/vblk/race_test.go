//go:build race

package vblk

// raceEnabled is true under the race detector, where sync.Pool drops what it is given at random.
const raceEnabled = true
