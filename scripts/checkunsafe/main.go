// Checkunsafe checks the module's rules about package unsafe: it is imported only in files named *_unsafe.go (in tests
// *_unsafe_test.go), and each use of it has a comment with the reason, on its lines or right above. Sizeof, Offsetof and
// Alignof need no reason. It prints what breaks the rules and exits with status 1 if anything does.
//
//	go run ./scripts/checkunsafe [FOLDER]
package main

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kvmlet/kvmlet/scripts/internal/gofiles"
)

func main() {
	flag.Parse()
	root := "."
	if flag.NArg() > 0 {
		root = flag.Arg(0)
	}
	found, err := check(root)
	if err != nil {
		fmt.Fprintln(os.Stderr, "checkunsafe:", err)
		os.Exit(2)
	}
	for _, line := range found {
		fmt.Println(line)
	}
	if len(found) > 0 {
		os.Exit(1)
	}
}

// check looks at all Go files in and below root, other modules left out.
func check(root string) ([]string, error) {
	var found []string
	err := gofiles.Walk(root, func(path string) error {
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		found = append(found, checkFile(fset, f, path)...)
		return nil
	})
	return found, err
}

func checkFile(fset *token.FileSet, f *ast.File, path string) []string {
	imported := slices.ContainsFunc(f.Imports, func(i *ast.ImportSpec) bool { return i.Path.Value == `"unsafe"` })
	if !imported {
		return nil
	}
	name := strings.TrimSuffix(strings.TrimSuffix(filepath.Base(path), ".go"), "_test")
	if !strings.HasSuffix(name, "_unsafe") {
		return []string{fmt.Sprintf("%s: imports unsafe, but its name does not end in _unsafe.go or _unsafe_test.go", path)}
	}
	commented := map[int]bool{} // lines that a comment is on
	for _, g := range f.Comments {
		for l := fset.Position(g.Pos()).Line; l <= fset.Position(g.End()).Line; l++ {
			commented[l] = true
		}
	}
	var found []string
	var stack []ast.Node
	ast.Inspect(f, func(n ast.Node) bool {
		if n == nil {
			stack = stack[:len(stack)-1]
			return true
		}
		stack = append(stack, n)
		if !needsReason(n) {
			return true
		}
		first, last := lines(fset, stack)
		for l := first - 1; l <= last; l++ {
			if commented[l] {
				return true
			}
		}
		found = append(found, fmt.Sprintf("%s: a use of unsafe without a reason beside it", fset.Position(n.Pos())))
		return true
	})
	return found
}

func needsReason(n ast.Node) bool {
	sel, ok := n.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	pkg, ok := sel.X.(*ast.Ident)
	return ok && pkg.Name == "unsafe" && !slices.Contains([]string{"Sizeof", "Offsetof", "Alignof"}, sel.Sel.Name)
}

// lines returns the lines of the innermost simple statement or declaration around the last node of stack: those on
// which a reason may stand. Of a function, that is its signature.
func lines(fset *token.FileSet, stack []ast.Node) (first, last int) {
	line := func(p token.Pos) int { return fset.Position(p).Line }
	for _, n := range slices.Backward(stack) {
		switch n := n.(type) {
		case *ast.BlockStmt:
			continue
		case *ast.FuncDecl:
			return line(n.Pos()), line(n.Type.End())
		case *ast.IfStmt:
			return line(n.Pos()), line(n.Body.Pos())
		case *ast.ForStmt:
			return line(n.Pos()), line(n.Body.Pos())
		case *ast.RangeStmt:
			return line(n.Pos()), line(n.Body.Pos())
		case *ast.SwitchStmt:
			return line(n.Pos()), line(n.Body.Pos())
		case ast.Stmt, ast.Spec, *ast.Field:
			return line(n.Pos()), line(n.End())
		}
	}
	p := line(stack[len(stack)-1].Pos())
	return p, p
}
