package aml

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

func TestTerms(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		what string
		got  []byte
		want string
	}{
		{"zero", Int(0), "00"},
		{"one", Int(1), "01"},
		{"byte", Int(0xff), "0aff"},
		{"word", Int(0x100), "0b0001"},
		{"dword", Int(0x12345678), "0c78563412"},
		{"qword", Int(1 << 32), "0e0000000001000000"},
		{"string", String("ab"), "0d616200"},
		{"root", Path(`\`), "5c00"},
		{"short name", Path("A"), "415f5f5f"},
		{"root name", Path(`\_SB`), "5c5f53425f"},
		{"parents", Path("^^COM1"), "5e5e434f4d31"},
		{"two segments", Path("PCI0.ISA"), "2e50434930" + "4953415f"},
		{"three segments", Path(`\A.B.C`), "5c2f03415f5f5f425f5f5f435f5f5f"},
		{"EISA identifier", EISAID("PNP0A08"), "0c41d00a08"},
		{"UUID", UUID("33db4d5b-1ff7-401c-9657-7441c03dd766"), "11130a10" + "5b4ddb33f71f1c4096577441c03dd766"},
		{"buffer", Buffer([]byte{7}), "11030107"},
		{"package", Package(Int(0), Int(5)), "120502000a05"},
		{"name", Name("_UID", Int(3)), "085f5549440a03"},
		{"scope", Scope(`\_SB`, Name("X", Int(0))), "100c5c5f53425f" + "08585f5f5f00"},
		{"device", Device("DEV0"), "5b820544455630"},
		{"method", Method("FOO", 2, false, Return(Arg(1))), "1408464f4f5f02" + "a469"},
		{"serialized method", Method("FOO", 7, true), "1406464f4f5f0f"},
		{"condition", If(Not(Equal(Arg(0), Int(1))), Return(Int(0))), "a00792936801a400"},
		{"or", Or(Arg(6), Int(4), Path("A")), "7d6e0a04415f5f5f"},
		{"field", CreateDWordField(Arg(3), 4, "CDW2"), "8a6b0a0443445732"},
		{"resources", Resources(IO(0x3f8, 8), IRQ(4)), "11100a0d" + "4701f803f8030108" + "221000" + "7900"},
		{"memory", Memory(0xe0000000, 0x100000), "86090001000000e000001000"},
		{"buses", BusRange(0, 255), "880d00020c00" + "00000000ff0000000001"},
		{"ports", IORange(0xd00, 0xffff), "880d00010c03" + "0000000dffff000000f3"},
		{"low memory", MemoryRange(0xc0000000, 0xdfffffff), "871700000c01" +
			"00000000000000c0ffffffdf0000000000000020"},
		{"high memory", MemoryRange(1<<32, 1<<33-1), "8a2b00000c01" +
			"00000000000000000000000001000000ffffffff0100000000000000000000000000000001000000"},
	} {
		if got := fmt.Sprintf("%x", tc.got); got != tc.want {
			t.Errorf("%s: got %s, want %s", tc.what, got, tc.want)
		}
	}
}

// TestLength checks the length of a block on both sides of where it takes another byte.
func TestLength(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		body int
		want string
	}{
		{0, "01"}, {62, "3f"}, {63, "4104"}, {0xffd, "4fff"}, {0xffe, "810001"}, {0xffffc, "8fffff"}, {0xffffd, "c1000001"},
	} {
		got := block(Term{opIf}, make(Term, tc.body))
		if n := len(tc.want) / 2; fmt.Sprintf("%x", []byte(got[1:1+n])) != tc.want || len(got) != 1+n+tc.body {
			t.Errorf("body of %d: %x, want %s", tc.body, []byte(got[1:1+n]), tc.want)
		}
	}
}

// TestArgumentsSurvive checks that building a term does not write into its parts.
func TestArgumentsSurvive(t *testing.T) {
	t.Parallel()
	part := append(make(Term, 0, 64), Path("PART")...)
	Name("A", part)
	Return(part)
	If(part, Return(Int(1)))
	Or(part, part, part)
	Scope("A", part, part)
	if rest := part[:64][4:]; !bytes.Equal(rest, make([]byte, 60)) {
		t.Errorf("%x", rest)
	}
}

func TestPanics(t *testing.T) {
	t.Parallel()
	for what, f := range map[string]func(){
		"empty name":     func() { Path("") },
		"long segment":   func() { Path("ABCDE") },
		"empty segment":  func() { Path("A..B") },
		"lower case":     func() { Path("a") },
		"digit first":    func() { Path("1A") },
		"too many":       func() { Path(strings.Repeat("A.", 255) + "A") },
		"carets in root": func() { Path(`\^A`) },
		"EISA length":    func() { EISAID("PNP") },
		"EISA letters":   func() { EISAID("PnP0A08") },
		"EISA digits":    func() { EISAID("PNP0A0X") },
		"UUID":           func() { UUID("33db4d5b-1ff7-401c-9657-7441c03dd76x") },
		"UUID length":    func() { UUID("33db4d5b1ff7401c96577441c03dd766") },
		"string":         func() { String("\u00e9") },
		"NUL":            func() { String("a\x00") },
		"argument":       func() { Arg(7) },
		"arguments":      func() { Method("A", 8, false) },
		"elements":       func() { Package(make([]Term, 256)...) },
		"interrupt":      func() { IRQ(16) },
		"all ports":      func() { IORange(0, 0xffff) },
		"backward range": func() { BusRange(1, 0) },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			f()
		})
	}
}
