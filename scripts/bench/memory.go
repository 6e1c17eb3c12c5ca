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

// mapping is one of a process's.
type mapping struct {
	start, end uint64
	writable   bool
	rss, anon  int64
}

// readFootprint reads the smaps of a process whose guest has the given memory in bytes.
func readFootprint(pid int, guest int64) (footprint, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return footprint{}, err
	}
	defer f.Close()
	list, err := parseSmaps(f)
	if err != nil {
		return footprint{}, err
	}
	return withoutGuest(list, uint64(guest))
}

// parseSmaps reads a proc_pid_smaps(5) file.
func parseSmaps(r io.Reader) (list []mapping, err error) {
	s := bufio.NewScanner(r)
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) < 2 {
			continue
		}
		if !strings.HasSuffix(f[0], ":") { // the head of the next mapping: addresses, permissions, ...
			m := mapping{writable: strings.HasPrefix(f[1], "rw")}
			if _, err := fmt.Sscanf(f[0], "%x-%x", &m.start, &m.end); err != nil {
				return nil, fmt.Errorf("smaps: %q: %w", s.Text(), err)
			}
			list = append(list, m)
			continue
		}
		if len(list) == 0 || f[0] != "Rss:" && f[0] != "Anonymous:" {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("smaps: %q: %w", s.Text(), err)
		}
		if last := &list[len(list)-1]; f[0] == "Rss:" {
			last.rss = kib << 10
		} else {
			last.anon = kib << 10
		}
	}
	return list, s.Err()
}

// slack is by how much the mappings of guest RAM may be larger than the guest's memory, for alignment.
const slack = 4 << 20

// withoutGuest sums up all mappings but those of guest RAM: the shortest row of writable mappings, one right behind the
// other, that is as large as the guest's memory. It is a row and not one mapping where files are mapped into guest RAM.
func withoutGuest(list []mapping, guest uint64) (sum footprint, err error) {
	best := uint64(slack + 1)
	from, to := 0, 0
	for i := range list {
		for j := i; j < len(list) && list[j].writable && (j == i || list[j].start == list[j-1].end); j++ {
			size := list[j].end - list[i].start
			if size >= guest && size-guest < best {
				best, from, to = size-guest, i, j+1
			}
			if size >= guest {
				break
			}
		}
	}
	if to == 0 {
		return sum, fmt.Errorf("no mapping looks like %d MiB of guest memory", guest>>20)
	}
	for i, m := range list {
		if i < from || i >= to {
			sum.Total += m.rss
			sum.Anon += m.anon
		}
	}
	return sum, nil
}
