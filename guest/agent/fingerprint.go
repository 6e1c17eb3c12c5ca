package agent

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
)

//go:embed *.go
var sources embed.FS

// Fingerprint identifies this package as it was built: its sources, the Go version and the module it needs. A guest
// whose PID 1 has the same fingerprint behaves the same, whatever else is in its executable.
var Fingerprint = sync.OnceValue(func() string {
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version())
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			if dep.Path == "golang.org/x/sys" {
				fmt.Fprintln(h, dep.Version, dep.Sum)
			}
		}
	}
	names, _ := fs.Glob(sources, "*.go")
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		b, _ := sources.ReadFile(name) // embedded, so it is there
		fmt.Fprintln(h, name, len(b))
		h.Write(b)
	}
	return hex.EncodeToString(h.Sum(nil))
})
