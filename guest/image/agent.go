package image

import (
	"context"
	"fmt"
)

// AgentSegment returns an archive with the executable exe as /init, to be placed behind an initramfs or to be one by
// itself. A dynamically linked executable, as "go test -race" makes them, brings its libraries along. The caller closes
// the archive after its last use.
func AgentSegment(exe string) (*Archive, error) {
	t, _, err := agentTree(exe)
	if err != nil {
		return nil, err
	}
	return newArchive(t)
}

// Init returns the path of a file in the default store that holds AgentSegment(exe), for those who cannot read an
// Archive.
func Init(ctx context.Context, exe string) (string, error) {
	s, err := OpenStore("")
	if err != nil {
		return "", err
	}
	return s.Init(ctx, exe)
}

// Init is the function Init on this store.
func (s *Store) Init(ctx context.Context, exe string) (string, error) {
	t, p, err := agentTree(exe)
	if err != nil {
		return "", err
	}
	parts := []string{"init/1"}
	for _, file := range append([]library{{path: p.path}}, p.libs...) {
		k, err := StatKey(file.path)
		if err != nil {
			return "", err
		}
		parts = append(parts, file.dest, k.String())
	}
	return s.Build(ctx, "init", KeyOf(parts...), t.writeArchive)
}

func agentTree(exe string) (tree, *program, error) {
	p, err := newLinker().load(exe, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("make the guest's init of %s: %w", exe, err)
	}
	t := newTree()
	if err := t.addProgram("init", p); err != nil {
		return nil, nil, fmt.Errorf("make the guest's init of %s: %w", exe, err)
	}
	return t, p, nil
}
