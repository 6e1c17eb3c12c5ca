package vblk

import (
	"bytes"
	"encoding/binary"
	"math"
	"slices"
	"testing"

	"github.com/kvmlet/kvmlet/iov"
)

// ranges builds the payload of a discard, of triples of sector, number of sectors, and flags.
func ranges(triples ...uint64) (p []byte) {
	for t := range slices.Chunk(triples, 3) {
		p = binary.LittleEndian.AppendUint64(p, t[0])
		p = binary.LittleEndian.AppendUint32(p, uint32(t[1]))
		p = binary.LittleEndian.AppendUint32(p, uint32(t[2]))
	}
	return p
}

func TestRanges(t *testing.T) {
	t.Parallel()
	const discard, zeroes = typeDiscard, typeWriteZeroes
	many := func(n int) []byte { return bytes.Repeat(ranges(1, 1, 0), n) }
	for _, tc := range []struct {
		name      string
		typ       uint32
		payload   []byte
		room      int
		status    byte
		malformed bool
		changes   []string
	}{
		{name: "discard", typ: discard, payload: ranges(3, 5, 0), changes: []string{"discard 3+5"}},
		{name: "discard everything", typ: discard, payload: ranges(0, 64, 0), changes: []string{"discard 0+64"}},
		{name: "discard three ranges", typ: discard, payload: ranges(3, 5, 0, 63, 1, 0, 4, 2, 0),
			changes: []string{"discard 3+5", "discard 63+1", "discard 4+2"}},
		{name: "discard nothing", typ: discard, payload: ranges(64, 0, 0)},
		{name: "discard with unmap", typ: discard, payload: ranges(3, 5, 1), status: statusUnsupp},
		{name: "discard with an unknown flag", typ: discard, payload: ranges(3, 5, 2), status: statusUnsupp},
		{name: "zeroes", typ: zeroes, payload: ranges(3, 5, 0), changes: []string{"zero 3+5"}},
		{name: "zeroes with unmap", typ: zeroes, payload: ranges(3, 5, 1), changes: []string{"unmap 3+5"}},
		{name: "zeroes in two ways", typ: zeroes, payload: ranges(3, 5, 1, 9, 1, 0), changes: []string{"unmap 3+5", "zero 9+1"}},
		{name: "zeroes with an unknown flag", typ: zeroes, payload: ranges(3, 5, 2), status: statusUnsupp},
		{name: "zeroes with the highest flag", typ: zeroes, payload: ranges(3, 5, 1<<31), status: statusUnsupp},
		{name: "zeroes, the second with an unknown flag", typ: zeroes, payload: ranges(3, 5, 0, 1, 1, 4), status: statusUnsupp},
		// Both are wrong: the flag decides (virtio 1.2, 5.2.6.2: MUST).
		{name: "an unknown flag beyond the end", typ: zeroes, payload: ranges(65, 5, 4), status: statusUnsupp},

		{name: "beyond the end", typ: discard, payload: ranges(64, 1, 0), status: statusIOErr, malformed: true},
		{name: "across the end", typ: zeroes, payload: ranges(63, 2, 0), status: statusIOErr, malformed: true},
		{name: "the second across the end", typ: zeroes, payload: ranges(0, 2, 0, 63, 2, 0), status: statusIOErr, malformed: true},
		{name: "nothing beyond the end", typ: zeroes, payload: ranges(65, 0, 0), status: statusIOErr, malformed: true},
		{name: "sector at 2^55", typ: zeroes, payload: ranges(1<<55, 1, 0), status: statusIOErr, malformed: true},
		{name: "sector at 2^54", typ: discard, payload: ranges(1<<54, 1, 0), status: statusIOErr, malformed: true},
		{name: "last sector of all", typ: discard, payload: ranges(math.MaxUint64, 1, 0), status: statusIOErr, malformed: true},
		{name: "last sector of all, end wraps", typ: zeroes, payload: ranges(math.MaxUint64, 2, 0), status: statusIOErr, malformed: true},
		{name: "most sectors of all", typ: zeroes, payload: ranges(0, math.MaxUint32, 0), status: statusIOErr, malformed: true},
		{name: "no range", typ: discard, status: statusIOErr, malformed: true},
		{name: "half a range", typ: discard, payload: ranges(0, 1, 0)[:8], status: statusIOErr, malformed: true},
		{name: "a range and a byte", typ: zeroes, payload: append(ranges(0, 1, 0), 0), status: statusIOErr, malformed: true},
		{name: "64 ranges", typ: zeroes, payload: many(64), changes: slices.Repeat([]string{"zero 1+1"}, 64)},
		{name: "65 ranges", typ: zeroes, payload: many(65), status: statusIOErr, malformed: true},
		{name: "100000 ranges", typ: discard, payload: many(100000), status: statusIOErr, malformed: true},
		{name: "room for an answer", typ: discard, payload: ranges(0, 1, 0), room: 16, status: statusIOErr, malformed: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := newMemory(64)
			copy(m.data, pattern(len(m.data), 7))
			r := start(t, setup{memory: m})
			status, written := r.request(tc.typ, math.MaxUint64, tc.payload, space(tc.room)) // the header's sector says nothing
			if status != tc.status || written != 1 || !slices.Equal(m.changed(), tc.changes) {
				t.Errorf("status %d, %d bytes written, %v", status, written, m.changed())
			}
			want := Counters{}
			if tc.malformed {
				want.Malformed = 1
			}
			if tc.status == statusUnsupp {
				want.Unsupported = 1
			}
			if c := r.dev.Counters(); c != want {
				t.Errorf("counters %+v, want %+v", c, want)
			}
			r.alive()
		})
	}
}

