package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// footprint is a process's resident memory without its guest's, in bytes.
type footprint struct {
	Total int64
	Anon  int64 // of it: heap, stacks, written data; the rest are pages of files, which processes share
}

// readFootprint reads the smaps of a process whose guest has the given memory in bytes.
func readFootprint(pid int, guest int64) (footprint, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return footprint{}, err
	}
	defer f.Close()
	return parseSmaps(f, guest)
}

// slack is by how much a mapping of guest RAM may be larger than the guest's memory, for alignment.
const slack = 4 << 20

// parseSmaps sums up the mappings of a proc_pid_smaps(5) file, but for the writable one of the guest's size, of which there
// must be exactly one.
func parseSmaps(r io.Reader, guest int64) (sum footprint, err error) {
	var size int64
	var writable, skip bool
	found := 0
	for s := bufio.NewScanner(r); ; {
		if !s.Scan() {
			if err = s.Err(); err == nil && found != 1 {
				err = fmt.Errorf("%d mappings look like %d MiB of guest memory, want one", found, guest>>20)
			}
			return sum, err
		}
		f := strings.Fields(s.Text())
		if len(f) < 2 {
			continue
		}
		if !strings.HasSuffix(f[0], ":") { // the head of the next mapping: addresses, permissions, ...
			writable = strings.HasPrefix(f[1], "rw")
			continue
		}
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			return sum, fmt.Errorf("smaps: %q: %w", s.Text(), err)
		}
		n := kib << 10
		switch f[0] {
		case "Size:":
			size = n
			if skip = writable && size >= guest && size <= guest+slack; skip {
				found++
			}
		case "Rss:":
			if !skip {
				sum.Total += n
			}
		case "Anonymous:":
			if !skip {
				sum.Anon += n
			}
		}
	}
}
