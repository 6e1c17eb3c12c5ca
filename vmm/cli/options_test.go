package cli

import (
	"errors"
	"strings"
	"testing"

	"github.com/kvmlet/kvmlet/blk"
	"github.com/kvmlet/kvmlet/blk/disk"
	"github.com/kvmlet/kvmlet/blk/qcow2"
	"github.com/kvmlet/kvmlet/blk/raw"
	"github.com/kvmlet/kvmlet/vmm"
)

func TestSize(t *testing.T) {
	t.Parallel()
	good := map[string]struct {
		bytes uint64
		text  string
	}{
		"512M": {512 << 20, "512M"}, "2G": {2 << 30, "2G"}, "2GiB": {2 << 30, "2G"}, "64mb": {64 << 20, "64M"},
		"1024K": {1 << 20, "1M"}, "65536": {65536, "64K"}, "1T": {1 << 40, "1T"}, "1001": {1001, "1001"}, "0": {0, "0"},
		"1.5G": {1610612736, "1536M"}, "0.5k": {512, "512"},
	}
	for in, want := range good {
		var s size
		if err := s.Set(in); err != nil || uint64(s) != want.bytes || s.String() != want.text {
			t.Errorf("%q gives %d %q (%v), want %d %q", in, uint64(s), s.String(), err, want.bytes, want.text)
		}
	}
	for _, in := range []string{"", "M", "1.5", "1.3G", "-1M", "12X", "99999999999999999999", "17179869184G", "0x10M"} {
		var s size
		if err := s.Set(in); err == nil {
			t.Errorf("%q was taken for %d bytes", in, uint64(s))
		}
	}
}

