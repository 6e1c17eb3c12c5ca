package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// monitor is a QMP connection (docs/interop/qmp-spec of QEMU). It is for one goroutine.
type monitor struct {
	conn   *net.UnixConn
	dec    *json.Decoder
	events []answer // came while do waited for its answer
}

// answer is any message from QEMU.
type answer struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Description string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Status string `json:"status"`
	} `json:"data"`
}

// openMonitor takes over f and goes through the greeting.
func openMonitor(f *os.File) (*monitor, error) {
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	m := &monitor{conn: conn.(*net.UnixConn)}
	m.dec = json.NewDecoder(io.LimitReader(m.conn, 1<<20))
	var greeting struct {
		QMP json.RawMessage
	}
	if err = m.dec.Decode(&greeting); err == nil {
		err = m.do("qmp_capabilities", nil, nil)
	}
	if err != nil {
		m.close()
		return nil, fmt.Errorf("talk to QEMU's monitor: %w", err)
	}
	return m, nil
}

func (m *monitor) close() { m.conn.Close() }

// do runs a command, handing pass over to QEMU with it if that is not nil.
func (m *monitor) do(command string, arguments any, pass *os.File) error {
	fail := func(err error) error { return fmt.Errorf("QEMU's monitor: %s: %w", command, err) }
	msg := map[string]any{"execute": command}
	if arguments != nil {
		msg["arguments"] = arguments
	}
	b, err := json.Marshal(msg)
	if err != nil {
		return fail(err)
	}
	var rights []byte
	if pass != nil {
		rights = unix.UnixRights(int(pass.Fd()))
	}
	if _, _, err := m.conn.WriteMsgUnix(append(b, '\n'), rights, nil); err != nil {
		return fail(err)
	}
	for {
		a, err := m.next()
		switch {
		case err != nil:
			return fail(err)
		case a.Error != nil:
			return fail(errors.New(a.Error.Description))
		case a.Return != nil:
			return nil
		default:
			m.events = append(m.events, a)
		}
	}
}

func (m *monitor) next() (answer, error) {
	var a answer
	err := m.dec.Decode(&a)
	if errors.Is(err, io.EOF) {
		err = errGone
	}
	return a, err
}

func (m *monitor) nextEvent() (a answer, err error) {
	if len(m.events) > 0 {
		a, m.events = m.events[0], m.events[1:]
		return a, nil
	}
	return m.next()
}

// migrate moves the machine's state to or from a file, but for its RAM, which is a file of its own. It returns when all
// is moved. The command is "migrate" or "migrate-incoming".
func (m *monitor) migrate(command string, state *os.File) error {
	on := func(name string) any { return map[string]any{"capability": name, "state": true} }
	capabilities := map[string]any{"capabilities": []any{on("x-ignore-shared"), on("events")}}
	if err := m.do("migrate-set-capabilities", capabilities, nil); err != nil {
		return err
	}
	if err := m.do("getfd", map[string]any{"fdname": "state"}, state); err != nil {
		return err
	}
	if err := m.do(command, map[string]any{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	for {
		a, err := m.nextEvent()
		switch {
		case err != nil:
			return fmt.Errorf("QEMU's monitor: %s: %w", command, err)
		case a.Event == "MIGRATION" && a.Data.Status == "completed":
			return nil
		case a.Event == "MIGRATION" && a.Data.Status == "failed":
			return fmt.Errorf("QEMU's monitor: %s failed", command)
		}
	}
}
