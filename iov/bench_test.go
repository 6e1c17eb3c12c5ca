package iov

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

const (
	benchElems = 64
	benchElem  = 4096
)

// pages returns benchElems pages and a Vec over them in no particular order, as guests hand them out.
func pages() (arena []byte, v Vec) {
	arena = make([]byte, benchElems*benchElem)
	v = make(Vec, 0, benchElems)
	for _, i := range rand.New(rand.NewPCG(5, 5)).Perm(benchElems) {
		v = v.Append(arena[i*benchElem : (i+1)*benchElem])
	}
	return arena, v
}

// compareSpeed alternates op with one copy of the same bytes, so that both meet the same conditions, and reports op's
// speed as a share of the copy's. It takes the best round of each, which other work on the machine disturbed least.
func compareSpeed(b *testing.B, op, plain func()) {
	const batch = 20
	b.SetBytes(2 * batch * benchElems * benchElem)
	b.ReportAllocs()
	best := func(old time.Duration, f func()) time.Duration {
		start := time.Now()
		for range batch {
			f()
		}
		return min(old, time.Since(start))
	}
	opTime, plainTime := time.Duration(math.MaxInt64), time.Duration(math.MaxInt64)
	for b.Loop() {
		plainTime = best(plainTime, plain)
		opTime = best(opTime, op)
	}
	b.ReportMetric(100*float64(plainTime)/float64(opTime), "%-of-copy")
}

func BenchmarkGather(b *testing.B) {
	arena, v := pages()
	flat := make([]byte, len(arena))
	compareSpeed(b, func() { _, _ = v.CopyTo(flat, 0) }, func() { copy(flat, arena) })
}

func BenchmarkScatter(b *testing.B) {
	arena, v := pages()
	flat := make([]byte, len(arena))
	compareSpeed(b, func() { _, _ = v.CopyFrom(0, flat) }, func() { copy(arena, flat) })
}

func BenchmarkCopy(b *testing.B) {
	from, v := pages()
	to, w := pages()
	compareSpeed(b, func() { _, _ = Copy(w, 0, v, 0, len(from)) }, func() { copy(to, from) })
}

func BenchmarkIsZero(b *testing.B) {
	for _, size := range []int{512, 4096, 65536, 1 << 20, 16 << 20} {
		v := Of(make([]byte, size))
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.SetBytes(int64(size))
			for b.Loop() {
				if !v.IsZero() {
					b.Fatal("not zero")
				}
			}
		})
	}
}

func BenchmarkMismatch(b *testing.B) {
	_, v := pages()
	_, w := pages()
	b.SetBytes(benchElems * benchElem)
	for b.Loop() {
		if Mismatch(v, w) != -1 {
			b.Fatal("zeroes differ")
		}
	}
}

func BenchmarkFill(b *testing.B) {
	_, v := pages()
	for _, c := range []byte{0, 0xff} {
		b.Run(fmt.Sprint(c), func(b *testing.B) {
			b.SetBytes(benchElems * benchElem)
			for b.Loop() {
				_ = v.Fill(0, benchElems*benchElem, c)
			}
		})
	}
}

func BenchmarkAppendSlice(b *testing.B) {
	_, v := pages()
	dst := make(Vec, 0, benchElems)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.AppendSlice(dst, 512, benchElems*benchElem-1024); err != nil {
			b.Fatal(err)
		}
	}
}
