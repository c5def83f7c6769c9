"""Many runs: evaluations beside every baseline, ablations, the demo; each resumable."""
