"""Side by side with what one would use instead, on this machine: ``python -m benchmarks --suite quick``.

Runs from a checkout, not from the installed package. Every provider is checked against a float64 loop before it is timed,
providers take turns in one process, and the rows that a run writes carry machine, versions and commit.
"""
