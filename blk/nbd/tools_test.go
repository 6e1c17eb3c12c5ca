package nbd_test

import (
	"bytes"
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/guest/hosttest"
)

// QEMU's tools at work on our server.
func TestServesQEMU(t *testing.T) {
	t.Parallel()
	img, qio := hosttest.Tool(t, "qemu-img"), hosttest.Tool(t, "qemu-io")
	const size = 8 << 20
	s, m := serveMemory(t, size)
	uri := s.uri("disk")

	var info struct {
		Size   int64  `json:"virtual-size"`
		Format string `json:"format"`
	}
	if err := json.Unmarshal([]byte(run(t, img, "info", "-f", "raw", "--output=json", uri)), &info); err != nil || info.Size != size {
		t.Errorf("info: %+v, %v", info, err)
	}

	want := make([]byte, size)
	paint := func(off, n int, b byte) { copy(want[off:], bytes.Repeat([]byte{b}, n)) }
	out := run(t, qio, "-f", "raw", "-c", "write -P 0x11 0 64k", "-c", "write -P 0x22 65537 4095", "-c", "write -P 0x33 1000001 333",
		"-c", "write -P 0x44 2M 1M", "-c", "write -z 2560k 4k", "-c", "write -z -u 2600k 8k", "-c", "write -f -P 0x55 7M 1M",
		"-c", "discard 4M 1M", "-c", "flush", "-c", "read -P 0x11 1 65535", "-c", "read -P 0x22 65537 4095", "-c", "read -P 0 2560k 4k",
		"-c", "aio_write -P 0x66 5M 100k", "-c", "aio_write -P 0x67 6M 100k", "-c", "aio_flush", "-c", "read -P 0x66 5M 100k", uri)
	if strings.Contains(out, "failed") {
		t.Error(out)
	}
	paint(0, 65536, 0x11)
	paint(65537, 4095, 0x22)
	paint(1000001, 333, 0x33)
	paint(2<<20, 1<<20, 0x44)
	paint(2560<<10, 4<<10, 0)
	paint(2600<<10, 8<<10, 0)
	paint(7<<20, 1<<20, 0x55)
	paint(5<<20, 100<<10, 0x66)
	paint(6<<20, 100<<10, 0x67)
	if !bytes.Equal(m.bytes(0, size), want) {
		t.Fatal("qemu-io's writes went wrong")
	}
	if m.fua.Load() == 0 {
		t.Error("no FUA arrived")
	}

	var extents []struct {
		Start, Length int64
		Data, Zero    bool
	}
	if err := json.Unmarshal([]byte(run(t, img, "map", "-f", "raw", "--output=json", uri)), &extents); err != nil {
		t.Fatal(err)
	}
	at := int64(0)
	for _, e := range extents {
		if e.Start != at || e.Zero == e.Data {
			t.Errorf("map: %+v at %d", e, at)
		}
		for i := e.Start / block; i < (e.Start+e.Length)/block; i++ {
			if m.isHole(int(i)) != e.Zero {
				t.Fatalf("map: block %d in %+v", i, e)
			}
		}
		at += e.Length
	}
	if at != size || len(extents) < 8 {
		t.Errorf("map: %d extents to %d", len(extents), at)
	}

	file := filepath.Join(t.TempDir(), "copy")
	run(t, img, "convert", "-f", "raw", "-O", "raw", uri, file)
	if !bytes.Equal(contents(t, file), want) {
		t.Error("convert from our server went wrong")
	}
	run(t, img, "compare", "-f", "raw", "-F", "raw", uri, file)
	other := noise(size, 7)
	clear(other[3<<20 : 5<<20])
	if err := os.WriteFile(file, other, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, img, "convert", "-n", "-W", "-f", "raw", "-O", "raw", file, uri)
	if !bytes.Equal(m.bytes(0, size), other) {
		t.Error("convert to our server went wrong")
	}
	run(t, img, "bench", "-f", "raw", "-c", "2000", "-d", "64", "-s", "4096", uri)
}

// A format on top of our server.
func TestServesQEMUQcow2(t *testing.T) {
	t.Parallel()
	img, qio := hosttest.Tool(t, "qemu-img"), hosttest.Tool(t, "qemu-io")
	s, _ := serveMemory(t, 16<<20)
	uri := s.uri("")
	run(t, img, "create", "-f", "qcow2", uri, "8M")
	run(t, qio, "-f", "qcow2", "-c", "write -P 7 1M 3M", "-c", "discard 2M 1M", "-c", "read -P 7 1M 1M", uri)
	if out := run(t, img, "check", "-f", "qcow2", uri); !strings.Contains(out, "No errors") {
		t.Error(out)
	}
}

