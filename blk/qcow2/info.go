package qcow2

// Info describes an image.
type Info struct {
	Size          int64       `json:"virtual-size"` // of the disk in bytes
	FileLength    int64       `json:"file-length"`
	ClusterSize   int64       `json:"cluster-size"`
	Compat        Compat      `json:"compat"`
	RefcountBits  int         `json:"refcount-bits"`
	Compression   string      `json:"compression-type"`
	LazyRefcounts bool        `json:"lazy-refcounts"`
	Dirty         bool        `json:"dirty-flag"` // not closed; it is repaired when it is opened for writing
	Corrupt       bool        `json:"corrupt"`
	BackingFile   string      `json:"backing-filename,omitempty"`
	BackingFormat string      `json:"backing-filename-format,omitempty"`
	Bitmaps       bool        `json:"bitmaps,omitempty"` // it has persistent bitmaps, lost with the first write
	Snapshots     []*Snapshot `json:"snapshots,omitempty"`
}

// Info returns what the header says. No request to the file is made.
func (im *Image) Info() Info {
	im.ops.RLock()
	defer im.ops.RUnlock()
	im.mu.Lock()
	defer im.mu.Unlock()
	h := im.h
	i := Info{
		Size: im.size.Load(), FileLength: im.f.length.Load(), ClusterSize: im.cluster, Compat: Compat11,
		RefcountBits: 1 << h.refOrder, Compression: Compression(h.compression).String(),
		LazyRefcounts: h.compat&compatLazy != 0, Dirty: h.incompat&incompatDirty != 0,
		Corrupt: h.incompat&incompatCorrupt != 0 || im.broken.Load(), BackingFile: h.backing, BackingFormat: h.backingFormat,
		Bitmaps: h.autoclear&autoclearBitmaps != 0,
	}
	if h.version < 3 {
		i.Compat = Compat010
	}
	for _, s := range im.snaps {
		c := *s
		i.Snapshots = append(i.Snapshots, &c)
	}
	return i
}
