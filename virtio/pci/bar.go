package pci

// The parts of the BAR, a page each.
const (
	pageSize = 0x1000

	commonOffset = 0 * pageSize
	isrOffset    = 1 * pageSize
	deviceOffset = 2 * pageSize
	notifyOffset = 3 * pageSize
	tableOffset  = 4 * pageSize
	pbaOffset    = 5 * pageSize

	barSize = 8 * pageSize // a power of two
)

// ReadMMIO reads len(p) bytes of device memory at the guest-physical address addr. It returns false, with p untouched,
// if the function does not decode that address.
func (f *Function) ReadMMIO(addr uint64, p []byte) bool {
	if _, ok := f.decoded(addr); !ok {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	off, ok := f.decoded(addr) // the BAR may have moved meanwhile
	if ok {
		f.readBAR(p, off)
	}
	return ok
}

// WriteMMIO writes len(p) bytes of device memory at the guest-physical address addr. It returns false if the function
// does not decode that address.
func (f *Function) WriteMMIO(addr uint64, p []byte) bool {
	if _, ok := f.decoded(addr); !ok {
		return false
	}
	f.mu.Lock()
	defer f.unlock()
	off, ok := f.decoded(addr)
	if ok {
		f.writeBAR(p, off)
	}
	return ok
}

// decoded returns where in the BAR addr lies, if it does. It takes no lock: a bus asks every function in turn, and none
// may hold up accesses that are another's.
func (f *Function) decoded(addr uint64) (off int, ok bool) {
	base := f.base.Load()
	if base == 0 || addr-base >= barSize {
		return 0, false
	}
	return int(addr - base), true
}

// readBAR reads from offset off < barSize. Accesses of every size and alignment are answered; what does not exist, and
// what lies beyond the page, reads as zero.
func (f *Function) readBAR(p []byte, off int) {
	clear(p)
	page, off := off&^(pageSize-1), off&(pageSize-1)
	p = p[:min(len(p), pageSize-off)]
	switch page {
	case commonOffset:
		f.readCommon(p, off)
	case isrOffset:
		if off == 0 && len(p) > 0 {
			p[0] = f.intx.read()
		}
	case deviceOffset:
		f.dev.ReadConfig(p, off)
	case tableOffset:
		f.readTable(p, off)
	case pbaOffset:
		f.readPending(p, off)
	}
}

// writeBAR writes to offset off < barSize; what does not exist or is read-only ignores it.
func (f *Function) writeBAR(p []byte, off int) {
	page, off := off&^(pageSize-1), off&(pageSize-1)
	p = p[:min(len(p), pageSize-off)]
	switch page {
	case commonOffset:
		f.writeCommon(p, off)
	case deviceOffset:
		f.dev.WriteConfig(p, off)
	case notifyOffset:
		f.kick(off / notifyMultiplier)
	case tableOffset:
		f.writeTable(p, off)
	}
}
