package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// ClientTLS returns a configuration for Options.TLS with the certificates in dir, by the names that libnbd and QEMU give
// them: ca-cert.pem, and client-cert.pem with client-key.pem, each of which may be missing. An empty dir means the
// system's authorities and no certificate of the client. The server's certificate must be for host.
func ClientTLS(dir, host string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host}
	if dir == "" {
		return c, nil
	}
	var err error
	if c.RootCAs, err = authorities(dir); err != nil {
		return nil, err
	}
	switch _, err := os.Stat(filepath.Join(dir, "client-cert.pem")); {
	case errors.Is(err, fs.ErrNotExist):
		return c, nil
	case err != nil:
		return nil, err
	}
	c.Certificates, err = certificate(dir, "client")
	return c, err
}

// ServerTLS returns a configuration for Server.TLS with the certificates in dir, by the names that libnbd and QEMU give
// them: server-cert.pem with server-key.pem, and ca-cert.pem. Where that last one is there, clients must show a
// certificate that it signed; where it is missing, anybody is let in.
func ServerTLS(dir string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	var err error
	if c.Certificates, err = certificate(dir, "server"); err != nil {
		return nil, err
	}
	if c.ClientCAs, err = authorities(dir); err != nil {
		return nil, err
	}
	if c.ClientCAs != nil {
		c.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return c, nil
}

// authorities reads ca-cert.pem. Nil means that there is none.
func authorities(dir string) (*x509.CertPool, error) {
	name := filepath.Join(dir, "ca-cert.pem")
	pem, err := os.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: no certificate in PEM form", name)
	}
	return pool, nil
}

// certificate reads the certificate of one side, with its key.
func certificate(dir, side string) ([]tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, side+"-cert.pem"), filepath.Join(dir, side+"-key.pem"))
	if err != nil {
		return nil, err
	}
	return []tls.Certificate{pair}, nil
}
