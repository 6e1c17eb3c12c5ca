// Package qcow2 is the block driver for disks in the format of QEMU, versions 2 and 3, after its public specification
// (docs/interop/qcow2.rst in QEMU; sections are named in the sources). Everything is done but encryption, external data
// files and extended L2 entries, which are refused by name; persistent bitmaps are dropped by the first write, as the
// specification asks of those who don't know them.
//
// An image lies on a blk.Device, its file, and may have another one under it, its backing file. A request passes these:
//
//	read.go, write.go, zero.go, compress.go   cut the request into extents, give clusters a place
//	map.go, cache.go                          where clusters are: L1 in memory, L2 tables in a cache of slices
//	alloc.go, refcount.go                     which clusters are free
//	commit.go                                 how metadata reaches the file, and in which order: the heart of it
//	file.go                                   the file's length
//
// beside those that work on the image as a whole: create.go, resize.go, snapshot.go, check.go and repair.go. How resize.go
// and snapshot.go change it in one step is in shadow.go.
//
// # Locks
//
// A request holds Image.ops for reading; what changes the shape of the image holds it for writing. Image.mu guards the
// mapping and is never held during I/O, refcounts.mu guards the refcounts and may be. They are taken in the order ops,
// tables, refcounts.mu, mu. A cluster that a request lets go of is not used again before the file says so, too, and before
// every request has ended that began when it was still in use (generations); so data is read and written without a lock.
//
// # Crashes
//
// Whatever is killed or loses power in the midst of writing leaves an image without contradictions, and in it all that was
// flushed; space may be lost, which Check gives back. With lazy refcounts, the next Open repairs it first.
//
// Snapshots are taken, applied and deleted in one step, in both versions of the format. An image whose process is killed
// meanwhile, or whose host loses power, has the one state or the other, and no space is lost by it. An operation that
// fails, because there is no room or for another reason, leaves what there was, in memory as in the file, and the image
// goes on. Only where the header's own write fails, and writing the old one again, too, nobody knows which state the file
// has: such an image is not written any more, and opens in the one or the other. The same goes for the size of the disk,
// but that what lies behind the end of a disk that shrinks may be zero before. The price is room for the tables that
// change, until they have: about 160 KiB for each GiB of data in clusters of 64 KiB.
//
// QEMU, and this package before, change refcounts and copied flags in place, which no order of writes keeps in step. An
// image that was killed then has flags that contradict refcounts, and lost clusters; in version 3 the dirty bit may say
// so. Check repairs it in both versions without loss: references are what counts, refcounts and flags follow.
//
// # Events
//
// The file's Device is told of these places (blk.Observer), and so a test can stop there:
//
//	qcow2_file_grow                                        the file is about to grow
//	qcow2_cluster_alloc qcow2_write_data                   clusters were found; data is about to go there
//	qcow2_write_compressed qcow2_read_compressed           compressed data is about to be written, read
//	qcow2_read_backing qcow2_cow_read                      about to read from the backing file, for copy on write
//	qcow2_l2_load qcow2_l2_alloc qcow2_l2_cow              about to read, make, copy an L2 table
//	qcow2_refblock_load qcow2_refblock_alloc               about to read, make a refcount block
//	qcow2_refcount_update qcow2_refblock_update            a commit begins with refcounts; one slice of them is written
//	qcow2_refblock_flush qcow2_reftable_update             flush of new blocks; table entries that point to them
//	qcow2_reftable_grow qcow2_reftable_grow_flush          a new refcount table is about to be written, flushed
//	qcow2_flush_data                                       flush of data and refcounts, before what refers to them
//	qcow2_l2_update qcow2_l1_update qcow2_l2_update_done   L2, L1 entries are about to be written; they are
//	qcow2_l2_flushed                                       the commit's entries are stable
//	qcow2_header_update qcow2_header_flush                 the header is about to be written, flushed
//	qcow2_snapshot_table qcow2_l1_switch                   about to switch to another snapshot table, L1 table
package qcow2
