package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"syscall"
	"time"
	"unicode"
)

const (
	// version is counted up when an end must not talk to an older one.
	version = 1

	helloLen     = 104
	seedLen      = 64
	maxMessage   = 4 << 20 // bytes of a Command or a request, above what Linux lets exec take
	maxErrorText = 4096
	maxSignal    = 64
)

// magic begins every hello. It has bytes that line disciplines, text modes and 7-bit links change.
const magic = "\x8fkvmlet\r\n\x00agent\xff"

// helloPrefix is what every hello frame begins with: its header and the magic.
var helloPrefix = func() (p [headerLen + len(magic)]byte) {
	putHeader(p[:], frameHello, 0, 0, helloLen)
	copy(p[headerLen:], magic)
	return p
}()

// hello opens a session.
//
//	0   magic    [16]byte
//	16  version  u32
//	20  check    u32  CRC-32C of what follows: a hello cut short runs into other bytes
//	24  session  u64  drawn by the host; 0 is a guest announcing itself
//	32  clock    i64  host: nanoseconds since 1970; guest: 0
//	40  seed     [64]byte  host: random; guest: 0
type hello struct {
	session uint64
	clock   int64
	seed    [seedLen]byte
}

func (h *hello) append(b []byte) []byte {
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint32(b, version)
	b = binary.LittleEndian.AppendUint32(b, 0)
	tail := len(b)
	b = binary.LittleEndian.AppendUint64(b, h.session)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.clock))
	b = append(b, h.seed[:]...)
	binary.LittleEndian.PutUint32(b[tail-4:], crc32.Checksum(b[tail:], castagnoli))
	return b
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// parseHello reads a hello frame's payload. A hello of another version comes back with ErrVersion and its session.
func parseHello(p []byte) (hello, error) {
	if len(p) != helloLen || string(p[:len(magic)]) != magic ||
		binary.LittleEndian.Uint32(p[20:]) != crc32.Checksum(p[24:], castagnoli) {
		return hello{}, fmt.Errorf("hello without magic or with a wrong checksum: %w", ErrProtocol)
	}
	h := hello{session: binary.LittleEndian.Uint64(p[24:]), clock: int64(binary.LittleEndian.Uint64(p[32:]))}
	copy(h.seed[:], p[40:])
	if v := binary.LittleEndian.Uint32(p[16:]); v != version {
		return h, fmt.Errorf("this end has version %d, the other %d: %w", version, v, ErrVersion)
	}
	return h, nil
}

// message reads and writes the fields of a message; a read beyond its end or bounds sets bad and returns zeroes.
type message struct {
	b   []byte
	bad bool
}

func (m *message) putU32(v uint32) { m.b = binary.LittleEndian.AppendUint32(m.b, v) }
func (m *message) putU64(v uint64) { m.b = binary.LittleEndian.AppendUint64(m.b, v) }

func (m *message) putString(s string) {
	m.putU32(uint32(len(s)))
	m.b = append(m.b, s...)
}

func (m *message) putStrings(list []string) {
	m.putU32(uint32(len(list)))
	for _, s := range list {
		m.putString(s)
	}
}

func (m *message) take(n int) []byte {
	if n < 0 || n > len(m.b) {
		m.b, m.bad = nil, true
		return nil
	}
	p := m.b[:n]
	m.b = m.b[n:]
	return p
}

