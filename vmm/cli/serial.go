package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/kvmlet/kvmlet/vmm"
)

// stopOnSignal calls leave with errLeft at the first signal that asks for an end. release undoes it.
func stopOnSignal(leave context.CancelCauseFunc) (release func()) {
	signals, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	go func() {
		select {
		case <-signals:
			leave(errLeft)
		case <-done:
		}
	}()
	return func() { signal.Stop(signals); close(done) }
}

// bootConsole runs a VM that has no agent of ours: its serial console is connected to our streams until it ends. A first
// interrupt or termination presses its power button, a second one stops it.
func (p *plan) bootConsole(ctx context.Context, s streams, log io.Writer) error {
	p.cfg.Console = s.out
	if log != nil {
		p.cfg.Console = io.MultiWriter(s.out, log)
	}
	vm, err := vmm.New(&p.cfg)
	if err != nil {
		return err
	}
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	var in io.Reader = s.in
	restore := func() {}
	if isTerminal(s.in) {
		if restore, err = rawTerminal(s.in); err != nil {
			return errors.Join(err, vm.Close())
		}
		defer restore()
		fprintf(s.err, "kvmlet: the VM's serial console; Ctrl-A x ends the VM\r\n")
		in = &escapeReader{r: s.in, leave: func() {
			fprintf(s.out, "\r\n")
			leave(errLeft)
		}}
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(signals)

	if err := vm.Start(); err != nil {
		return errors.Join(err, vm.Close())
	}
	go func() { _, _ = io.Copy(serialWriter{vm}, in) }() // ends with the input, or with the VM at the next key
	go func() {
		select {
		case <-signals:
		case <-ctx.Done():
			return
		}
		if !vm.PressPowerButton() {
			leave(errLeft)
			return
		}
		select {
		case <-signals:
			leave(errLeft)
		case <-ctx.Done():
		}
	}()
	end, err := vm.Wait(ctx)
	if err != nil {
		err = leaveError(context.Cause(ctx))
		restore()
		showCPUs(s, vm, err)
	} else {
		err = endError(end)
	}
	if closed := vm.Close(); err == nil {
		err = closed
	}
	return err
}

// serialWriter types into a VM's serial port.
type serialWriter struct{ vm *vmm.VM }

func (w serialWriter) Write(p []byte) (int, error) { return w.vm.Serial(p) }
