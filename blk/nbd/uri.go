package nbd

import (
	"fmt"
	"net"
	"net/url"
	"strings"
)

// ParseURI returns the Options that an NBD URI stands for (doc/uri.md):
//
//	nbd://HOST[:PORT]/EXPORT                 TCP
//	nbd+unix:///EXPORT?socket=PATH           a unix socket
//	nbds://..., nbds+unix://...              the same under TLS, which is demanded
//
// With TLS these parameters are understood:
//
//	tls-hostname=NAME       the name that the server's certificate must bear (default: HOST)
//	tls-verify-peer=0       take any certificate
//	tls-certificates=DIR    ca-cert.pem, and client-cert.pem with client-key.pem where the server wants them, as
//	                        libnbd and QEMU name them; without ca-cert.pem the system's authorities count
//
// Other parameters are an error.
func ParseURI(uri string) (Options, error) {
	o, err := parseURI(uri)
	if err != nil {
		return Options{}, fmt.Errorf("nbd: URI %q: %w", uri, err)
	}
	return o, nil
}

func parseURI(uri string) (Options, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return Options{}, err
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return Options{}, err
	}
	param := func(name string) (string, bool) {
		v, ok := query[name]
		delete(query, name)
		if !ok {
			return "", false
		}
		return v[len(v)-1], true
	}
	o := Options{Export: strings.TrimPrefix(u.Path, "/")}
	if len(o.Export) > maxString || strings.ContainsRune(o.Export, 0) {
		return Options{}, fmt.Errorf("export name longer than %d bytes or with a zero byte", maxString)
	}
	socket, hasSocket := param("socket")
	scheme, overTLS := u.Scheme, false
	if rest, ok := strings.CutPrefix(scheme, "nbds"); ok {
		scheme, overTLS = "nbd"+rest, true
	}
	switch scheme {
	case "nbd":
		if u.Hostname() == "" || hasSocket {
			return Options{}, fmt.Errorf("%s: wants a host, and no socket", u.Scheme)
		}
		port := u.Port()
		if port == "" {
			port = DefaultPort
		}
		o.Network, o.Address = "tcp", net.JoinHostPort(u.Hostname(), port)
	case "nbd+unix":
		if u.Host != "" || socket == "" {
			return Options{}, fmt.Errorf("%s: wants socket=PATH, and no host (three slashes before the export)", u.Scheme)
		}
		o.Network, o.Address = "unix", socket
	default:
		return Options{}, fmt.Errorf("scheme %q: want nbd, nbds, nbd+unix or nbds+unix", u.Scheme)
	}
	if overTLS {
		host, ok := param("tls-hostname")
		if !ok {
			host = u.Hostname()
		}
		verify, ok := param("tls-verify-peer")
		if ok && verify != "0" && verify != "1" {
			return Options{}, fmt.Errorf("tls-verify-peer=%s: want 0 or 1", verify)
		}
		if kind, ok := param("tls-type"); ok && kind != "x509" {
			return Options{}, fmt.Errorf("tls-type=%s: only x509 is supported", kind)
		}
		dir, _ := param("tls-certificates")
		if o.TLS, err = ClientTLS(dir, host); err != nil {
			return Options{}, err
		}
		o.TLS.InsecureSkipVerify = verify == "0"
	}
	for name := range query {
		return Options{}, fmt.Errorf("parameter %q is not known here", name)
	}
	return o, nil
}
