// Fuzz runs every fuzz target of the module for a while and prints the events of "go test -json".
//
//	go run ./scripts/fuzz -time 3s [-total 1m] [PACKAGE FOLDER...]
//
// Targets are found in the sources: functions FuzzX(f *testing.F) in files *_test.go. With -total, each gets an equal
// share if that is less. All targets run even if one fails; the exit status is then 1. An input that makes a target fail
// is kept by go test in the package's folder testdata/fuzz, where it becomes part of the ordinary tests.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/kvmlet/kvmlet/scripts/internal/gofiles"
)

// target is a fuzz function.
type target struct {
	dir  string // of its package, relative to the module
	name string
}

func main() {
	each := flag.Duration("time", 10*time.Second, "how long each target runs")
	total := flag.Duration("total", 0, "how long all targets run together at most, builds not counted; 0: no limit")
	flag.Parse()
	roots := flag.Args()
	if len(roots) == 0 {
		roots = []string{"."}
	}
	var targets []target
	for _, root := range roots {
		found, err := find(root)
		if err != nil {
			fmt.Fprintln(os.Stderr, "fuzz:", err)
			os.Exit(2)
		}
		targets = append(targets, found...)
	}
	if n := time.Duration(len(targets)); *total > 0 && n > 0 {
		*each = min(*each, *total/n).Round(100 * time.Millisecond)
	}
	fmt.Printf("fuzzing %d targets for %v each\n", len(targets), *each)
	status := 0
	for _, t := range targets {
		if err := t.run(*each); err != nil {
			fmt.Fprintf(os.Stderr, "fuzz: %s in %s: %v\n", t.name, t.dir, err)
			status = 1
		}
	}
	os.Exit(status)
}

// find returns the fuzz targets in and below root, in order.
func find(root string) ([]target, error) {
	var targets []target
	err := gofiles.Walk(root, func(path string) error {
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && isTarget(fn) {
				targets = append(targets, target{dir: filepath.Dir(path), name: fn.Name.Name})
			}
		}
		return nil
	})
	slices.SortFunc(targets, func(a, b target) int { return strings.Compare(a.dir+" "+a.name, b.dir+" "+b.name) })
	return targets, err
}

func isTarget(fn *ast.FuncDecl) bool {
	if fn.Recv != nil || !strings.HasPrefix(fn.Name.Name, "Fuzz") || fn.Type.Params.NumFields() != 1 {
		return false
	}
	star, ok := fn.Type.Params.List[0].Type.(*ast.StarExpr)
	if !ok {
		return false
	}
	sel, ok := star.X.(*ast.SelectorExpr)
	return ok && sel.Sel.Name == "F"
}

// attempts bounds how often a target is started whose time was over at the wrong moment.
const attempts = 3

func (t target) run(d time.Duration) error {
	for attempt := 1; ; attempt++ {
		// Minimizing an input that merely is interesting may take a minute, in which nothing new is tried.
		cmd := exec.Command("go", "test", "-json", "-vet=off", "-run=^$", "-fuzz=^"+t.name+"$", "-fuzztime="+d.String(),
			"-fuzzminimizetime=100x", "./"+filepath.ToSlash(t.dir))
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil && attempt < attempts && outOfTime(out) {
			continue
		}
		if _, err := os.Stdout.Write(out); err != nil {
			return err
		}
		return err
	}
}

// outOfTime reports whether a target failed for no other reason than that its time was over while a worker had an input:
// go test takes that for a failure now and then. A real one comes with the input that made it.
func outOfTime(out []byte) bool {
	return bytes.Contains(out, []byte("context deadline exceeded")) && !bytes.Contains(out, []byte("Failing input written"))
}
