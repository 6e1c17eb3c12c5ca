package nbd_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/nbd"
)

func TestTLS(t *testing.T) {
	t.Parallel()
	c := newCerts(t)
	m := newMemory(1 << 20)
	s := (&server{Server: nbd.Server{TLS: c.server, Exports: []nbd.Export{{Name: "disk", Disk: newDevice(t, m, blk.Options{})}}}}).start(t)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(tcp)

	dir, sock := "tls-certificates="+url.QueryEscape(c.dir), "socket="+url.QueryEscape(s.socket)
	for _, uri := range []string{
		"nbds://" + tcp.Addr().String() + "/disk?" + dir,
		"nbds+unix:///disk?" + sock + "&tls-hostname=disks.example&" + dir,
		"nbds+unix:///?" + sock + "&tls-verify-peer=0&" + dir,
	} {
		c, err := nbd.DialURI(testContext(t), uri)
		if err != nil {
			t.Fatalf("%s: %v", uri, err)
		}
		defer c.Close()
		for _, n := range []int{1, 5000, 300_000} {
			p := noise(n, uint64(n))
			mustWrite(t, c, p, 3)
			mustRead(t, c, p, 3)
		}
		if err := c.Flush(); err != nil {
			t.Error(err)
		}
		if _, n, err := c.BlockStatus(0, 4096); err != nil || n != 4096 {
			t.Errorf("status: %d, %v", n, err)
		}
	}

	var unknown x509.UnknownAuthorityError
	var hostname x509.HostnameError
	for what, tc := range map[string]struct {
		uri string
		is  func(error) bool
	}{
		"plain text": {"nbd+unix:///disk?" + sock, func(err error) bool {
			return errors.Is(err, nbd.ErrTLS) && strings.Contains(err.Error(), "nbds")
		}},
		"another name": {"nbds+unix:///disk?" + sock + "&tls-hostname=example.org&" + dir, func(err error) bool { return errors.As(err, &hostname) }},
		"unknown authority": {"nbds+unix:///disk?" + sock + "&tls-hostname=disks.example",
			func(err error) bool { return errors.As(err, &unknown) }},
		"no client certificate": {"nbds+unix:///disk?" + sock + "&tls-verify-peer=0",
			func(err error) bool { return err != nil }},
	} {
		if _, err := nbd.DialURI(testContext(t), tc.uri); !tc.is(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A server without TLS is refused where it is demanded.
func TestNoDowngrade(t *testing.T) {
	t.Parallel()
	s, _ := serveMemory(t, 4096)
	o := s.options()
	o.TLS = &tls.Config{ServerName: "disks.example"}
	if _, err := nbd.Dial(testContext(t), o); !errors.Is(err, nbd.ErrTLS) {
		t.Errorf("a server without TLS: %v", err)
	}
}

func TestParseURI(t *testing.T) {
	t.Parallel()
	c := newCerts(t)
	for uri, want := range map[string]nbd.Options{
		"nbd://example.com:1234/export":           {Network: "tcp", Address: "example.com:1234", Export: "export"},
		"nbd://example.com":                       {Network: "tcp", Address: "example.com:10809"},
		"nbd://example.com/":                      {Network: "tcp", Address: "example.com:10809"},
		"nbd://example.com//disk":                 {Network: "tcp", Address: "example.com:10809", Export: "/disk"},
		"nbd://[::1]/hello%20world":               {Network: "tcp", Address: "[::1]:10809", Export: "hello world"},
		"nbd+unix:///disk?socket=sock":            {Network: "unix", Address: "sock", Export: "disk"},
		"nbd+unix:///?socket=/run/my%20sock":      {Network: "unix", Address: "/run/my sock"},
		"nbd+unix:///a/b?socket=%00abstract":      {Network: "unix", Address: "\x00abstract", Export: "a/b"},
		"nbds://h/x":                              {Network: "tcp", Address: "h:10809", Export: "x", TLS: &tls.Config{ServerName: "h"}},
		"nbds://h/x?tls-hostname=o&tls-type=x509": {Network: "tcp", Address: "h:10809", Export: "x", TLS: &tls.Config{ServerName: "o"}},
		"nbds+unix:///x?socket=s&tls-verify-peer=0&tls-certificates=" + url.QueryEscape(c.dir): {Network: "unix", Address: "s", Export: "x",
			TLS: &tls.Config{InsecureSkipVerify: true}},
	} {
		o, err := nbd.ParseURI(uri)
		if err != nil {
			t.Errorf("%s: %v", uri, err)
			continue
		}
		if o.Network != want.Network || o.Address != want.Address || o.Export != want.Export || (o.TLS == nil) != (want.TLS == nil) {
			t.Errorf("%s: %+v", uri, o)
		}
		if o.TLS != nil && (o.TLS.ServerName != want.TLS.ServerName || o.TLS.InsecureSkipVerify != want.TLS.InsecureSkipVerify) {
			t.Errorf("%s: TLS %q, %t", uri, o.TLS.ServerName, o.TLS.InsecureSkipVerify)
		}
	}
	broken := filepath.Join(t.TempDir(), "ca-cert.pem")
	if err := os.WriteFile(broken, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, uri := range []string{
		"", "/dev/sda", "http://example.com/", "nbd:///x", "nbd+unix:///x", "nbd+unix://host/x?socket=s", "nbd://h/x?socket=s",
		"nbd://h/x?what=ever", "nbd://h/%00", "nbd://h/" + strings.Repeat("x", 4097), "nbds://h/?tls-type=psk",
		"nbds://h/?tls-verify-peer=2", "nbd://h/?tls-hostname=o", "nbds://h/?tls-certificates=" + url.QueryEscape(filepath.Dir(broken)),
		"nbdsx://h/", "nbd://h:port/", "nbd://h/?%zz",
	} {
		if o, err := nbd.ParseURI(uri); err == nil {
			t.Errorf("%q: %+v", uri, o)
		}
	}
}
