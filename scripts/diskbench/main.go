// Diskbench measures kvmlet's block layer beside QEMU's on the same files and prints a table for README.
//
//	go run ./scripts/diskbench [-rounds 5] [-seconds 0.3] [-size 1024] [-dir DIR] [-cache none,writeback] [-rows REGEXP]
//
// Each row is one load: `kvmlet disk bench` and `qemu-img bench` carry out the same number of requests on the same file,
// in turns, after one round of each that is not counted. The figures are the medians of requests per second as the two
// report them. qemu-img has no random order, so in the rows that are called random both go through the file in strides of
// 0.618 of its size, which meets every block once before any twice. The rows "4K blocks" force an alignment of 4,096
// bytes on both, by blkdebug there, so that each write reads a block, changes 512 bytes of it and writes it back. All
// requests of a run share one buffer, as qemu-img has it; kvmlet's lies in huge pages, as the memory of its guests does.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/kvmlet/kvmlet/scripts/internal/measure"
)

type options struct {
	rounds  int
	seconds float64
	size    int64 // MiB
	dir     string
	caches  string
	rows    string
}

func main() {
	var o options
	flag.IntVar(&o.rounds, "rounds", 5, "measure each row so many times")
	flag.Float64Var(&o.seconds, "seconds", 0.3, "let QEMU's part of a round take about so many seconds")
	flag.Int64Var(&o.size, "size", 1024, "size of the disk in `MiB`")
	flag.StringVar(&o.dir, "dir", "", "make the disks in `DIR` (default the folder for temporary files)")
	flag.StringVar(&o.caches, "cache", "none,writeback", "the cache modes to measure")
	flag.StringVar(&o.rows, "rows", "", "only rows whose name matches `REGEXP`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, &o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "diskbench:", err)
		os.Exit(1)
	}
}

// row is one load.
type row struct {
	format, cache, aio string
	write, random      bool
	depth              int
	size               int64 // of a request, in bytes
	align              int   // forced; 0: as it is
}

func (r row) name() string {
	what := map[bool]string{false: "read", true: "write"}[r.write]
	order := map[bool]string{false: "sequential", true: "random"}[r.random]
	size := fmt.Sprint(r.size>>10, "K")
	if r.size < 1024 {
		size = fmt.Sprint(r.size)
	}
	name := fmt.Sprintf("%s, %s, %s, %s %s %s, depth %d", r.format, r.cache, r.aio, size, order, what, r.depth)
	if r.align > 0 {
		name += fmt.Sprintf(", %dK blocks", r.align>>10)
	}
	return name
}

func rows(caches []string) (all []row) {
	for _, cache := range caches {
		for _, format := range []string{"raw", "qcow2"} {
			for _, load := range []struct {
				size   int64
				random bool
			}{{4 << 10, true}, {64 << 10, false}} {
				for _, write := range []bool{false, true} {
					for _, depth := range []int{1, 64} {
						for _, aio := range []string{"io_uring", "threads"} {
							all = append(all, row{
								format: format, cache: cache, aio: aio, write: write, depth: depth,
								random: load.random, size: load.size,
							})
						}
					}
				}
			}
		}
		for _, depth := range []int{1, 64} {
			for _, aio := range []string{"io_uring", "threads"} {
				all = append(all, row{
					format: "raw", cache: cache, aio: aio, write: true, random: true, depth: depth, size: 512, align: 4096,
				})
			}
		}
	}
	return all
}

// stride is how far a "random" row goes with each request: an odd number of requests' sizes, so that a disk whose size is
// a power of two is met in every place.
func (r row) stride(disk int64) int64 {
	if !r.random {
		return r.size
	}
	n := int64(float64(disk/r.size) * 0.618)
	return (n | 1) * r.size
}

// bench is one side of the comparison.
type bench func(ctx context.Context, r row, file string, disk, count int64) (opsPerSecond float64, err error)

var reported = regexp.MustCompile(`Run completed in ([0-9.]+) seconds`)

func qemu(ctx context.Context, r row, file string, disk, count int64) (float64, error) {
	args := []string{
		"bench", "-i", r.aio, "-t", r.cache, "-c", fmt.Sprint(count), "-d", fmt.Sprint(r.depth),
		"-s", fmt.Sprint(r.size), "-S", fmt.Sprint(r.stride(disk)),
	}
	if r.write {
		args = append(args, "-w")
	}
	if r.align > 0 {
		args = append(args, "--image-opts", fmt.Sprintf(
			"driver=%s,file.driver=blkdebug,file.align=%d,file.image.driver=file,file.image.filename=%s", r.format, r.align, file))
	} else {
		args = append(args, "-f", r.format, file)
	}
	out, err := output(ctx, "qemu-img", args)
	if err != nil {
		return 0, err
	}
	m := reported.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("qemu-img %s: no time in %q", strings.Join(args, " "), out)
	}
	seconds, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		return 0, err
	}
	return float64(count) / seconds, nil
}

