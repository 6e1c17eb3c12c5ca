// Package aml encodes ACPI Machine Language, as much of it as the tables of a virtual machine need (ACPI 6.4, chapter
// 20). Its functions are named after the terms of the source language and nest like them:
//
//	aml.Scope(`\_SB`,
//		aml.Device("COM1",
//			aml.Name("_HID", aml.EISAID("PNP0501")),
//			aml.Name("_CRS", aml.Resources(aml.IO(0x3f8, 8), aml.IRQ(4)))))
//
// Names, identifiers and arguments come from the program, not from a user: the functions panic on those that cannot be
// encoded.
package aml

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

// Term is the encoding of a term, or of several in a row.
type Term []byte

// Opcodes (ACPI 6.4, table 20.2).
const (
	opZero             = 0x00
	opOne              = 0x01
	opName             = 0x08
	opByte             = 0x0a
	opWord             = 0x0b
	opDWord            = 0x0c
	opString           = 0x0d
	opQWord            = 0x0e
	opScope            = 0x10
	opBuffer           = 0x11
	opPackage          = 0x12
	opMethod           = 0x14
	opDualName         = 0x2e
	opMultiName        = 0x2f
	opExtended         = 0x5b
	opRoot             = 0x5c
	opParent           = 0x5e
	opArg0             = 0x68
	opOr               = 0x7d
	opCreateDWordField = 0x8a
	opNot              = 0x92
	opEqual            = 0x93
	opIf               = 0xa0
	opReturn           = 0xa4
	extDevice          = 0x82
)

// Scope opens the existing object at path and puts body into it.
func Scope(path string, body ...Term) Term { return block(Term{opScope}, join(Path(path), body)) }

// Device makes a device.
func Device(name string, body ...Term) Term {
	return block(Term{opExtended, extDevice}, join(Path(name), body))
}

// Name makes a named data object.
func Name(name string, value Term) Term { return join(Term{opName}, []Term{Path(name), value}) }

// Method makes a method that takes args arguments, 0 to 7. Two threads may run it only one after the other if it is
// serialized, which a method that makes named objects must be.
func Method(name string, args int, serialized bool, body ...Term) Term {
	if args < 0 || args > 7 {
		panic(fmt.Sprintf("aml: method %s with %d arguments", name, args))
	}
	flags := byte(args)
	if serialized {
		flags |= 1 << 3
	}
	return block(Term{opMethod}, join(append(Path(name), flags), body))
}

// Package makes a list of up to 255 data objects.
func Package(elems ...Term) Term {
	if len(elems) > 255 {
		panic(fmt.Sprintf("aml: package of %d elements", len(elems)))
	}
	return block(Term{opPackage}, join(Term{byte(len(elems))}, elems))
}

// Buffer makes a list of bytes.
func Buffer(b []byte) Term { return block(Term{opBuffer}, append(Int(uint64(len(b))), b...)) }

// String makes a string, of ASCII without NUL.
func String(s string) Term {
	for _, r := range s {
		if r == 0 || r > 0x7f {
			panic(fmt.Sprintf("aml: string %q is not ASCII", s))
		}
	}
	return append(append(Term{opString}, s...), 0)
}

// Int makes an integer, in the shortest form.
func Int(v uint64) Term {
	switch {
	case v == 0:
		return Term{opZero}
	case v == 1:
		return Term{opOne}
	case v < 1<<8:
		return Term{opByte, byte(v)}
	case v < 1<<16:
		return binary.LittleEndian.AppendUint16(Term{opWord}, uint16(v))
	case v < 1<<32:
		return binary.LittleEndian.AppendUint32(Term{opDWord}, uint32(v))
	}
	return binary.LittleEndian.AppendUint64(Term{opQWord}, v)
}

