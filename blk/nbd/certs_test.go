package nbd_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kvmlet/kvmlet/blk/nbd"
)

// certs is a certificate authority with a server and a client, all new, in files of the names that QEMU, nbdkit and
// libnbd want.
type certs struct {
	dir    string
	server *tls.Config // demands the client's certificate
}

func newCerts(tb testing.TB) *certs {
	tb.Helper()
	c := &certs{dir: tb.TempDir()}
	must := func(err error) {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
	}
	save := func(name, kind string, der []byte) {
		must(os.WriteFile(filepath.Join(c.dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	for serial, name := range []string{"ca", "server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		t := &x509.Certificate{
			SerialNumber: big.NewInt(int64(serial) + 1),
			Subject:      pkix.Name{CommonName: "kvmlet test " + name},
			NotBefore:    time.Now().Add(-time.Hour),
			NotAfter:     time.Now().Add(time.Hour),
			KeyUsage:     x509.KeyUsageDigitalSignature,
		}
		parent, parentKey := ca, caKey
		switch name {
		case "ca":
			t.IsCA, t.BasicConstraintsValid, t.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
			parent, parentKey = t, key
		case "server":
			t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
			t.DNSNames, t.IPAddresses = []string{"disks.example"}, []net.IP{net.IPv4(127, 0, 0, 1)}
		case "client":
			t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		}
		der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), parentKey)
		must(err)
		save(name+"-cert.pem", "CERTIFICATE", der)
		pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
		must(err)
		save(name+"-key.pem", "PRIVATE KEY", pkcs8)
		if name == "ca" {
			ca, err = x509.ParseCertificate(der)
			must(err)
			caKey = key
		}
	}
	var err error
	c.server, err = nbd.ServerTLS(c.dir)
	must(err)
	return c
}

func TestServerTLS(t *testing.T) {
	t.Parallel()
	c := newCerts(t)
	if c.server.ClientAuth != tls.RequireAndVerifyClientCert || c.server.ClientCAs == nil {
		t.Error("an authority is there, and clients need no certificate")
	}
	ca := filepath.Join(c.dir, "ca-cert.pem")
	if err := os.WriteFile(ca, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := nbd.ServerTLS(c.dir); err == nil || !strings.Contains(err.Error(), ca) {
		t.Errorf("an authority that is none: %v", err)
	}
	if err := os.Remove(ca); err != nil {
		t.Fatal(err)
	}
	open, err := nbd.ServerTLS(c.dir)
	if err != nil || open.ClientAuth != tls.NoClientCert || len(open.Certificates) != 1 {
		t.Errorf("no authority: %+v, %v", open, err)
	}
	if err := os.Remove(filepath.Join(c.dir, "server-key.pem")); err != nil {
		t.Fatal(err)
	}
	if _, err := nbd.ServerTLS(c.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no key: %v", err)
	}
}
