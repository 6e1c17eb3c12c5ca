//go:build race

package qcow2

// raceEnabled says that the race detector is on, which allocates.
const raceEnabled = true
