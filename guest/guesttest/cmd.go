package guesttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/kvmlet/kvmlet/guest/agent"
)

// Cmd is a command in a guest, to be used as an exec.Cmd is: set its fields, then Run, Output, or Start and Wait.
type Cmd struct {
	agent.Command
	Process *agent.Process // set by Start

	guest *Guest
	ctx   context.Context
}

// ExitError says that a command ended with another status than 0.
type ExitError struct {
	agent.ExitStatus
	Args   []string
	Stderr []byte // from Output, if nothing else took it
}

func (e *ExitError) Error() string {
	what := fmt.Sprintf("exit status %d", e.Code)
	if e.Signal != 0 {
		what = "signal: " + e.Signal.String()
	}
	s := fmt.Sprintf("%s in the guest: %s", strings.Join(e.Args, " "), what)
	if text := bytes.TrimSpace(e.Stderr); len(text) > 0 {
		s += ": " + string(text)
	}
	return s
}

// Command returns a command that has not been started. Programs are looked up in the guest.
func (g *Guest) Command(args ...string) *Cmd { return g.CommandContext(g.ctx, args...) }

// CommandContext is Command with a context at whose end the command is killed.
func (g *Guest) CommandContext(ctx context.Context, args ...string) *Cmd {
	return &Cmd{Command: agent.Command{Args: args}, guest: g, ctx: ctx}
}

// Start starts the command and does not wait for it. The error of one that cannot be started is an *agent.StartError.
func (c *Cmd) Start() (err error) {
	c.Process, err = c.guest.agent.Start(c.ctx, c.Command)
	return err
}

// Wait returns when the command has ended and its output is written: nil for exit status 0, an *ExitError for another.
func (c *Cmd) Wait() error {
	status, err := c.Process.Wait()
	if err != nil {
		return fmt.Errorf("%s in the guest: %w", strings.Join(c.Args, " "), err)
	}
	if status.Code != 0 {
		return &ExitError{ExitStatus: status, Args: c.Args}
	}
	return nil
}

// Run is Start and Wait.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the command and returns its standard output.
func (c *Cmd) Output() ([]byte, error) {
	var stdout, stderr bytes.Buffer
	c.Stdout = &stdout
	if c.Stderr == nil {
		c.Stderr = &stderr
	}
	err := c.Run()
	var e *ExitError
	if errors.As(err, &e) {
		e.Stderr = stderr.Bytes()
	}
	return stdout.Bytes(), err
}
