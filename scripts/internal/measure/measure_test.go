package measure

import "testing"

func TestMedian(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		in   []int64
		want int64
	}{{nil, 0}, {[]int64{3}, 3}, {[]int64{9, 1, 5}, 5}, {[]int64{4, 3, 2, 1}, 2}} {
		if got := Median(c.in); got != c.want {
			t.Errorf("median of %v is %d, want %d", c.in, got, c.want)
		}
	}
}
