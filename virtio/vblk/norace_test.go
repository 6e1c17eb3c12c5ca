//go:build !race

package vblk

const raceEnabled = false
