//go:build race

package blk_test

// raceEnabled is true under the race detector, where sync.Pool drops what it is given at random.
const raceEnabled = true