func TestParseDisk(t *testing.T) {
	t.Parallel()
	good := map[string]vmm.Disk{
		"path=a.img":                         {Path: "a.img"},
		"path=a.img,readonly":                {Path: "a.img", ReadOnly: true},
		"path=a.img,readonly=off,format=raw": {Path: "a.img", Format: disk.Raw},
		"readonly=on,id=root,path=/x/y":      {Path: "/x/y", ID: "root", ReadOnly: true},
		"path=with,,comma.img":               {Path: "with,comma.img"},
		"path=eq=ual.img":                    {Path: "eq=ual.img"},
		"path=,,,,x,,,readonly":              {Path: ",,x,", ReadOnly: true},
		"path=a.qcow2,format=qcow2,cache=none,aio=threads,backing=on,copy-on-read,detect-zeroes=unmap,queues=3": {
			Path: "a.qcow2", Format: disk.QCOW2, Cache: disk.CacheNone, AIO: raw.AIOThreads, Backing: disk.BackingOn,
			CopyOnRead: true, DetectZeroes: blk.DetectUnmap, Queues: 3,
		},
		"path=a,format=qcow2,backing=on,backing-format=raw": {
			Path: "a", Format: disk.QCOW2, Backing: disk.BackingOn, BackingFormat: disk.Raw,
		},
		"path=nbd+unix:///?socket=/s,backing=/base dir": {
			Path: "nbd+unix:///?socket=/s", Backing: disk.BackingBelow("/base dir"),
		},
		"path=a,throttle=iops-total=500:bps-read=10M:bps-read-max=20M:bps-read-max-length=3,throttle-group=g": {
			Path: "a", ThrottleGroup: "g", Throttle: blk.Throttle{
				IOPSTotal: blk.Rate{Avg: 500}, BPSRead: blk.Rate{Avg: 10 << 20, Max: 20 << 20, Length: 3},
			},
		},
	}
	for in, want := range good {
		got, err := parseDisk(in)
		if err != nil || got != want {
			t.Errorf("parseDisk(%q) = %+v, %v", in, got, err)
		}
		again, err := parseDisk(formatDisk(got))
		if err != nil || again != got {
			t.Errorf("%q does not survive formatDisk: %q, %v", in, formatDisk(got), err)
		}
	}
	bad := map[string]string{
		"":                       "empty",
		"a.img":                  `want path=a.img`,
		"path=":                  "names no file",
		"path=a,path=b":          "twice",
		"path=a,,":               "", // a file called "a,"
		"path=a,":                "empty",
		"path=a,format=vmdk":     "raw or qcow2",
		"path=a,cache=all":       "writeback",
		"path=a,aio=native":      "io_uring",
		"path=a,backing=":        "backing=",
		"path=a,backing-format=": "backing-format=: want raw or qcow2",
		"path=a,detect-zeroes=1": "unmap",
		"path=a,queues=0":        "from 1 up",
		"path=a,throttle=fast=1": "fast",
		"path=a,throttle=iops-read=1,bps-read=1M": "join limits there with ':'",
		"path=a,throttle=":                        "throttle",
		"path=a,throttle-group=":                  "names no group",
		"path=a,readonly=perhaps":                 "on or off",
		"path=a,cash=none":                        "unknown property",
	}
	for in, want := range bad {
		_, err := parseDisk(in)
		if want == "" {
			if err != nil {
				t.Errorf("parseDisk(%q): %v", in, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("parseDisk(%q) says %v, want %q", in, err, want)
		}
	}
}

func FuzzParseDisk(f *testing.F) {
	f.Add("path=a.img,readonly,id=x")
	f.Add("path=,,,,,format=raw")
	f.Add("path=a,format=qcow2,cache=unsafe,backing=,,,throttle=iops-read=1K:iops-size=4096")
	f.Fuzz(func(t *testing.T, s string) {
		d, err := parseDisk(s)
		if err != nil {
			return
		}
		if again, err := parseDisk(formatDisk(d)); err != nil || again != d {
			t.Errorf("%q: %+v became %+v (%v)", s, d, again, err)
		}
	})
}

func TestParseNet(t *testing.T) {
	t.Parallel()
	c, err := parseNet("tap=vm0,mac=52:54:00:12:34:56,hostip=192.168.77.1/24,id=lan")
	if err != nil {
		t.Fatal(err)
	}
	if c.Spec.Name != "vm0" || c.ID != "lan" || c.MAC.String() != "52:54:00:12:34:56" || c.guestIP().String() != "192.168.77.2/24" {
		t.Errorf("parsed as %+v, guest address %v", c, c.guestIP())
	}
	if v, ok := c.Spec.Take("hostip"); !ok || v != "192.168.77.1/24" {
		t.Error("the backend does not get its address")
	}
	for in, want := range map[string]string{
		"":                              "kind",
		"tap":                           "names no device",
		"bridge=br0":                    "unknown kind",
		"tap=vm0,mac=01:00:5e:00:00:01": "multicast",
		"tap=vm0,mac=junk":              "MAC",
		"tap=vm0,hostip=192.168.77.1":   "prefix",
		"tap=vm0,hostip=10.0.0.1/32":    "no address left",
		"tap=vm0,mac=52:54:00:12:34:56,mac=52:54:00:12:34:57": "twice",
	} {
		if _, err := parseNet(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("parseNet(%q) says %v, want %q", in, err, want)
		}
	}
}

func TestGuestIP(t *testing.T) {
	t.Parallel()
	for host, want := range map[string]string{
		"10.0.0.1/24":   "10.0.0.2/24",
		"10.0.0.254/24": "10.0.0.253/24", // the next is the broadcast address
		"10.0.0.1/30":   "10.0.0.2/30",
		"10.0.0.2/30":   "10.0.0.1/30",
		"10.0.0.0/31":   "10.0.0.1/31",
		"10.0.0.1/31":   "10.0.0.0/31",
		"fd00::1/64":    "fd00::2/64",
	} {
		c, err := parseNet("tap=vm0,hostip=" + host)
		if err != nil || c.guestIP().String() != want {
			t.Errorf("a host at %s gives a guest at %v (%v), want %s", host, c.guestIP(), err, want)
		}
	}
}

// TestBackingFormat gives a VM an image that does not say what its backing file is.
func TestBackingFormat(t *testing.T) {
	t.Parallel()
	f := newDiskFiles(t)
	f.data("base", 1<<20)
	file, err := disk.Open(t.Context(), disk.Spec{Path: f.data("image", 512)})
	if err != nil {
		t.Fatal(err)
	}
	err = qcow2.Create(t.Context(), file, qcow2.CreateOptions{Size: 1 << 20, BackingFile: "base"})
	if err := errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}
	for property, want := range map[string]string{
		"": "never guessed", ",backing-format=qcow2": "not a qcow2 image", ",backing-format=raw": "",
	} {
		d, err := parseDisk("path=" + f.path("image") + ",format=qcow2,backing=on" + property)
		if err != nil {
			t.Fatal(err)
		}
		r, err := vmm.OpenResources(&vmm.Config{Disks: []vmm.Disk{d}})
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", property, err, want)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}
