package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/kvmlet/kvmlet/guest/image"
	"github.com/kvmlet/kvmlet/guest/linux"
)

// ImageOptions say what a guest is booted from.
type ImageOptions struct {
	Kernel string // a file; empty: the pinned kernel
	Initrd string // a file; empty: kvmlet's guest image, if Agent is set, or else none

	// Agent puts Init into the initrd as /init: a program that calls agent.Main as PID 1. Empty: this very program.
	Agent bool
	Init  string

	Store    *image.Store         // empty: the user's
	Progress func(image.Progress) // told what takes long; may be nil
}

// Image is a kernel and the parts of its initrd, open and ready for a Config. It may serve several VMs, and must stay
// open until the last of them is made.
type Image struct {
	Kernel *linux.Kernel
	Initrd []linux.Blob

	files []io.Closer
}

// OpenImage opens what o names and makes what o leaves to us. Making the guest image takes most of a minute, once.
func OpenImage(ctx context.Context, o ImageOptions) (_ *Image, err error) {
	i := &Image{}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.Close())
		}
	}()
	if o.Kernel != "" { // what the user named comes first: it may be wrong, and the rest may take long
		if err := i.addKernel(o.Kernel); err != nil {
			return nil, err
		}
	}
	if o.Initrd != "" {
		if err := i.addInitrd(o.Initrd); err != nil {
			return nil, err
		}
	}
	if o.Store == nil {
		if o.Store, err = image.OpenStore(""); err != nil {
			return nil, err
		}
	}
	if o.Kernel == "" {
		if err := i.addPinned(ctx, &o); err != nil {
			return nil, err
		}
	}
	if !o.Agent {
		return i, nil
	}
	return i, i.addAgent(ctx, &o)
}

// Close closes the files.
func (i *Image) Close() error {
	var errs []error
	for _, f := range i.files {
		errs = append(errs, f.Close())
	}
	i.files = nil
	return errors.Join(errs...)
}

func (i *Image) addKernel(path string) (err error) {
	if i.Kernel, err = linux.Open(path); err == nil {
		i.files = append(i.files, i.Kernel)
	}
	return err
}

func (i *Image) addInitrd(path string) error {
	f, size, err := image.OpenRegular(path)
	if err != nil {
		return fmt.Errorf("initrd: %w", err)
	}
	i.files = append(i.files, f)
	i.Initrd = append(i.Initrd, io.NewSectionReader(f, 0, size))
	return nil
}

// addStored adds a file of the store, which nobody writes to any more.
func (i *Image) addStored(path string) error {
	f, size, err := image.OpenRegular(path)
	if err != nil {
		return fmt.Errorf("guest image: %w", err)
	}
	i.files = append(i.files, f)
	i.Initrd = append(i.Initrd, linux.NewStableFile(f, size))
	return nil
}

// addPinned opens the pinned kernel and its unpacked form, which is kept: reading it takes a tenth of unpacking it.
func (i *Image) addPinned(ctx context.Context, o *ImageOptions) error {
	path, err := o.Store.Kernel(ctx)
	if err != nil {
		return err
	}
	if err := i.addKernel(path); err != nil {
		return err
	}
	if !i.Kernel.Packed() {
		return nil
	}
	key := image.KeyOf("vmlinux/1", image.KernelKey().String())
	unpacked, err := o.Store.Derived(ctx, key, func(w io.Writer) error {
		if o.Progress != nil {
			o.Progress(image.Progress{Step: 1, Steps: 1, Text: "Unpacking the kernel"})
		}
		return i.Kernel.Unpack(w)
	})
	if err != nil {
		return err
	}
	f, size, err := image.OpenRegular(unpacked)
	if err != nil {
		return fmt.Errorf("unpacked kernel: %w", err)
	}
	i.files = append(i.files, f)
	return i.Kernel.SetUnpacked(linux.NewStableFile(f, size), size)
}

// addAgent completes the initrd: the guest image unless there is another, and the agent as its init, which comes last
// and so replaces any other /init.
func (i *Image) addAgent(ctx context.Context, o *ImageOptions) error {
	if o.Initrd == "" {
		path, err := image.Initramfs(ctx, image.Options{Store: o.Store}, o.Progress)
		if err != nil {
			return err
		}
		if err := i.addStored(path); err != nil {
			return err
		}
	}
	exe := o.Init
	if exe == "" {
		var err error
		if exe, err = os.Executable(); err != nil {
			return fmt.Errorf("find this program's file: %w", err)
		}
	}
	path, err := o.Store.Init(ctx, exe)
	if err != nil {
		return err
	}
	return i.addStored(path)
}