// One range may be as long as the configuration says, and no longer, on the largest disk.
func TestLongestRange(t *testing.T) {
	t.Parallel()
	m := &memory{void: 1 << 50}
	r := start(t, setup{memory: m})
	for sectors, want := range map[uint64]byte{maxRangeSectors: statusOK, maxRangeSectors + 1: statusIOErr} {
		if status, _ := r.request(typeDiscard, 0, ranges(1, sectors, 0), nil); status != want {
			t.Errorf("%d sectors: status %d", sectors, status)
		}
	}
	if c := m.changed(); !slices.Equal(c, []string{"discard 1+4194304"}) {
		t.Error(c)
	}
}

func TestRangesOfReadOnlyDisk(t *testing.T) {
	t.Parallel()
	r := start(t, setup{readOnly: true})
	for _, typ := range []uint32{typeDiscard, typeWriteZeroes} {
		if status, written := r.request(typ, 0, ranges(0, 1, 0), nil); status != statusIOErr || written != 1 {
			t.Errorf("type %d: status %d, %d bytes written", typ, status, written)
		}
		if status, _ := r.request(typ, 0, ranges(0, 1, 2), nil); status != statusUnsupp {
			t.Errorf("type %d with an unknown flag: status %d", typ, status)
		}
	}
	if c := r.memory.changed(); len(c) != 0 {
		t.Error(c)
	}
}

// A failure ends a request: later ranges are left alone.
func TestRangesFail(t *testing.T) {
	t.Parallel()
	m := newMemory(64)
	m.hold = func(off int64) { m.fail.Store(off == 512) }
	r := start(t, setup{memory: m})
	status, _ := r.request(typeWriteZeroes, 0, ranges(0, 1, 0, 1, 1, 0, 2, 1, 0), nil)
	if c := m.changed(); status != statusIOErr || !slices.Equal(c, []string{"zero 0+1"}) {
		t.Errorf("status %d, %v", status, c)
	}
	r.alive()
}

// A reset comes between two ranges.
func TestResetStopsBetweenRanges(t *testing.T) {
	t.Parallel()
	m := newMemory(64)
	entered, release := make(chan struct{}, 64), make(chan struct{})
	m.hold = func(int64) {
		entered <- struct{}{}
		<-release
	}
	r := start(t, setup{memory: m})
	r.Add([][]byte{header(typeDiscard, 0), ranges(0, 1, 0, 1, 1, 0, 2, 1, 0)}, [][]byte{space(1)})
	r.Kick()
	<-entered
	r.resetHeld(release)
	if c := m.changed(); !slices.Equal(c, []string{"discard 0+1"}) || r.UsedIdx() != 1 {
		t.Errorf("%v, %d requests returned", c, r.UsedIdx())
	}
}

// The cache is written through for zeroes as for data.
func TestWriteZeroesThrough(t *testing.T) {
	t.Parallel()
	r := start(t, setup{without: FeatureFlush | FeatureConfigWCE})
	if status, _ := r.request(typeWriteZeroes, 0, ranges(0, 1, 1), nil); status != statusOK || r.memory.flushed() != 1 {
		t.Errorf("status %d, %d flushes", status, r.memory.flushed())
	}
}

// What the guest changes after the ranges were read has no effect.
func TestRangesAreCopied(t *testing.T) {
	t.Parallel()
	m := newMemory(64)
	dev, _ := newDevice(t, m, false, Options{})
	payload, status := ranges(1, 1, 0, 2, 1, 0), space(1)
	m.hold = func(int64) { copy(payload, bytes.Repeat([]byte{0xff}, len(payload))) }
	r := new(request)
	r.chain.Readable, r.chain.Writable = iov.Of(header(typeDiscard, 0), payload), iov.Of(status)
	serve(dev, r)
	if c := m.changed(); status[0] != statusOK || !slices.Equal(c, []string{"discard 1+1", "discard 2+1"}) {
		t.Errorf("status %d, %v", status[0], c)
	}
}