// libnbd's tools at work on our server.
func TestServesLibnbd(t *testing.T) {
	t.Parallel()
	info, cp := hosttest.Tool(t, "nbdinfo"), hosttest.Tool(t, "nbdcopy")
	const size = 8 << 20
	m := newMemory(size)
	d := newDevice(t, m, blk.Options{})
	s := serve(t, nbd.Export{Name: "disk", Description: "a disk in memory", Disk: d}, nbd.Export{Name: "frozen", Disk: d, ReadOnly: true})

	var list struct {
		Protocol   string
		Structured bool
		Exports    []struct {
			Name        string   `json:"export-name"`
			Description string   `json:"description"`
			Contexts    []string `json:"contexts"`
			Size        int64    `json:"export-size"`
			ReadOnly    bool     `json:"is_read_only"`
			MultiConn   bool     `json:"can_multi_conn"`
			DF          bool     `json:"can_df"`
			FUA         bool     `json:"can_fua"`
			Trim        bool     `json:"can_trim"`
			Zero        bool     `json:"can_zero"`
			FastZero    bool     `json:"can_fast_zero"`
			Min         string   `json:"block_minimum"`
		}
	}
	out := run(t, info, "--json", "--list", s.uri(""))
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list.Exports) != 2 {
		t.Fatalf("%v: %s", err, out)
	}
	for i, e := range list.Exports {
		rw := i == 0
		if e.Size != size || e.ReadOnly == rw || !e.MultiConn || !e.DF || !e.FUA || e.Trim != rw || e.Zero != rw || e.FastZero != rw ||
			len(e.Contexts) != 1 || e.Contexts[0] != "base:allocation" {
			t.Errorf("export %+v", e)
		}
	}
	if e := list.Exports[0]; e.Name != "disk" || e.Description != "a disk in memory" || list.Protocol != "newstyle-fixed" {
		t.Errorf("%s: %+v", list.Protocol, e)
	}

	want := noise(size, 8)
	clear(want[1<<20 : 3<<20])
	dir := t.TempDir()
	file, back := filepath.Join(dir, "file"), filepath.Join(dir, "back")
	if err := os.WriteFile(file, want, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, cp, "--connections=4", "--requests=64", "--flush", file, s.uri("disk"))
	if !bytes.Equal(m.bytes(0, size), want) {
		t.Error("nbdcopy to our server went wrong")
	}
	if m.flushes.Load() == 0 {
		t.Error("no flush arrived")
	}
	run(t, cp, "--connections=4", "--requests=64", s.uri("frozen"), back)
	if !bytes.Equal(contents(t, back), want) {
		t.Error("nbdcopy from our server went wrong")
	}
	var extents []struct{ Offset, Length, Type int64 }
	if err := json.Unmarshal([]byte(run(t, info, "--json", "--map", s.uri("disk"))), &extents); err != nil || len(extents) == 0 {
		t.Errorf("map: %v, %v", extents, err)
	}
	m.mu.Lock()
	for i := range m.hole {
		m.hole[i] = i%2 == 0 // more runs than one answer has
	}
	m.mu.Unlock()
	if err := json.Unmarshal([]byte(run(t, info, "--json", "--map", s.uri("disk"))), &extents); err != nil || len(extents) != size/block {
		t.Errorf("map: %d extents, %v", len(extents), err)
	}
}

func TestServesLibnbdOverTLS(t *testing.T) {
	t.Parallel()
	info, cp := hosttest.Tool(t, "nbdinfo"), hosttest.Tool(t, "nbdcopy")
	c := newCerts(t)
	m := newMemory(1 << 20)
	s := (&server{Server: nbd.Server{TLS: c.server, Exports: only(t, m)}}).start(t)
	uri := "nbds+unix:///?socket=" + url.QueryEscape(s.socket) + "&tls-hostname=disks.example&tls-certificates=" + url.QueryEscape(c.dir)
	if out := strings.TrimSpace(run(t, info, "--size", uri)); out != "1048576" {
		t.Errorf("size %s", out)
	}
	want := noise(1<<20, 9)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, want, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, cp, file, uri)
	if !bytes.Equal(m.bytes(0, 1<<20), want) {
		t.Error("nbdcopy went wrong")
	}
}

// A file that does not end with a sector is served as the disk that blk/raw makes of it.
func TestServesOddFile(t *testing.T) {
	t.Parallel()
	const size, sectors = 1_000_001, 1_000_448
	dir := t.TempDir()
	file, back := filepath.Join(dir, "file"), filepath.Join(dir, "back")
	want := noise(size, 1)
	if err := os.WriteFile(file, want, 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := raw.Open(file, raw.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, nbd.Export{Disk: newDevice(t, b, blk.Options{})})
	uri := s.uri("")
	exported := append(bytes.Clone(want), make([]byte, sectors-size)...)
	for _, args := range [][]string{
		{hosttest.Tool(t, "nbdcopy"), uri, back},
		{hosttest.Tool(t, "qemu-img"), "convert", "-f", "raw", "-O", "raw", uri, back},
	} {
		run(t, args[0], args[1:]...)
		if !bytes.Equal(contents(t, back), exported) {
			t.Errorf("%s copies something else", args[0])
		}
	}
	if out := strings.TrimSpace(run(t, hosttest.Tool(t, "nbdinfo"), "--size", uri)); out != strconv.Itoa(sectors) {
		t.Errorf("nbdinfo: %s", out)
	}
	c := dial(t, s.options())
	mustRead(t, c, exported, 0)
	if !bytes.Equal(contents(t, file), want) {
		t.Error("reading has changed the file")
	}
	mustWrite(t, c, []byte("end"), sectors-3)
	if got := contents(t, file); len(got) != sectors || !bytes.Equal(got[:size], want) || string(got[sectors-3:]) != "end" {
		t.Errorf("a file of %d bytes after its last sector was written", len(got))
	}
}
