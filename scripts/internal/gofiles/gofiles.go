// Package gofiles finds the Go files of a module.
package gofiles

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Walk calls f with every Go file in and below root, in order, and ends at the first error. Like the go command it leaves
// out test data, other modules, and folders whose names start with a dot.
func Walk(root string, f func(path string) error) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return enter(root, path, d.Name())
		case filepath.Ext(path) != ".go":
			return nil
		}
		return f(path)
	})
}

// enter returns fs.SkipDir for a folder that is left out.
func enter(root, path, name string) error {
	if path == root {
		return nil
	}
	if strings.HasPrefix(name, ".") || name == "testdata" {
		return fs.SkipDir
	}
	switch _, err := os.Stat(filepath.Join(path, "go.mod")); {
	case err == nil:
		return fs.SkipDir // another module
	case errors.Is(err, fs.ErrNotExist):
		return nil
	default:
		return err
	}
}