func (m *message) u32() uint32 {
	if p := m.take(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (m *message) u64() uint64 {
	if p := m.take(8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

func (m *message) string() string { return string(m.take(int(m.u32()))) }

// strings reads a list; each entry takes at least its length's 4 bytes, which bounds the allocation by the message.
func (m *message) strings() []string {
	n := int(m.u32())
	if n > len(m.b)/4 {
		m.bad = true
		return nil
	}
	list := make([]string, 0, n)
	for range n {
		list = append(list, m.string())
	}
	return list
}

func (m *message) u32s() []uint32 {
	n := int(m.u32())
	if n > len(m.b)/4 {
		m.bad = true
		return nil
	}
	list := make([]uint32, 0, n)
	for range n {
		list = append(list, m.u32())
	}
	return list
}

// done reports whether the message was well formed and is read to its end.
func (m *message) done(what string) error {
	if m.bad || len(m.b) != 0 {
		return fmt.Errorf("malformed %s: %w", what, ErrProtocol)
	}
	return nil
}

// spec is what the guest needs to know of a Command.
type spec struct {
	args, env     []string
	dir, root     string
	defaultEnv    bool // add nothing of the host's: the agent's own environment
	tty           bool
	rows, columns uint16
	wired         [channels]bool // which of the standard streams are connected; the others are /dev/null
	user          *User
}

const (
	specTTY = 1 << iota
	specDefaultEnv
	specUser
	specStdin // and the next two: the other channels
)

func (s *spec) encode() []byte {
	var m message
	var flags uint32
	set := func(on bool, bit uint32) {
		if on {
			flags |= bit
		}
	}
	set(s.tty, specTTY)
	set(s.defaultEnv, specDefaultEnv)
	set(s.user != nil, specUser)
	for c, on := range s.wired {
		set(on, specStdin<<c)
	}
	m.putU32(flags)
	m.putU32(uint32(s.rows)<<16 | uint32(s.columns))
	m.putString(s.dir)
	m.putString(s.root)
	m.putStrings(s.args)
	m.putStrings(s.env)
	if s.user != nil {
		m.putU32(s.user.UID)
		m.putU32(s.user.GID)
		m.putU32(uint32(len(s.user.Groups)))
		for _, g := range s.user.Groups {
			m.putU32(g)
		}
	}
	return m.b
}

func decodeSpec(b []byte) (*spec, error) {
	m := message{b: b}
	flags, size := m.u32(), m.u32()
	s := &spec{
		tty:        flags&specTTY != 0,
		defaultEnv: flags&specDefaultEnv != 0,
		rows:       uint16(size >> 16),
		columns:    uint16(size),
	}
	for c := range s.wired {
		s.wired[c] = flags&(specStdin<<c) != 0
	}
	s.dir, s.root = m.string(), m.string()
	s.args, s.env = m.strings(), m.strings()
	if flags&specUser != 0 {
		s.user = &User{UID: m.u32(), GID: m.u32(), Groups: m.u32s()}
	}
	if flags >= specStdin<<channels {
		m.bad = true
	}
	if err := m.done("command"); err != nil {
		return nil, err
	}
	if len(s.args) == 0 {
		return nil, fmt.Errorf("command without arguments: %w", ErrProtocol)
	}
	return s, nil
}

// request kinds.
const (
	requestInfo uint32 = iota
	requestPoweroff
	requestReboot
	requestSync
	requestMount
	requestSwitchRoot
)

func requestHead(kind uint32) []byte { return binary.LittleEndian.AppendUint32(nil, kind) }

func encodeMounts(mounts []Mount) []byte {
	m := message{b: requestHead(requestMount)}
	m.putU32(uint32(len(mounts)))
	for _, mt := range mounts {
		m.putString(mt.Source)
		m.putString(mt.Target)
		m.putString(mt.Type)
		m.putU64(uint64(mt.Flags))
		m.putString(mt.Options)
	}
	return m.b
}

// decodeMounts reads what follows the request's kind.
func decodeMounts(m *message) []Mount {
	n := int(m.u32())
	if n > len(m.b)/24 {
		m.bad = true
		return nil
	}
	mounts := make([]Mount, 0, n)
	for range n {
		mounts = append(mounts, Mount{
			Source: m.string(), Target: m.string(), Type: m.string(), Flags: uintptr(m.u64()), Options: m.string(),
		})
	}
	return mounts
}

func (i *Info) encode() []byte {
	var m message
	m.putString(i.Kernel)
	m.putString(i.Hostname)
	m.putU32(uint32(i.CPUs))
	m.putU64(i.Memory)
	m.putU64(uint64(i.InitStarted))
	m.putU64(uint64(i.AgentReady))
	m.putU64(uint64(i.Uptime))
	return m.b
}

func decodeInfo(b []byte) (Info, error) {
	m := message{b: b}
	i := Info{
		Kernel: m.string(), Hostname: m.string(), CPUs: int(m.u32()), Memory: m.u64(),
		InitStarted: time.Duration(m.u64()), AgentReady: time.Duration(m.u64()), Uptime: time.Duration(m.u64()),
	}
	return i, m.done("info")
}

// Error is a failure in the guest, as its kernel or agent told it.
type Error struct {
	Errno syscall.Errno // 0 if no system call is behind it
	Text  string
}

func (e *Error) Error() string { return e.Text }

// Unwrap gives the Errno, so that errors.Is(err, fs.ErrNotExist) and the like work.
func (e *Error) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

// appendError appends a failure in wire form: errno and text.
func appendError(b []byte, err error) []byte {
	var errno syscall.Errno
	errors.As(err, &errno)
	text := err.Error()
	b = binary.LittleEndian.AppendUint32(b, uint32(errno))
	return append(b, text[:min(len(text), maxErrorText)]...)
}

// decodeError reads what appendError wrote, making the text printable.
func decodeError(b []byte) error {
	m := message{b: b}
	errno := syscall.Errno(m.u32())
	text := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, string(m.b[:min(len(m.b), maxErrorText)]))
	if m.bad || text == "" {
		text = "the guest gave no reason"
	}
	return &Error{errno, text}
}
