package vmm

// The guest-physical address space. RAM fills what guest/memory leaves: [0, 3 GiB) and from 4 GiB on.
const (
	pciWindow     = 0xC000_0000 // memory BARs, assigned by us as firmware would
	pciWindowSize = 0x2000_0000
	ecamBase      = 0xE000_0000 // one bus
	identityPage  = 0xFFFB_C000 // KVM_SET_IDENTITY_MAP_ADDR: one page
	tssPages      = 0xFFFB_D000 // KVM_SET_TSS_ADDR: three pages
	ioAPIC        = 0xFEC0_0000 // where KVM puts it
	localAPIC     = 0xFEE0_0000 // where a CPU puts it
	acpiBase      = 0x000E_0000 // where firmware keeps its tables
	mpBase        = 0x000F_0000 // kernels look for the MP table from here on
	tablesEnd     = 0x0010_0000
)

// Global system interrupts. The first 16 are the ISA ones; PCI slots share the I/O APIC's other eight (acpi.INTx).
const (
	gsiTimer   = 0
	gsiMSIBase = 24 // the first that is not a pin
)

// Limits of a machine.
const (
	MinMemory = 64 << 20
	MaxMemory = 64 << 30
	MaxCPUs   = 64
)
