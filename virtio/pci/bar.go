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
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.base == 0 || addr-f.base >= barSize {
		return false
	}
	f.readBAR(p, int(addr-f.base))
	return true
}

// WriteMMIO writes len(p) bytes of device memory at the guest-physical address addr. It returns false if the function
// does not decode that address.
func (f *Function) WriteMMIO(addr uint64, p []byte) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.base == 0 || addr-f.base >= barSize {
		return false
	}
	f.writeBAR(p, int(addr-f.base))
	return true
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
