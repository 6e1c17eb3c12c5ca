package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// frameBytes is a frame as it is sent.
func frameBytes(t frameType, c channel, stream uint32, payload []byte) []byte {
	b := make([]byte, headerLen, headerLen+len(payload))
	putHeader(b, t, c, stream, len(payload))
	return append(b, payload...)
}

func helloBytes(session uint64) []byte {
	h := hello{session: session}
	h.seed[seedLen-1] = 0xa5 // so that no zeros, and no other hello, make a part of it whole
	return frameBytes(frameHello, 0, 0, h.append(nil))
}

func u32Bytes(values ...uint32) (b []byte) {
	for _, v := range values {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// The wire format is fixed: another build of this package may be at the other end.
func TestWireLayout(t *testing.T) {
	t.Parallel()
	got := frameBytes(frameData, stderr, 0x04030201, []byte("xyz"))
	if want := "\x04\x02\x03\x00\x01\x02\x03\x04xyz"; string(got) != want {
		t.Errorf("data frame %q, want %q", got, want)
	}
	h := hello{session: 0x1122334455667788, clock: -2}
	h.seed[0], h.seed[63] = 'a', 'z'
	b := frameBytes(frameHello, 0, 0, h.append(nil))
	want := "\x01\x00\x68\x00\x00\x00\x00\x00" + "\x8fkvmlet\r\n\x00agent\xff" + "\x01\x00\x00\x00" + "\xc6\x34\x3b\xbf" +
		"\x88\x77\x66\x55\x44\x33\x22\x11" + "\xfe\xff\xff\xff\xff\xff\xff\xff" + "a" + string(make([]byte, 62)) + "z"
	if string(b) != want {
		t.Errorf("hello frame %q, want %q", b, want)
	}
	if back, err := parseHello(b[headerLen:]); err != nil || back != h {
		t.Errorf("parsed back: %+v, %v", back, err)
	}
}

func TestDecoderGivesFramesAsSent(t *testing.T) {
	t.Parallel()
	var sent []byte
	big := bytes.Repeat([]byte{0, 1, 2}, MaxPayload/3+1)[:MaxPayload]
	for i := range uint32(50) {
		sent = append(sent, make([]byte, i)...) // padding
		sent = append(sent, frameBytes(frameData, stdout, i+1, big[:len(big)*int(i)/49])...)
	}
	for name, r := range map[string]io.Reader{
		"whole": bytes.NewReader(sent), "bytes": iotest.OneByteReader(bytes.NewReader(sent)),
		"halves": iotest.HalfReader(bytes.NewReader(sent)), "with error": iotest.DataErrReader(bytes.NewReader(sent)),
	} {
		d := newDecoder(r)
		for i := range uint32(50) {
			f, err := d.next()
			if err != nil || f.stream != i+1 || f.typ != frameData || !bytes.Equal(f.payload, big[:len(big)*int(i)/49]) {
				t.Fatalf("%s: frame %d: %+v, %v", name, i, f, err)
			}
		}
		if _, err := d.next(); err != io.EOF {
			t.Errorf("%s: at the end: %v", name, err)
		}
	}
}

func TestDecoderRefusesBadFrames(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{
		"type":             frameBytes(frameTypes, 0, 1, nil),
		"channel":          frameBytes(frameData, channels, 1, nil),
		"too long":         append([]byte{byte(frameData), 1, 0xff, 0xff, 1, 0, 0, 0}, make([]byte, 0xffff)...),
		"one too long":     append([]byte{byte(frameData), 1, 0xf9, 0x7f, 1, 0, 0, 0}, make([]byte, 0x7ff9)...),
		"credit too short": frameBytes(frameCredit, 1, 1, []byte{1, 2, 3}),
		"credit too long":  frameBytes(frameCredit, 1, 1, make([]byte, 5)),
		"hello's length":   frameBytes(frameHello, 0, 0, make([]byte, helloLen-1)),
		"hello's stream":   frameBytes(frameHello, 0, 1, make([]byte, helloLen)),
		"stream 0":         frameBytes(frameData, 1, 0, nil),
	} {
		if f, err := newDecoder(bytes.NewReader(b)).next(); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %+v, %v", name, f, err)
		}
	}
	cut := frameBytes(frameData, 1, 1, []byte("abc"))[:10]
	if _, err := newDecoder(bytes.NewReader(cut)).next(); err != io.ErrUnexpectedEOF {
		t.Errorf("cut short: %v", err)
	}
	if _, err := newDecoder(emptyReader{}).next(); err != io.ErrNoProgress {
		t.Errorf("reader without progress: %v", err)
	}
}

type emptyReader struct{}

func (emptyReader) Read([]byte) (int, error) { return 0, nil }

// Whatever comes before a hello, that is found, and what is behind it is read from its first byte.
func TestSyncFindsHelloInGarbage(t *testing.T) {
	t.Parallel()
	src := rand.New(rand.NewPCG(1, 2))
	good, other := helloBytes(7), helloBytes(8)
	for round := range 500 {
		var b []byte
		for range src.IntN(6) {
			switch src.IntN(4) {
			case 0:
				junk := make([]byte, src.IntN(40000))
				for i := range junk {
					junk[i] = byte(src.Uint32())
				}
				b = append(b, junk...)
			case 1:
				b = append(b, make([]byte, src.IntN(70000))...)
			case 2: // a hello that is cut short
				b = append(b, other[:src.IntN(len(other))]...)
			case 3:
				b = append(b, frameBytes(frameData, stdout, 1, other[:src.IntN(len(other))])...)
			}
		}
		b = append(b, good...)
		b = append(b, frameBytes(frameClose, 2, 3, nil)...)
		d := newDecoder(iotest.HalfReader(bytes.NewReader(b)))
		h, err := d.sync()
		if err != nil || h.session != 7 {
			t.Fatalf("round %d: hello %+v, %v", round, h, err)
		}
		if f, err := d.next(); err != nil || f.typ != frameClose || f.channel != 2 || f.stream != 3 {
			t.Fatalf("round %d: behind the hello: %+v, %v", round, f, err)
		}
	}
}

func FuzzDecoder(f *testing.F) {
	f.Add(helloBytes(1))
	f.Add(append(frameBytes(frameStart, pieceMore, 1, []byte("abc")), frameBytes(frameStart, pieceLast, 1, nil)...))
	f.Add(append([]byte{0, 0, 0}, frameBytes(frameData, stderr, 9, bytes.Repeat([]byte("x"), 300))...))
	f.Add(append(frameBytes(frameExit, 0, 1, u32Bytes(137, 9)), 0xff))
	f.Add(append([]byte{byte(frameData), 0, 0xf8}, helloBytes(2)...))
	f.Add(helloPrefix[:])
	f.Fuzz(func(t *testing.T, b []byte) {
		d := newDecoder(iotest.HalfReader(bytes.NewReader(b)))
		taken := 0
		var pieces assembler
		for {
			f, err := d.next()
			switch {
			case errors.Is(err, ErrProtocol):
				if _, err := d.sync(); err != nil && !errors.Is(err, ErrVersion) {
					return
				}
			case err == io.EOF || err == io.ErrUnexpectedEOF:
				return
			case err != nil:
				t.Fatalf("error %v", err)
			default:
				if s := shapes[f.typ]; len(f.payload) < s.minLen || len(f.payload) > s.maxLen || int(f.channel) > s.maxChannel {
					t.Fatalf("frame %+v", f)
				}
				if taken += headerLen + len(f.payload); taken > len(b) {
					t.Fatalf("frames of %d bytes out of %d", taken, len(b))
				}
				if f.typ == frameStart || f.typ == frameRequest {
					if msg, err := pieces.add(f); err == nil && msg != nil {
						if spec, err := decodeSpec(msg); err == nil && !bytes.Equal(spec.encode(), msg) {
							t.Fatalf("command %q is encoded as %q", msg, spec.encode())
						}
					}
				}
			}
		}
	})
}

// FuzzMessages feeds the decoders of what is inside frames.
func FuzzMessages(f *testing.F) {
	s := spec{args: []string{"sh", "-c", "x"}, env: []string{"A=b"}, dir: "/", tty: true, user: &User{1, 2, []uint32{3}}}
	f.Add(s.encode())
	i := Info{Kernel: "Linux", CPUs: 2}
	f.Add(i.encode())
	f.Add(encodeMounts([]Mount{{Source: "a", Target: "b", Type: "c", Options: "d"}})[4:])
	f.Add(appendError(nil, io.EOF))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := decodeSpec(b); err == nil && len(s.args)+len(s.env) > len(b) {
			t.Errorf("%d arguments from %d bytes", len(s.args), len(b))
		}
		decodeInfo(b)
		m := message{b: b}
		decodeMounts(&m)
		if decodeError(b).Error() == "" {
			t.Error("no text")
		}
	})
}
