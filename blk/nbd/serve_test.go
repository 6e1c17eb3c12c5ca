package nbd_test

import (
	"errors"
	"net"
	"net/url"
	"path/filepath"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
)

// server is one that runs until the test ends.
type server struct {
	nbd.Server
	socket string
	served chan error
}

// listen starts s on a unix socket.
func (s *server) listen(tb testing.TB) {
	tb.Helper()
	if s.socket == "" {
		s.socket = filepath.Join(tb.TempDir(), "nbd.sock")
	}
	ln, err := net.Listen("unix", s.socket)
	if err != nil {
		tb.Fatal(err)
	}
	s.served = make(chan error, 1)
	go func() { s.served <- s.Serve(ln) }()
}

// start is listen, until the test ends.
func (s *server) start(tb testing.TB) *server {
	tb.Helper()
	s.listen(tb)
	tb.Cleanup(func() { s.close(tb) })
	return s
}

func (s *server) close(tb testing.TB) {
	tb.Helper()
	if err := s.Close(); err != nil {
		tb.Error(err)
	}
	if err := <-s.served; !errors.Is(err, nbd.ErrServerClosed) {
		tb.Errorf("Serve: %v", err)
	}
}

// serve exports disks on a unix socket until the test ends.
func serve(tb testing.TB, exports ...nbd.Export) *server {
	tb.Helper()
	return (&server{Server: nbd.Server{Exports: exports}}).start(tb)
}

// only is a list of one export, of the default name.
func only(tb testing.TB, m *memory) []nbd.Export {
	tb.Helper()
	return []nbd.Export{{Disk: newDevice(tb, m, blk.Options{})}}
}

// serveMemory exports a fresh disk in memory.
func serveMemory(tb testing.TB, size int) (*server, *memory) {
	tb.Helper()
	m := newMemory(size)
	return serve(tb, nbd.Export{Name: "disk", Disk: newDevice(tb, m, blk.Options{})}), m
}

func (s *server) options() nbd.Options {
	return nbd.Options{Network: "unix", Address: s.socket}
}

func (s *server) uri(export string) string {
	return "nbd+unix:///" + export + "?socket=" + url.QueryEscape(s.socket)
}
