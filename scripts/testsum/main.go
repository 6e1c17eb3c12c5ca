// Testsum runs test commands, shows what they do, and closes with one line: "N passed, N failed", and the skipped ones
// if there are any.
//
// Each argument is a command, split at spaces, that prints the events of "go test -json" (cmd/test2json). Lines that are
// none are passed on. All commands run, one after the other. The exit status is that of the first that failed, and 1 if
// a test failed or none ran.
//
//	testsum 'go test -json -race ./iov' 'go test -json ./vmm'
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// quiet is how long the output may stand still before the running tests are named.
const quiet = 30 * time.Second

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: testsum 'go test -json PACKAGE...'...")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	r := newReport(os.Stdout)
	status := 0
	for _, line := range os.Args[1:] {
		if ctx.Err() != nil {
			break
		}
		code, err := run(ctx, r, strings.Fields(line))
		if err != nil {
			fmt.Fprintf(os.Stderr, "testsum: %s: %v\n", line, err)
		}
		if status == 0 {
			status = code
		}
	}
	failed := r.close()
	if status == 0 && (failed || ctx.Err() != nil) {
		status = 1
	}
	os.Exit(status)
}

// run executes one command and feeds its standard output to r. It returns the exit status.
func run(ctx context.Context, r *report, args []string) (int, error) {
	if len(args) == 0 {
		return 2, errors.New("empty command")
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	// An interrupt lets the tests clean up; who does not end then is killed.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 1, err
	}
	if err := cmd.Start(); err != nil {
		return 127, err
	}
	readErr := feed(r, out)
	err = cmd.Wait()
	var exit *exec.ExitError
	switch {
	case err == nil && readErr != nil:
		return 1, readErr
	case err == nil:
		return 0, nil
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		return exit.ExitCode(), nil
	}
	return 1, err
}

// feed hands lines to r as they come, and tells it when none come for a while.
func feed(r *report, out io.Reader) error {
	lines := make(chan []byte)
	var readErr error
	go func() {
		defer close(lines)
		br := bufio.NewReader(out)
		for {
			line, err := br.ReadBytes('\n')
			if len(line) > 0 {
				lines <- line
			}
			if err != nil {
				if !errors.Is(err, io.EOF) {
					readErr = err
				}
				return
			}
		}
	}()
	tick := time.NewTicker(quiet / 6)
	defer tick.Stop()
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				return readErr
			}
			r.line(line, time.Now())
		case now := <-tick.C:
			r.idle(now)
		}
	}
}
