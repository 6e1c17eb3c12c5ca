package main

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestFootprint(t *testing.T) {
	t.Parallel()
	const smaps = `00400000-00900000 r-xp 00000000 00:15 12345                              /usr/bin/vmm
Size:               5120 kB
Rss:                4000 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Rss:                 100 kB
Anonymous:           100 kB
7f0000200000-7f0001200000 rw-p 00000000 00:00 0
Rss:                8192 kB
Anonymous:          8192 kB
7f0001200000-7f0002200000 rw-p 00000000 00:15 777                        /initrd of a guest
Rss:                4096 kB
Anonymous:             0 kB
7f0003000000-7f0043000000 ---p 00000000 00:00 0
Rss:                   0 kB
`
	list, err := parseSmaps(strings.NewReader(smaps))
	if err != nil {
		t.Fatal(err)
	}
	got, err := withoutGuest(list, 32<<20)
	if want := (footprint{Total: 4100 << 10, Anon: 100 << 10}); err != nil || got != want {
		t.Errorf("32 MiB in two mappings: %+v, %v, want %+v", got, err, want)
	}
	if got, err := withoutGuest(list, 1<<30); err == nil {
		t.Errorf("1 GiB that is not writable: %+v, want an error", got)
	}
}

func TestParseEvent(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]event{
		"       CPU 0/KVM-1234    [001] d..1.    12.345678: kvm_entry: vcpu 0, rip 0xfff0 intr_info 0x0": {
			at: 12*time.Second + 345678*time.Microsecond, tid: 1234, name: "kvm_entry", text: "vcpu 0, rip 0xfff0 intr_info 0x0",
		},
		"           <...>-77      [000] .....  1000.000001: sched_process_exec: filename=/a b pid=77 old_pid=77": {
			at: 1000*time.Second + time.Microsecond, tid: 77, name: "sched_process_exec", text: "filename=/a b pid=77 old_pid=77",
		},
		"CPU:1 [LOST 12 EVENTS]": {},
	} {
		if got, ok := parseEvent(s); got != want || ok != (want != event{}) {
			t.Errorf("%q: %+v, %v, want %+v", s, got, ok, want)
		}
	}
}

func TestPhases(t *testing.T) {
	t.Parallel()
	got := phases(100, []event{
		{at: 110, name: "m2"}, {at: 130, name: "m3"}, {at: 135, name: "m2"}, {at: 160, name: "kvm_entry"},
	})
	want := []phase{{"exec", 10}, {milestones[2], 20}, {milestones[3], 30}}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// The table that is read has no official format; a new Go may change it.
func TestFunctionOffsets(t *testing.T) {
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	offsets, err := functionOffsets(exe)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"runtime.main", module + "scripts/bench.functionOffsets"} {
		if offsets[name] == 0 {
			t.Errorf("no function %s among %d", name, len(offsets))
		}
	}
}