func kvmlet(program string) bench {
	return func(ctx context.Context, r row, file string, disk, count int64) (float64, error) {
		args := []string{
			"disk", "bench", "--json", "--quiet", "--one-buffer", "--format", r.format, "--cache", r.cache, "--aio", r.aio,
			"--count", fmt.Sprint(count), "--depth", fmt.Sprint(r.depth), "--size", fmt.Sprint(r.size),
			"--step", fmt.Sprint(r.stride(disk)),
		}
		if r.write {
			args = append(args, "--write")
		}
		if r.align > 0 {
			args = append(args, "--request-align", fmt.Sprint(r.align))
		}
		out, err := output(ctx, program, append(args, file))
		if err != nil {
			return 0, err
		}
		var result struct{ IOPS float64 }
		if err := json.Unmarshal(out, &result); err != nil {
			return 0, fmt.Errorf("kvmlet %s: %w", strings.Join(args, " "), err)
		}
		return result.IOPS, nil
	}
}

func output(ctx context.Context, program string, args []string) ([]byte, error) {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		said := bytes.TrimSpace(stderr.Bytes())
		return nil, fmt.Errorf("%s %s: %w: %s", filepath.Base(program), strings.Join(args, " "), err, said)
	}
	return out, nil
}

func run(ctx context.Context, o *options, w io.Writer) error {
	if flag.NArg() > 0 || o.rounds < 1 || o.seconds <= 0 || o.size < 1 {
		return errors.New("want no arguments, one round at least, and positive numbers")
	}
	only, err := regexp.Compile(o.rows)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(o.dir, "diskbench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "kvmlet")
	if err := measure.Build(ctx, program); err != nil {
		return err
	}
	version, err := output(ctx, "qemu-img", []string{"--version"})
	if err != nil {
		return err
	}
	disk := o.size << 20
	files, err := makeDisks(ctx, dir, disk)
	if err != nil {
		return err
	}
	before := measure.Load()
	fmt.Fprintf(w, "| load | QEMU | kvmlet | ratio |\n|---|---|---|---|\n")
	for _, r := range rows(strings.Split(o.caches, ",")) {
		if !only.MatchString(r.name()) {
			continue
		}
		theirs, ours, err := compare(ctx, o, r, files[r.format], disk, qemu, kvmlet(program))
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "| %s | %.0f | %.0f | %.2f |\n", r.name(), theirs, ours, ours/theirs)
	}
	fmt.Fprintf(w, "\nRequests per second, medians of %d rounds. %s; %d CPUs, load %s before and %s after.\n",
		o.rounds, strings.SplitN(string(version), "\n", 2)[0], runtime.NumCPU(), before, measure.Load())
	return nil
}

// compare returns the medians of both sides. How many requests a round has follows from a first one.
func compare(ctx context.Context, o *options, r row, file string, disk int64, sides ...bench) (first, second float64, err error) {
	const few = 500
	speed, err := sides[0](ctx, r, file, disk, few)
	if err != nil {
		return 0, 0, err
	}
	count := max(int64(speed*o.seconds), few)
	results := make([][]float64, len(sides))
	for i := range o.rounds + 1 {
		for k := range sides {
			side := (i + k) % len(sides) // who begins changes
			n, err := sides[side](ctx, r, file, disk, count)
			if err != nil {
				return 0, 0, err
			}
			if i > 0 {
				results[side] = append(results[side], n)
			}
		}
	}
	return measure.Median(results[0]), measure.Median(results[1]), nil
}

// makeDisks fills a raw disk and a qcow2 image of the same contents, which no file system can leave out.
func makeDisks(ctx context.Context, dir string, size int64) (map[string]string, error) {
	files := map[string]string{"raw": filepath.Join(dir, "disk.raw"), "qcow2": filepath.Join(dir, "disk.qcow2")}
	f, err := os.Create(files["raw"])
	if err != nil {
		return nil, err
	}
	block := bytes.Repeat([]byte("kvmlet's block layer beside QEMU's\n"), 1<<20)[:1<<20]
	for at := int64(0); at < size && err == nil; at += int64(len(block)) {
		_, err = f.Write(block)
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return nil, err
	}
	_, err = output(ctx, "qemu-img", []string{"convert", "-f", "raw", "-O", "qcow2", files["raw"], files["qcow2"]})
	return files, err
}
