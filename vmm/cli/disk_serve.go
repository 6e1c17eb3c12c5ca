package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/blk/nbd"
)

// serveGrace is how long requests under way have when the server is stopped.
const serveGrace = 5 * time.Second

// maxSocket is the length in bytes of the path of a unix socket: sun_path has 108, and ends with a zero (unix(7)).
const maxSocket = 107

// maxExport is the length in bytes of a string of the NBD protocol (its section Conventions), as the name of an export is.
const maxExport = 4096

// serveOptions are the flags of `disk serve`.
type serveOptions struct {
	disk                diskFlags
	detect              detectZeroes
	socket, listen      string
	export, description string
	tls                 string
}

func newDiskServe(s streams) *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "serve [flags] (--socket PATH | --listen HOST:PORT) DISK",
		Short: "Export a disk over NBD",
		Long: `serve exports a disk to NBD clients such as qemu-img, nbdcopy or the Linux kernel, and prints the
URI by which they find it. 32 clients are served at a time, more have to wait; requests may begin
and end at any byte. Clients may idle, but one that takes more than a minute for the rest of a
request, or for its answer, is disconnected; requests take up 256 MiB at most. A signal ends it:
requests under way are answered, the disk is flushed, the socket is removed, and the exit status
is 0.

The socket is its owner's only (mode 0600). On TCP, which has no such thing, everybody who reaches
the port has the disk: use 127.0.0.1, or --tls with a folder that holds server-cert.pem,
server-key.pem and, if clients must show a certificate too, the ca-cert.pem that signed it. These
are the names that QEMU and libnbd give them.`,
		Example: `  kvmlet disk serve --socket test.sock test.img
  kvmlet disk serve --format qcow2 --read-only --listen 127.0.0.1:10809 --export test test.qcow2
  qemu-img info 'nbd+unix:///?socket=test.sock'`,
		Args: operands("DISK"),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case (o.socket == "") == (o.listen == ""):
				return errors.New("say where: --socket PATH or --listen HOST:PORT (one of them)")
			case o.tls != "" && o.listen == "":
				return errors.New("--tls is for --listen: a unix socket stays on this machine")
			case len(o.export) > maxExport:
				return fmt.Errorf("--export: a name of %d bytes, and NBD has %d at most", len(o.export), maxExport)
			case len(o.description) > maxExport:
				return fmt.Errorf("--description: a text of %d bytes, and NBD has %d at most", len(o.description), maxExport)
			}
			o.disk.spec.Path = args[0]
			if o.disk.spec.ReadOnly {
				hintFormat(cmd, s, "format", args[0])
			} else if err := sureOfFormat(cmd, "format", args[0]); err != nil {
				return err
			}
			outliveReaders()
			return o.run(cmd.Context(), s)
		},
	}
	f := cmd.Flags()
	addFormat(cmd, &o.disk.spec.Format, "format", "f", "the disk")
	f.StringVarP(&o.socket, "socket", "k", "", "listen on a unix socket at `PATH`")
	f.StringVar(&o.listen, "listen", "", "listen on TCP at `HOST:PORT`; port 0 takes any")
	f.StringVarP(&o.export, "export", "x", "", "`NAME` of the export (default the empty name)")
	f.StringVarP(&o.description, "description", "D", "", "`TEXT` that clients show in lists of exports")
	f.BoolVarP(&o.disk.spec.ReadOnly, "read-only", "r", false, "refuse writes, and share the disk with other readers")
	f.StringVar(&o.tls, "tls", "", "demand TLS, with the certificates in `DIR`")
	o.disk.addBacking(cmd)
	o.disk.addIO(cmd)
	named(cmd, &o.detect, parseDetectZeroes, disk.DetectNames(), "detect-zeroes", "",
		"`WHAT` becomes of zeroes that clients write: off (data), on (known zeroes) or unmap (holes)")
	f.BoolVar(&o.disk.spec.CopyOnRead, "copy-on-read", false, "store what is read from the backing file")
	o.disk.addThrottle(cmd)
	return cmd
}

func (o *serveOptions) run(ctx context.Context, s streams) (err error) {
	if o.disk.spec.DetectZeroes, err = o.detect.setting(); err != nil {
		return err
	}
	server := nbd.Server{Log: func(client net.Addr, err error) { logClient(s, client, err) }}
	if o.tls != "" {
		if server.TLS, err = nbd.ServerTLS(o.tls); err != nil {
			return fmt.Errorf("--tls: %w", err)
		}
	}
	served := false
	err = interruptible(ctx, "", func(ctx context.Context) error { return o.serve(ctx, s, &server, &served) })
	var stopped *exitError
	if served && errors.As(err, &stopped) && stopped.status == statusStopped {
		return nil
	}
	return err
}

