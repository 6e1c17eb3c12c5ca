package vconsole

import (
	"encoding/binary"
	"errors"

	"github.com/kvmlet/kvmlet/iov"
)

// Control events (virtio 1.2, 5.3.6.2).
const (
	eventDeviceReady = 0 // driver: the device is set up (value 1) or could not be (0)
	eventDeviceAdd   = 1 // device: there is a port
	eventPortReady   = 3 // driver: the port is set up (value 1) or could not be (0)
	eventConsolePort = 4 // device: the port is a terminal
	eventResize      = 5 // device: the terminal's size; two more 16-bit fields follow: cols, rows
	eventPortOpen    = 6 // both: the sender's side is open (value 1) or closed (0)
	eventPortName    = 7 // device: the port's name follows, without a terminating zero
)

// controlSize is the length of struct virtio_console_control (virtio 1.2, 5.3.6.2): id at 0 (32 bits), event at 4 and
// value at 6 (16 bits each).
const controlSize = 8

// What the device still has to tell the driver about a port: one bit each, so that the backlog is bounded however often
// the driver asks. The lowest bit goes first. A port is announced open before it gets its name: a guest program that
// finds a port by its name may read at once, and must not take a port that is not open yet for one that has ended.
const (
	pendingAdd = 1 << iota
	pendingConsole
	pendingResize
	pendingOpen
	pendingName
)

var errControlBuffer = errors.New("vconsole: control receive buffer is too small for the message")

// send marks messages about p for sending. d.mu is held.
func (d *Device) send(p *Port, bits uint8) {
	p.pending |= bits
	d.control.Broadcast()
}

// obey carries out what the driver sends on the control queue. Linux spins until a message is consumed, so nothing here
// may wait for anything but the queue.
func (d *Device) obey(w *worker) error {
	for !d.stopped(w) {
		ok, err := w.queue.Pop(&w.chain)
		if err != nil {
			return err
		}
		if !ok {
			if w.queue.Wait() != nil {
				return nil
			}
			continue
		}
		var msg [controlSize]byte
		n, err := w.chain.Readable.CopyTo(msg[:], 0)
		d.handle(msg[:n], err)
		w.done(0)
	}
	return nil
}

// handle acts on one control message. A message that is short, unknown or about a port that does not exist is counted
// and otherwise ignored: it harms nobody.
func (d *Device) handle(msg []byte, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil || len(msg) < controlSize {
		d.stats.BadControl++
		return
	}
	id := binary.LittleEndian.Uint32(msg[0:])
	event := binary.LittleEndian.Uint16(msg[4:])
	value := binary.LittleEndian.Uint16(msg[6:]) != 0

	if event == eventDeviceReady { // of the device, so the id means nothing
		for _, p := range d.ports {
			if p != nil {
				p.ready, p.pending = false, 0
				if value {
					d.send(p, pendingAdd)
				}
			}
		}
		return
	}
	if id >= uint32(len(d.ports)) || d.ports[id] == nil {
		d.stats.BadControl++
		return
	}
	p := d.ports[id]
	switch event {
	case eventPortReady:
		p.ready, p.pending = value, 0
		if value {
			d.send(p, p.introduction())
		}
	case eventPortOpen:
		p.setOpen(value)
	default:
		d.stats.BadControl++
	}
}

// introduction returns the messages that follow when the driver has set up p. d.mu is held.
func (p *Port) introduction() uint8 {
	if p.id != 0 {
		return pendingOpen | pendingName
	}
	if p.dev.cols == 0 && p.dev.rows == 0 {
		return pendingConsole | pendingOpen
	}
	return pendingConsole | pendingResize | pendingOpen
}

// announce sends the pending control messages, one per buffer of the driver's.
func (d *Device) announce(w *worker) error {
	var buf [controlSize + MaxName]byte
	return d.supply(w, d.control, func() bool { return d.pendingPort() != nil }, func(dst iov.Vec) (int, error) {
		p := d.pendingPort()
		bit := p.pending & -p.pending
		msg := p.appendMessage(buf[:0], bit)
		if dst.Size() < len(msg) {
			return 0, errControlBuffer
		}
		p.pending &^= bit
		return dst.CopyFrom(0, msg)
	})
}

// pendingPort returns the first port about which there is something to tell, or nil. d.mu is held.
func (d *Device) pendingPort() *Port {
	for _, p := range d.ports {
		if p != nil && p.pending != 0 {
			return p
		}
	}
	return nil
}

// appendMessage appends the control message that bit stands for. d.mu is held.
func (p *Port) appendMessage(b []byte, bit uint8) []byte {
	le := binary.LittleEndian
	head := func(event, value uint16) {
		b = le.AppendUint32(b, p.id)
		b = le.AppendUint16(b, event)
		b = le.AppendUint16(b, value)
	}
	switch bit {
	case pendingAdd:
		head(eventDeviceAdd, 1)
	case pendingConsole:
		head(eventConsolePort, 1)
	case pendingResize:
		head(eventResize, 0)
		b = le.AppendUint16(b, p.dev.cols)
		b = le.AppendUint16(b, p.dev.rows)
	case pendingOpen:
		var open uint16
		if !p.closed {
			open = 1
		}
		head(eventPortOpen, open)
	case pendingName:
		head(eventPortName, 1)
		b = append(b, p.name...)
	}
	return b
}
