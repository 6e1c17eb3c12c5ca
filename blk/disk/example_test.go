package disk_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"

	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/blk/nbd"
	"github.com/kvmlet/kvmlet/iov"
)

// A qcow2 image is made, written and read. Buffers are vectors, of which iov.Of makes one of slices.
func Example() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, path := context.Background(), filepath.Join(dir, "test.qcow2")
	if err := disk.Create(ctx, disk.CreateSpec{Path: path, Format: disk.QCOW2, Size: 1 << 30}); err != nil {
		log.Fatal(err)
	}
	d, err := disk.Open(ctx, disk.Spec{Path: path, Format: disk.QCOW2})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := d.WriteVecAt(iov.Of([]byte("hello, "), []byte("disk")), 1000); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 11)
	if _, err := d.ReadVecAt(iov.Of(p), 1000); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d bytes\n", p, d.Size())
	if err := d.Close(); err != nil { // what was written is in the image
		log.Fatal(err)
	}
	// Output: hello, disk, 1073741824 bytes
}

// A disk is exported by NBD, and opened by its URI as any client would.
func ExampleOpen_nbd() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, path, socket := context.Background(), filepath.Join(dir, "test.img"), filepath.Join(dir, "s")
	if err := disk.Create(ctx, disk.CreateSpec{Path: path, Size: 64 << 20}); err != nil {
		log.Fatal(err)
	}
	d, err := disk.Open(ctx, disk.Spec{Path: path})
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	ln, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatal(err)
	}
	server := &nbd.Server{Exports: []nbd.Export{{Name: "test", Disk: d}}}
	ended := make(chan error)
	go func() { ended <- server.Serve(ln) }()

	remote, err := disk.Open(ctx, disk.Spec{Path: "nbd+unix:///test?socket=" + socket, ReadOnly: true})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(remote.Size(), "bytes")
	if err := remote.Close(); err != nil {
		log.Fatal(err)
	}
	if err := server.Shutdown(ctx); err != nil { // requests under way are answered first
		log.Fatal(err)
	}
	fmt.Println(<-ended)
	// Output:
	// 67108864 bytes
	// nbd: server closed
}