// serve opens disk and socket and serves until ctx ends. served is set once a client can come, and cleared if what they
// wrote could not be kept.
func (o *serveOptions) serve(ctx context.Context, s streams, server *nbd.Server, served *bool) (err error) {
	d, err := disk.Open(ctx, o.disk.spec)
	if err != nil {
		return err
	}
	ln, uri, err := o.open(ctx)
	if err != nil {
		return errors.Join(err, d.Close())
	}
	server.Exports = []nbd.Export{{Name: o.export, Description: o.description, ReadOnly: o.disk.spec.ReadOnly, Disk: d}}
	if _, err := fmt.Fprintln(s.answer, uri); err != nil { // nobody would know where to connect
		return errors.Join(err, ln.Close(), d.Close())
	}
	*served = true
	err = serveUntil(ctx, server, ln)
	if kept := errors.Join(d.FlushContext(context.WithoutCancel(ctx)), d.Close()); kept != nil {
		*served = false
		return kept
	}
	return err
}

// logClient tells why a client is gone, unless it is by its own choice.
func logClient(s streams, client net.Addr, err error) {
	if errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) || errors.Is(err, net.ErrClosed) {
		return
	}
	if client.Network() == "unix" { // they have no names
		fprintf(s.err, "kvmlet: a client was disconnected: %s\n", message(err, false))
		return
	}
	fprintf(s.err, "kvmlet: client %v was disconnected: %s\n", client, message(err, false))
}

// serveUntil serves until ctx ends, and returns when no client is left.
func serveUntil(ctx context.Context, server *nbd.Server, ln net.Listener) error {
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ln) }()
	select {
	case err := <-ended:
		_ = server.Close()
		return err
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), serveGrace)
	defer cancel()
	_ = server.Shutdown(grace) // after the grace, those who are left are cut off
	if err := <-ended; !errors.Is(err, nbd.ErrServerClosed) {
		return err
	}
	return ctx.Err()
}

// open listens, and returns the URI that leads there.
func (o *serveOptions) open(ctx context.Context) (net.Listener, string, error) {
	if o.socket == "" {
		ln, err := new(net.ListenConfig).Listen(ctx, "tcp", o.listen)
		if err != nil {
			return nil, "", fmt.Errorf("--listen: %w", err)
		}
		u := url.URL{Scheme: "nbd", Host: ln.Addr().String(), Path: "/" + o.export}
		if o.tls != "" {
			u.Scheme = "nbds"
		}
		return ln, u.String(), nil
	}
	if len(o.socket) > maxSocket {
		return nil, "", fmt.Errorf("--socket: a path of %d bytes, and the kernel takes %d (choose a shorter or a relative one)",
			len(o.socket), maxSocket)
	}
	path, err := filepath.Abs(o.socket)
	if err == nil {
		err = clearSocket(o.socket)
	}
	if err != nil {
		return nil, "", fmt.Errorf("--socket: %w", err)
	}
	// The mode counts from the moment that the name appears.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var cherr error
		err := c.Control(func(fd uintptr) { cherr = unix.Fchmod(int(fd), 0o600) })
		return cmp.Or(err, cherr)
	}}
	ln, err := listenOwned(ctx, lc, o.socket) // by the shorter of its names: there is little room for it
	if err != nil {
		return nil, "", fmt.Errorf("--socket: %w", err)
	}
	name := url.URL{Path: "/" + o.export}
	socket := strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(path))
	return ln, "nbd+unix://" + name.EscapedPath() + "?socket=" + socket, nil
}

// ownedSocket is a listener that removes its socket at the end, if it is still its own.
type ownedSocket struct {
	net.Listener
	path string
	info os.FileInfo
}

func listenOwned(ctx context.Context, lc net.ListenConfig, path string) (net.Listener, error) {
	ln, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	info, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return &ownedSocket{ln, path, info}, nil
}

func (s *ownedSocket) Close() error {
	if now, err := os.Lstat(s.path); err == nil && os.SameFile(now, s.info) {
		_ = os.Remove(s.path)
	}
	return s.Listener.Close()
}

// clearSocket removes what a server left that was killed, and refuses what is anything else.
func clearSocket(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is there, and not a socket (choose another path)", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = c.Close()
		return fmt.Errorf("%s: somebody listens there (stop them, or choose another path)", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}
