package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"time"

	"github.com/kvmlet/kvmlet/vmm"
)

// bootConsole runs a VM that has no agent of ours: its serial console is connected to our streams until it ends. A first
// interrupt or termination presses its power button, a second one stops it. That nobody reads standard output any more
// presses the button too, and stops the VM if it does not end soon.
func (p *plan) bootConsole(ctx context.Context, s streams, signals *signals, log io.Writer) error {
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	out := &ifRead{w: s.out}
	p.cfg.Console = out
	if log != nil {
		p.cfg.Console = io.MultiWriter(out, log)
	}
	vm, err := vmm.New(&p.cfg)
	if err != nil {
		return err
	}
	out.gone = func() { unread(vm, leave, powerOffGrace) }
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
	if err := vm.Start(); err != nil {
		return errors.Join(err, vm.Close())
	}
	go func() { _, _ = io.Copy(serialWriter{vm}, in) }() // ends with the input, or with the VM at the next key
	asked := 0
	defer signals.during(func(sig os.Signal) {
		if !wantsEnd(sig) {
			return
		}
		if asked++; asked > 1 || !vm.PressPowerButton() {
			leave(errLeft)
		}
	})()
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

// unread asks a VM to end whose output nobody reads any more, and leaves it if it does not listen or takes longer than
// grace.
func unread(vm interface{ PressPowerButton() bool }, leave context.CancelCauseFunc, grace time.Duration) {
	if !vm.PressPowerButton() {
		leave(errLeft)
		return
	}
	time.AfterFunc(grace, func() { leave(errLeft) }) // without effect if it ended by then
}

// serialWriter types into a VM's serial port.
type serialWriter struct{ vm *vmm.VM }

func (w serialWriter) Write(p []byte) (int, error) { return w.vm.Serial(p) }
