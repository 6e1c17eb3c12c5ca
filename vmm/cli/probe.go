package cli

import (
	"encoding/json"
	"fmt"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/kvmlet/kvmlet/vmm"
)

func newProbe(s streams) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "probe",
		Short: "Tell what this host can do for VMs, and what to do about what is missing",
		Long: `probe tries KVM, taps and io_uring and prints what it found. KVM is measured, not guessed from its
module's name: a small guest counts for a few milliseconds, and its speed tells hardware from
software. The exit status is 0 whatever was found.`,
		Example: "  kvmlet probe\n  kvmlet probe --json | jq -r .kvm",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			p := vmm.Inspect()
			if asJSON {
				enc := json.NewEncoder(s.answer)
				enc.SetIndent("", "  ")
				return enc.Encode(p)
			}
			return printProbe(s, p)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printProbe(s streams, p *vmm.Probe) error {
	w := tabwriter.NewWriter(s.answer, 0, 0, 2, ' ', 0)
	mem := size(p.Memory &^ (1<<20 - 1))
	fmt.Fprintf(w, "host\tLinux %s, %d CPUs, %v of memory\n", p.Kernel, p.CPUs, &mem)
	for _, f := range p.Features {
		mark := "yes"
		if !f.OK {
			mark = "no"
		}
		fmt.Fprintf(w, "%s\t%s: %s\n", f.Name, mark, f.Detail)
		if f.Remedy != "" {
			fmt.Fprintf(w, "\t  %s\n", f.Remedy)
		}
	}
	if p.APIVersion != 0 {
		fmt.Fprintf(w, "KVM API\tversion %d\n", p.APIVersion)
		names := make([]string, 0, len(p.Capabilities))
		for name := range p.Capabilities {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			fmt.Fprintf(w, "\t%s %d\n", name, p.Capabilities[name])
		}
	}
	verdict := "VMs run on this host's KVM"
	if p.KVM != vmm.HardwareKVM {
		verdict = "VMs run in the lab (QEMU without KVM)"
	}
	fmt.Fprintf(w, "so\t%s\n", verdict)
	return w.Flush()
}
