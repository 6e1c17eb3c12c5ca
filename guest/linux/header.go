package linux

// Offsets of setup header fields that are looked at before the header is decoded.
const (
	offSetupHeader = 0x1f1
	offBootFlag    = 0x1fe
	offHeader      = 0x202
	offHeaderEnd   = 0x290 // where boot_params has its next field, so no header is longer
)

// setupHeader is "The Real-Mode Kernel Header" (boot.rst), which stands at 0x1f1 both in a bzImage and in boot_params.
// The layout is packed; encoding/binary reads and writes it so.
type setupHeader struct {
	SetupSects          uint8    // 0x1f1: sectors of setup code, 0 means 4
	RootFlags           uint16   // 0x1f2
	SysSize             uint32   // 0x1f4: protected-mode code, in 16-byte units
	RAMSize             uint16   // 0x1f8
	VidMode             uint16   // 0x1fa
	RootDev             uint16   // 0x1fc
	BootFlag            uint16   // 0x1fe: 0xaa55
	Jump                [2]uint8 // 0x200: a short jump over the header
	Magic               [4]uint8 // 0x202: "HdrS"
	Version             uint16   // 0x206: boot protocol
	RealModeSwitch      uint32   // 0x208
	StartSysSeg         uint16   // 0x20c
	KernelVersion       uint16   // 0x20e: of the version string, less 0x200
	TypeOfLoader        uint8    // 0x210
	LoadFlags           uint8    // 0x211
	SetupMoveSize       uint16   // 0x212
	Code32Start         uint32   // 0x214
	RamdiskImage        uint32   // 0x218
	RamdiskSize         uint32   // 0x21c
	BootsectKludge      uint32   // 0x220
	HeapEndPtr          uint16   // 0x224
	ExtLoaderVer        uint8    // 0x226
	ExtLoaderType       uint8    // 0x227
	CmdLinePtr          uint32   // 0x228
	InitrdAddrMax       uint32   // 0x22c: of the initrd's last byte
	KernelAlignment     uint32   // 0x230
	RelocatableKernel   uint8    // 0x234
	MinAlignment        uint8    // 0x235
	XLoadFlags          uint16   // 0x236: 2.12
	CmdlineSize         uint32   // 0x238: without the NUL
	HardwareSubarch     uint32   // 0x23c
	HardwareSubarchData uint64   // 0x240
	PayloadOffset       uint32   // 0x248: 2.08; from the protected-mode code's start
	PayloadLength       uint32   // 0x24c: 2.08
	SetupData           uint64   // 0x250
	PrefAddress         uint64   // 0x258: 2.10
	InitSize            uint32   // 0x260: 2.10; memory needed from the load address on
	HandoverOffset      uint32   // 0x264
	KernelInfoOffset    uint32   // 0x268
	Later               [36]byte // 0x26c: fields of newer protocols, handed through
}

// Values of the setup header ("Details of Header Fields").
const (
	bootFlag = 0xaa55

	protocol208 = 0x0208 // payload_offset, payload_length
	protocol212 = 0x020c // xloadflags, ext_ramdisk_*
	protocol215 = 0x020f

	loaderUndefined = 0xff // type_of_loader of a boot loader without a number

	loadedHigh = 1 << 0 // loadflags LOADED_HIGH: the protected-mode code loads at 1 MiB

	xlfKernel64   = 1 << 0 // xloadflags XLF_KERNEL_64: a 64-bit entry at 0x200
	xlfAbove4GiB  = 1 << 1 // xloadflags XLF_CAN_BE_LOADED_ABOVE_4G
	entry64Offset = 0x200  // "64-bit BOOT PROTOCOL"
)

// What an x86-64 kernel without a setup header supports: COMMAND_LINE_SIZE less the NUL, and the initrd_addr_max that
// every 64-bit bzImage has.
const (
	defaultCmdlineSize   = 2047
	defaultInitrdAddrMax = 0x7fffffff
)

// e820Entry is struct boot_e820_entry, also packed.
type e820Entry struct {
	Addr uint64 // 0
	Size uint64 // 8
	Type uint32 // 16
}

// Types of memory; PVH uses the same numbers.
const (
	memoryRAM      = 1
	memoryReserved = 2
)

const e820Max = 128 // E820_MAX_ENTRIES_ZEROPAGE

// bootParams is struct boot_params, the "zero page" (zero-page.rst), as far as this package fills it.
type bootParams struct {
	_               [0x70]byte         // 0x000: screen_info and others that firmware fills
	ACPIRSDPAddr    uint64             // 0x070
	_               [0x48]byte         // 0x078
	ExtRamdiskImage uint32             // 0x0c0: the address's upper half
	ExtRamdiskSize  uint32             // 0x0c4
	ExtCmdLinePtr   uint32             // 0x0c8
	_               [0x11c]byte        // 0x0cc
	E820Entries     uint8              // 0x1e8
	_               [8]byte            // 0x1e9: among them sentinel at 0x1ef, which must be 0
	Header          setupHeader        // 0x1f1
	_               [0x40]byte         // 0x290
	E820Table       [e820Max]e820Entry // 0x2d0
	_               [0x330]byte        // 0xcd0
}
