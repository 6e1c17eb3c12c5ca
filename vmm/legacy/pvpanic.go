package legacy

// PvpanicPort is the usual port of the panic device.
const PvpanicPort = 0x505

// PanicEvent is a set of things a guest's kernel reports when it fails (QEMU's docs/specs/pvpanic, "Bit definition").
type PanicEvent byte

// The events. A guest that has a crash kernel loaded reports GuestCrashLoaded in place of GuestPanicked, and goes on to
// run it.
const (
	GuestPanicked    PanicEvent = 1 << 0
	GuestCrashLoaded PanicEvent = 1 << 1
)

// Pvpanic is the port through which a guest's kernel says that it panicked (ACPI device QEMU0001).
type Pvpanic struct {
	port    uint16
	onPanic func(PanicEvent)
}

// NewPvpanic returns the device at port. onPanic is called for each report that names an event of this package.
func NewPvpanic(port uint16, onPanic func(PanicEvent)) *Pvpanic {
	return &Pvpanic{port: port, onPanic: onPanic}
}

// ReadPort implements the bus's reads: the events that can be reported.
func (d *Pvpanic) ReadPort(port uint16, p []byte) {
	for i := range p {
		p[i] = floating
		if port+uint16(i) == d.port {
			p[i] = byte(GuestPanicked | GuestCrashLoaded)
		}
	}
}

// WritePort implements the bus's writes.
func (d *Pvpanic) WritePort(port uint16, p []byte) {
	for i, b := range p {
		if e := PanicEvent(b) & (GuestPanicked | GuestCrashLoaded); port+uint16(i) == d.port && e != 0 {
			d.onPanic(e)
		}
	}
}
