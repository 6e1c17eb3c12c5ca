package raw

import (
	"testing"
	"unsafe"
)

// Sizes and offsets as in linux/io_uring.h.
func TestLayout(t *testing.T) {
	t.Parallel()
	var (
		p  ringParams
		so sqOffsets
		co cqOffsets
		s  sqe
		c  cqe
	)
	for _, tc := range []struct {
		name      string
		got, want uintptr
	}{
		{"io_uring_params", unsafe.Sizeof(p), 120},
		{"io_uring_params.sq_entries", unsafe.Offsetof(p.sqEntries), 0},
		{"io_uring_params.cq_entries", unsafe.Offsetof(p.cqEntries), 4},
		{"io_uring_params.flags", unsafe.Offsetof(p.flags), 8},
		{"io_uring_params.features", unsafe.Offsetof(p.features), 20},
		{"io_uring_params.sq_off", unsafe.Offsetof(p.sq), 40},
		{"io_uring_params.cq_off", unsafe.Offsetof(p.cq), 80},
		{"io_sqring_offsets", unsafe.Sizeof(so), 40},
		{"io_sqring_offsets.head", unsafe.Offsetof(so.head), 0},
		{"io_sqring_offsets.tail", unsafe.Offsetof(so.tail), 4},
		{"io_sqring_offsets.ring_mask", unsafe.Offsetof(so.ringMask), 8},
		{"io_sqring_offsets.ring_entries", unsafe.Offsetof(so.ringEntries), 12},
		{"io_sqring_offsets.flags", unsafe.Offsetof(so.flags), 16},
		{"io_sqring_offsets.dropped", unsafe.Offsetof(so.dropped), 20},
		{"io_sqring_offsets.array", unsafe.Offsetof(so.array), 24},
		{"io_cqring_offsets", unsafe.Sizeof(co), 40},
		{"io_cqring_offsets.head", unsafe.Offsetof(co.head), 0},
		{"io_cqring_offsets.tail", unsafe.Offsetof(co.tail), 4},
		{"io_cqring_offsets.ring_mask", unsafe.Offsetof(co.ringMask), 8},
		{"io_cqring_offsets.ring_entries", unsafe.Offsetof(co.ringEntries), 12},
		{"io_cqring_offsets.overflow", unsafe.Offsetof(co.overflow), 16},
		{"io_cqring_offsets.cqes", unsafe.Offsetof(co.cqes), 20},
		{"io_cqring_offsets.flags", unsafe.Offsetof(co.flags), 24},
		{"io_uring_sqe", unsafe.Sizeof(s), 64},
		{"io_uring_sqe.opcode", unsafe.Offsetof(s.opcode), 0},
		{"io_uring_sqe.fd", unsafe.Offsetof(s.fd), 4},
		{"io_uring_sqe.off", unsafe.Offsetof(s.off), 8},
		{"io_uring_sqe.addr", unsafe.Offsetof(s.addr), 16},
		{"io_uring_sqe.len", unsafe.Offsetof(s.len), 24},
		{"io_uring_sqe.user_data", unsafe.Offsetof(s.userData), 32},
		{"io_uring_cqe", unsafe.Sizeof(c), 16},
		{"io_uring_cqe.user_data", unsafe.Offsetof(c.userData), 0},
		{"io_uring_cqe.res", unsafe.Offsetof(c.res), 8},
	} {
		if tc.got != tc.want {
			t.Errorf("%s: %d, want %d", tc.name, tc.got, tc.want)
		}
	}
}
