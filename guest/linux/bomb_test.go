package linux

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// allocated returns how many bytes f allocates. Nothing else may run: the test is not parallel.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// A payload that goes on beyond the size that it announces is refused at the first byte too many: memory is that of the
// decoder.
func TestUnpackBombs(t *testing.T) {
	const announced, limit = 1 << 20, 24 << 20
	zeroes := make([]byte, 40<<20)
	stream := writeWith(t, zeroes, func(w io.Writer) (io.WriteCloser, error) {
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	})
	bombs := map[string][]byte{
		"zstd":              stream,
		"zstd, 50 frames":   bytes.Repeat(stream, 50),
		"zstd, one segment": zstdFrame(1<<20, 300), // more data than its header says
	}
	for _, name := range []string{"gzip", "lzma", "xz", "lz4"} {
		b := pack(t, name, zeroes)
		bombs[name] = b[:len(b)-4]
	}
	for name, bomb := range bombs {
		k := parse(t, testBz{payload: sized(bomb[:len(bomb):len(bomb)], announced)}.build(t))
		var err error
		n := allocated(func() { err = k.Unpack(io.Discard) })
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		if n > limit {
			t.Errorf("%s: %d MiB allocated", name, n>>20)
		}
	}
}

// zstdFrame returns a frame in a single segment, announced as size bytes, with blocks of 128 KiB of zeroes each (RFC
// 8878, 3.1.1).
func zstdFrame(size uint32, blocks int) []byte {
	b := binary.LittleEndian.AppendUint32([]byte("\x28\xb5\x2f\xfd\xa0"), size)
	for i := range blocks {
		h := uint32(128<<10<<3 | 1<<1) // RLE
		if i == blocks-1 {
			h |= 1
		}
		b = append(b, byte(h), byte(h>>8), byte(h>>16), 0)
	}
	return b
}

// sparseFile is a bzImage whose payload is followed by zeroes up to the unpacked size at the end of the file.
type sparseFile struct {
	head     []byte
	size     int64
	unpacked uint32
}

func newSparseFile(tb testing.TB, payload []byte, packed int64, unpacked uint32) sparseFile {
	tb.Helper()
	head := testBz{payload: payload, header: func(h *setupHeader) {
		h.PayloadLength = uint32(packed)
		h.SysSize = uint32((bzStub + packed) / 16)
	}}.build(tb)
	return sparseFile{head, bzSetup + bzStub + packed, unpacked}
}

func (f sparseFile) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.size {
		return 0, io.ErrUnexpectedEOF
	}
	clear(p)
	if off < int64(len(f.head)) {
		copy(p, f.head[off:])
	}
	if tail := binary.LittleEndian.AppendUint32(nil, f.unpacked); off+int64(len(p)) > f.size-4 {
		copy(p[max(f.size-4-off, 0):], tail[max(off-(f.size-4), 0):])
	}
	return len(p), nil
}

// A file may be far longer than what is in it; it is neither held in memory, nor read for as long as it likes.
func TestUnpackSparse(t *testing.T) {
	frame := pack(t, "zstd", testELF{}.build(t))
	frame = frame[:len(frame)-4]
	for _, tc := range []struct {
		name             string
		packed, unpacked int64
		known            bool
	}{
		{"200 MiB", 200 << 20, 1 << 30, true},
		{"as much as is taken", maxPacked, 1 << 30, true},
		{"more", maxPacked + 16, 1 << 30, false},
		{"almost 4 GiB", 1<<32 - 16, 1 << 30, false},
		{"shorter when unpacked", 64 << 20, 1 << 20, false},
	} {
		f := newSparseFile(t, frame, tc.packed, uint32(tc.unpacked))
		k, err := Parse(f, f.size)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if known := k.UnpackedSize() != 0; known != tc.known {
			t.Errorf("%s: to be unpacked: %v", tc.name, known)
		}
		if !tc.known {
			continue
		}
		n := allocated(func() { err = k.Unpack(io.Discard) })
		if !errors.Is(err, ErrCorrupt) || n > 24<<20 {
			t.Errorf("%s: %v, %d MiB allocated", tc.name, err, n>>20)
		}
	}
}

// What the methods make of data that cannot be packed is taken.
func TestPlausible(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		packed, unpacked int64
		want             bool
	}{
		{100, 0, false},
		{100, 1, true},
		{1<<20 + 1<<17, 1 << 20, true},
		{1<<20 + 1<<18, 1 << 20, false},
		{maxPacked, maxUnpacked, true},
		{maxPacked + 1, maxUnpacked, false},
		{maxPacked, maxUnpacked + 1, false},
	} {
		if got := plausible(tc.packed, tc.unpacked); got != tc.want {
			t.Errorf("%d bytes packed, %d unpacked: %v", tc.packed, tc.unpacked, got)
		}
	}
}

func TestLZ4(t *testing.T) {
	t.Parallel()
	want := testELF{}.build(t)
	frame := pack(t, "lz4", want)
	frame = frame[:len(frame)-4]
	magic, block := frame[:4:4], frame[4:]
	length := binary.LittleEndian.AppendUint32
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for _, tc := range []struct {
		name   string
		packed []byte
		copies int // of want; -1: corrupt
	}{
		{"nothing", magic, 0},
		{"one frame", frame, 1},
		{"two frames", cat(frame, frame), 2},
		{"two blocks", cat(frame, block), 2},
		{"a frame without blocks", cat(magic, magic, frame, magic), 1},
		// Each is four bytes that lead nowhere, and there is no end to how many there are.
		{"magic numbers", cat(bytes.Repeat(magic, 10<<20), frame), 1},
		{"cut in a length", cat(frame, []byte{1, 0, 0}), -1},
		{"cut behind a length", length(frame[:len(frame):len(frame)], 100), -1},
		{"cut in a block", frame[:len(frame)-1], -1},
		{"a block of 4 GiB", length(frame[:len(frame):len(frame)], 1<<32-1), -1},
		{"a block beyond the bound", cat(magic, length(nil, 9<<20), make([]byte, 9<<20)), -1},
		{"a block that unpacks to more than 8 MiB", cat(magic, lz4Run(8<<20+1)), -1},
		{"damage", cat(magic, length(nil, 3), []byte{0x0f, 0, 0}), -1},
	} {
		got, err := io.ReadAll(newLZ4Reader(bytes.NewReader(tc.packed)))
		if (err != nil) != (tc.copies < 0) || err == nil && !bytes.Equal(got, bytes.Repeat(want, tc.copies)) {
			t.Errorf("%s: %d bytes, %v", tc.name, len(got), err)
		}
	}
	if got, err := io.ReadAll(newLZ4Reader(bytes.NewReader(cat(magic, lz4Run(8<<20))))); len(got) != 8<<20 || err != nil {
		t.Errorf("a whole block: %d bytes, %v", len(got), err)
	}
}

// lz4Run returns a block, with its length, of n zeroes (lz4_Block_format.md): a literal, a match of the byte before it,
// and five literals, with which a block has to end.
func lz4Run(n int) []byte {
	match := n - 1 - 5
	b := []byte{0x1f, 0, 1, 0}
	left := match - 4 - 15
	b = append(b, bytes.Repeat([]byte{255}, left/255)...)
	b = append(b, byte(left%255), 0x50, 0, 0, 0, 0, 0)
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...)
}
