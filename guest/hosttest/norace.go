//go:build !race

package hosttest

// Race is true under the race detector, where sync.Pool drops what it is given at random, and goroutines are made anew.
const Race = false
