package kvm

import (
	"errors"
	"testing"
	"time"
)

func TestWhatIsHardware(t *testing.T) {
	for name, c := range map[string]struct {
		missing []string
		speed   float64
		err     error
		want    string
	}{
		"hardware":  {speed: 3e9},
		"lab":       {speed: 300e6},
		"software":  {speed: 1.2e6, want: "this host's KVM is software"},
		"incapable": {missing: []string{"KVM_CAP_IRQFD", "x"}, speed: 3e9, want: "this host's KVM lacks KVM_CAP_IRQFD"},
		"broken":    {err: errors.New("no"), want: "this host's KVM failed its self-test"},
	} {
		got := ""
		if err := judge(c.missing, func() (float64, error) { return c.speed, c.err }); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// TestStalledGuestIsNotSoftware has a host that leaves no time to the guest in the short runs.
func TestStalledGuestIsNotSoftware(t *testing.T) {
	for name, c := range map[string]struct {
		speeds []float64
		want   float64
		runs   int
	}{
		"hardware":       {[]float64{2e9, 3e9}, 3e9, 2},
		"stalled once":   {[]float64{0, 300e6}, 300e6, 2},
		"stalled twice":  {[]float64{0, 0, 100e6}, 100e6, 3},
		"stalled thrice": {[]float64{0, 1, 0, 50e6}, 50e6, 4},
		"software":       {[]float64{1e6, 1.2e6, 1.1e6, 1e6}, 1.2e6, 4},
	} {
		runs := 0
		got, err := bestSpeed(func(window time.Duration) (float64, error) {
			runs++
			return c.speeds[runs-1], nil
		})
		if err != nil || got != c.want || runs != c.runs {
			t.Errorf("%s: %g after %d runs, %v; want %g after %d", name, got, runs, err, c.want, c.runs)
		}
	}
}