// EISAID makes the integer that stands for an identifier of three letters and four hexadecimal digits (ACPI 6.4,
// 19.3.4).
func EISAID(id string) Term {
	bad := func() { panic(fmt.Sprintf("aml: EISA identifier %q", id)) }
	if len(id) != 7 {
		bad()
	}
	var v uint32
	for _, c := range []byte(id[:3]) {
		if c < 'A' || c > 'Z' {
			bad()
		}
		v = v<<5 | uint32(c-'A'+1)
	}
	product, err := hex.DecodeString(id[3:])
	if err != nil {
		bad()
	}
	v = v<<16 | uint32(binary.BigEndian.Uint16(product))
	return binary.BigEndian.AppendUint32(Term{opDWord}, v)
}

// UUID makes the buffer that stands for a UUID: its first three groups have their bytes reversed (ACPI 6.4, 19.6.142).
func UUID(s string) Term {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != 16 || len(s) != 36 {
		panic(fmt.Sprintf("aml: UUID %q", s))
	}
	order := [16]int{3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15}
	out := make([]byte, 16)
	for i, from := range order {
		out[i] = b[from]
	}
	return Buffer(out)
}

// Path makes a reference to an object, or a new name: segments of up to four capitals, digits and underscores joined by
// dots, after a backslash for the root or carets for parents.
func Path(path string) Term {
	bad := func() { panic(fmt.Sprintf("aml: name %q", path)) }
	var t Term
	rest := path
	if strings.HasPrefix(rest, `\`) {
		t, rest = append(t, opRoot), rest[1:]
	} else {
		for strings.HasPrefix(rest, "^") {
			t, rest = append(t, opParent), rest[1:]
		}
	}
	var segs []string
	if rest != "" {
		segs = strings.Split(rest, ".")
	}
	switch n := len(segs); {
	case n == 0 && len(t) == 0, n > 255:
		bad()
	case n == 0:
		t = append(t, 0)
	case n == 2:
		t = append(t, opDualName)
	case n > 2:
		t = append(t, opMultiName, byte(n))
	}
	for _, seg := range segs {
		if len(seg) < 1 || len(seg) > 4 {
			bad()
		}
		for i, c := range []byte(seg) {
			if (c < 'A' || c > 'Z') && c != '_' && (i == 0 || c < '0' || c > '9') {
				bad()
			}
		}
		t = append(t, (seg + "___")[:4]...)
	}
	return t
}

// Arg is a method's argument, from 0 to 6.
func Arg(i int) Term {
	if i < 0 || i > 6 {
		panic(fmt.Sprintf("aml: argument %d", i))
	}
	return Term{opArg0 + byte(i)}
}

// Return ends a method.
func Return(value Term) Term { return join(Term{opReturn}, []Term{value}) }

// If runs body where cond is not zero.
func If(cond Term, body ...Term) Term { return block(Term{opIf}, join(cond, body)) }

// Equal compares.
func Equal(a, b Term) Term { return join(Term{opEqual}, []Term{a, b}) }

// Not is the logical one.
func Not(a Term) Term { return join(Term{opNot}, []Term{a}) }

// Or stores the bits of a and b to target.
func Or(a, b, target Term) Term { return join(Term{opOr}, []Term{a, b, target}) }

// CreateDWordField names the four bytes at an offset in a buffer.
func CreateDWordField(buffer Term, offset uint64, name string) Term {
	return join(Term{opCreateDWordField}, []Term{buffer, Int(offset), Path(name)})
}

// join puts terms behind first, in memory of their own.
func join(first Term, terms []Term) Term {
	t := append(Term(nil), first...)
	for _, more := range terms {
		t = append(t, more...)
	}
	return t
}

// block puts the length of body and its own between op and body (PkgLength: ACPI 6.4, 20.2.4). One byte holds up to 63;
// of more, the first holds the low 4 bits and the number of bytes that follow with 8 bits each.
func block(op, body Term) Term {
	size := len(body) + 1
	if size <= 0x3f {
		return append(append(op, byte(size)), body...)
	}
	more := 1
	for size+more >= 1<<(4+8*more) {
		if more++; more > 3 {
			panic("aml: a term of 256 MiB")
		}
	}
	size += more
	op = append(op, byte(more<<6|size&0xf))
	for rest := size >> 4; more > 0; more, rest = more-1, rest>>8 {
		op = append(op, byte(rest))
	}
	return append(op, body...)
}
